"""Memory plans: published shapes, sums by hand, the compiler's count, the command."""

import csv
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from model_helpers import LLAMA, PARAMETERS, QWEN, published_config

from experiments.command_line import main
from experiments.jobs import PAPER, Base, Job, LoraConfig
from experiments.memory import plan_memory, residual_bytes
from experiments.memory_check import MemoryCheck, check_memory
from experiments.methods import adamw, guards
from experiments.models.config import DecoderConfig
from experiments.models.decoder import Decoder
from experiments.models.sharding import make_mesh, shardings
from experiments.models.zoo import ZOO
from experiments.suites import memory as suite

pytestmark = pytest.mark.usefixtures("cheap_compilation")

LORA = Job(
    base=Base("tiny", QWEN),
    corpus="none",
    reference_lr=1e-3,
    steps=2,
    batch_size=8,
    seq_len=8,
    chunk_steps=2,
    checkpoint_steps=2,
    heldout_batch_size=8,
    lora=LoraConfig(rank=2),
    dtype="bfloat16",
    remat="full",
)
FULL = dataclasses.replace(LORA, base=Base("tiny", LLAMA), lora=None)
NONE, SPARSE, STEP = (guards()[f"guard(AdamW), {m}"] for m in ("none", "sparse", "step"))
RANK, LAYERS, WIDTH = 2, 2, 16
# What each corrected layer reads and writes: q, k, v, o, gate, up, down of QWEN.
EDGES = (16, 16), (16, 8), (16, 8), (16, 16), (16, 24), (16, 24), (24, 16)


def published_name(name):
    """The name on the hub, as the table of the published sizes has it."""
    (found,) = (short for short in PARAMETERS if name.split("/")[1].startswith(short))
    return found


@pytest.mark.parametrize(("name", "config"), ZOO.items())
def test_zoo_has_the_published_shapes(name, config):
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert size == PARAMETERS[published_name(name)]
    published = DecoderConfig.from_hf(published_config(published_name(name)))
    if name.endswith("1.5B"):  # The file at hand is of the instruct model, of fewer positions.
        published = dataclasses.replace(published, max_position_embeddings=131_072)
    assert config == published


def test_every_job_of_the_paper_has_a_shape():
    assert {job.base.name for job in PAPER.values()} <= ZOO.keys()


def test_residual_bytes_leaves_out_arguments():
    x = jnp.zeros(3)
    assert residual_bytes(lambda x: jnp.sin(jnp.sin(x)), x) == 24
    assert residual_bytes(lambda x, y: x * y, x, x) == 0


def test_lora_plan_is_the_sum_by_hand():
    plan = plan_memory(LORA, adamw)
    trained = 4 * LAYERS * RANK * sum(map(sum, EDGES))
    weights = QWEN.vocab_size * WIDTH + WIDTH
    weights += LAYERS * (sum(a * b for a, b in EDGES) + 16 + 8 + 8 + 2 * WIDTH)
    assert plan.frozen == 2 * weights
    assert plan.trained == plan.gradients == plan.initial == trained
    assert plan.optimizer == 2 * trained + 4
    assert plan.update == 0
    # Two chunk steps of tokens and segments, the rate, the step.
    assert plan.inputs == 2 * (2 * 8 * 9) * 4 + 4 + 4
    # The inputs of both layers in bfloat16, and a little of the final norm and of the loss.
    assert plan.saved >= LAYERS * 8 * 8 * WIDTH * 2
    assert plan.total == sum(plan)


def test_memories_of_the_guard():
    none, sparse, step = (plan_memory(FULL, method) for method in (NONE, SPARSE, STEP))
    assert step.optimizer - none.optimizer == step.trained
    assert 0 < sparse.optimizer - none.optimizer < step.trained / 2
    assert step.update == 3 * step.trained + 4


@pytest.mark.parametrize("job", [LORA, FULL], ids=["lora", "full"])
def test_recomputation_trades_saved_for_working(job):
    full, dots, none = (
        plan_memory(dataclasses.replace(job, remat=remat), adamw)
        for remat in ("full", "dots", "none")
    )
    assert full.saved < dots.saved < none.saved
    assert none.working <= dots.working <= full.working


@pytest.mark.parametrize(("job", "count"), [(LORA, 1), (FULL, 8)], ids=["lora-1", "full-8"])
def test_the_compiler_counts_the_same_arguments(job, count):
    check = check_memory(job, STEP, jax.devices()[:count])
    assert check.arguments == check.planned_arguments
    assert check.temporaries > 0


def test_activations_are_split_like_the_batch():
    job = dataclasses.replace(LORA, seq_len=256, remat="none")
    one, eight = (check_memory(job, STEP, jax.devices()[:count]) for count in (1, 8))
    assert 8 * eight.temporaries < 1.1 * one.temporaries


def test_what_cannot_be_split_evenly_is_replicated():
    thinned = {"q_proj": {"kernel": jax.ShapeDtypeStruct((6, 4), jnp.float32)}}
    (found,) = jax.tree.leaves(shardings(thinned, make_mesh(fsdp=8)))
    assert found.is_fully_replicated


def test_command_writes_report_and_summary(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(suite.PRESETS, "tiny", {"tiny": LORA})
    monkeypatch.setattr(suite, "check_memory", lambda *args: MemoryCheck("CPU", 10, 10, 2, 3))
    assert main(["memory", "--preset", "tiny", "--results", str(tmp_path)]) == 0
    folder = tmp_path / "memory" / "tiny"
    report = (folder / "report.md").read_text()
    assert "80 GB GPU" in report
    assert "| tiny | AdamW | 8 | CPU | 10 | 10 |" in report
    with (folder / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2
    assert int(rows[0]["total"]) == plan_memory(LORA, adamw).total
    assert main(["memory", "--preset", "huge", "--results", str(tmp_path)]) == 2
    assert "choose one of nano" in capsys.readouterr().err
