"""The suite `throughput`: what it counts is right, and a second run only prints."""

import csv
import doctest

import jax
import pytest
from flax import nnx
from model_helpers import FAMILIES
from suite_helpers import TINY_JOB

from experiments import flops
from experiments.command_line import main
from experiments.finetune import random_start
from experiments.methods import guards
from experiments.models.decoder import Decoder
from experiments.suites import throughput

LABEL = "tiny, LoRA"
CONFIG = throughput.ThroughputConfig({LABEL: TINY_JOB}, rounds=2)

pytestmark = pytest.mark.usefixtures("cheap_compilation")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the suite at a size of seconds; returns the rows of its summary."""
    monkeypatch.setitem(throughput.PRESETS, "tiny", CONFIG)

    def call(*flags):
        assert main(["throughput", "--preset", "tiny", "--results", str(tmp_path), *flags]) == 0
        with (tmp_path / "throughput/tiny/summary.csv").open() as file:
            return {row["optimizer"]: row for row in csv.DictReader(file)}

    return call


def test_every_optimizer_is_measured_once(run, monkeypatch, tmp_path):
    found = run()
    assert found.keys() == guards().keys() | {"AdamW + clip"}
    assert all(float(row["seconds"]) > 0 for row in found.values())
    assert int(found["guard(AdamW), step"]["bytes"]) > int(found["AdamW"]["bytes"])
    report = (tmp_path / "throughput/tiny/report.md").read_text()
    assert f"## {LABEL}: 4 x 16 tokens, float32" in report
    assert "not known" in report
    monkeypatch.delattr(throughput, "_measure")
    assert run() == found


@FAMILIES
def test_matrix_weights_are_those_of_the_model(config):
    model = Decoder(config, rngs=nnx.Rngs(0))
    flat = {"/".join(map(str, path)): x for path, x in nnx.to_flat_state(nnx.state(model))}
    used = {
        name: x
        for name, x in flat.items()
        if name.endswith("kernel") or (config.tie_word_embeddings and name.endswith("embedding"))
    }
    assert flops.matrix_weights(config) == sum(x[...].size for x in used.values())


def test_operations_are_counted_by_hand():
    found = {
        corrections: flops.step_flops(
            TINY_JOB.base.config, batch_size=2, seq_len=3, corrections=corrections
        )
        for corrections in (None, 10)
    }
    weights = flops.matrix_weights(TINY_JOB.base.config)
    attention = 12 * 1 * 8 * 3
    assert found == {None: 6 * (6 * weights + attention), 10: 6 * (4 * weights + 60 + attention)}


def test_example():
    assert doctest.testmod(flops) == (0, 3)


def test_published_models_have_what_they_train():
    for job in throughput.PRESETS["paper"].jobs.values():
        start = jax.eval_shape(lambda job=job: random_start(job))
        trained = sum(x.size for x in jax.tree.leaves(start.params))
        everything = trained + sum(x.size for x in jax.tree.leaves(start.frozen))
        assert (trained == everything) == (job.lora is None)
