"""The suites of the paper at a size that takes seconds: each runs, reports, and runs no more."""

import csv
import dataclasses
import json
import math
import re
import shutil
import types

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
from flax import nnx
from helpers import norm
from suite_helpers import CHUNK, TINY_JOB

from experiments import faults, jobs, methods, paper
from experiments.command_line import main
from experiments.curvature import hessian_trace
from experiments.errors import UserError
from experiments.finetune import Finetune
from experiments.models.decoder import Decoder
from experiments.models.hf import save_pretrained
from experiments.suites import (
    clipping,
    everything,
    failures,
    lr_stress,
    neutrality,
    reference,
    seeds,
    sizes,
    tinyllama,
)

FAULT = "NaN gradients, 1 % of steps"
COMPARED = (methods.ADAMW, "schedule-free AdamW", methods.GUARD)
FULL = dataclasses.replace(
    TINY_JOB,
    base=dataclasses.replace(
        TINY_JOB.base,
        name="tiny Llama",
        config=dataclasses.replace(
            TINY_JOB.base.config, attention_bias=False, tie_word_embeddings=False
        ),
    ),
    lora=None,
)
TINY = {
    clipping: clipping.ClippingConfig(TINY_JOB, norms=(0.1,)),
    failures: failures.FailuresConfig(TINY_JOB, methods=("AdamW", "guard(AdamW)")),
    lr_stress: lr_stress.LrStressConfig(TINY_JOB, multiples=(1, 100)),
    neutrality: neutrality.NeutralityConfig(
        TINY_JOB, multiples=(10,), path_multiples=(0.5, 100), stops=2, probes=2
    ),
    reference: reference.ReferenceConfig(TINY_JOB, eval_steps=2 * CHUNK),
    seeds: seeds.SeedsConfig(
        TINY_JOB, seeds=(0, 1), multiples=(1,), methods=("AdamW", "guard(AdamW)")
    ),
    sizes: sizes.SizesConfig({"one": TINY_JOB, "two": FULL}, (1,), ("AdamW", "guard(AdamW)")),
    tinyllama: lr_stress.LrStressConfig(FULL, multiples=(1, 100)),
}

THEIRS = {
    ("tiny", paper.REFERENCE): ("13.21", "10.74"),
    ("tiny", "LR 0.01"): ("659.76", "10.33"),
    ("tiny", "LR 0.1"): ("1885.24", "11.57"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory, cache):
    """What `all` leaves."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBW_OPTAX_CACHE", str(cache))
        for module, config in TINY.items():
            patch.setitem(module.PRESETS, "tiny", config)
        patch.setattr(
            neutrality,
            "SWITCHED_OFF",
            {"no envelope": neutrality.SWITCHED_OFF["no envelope"]},
        )
        scenarios = TINY[failures].scenarios()
        some = {name: scenarios[name] for name in (failures.CLEAN, FAULT)}
        patch.setattr(failures.FailuresConfig, "scenarios", lambda self: some)
        few = {name: methods.baselines(TINY_JOB.steps)[name] for name in COMPARED}
        patch.setattr(reference, "baselines", lambda steps: few)
        patch.setattr(paper, "PERPLEXITIES", THEIRS)
        patch.setattr(paper, "SECONDS", {"tiny": ("392.54", "357.02")})
        assert main(["all", "--preset", "tiny", "--results", str(folder)]) == 0
        before = _contents(folder)
        # Again: everything is read, nothing is run.
        patch.setattr("experiments.lab.Finetune", None)
        assert main(["all", "--preset", "tiny", "--results", str(folder)]) == 0
        assert _contents(folder) == before
    return folder


def _contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*.jsonl"))}


def _rows(results, suite):
    with (results / suite / "tiny" / "summary.csv").open() as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_the_index_leads_to_every_report(results):
    index = (results / "tiny.md").read_text()
    for name in everything.PAPER_SUITES:
        path = f"{name.replace('-', '_')}/tiny/report.md"
        assert f"({path})" in index
        assert (results / path).is_file()


def test_the_papers_numbers_are_beside_those_of_its_model(results):
    expected = {
        "reference": ["reference: perplexity", "reference: seconds, end to end"],
        "sizes": ["reference: perplexity"],
        "lr_stress": ["reference: perplexity", "LR 0.1: perplexity"],
        "clipping": ["LR 0.01: perplexity"],
        "seeds": ["reference: perplexity"],
        "tinyllama": [],
    }
    for suite, settings in expected.items():
        report = (results / suite / "tiny" / "report.md").read_text()
        assert re.findall(r"^\| tiny, (.*?) \|", report, re.MULTILINE) == settings
        assert ("Beside the paper" in report) == bool(settings)


@pytest.mark.parametrize("clean", [math.log(6.0), None])
def test_nothing_is_usable_where_clean_adamw_learns_nothing(clean):
    def records(loss):
        return {methods.ADAMW: [{"heldout_loss": loss, "steps": 20}]}

    found = failures._productive_table({failures.CLEAN: records(clean), FAULT: records(0.1)}, 5.0)
    assert found.rows == []
    assert "does not end better than the untrained model" in found.note
    found = failures._productive_table({failures.CLEAN: records(0.5), FAULT: records(1.0)}, 5.0)
    assert found.rows == [[methods.ADAMW, "1 of 1", "20", "20", "100%"]]


def test_reference_measures_the_loss_on_the_way(results):
    rows = [
        json.loads(line)
        for line in (results / "reference" / "tiny" / "metrics.jsonl").read_text().splitlines()
    ]
    plain = [row for row in rows if row["run"] == "AdamW, seed 0" and "heldout_loss" in row]
    assert [row["step"] for row in plain] == [2 * CHUNK, 4 * CHUNK]
    assert 0 < plain[0]["seconds"] < plain[1]["seconds"]
    assert set(_rows(results, "reference")) >= {f"{name}, seed 0" for name in COMPARED}


KNOWN = {**methods.baselines(8), **failures.IF_FINITE}
IN_BFLOAT16 = [(name, "bfloat16") for name in failures.PRESETS["nano"].methods]


@pytest.mark.parametrize(("name", "dtype"), [*((n, "float32") for n in KNOWN), *IN_BFLOAT16])
@pytest.mark.parametrize("scheduled", [False, True])
def test_every_method_takes_a_rate_or_a_schedule(name, dtype, scheduled):
    method = KNOWN[name]

    @jax.jit
    def descend(rate, params):
        tx = optax.with_extra_args_support(method((lambda step: rate) if scheduled else rate))
        state = tx.init(params)
        for _ in range(3):
            value, grads = jax.value_and_grad(lambda p: jnp.sum(p["w"] ** 2))(params)
            updates, state = tx.update(grads, state, params, value=value)
            params = optax.apply_updates(params, updates)
        return methods.evaluated(state, params)

    start = {"w": jnp.linspace(1.0, 2.0, 6, dtype=dtype)}
    end = descend(jnp.float32(1e-2), start)
    assert norm(end) <= norm(start)  # Those that find their rate begin with steps below rounding.


def test_seeds_differ(results):
    rows = _rows(results, "seeds")
    first, second = (rows[f"AdamW at 1x, seed {seed}"]["heldout_loss"] for seed in (0, 1))
    assert first != second


def test_a_report_counts_the_seconds_of_its_own_runs(results, tmp_path, monkeypatch):
    monkeypatch.setitem(seeds.PRESETS, "tiny", TINY[seeds])
    folder = shutil.copytree(results / "seeds", tmp_path / "seeds") / "tiny"
    runs = json.loads((folder / "runs.json").read_text())
    for name, record in runs.items():
        record["seconds"] = 10.0 if name.endswith("seed 1") else 1000.0
    (folder / "runs.json").write_text(json.dumps(runs))
    options = ["--preset", "tiny", "--results", str(tmp_path)]
    assert main(["seeds", "--seeds", "1", *options]) == 0
    assert "training: 20 s in all" in (folder / "report.md").read_text()  # AdamW and the guard.


def test_a_fault_reaches_the_run_and_the_guard_carries_it(results):
    rows = _rows(results, "failures")
    assert rows[f"{FAULT}: AdamW, seed 0"]["heldout_loss"] == ""
    guarded = rows[f"{FAULT}: guard(AdamW), seed 0"]
    assert float(guarded["heldout_loss"]) < 6
    assert int(guarded["guard_nonfinite_steps"]) == 1


def test_clipping_reports_gradient_norms_before_clipping(results):
    report = (results / "clipping" / "tiny" / "report.md").read_text()
    assert "(gradient_norms.png)" in report
    assert "| clip 0.1 |" in report


def test_clipping_compares_what_else_is_asked_for(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("LBW_OPTAX_CACHE", str(cache))
    monkeypatch.setitem(clipping.PRESETS, "tiny", TINY[clipping])
    options = ["--preset", "tiny", "--results", str(tmp_path)]
    assert main(["clipping", "--methods", methods.LOWER, *options]) == 0
    rows = _rows(tmp_path, "clipping")
    tenth, healthy = (
        float(rows[f"{run}, seed 0"]["heldout_loss"]) for run in (methods.LOWER, "AdamW at 1x")
    )
    assert tenth == pytest.approx(healthy, abs=1e-4)
    assert "What the guard did" not in (tmp_path / "clipping" / "tiny" / "report.md").read_text()


def test_a_healthy_path_is_identical(results):
    runs = json.loads((results / "neutrality" / "tiny" / "runs.json").read_text())
    assert all(stop["identical"] for stop in runs["paths at 0.5x, seed 0"]["stops"])
    assert not any(stop["identical"] for stop in runs["paths at 100x, seed 0"]["stops"])


@pytest.fixture
def own(tmp_path, cache, monkeypatch):
    """Folders of a model, with its tokenizer, and of a text; a preset that fine-tunes the one."""
    documents = [f"Line {i} of {i * i}.\n" for i in range(200)]
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size=300, special_tokens=["<|endoftext|>"])
    folder = tmp_path / "models" / "tiny"
    config = dataclasses.replace(TINY_JOB.base.config, vocab_size=bpe.get_vocab_size())
    save_pretrained(Decoder(config, rngs=nnx.Rngs(0)), folder)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    text = tmp_path / "text"
    text.mkdir()
    (text / "train.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    (text / "test.txt").write_text("".join(documents[:20]))

    job = dataclasses.replace(TINY_JOB, base=jobs.Base("someone/tiny"), stride=8)
    monkeypatch.setenv("LBW_OPTAX_CACHE", str(cache))
    monkeypatch.setitem(lr_stress.PRESETS, "tiny", lr_stress.LrStressConfig(job, (10,)))
    return types.SimpleNamespace(config=config, folder=folder, text=text)


def test_a_checkpoint_and_a_text_from_folders(own, tmp_path, capsys):
    """What the preset `paper` does, with a model and a tokenizer made here."""
    options = ["--preset", "tiny", "--results", str(tmp_path), "--data", str(own.text)]
    command = ["lr-stress", "--methods", "AdamW", *options]
    command += ["--models", str(own.folder.parent)]
    assert main([*command, "--pretrain-data", str(own.text)]) == 2
    assert "someone/tiny is trained already" in capsys.readouterr().err
    assert main(command) == 0
    rows = _rows(tmp_path, "lr_stress")
    before = rows["zero-step, someone/tiny, LoRA"]
    assert float(rows["AdamW at 10x, seed 0"]["heldout_loss"]) < float(before["heldout_loss"])

    # Another model in the same place is not taken for this one.
    assert main(command) == 0
    save_pretrained(Decoder(own.config, rngs=nnx.Rngs(1)), own.folder)
    assert main(command) == 2
    assert "holds results of another someone/tiny" in capsys.readouterr().err
    shutil.rmtree(own.folder)
    assert main(command) == 0  # What is finished is printed without it.


def test_results_know_the_revision_that_the_hub_gave(own, tmp_path, monkeypatch, capsys):
    kept = []

    def download(name, allow_patterns):
        kept[:] = ["commit"]
        return str(own.folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("experiments.models.hf.snapshot_download", download)
    monkeypatch.setattr("experiments.lab.revision", lambda name: kept[0] if kept else None)
    options = ["--preset", "tiny", "--results", str(tmp_path), "--data", str(own.text)]
    command = ["lr-stress", "--methods", "AdamW", *options]
    assert main(command) == 0
    assert _rows(tmp_path, "lr_stress")["zero-step, someone/tiny, LoRA"]["model"] == "commit"
    assert main(command) == 0
    kept[:] = ["another"]
    assert main(command) == 2
    assert "holds results of another someone/tiny" in capsys.readouterr().err


def test_eight_devices_end_as_one(results, tmp_path, monkeypatch):
    # With a cache of its own: the model is pretrained here too, and is the same.
    monkeypatch.setenv("LBW_OPTAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(lr_stress.PRESETS, "tiny", lr_stress.LrStressConfig(TINY_JOB, (100,)))
    options = ["--preset", "tiny", "--results", str(tmp_path), "--mesh", "2", "2", "2"]
    assert main(["lr-stress", "--methods", "guard(AdamW)", *options]) == 0
    ours, theirs = (
        _rows(folder, "lr_stress")["guard(AdamW) at 100x, seed 0"] for folder in (tmp_path, results)
    )
    assert float(ours["heldout_loss"]) == pytest.approx(float(theirs["heldout_loss"]), abs=1e-4)
    for field in ("guard_control_active_steps", "guard_regime_switches", "guard_regime"):
        assert ours[field] == theirs[field]


def test_a_tokenizer_of_another_model_is_one_line(cache, monkeypatch):
    monkeypatch.setenv("LBW_OPTAX_CACHE", str(cache))
    other = types.SimpleNamespace(vocabulary=257)
    with pytest.raises(UserError, match="its tokenizer has 257 tokens, more than the 256"):
        Finetune(TINY_JOB, other, None)


def test_one_sequence_and_dropout_on_two_devices(cache, tmp_path, monkeypatch):
    """A batch that cannot be split is on every device; masks are a function of the step."""
    monkeypatch.setenv("LBW_OPTAX_CACHE", str(cache))

    def heldout_loss(dropout, devices):
        lora = dataclasses.replace(TINY_JOB.lora, dropout=dropout)
        job = dataclasses.replace(TINY_JOB, batch_size=1, lora=lora)
        monkeypatch.setitem(lr_stress.PRESETS, "tiny", lr_stress.LrStressConfig(job, (10,)))
        folder = tmp_path / f"{dropout} {devices}"
        options = ["--preset", "tiny", "--results", str(folder), "--mesh", "1", devices, "1"]
        assert main(["lr-stress", "--methods", "AdamW", *options]) == 0
        return float(_rows(folder, "lr_stress")["AdamW at 10x, seed 0"]["heldout_loss"])

    one = heldout_loss(0.5, "1")
    assert heldout_loss(0.5, "2") == pytest.approx(one, abs=1e-4)
    assert heldout_loss(0.0, "1") != pytest.approx(one, abs=1e-4)


def test_a_mesh_without_devices_is_one_line(tmp_path, capsys):
    assert main(["lr-stress", "--results", str(tmp_path), "--mesh", "3", "3", "1"]) == 2
    assert "--mesh 3 3 1: must be positive, with a product of" in capsys.readouterr().err


def test_unknown_method_is_one_line(tmp_path, capsys):
    assert main(["lr-stress", "--results", str(tmp_path), "--methods", "SGD"]) == 2
    assert "--methods 'SGD': unknown; give all alone, or some of 'AdamW'" in capsys.readouterr().err


@pytest.mark.parametrize("module", TINY, ids=lambda m: m.__name__.rsplit(".")[-1])
def test_presets_come_in_whole_chunks(module):
    for config in module.PRESETS.values():
        found = config.sizes.values() if module is sizes else [config.job]
        for job in found:
            assert isinstance(job, jobs.Job)
            if job.base.recipe is not None:
                assert job.base.recipe.steps % job.base.recipe.chunk_steps == 0
                assert job.seq_len <= job.base.config.max_position_embeddings


def test_every_scenario_names_a_fault_that_there_is():
    for scenario in failures.PRESETS["nano"].scenarios().values():
        assert scenario.fault in faults.drills(200)


def test_a_job_of_broken_chunks_is_refused():
    with pytest.raises(ValueError, match=r"steps \(21\) must be a multiple of chunk_steps"):
        dataclasses.replace(TINY_JOB, steps=21)


def test_hessian_trace_of_a_quadratic_form():
    matrix = np.random.default_rng(0).standard_normal((6, 6))
    matrix = jnp.asarray(matrix + matrix.T, jnp.float32)

    def loss(params, m):
        x = jnp.concatenate([params["a"], params["b"]])
        return x @ m @ x / 2

    params = {"a": jnp.ones(2), "b": jnp.ones(4)}
    mean, error = hessian_trace(loss, params, matrix, jax.random.key(0), 2000)
    assert abs(mean - jnp.trace(matrix)) < 4 * error
    assert error < 0.2
