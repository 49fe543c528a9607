"""The suite lr-stress at a size that takes seconds: files, resume, reuse, errors."""

import csv
import json
import math

import jax
import pytest
from experiments.lr_stress import PLOTTED_MULTIPLE
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from experiments import plots, presets
from experiments.__main__ import main
from experiments.models.config import DecoderConfig
from experiments.results import Results

CHUNK = 5
TINY = presets.LrStressPreset(
    model=DecoderConfig(8, 16, 1, 2, 1, 4, vocab_size=256),
    dtype="float32",
    seq_len=16,
    pretrain=presets.PretrainConfig(
        steps=10, batch_size=4, learning_rate=1e-3, chunk_steps=CHUNK, checkpoint_steps=CHUNK
    ),
    finetune=presets.FinetuneConfig(
        steps=20, batch_size=4, reference_lr=1e-3, chunk_steps=CHUNK, checkpoint_steps=2 * CHUNK
    ),
    heldout_batch_size=4,
    heldout_windows=8,
    lr_multiples=(1, 100),
)
RUNS = 6


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where pretrained models are kept.

    Most of a tiny job is compilation: it is made cheap here, and is shared by the module's jobs.
    """
    folder = tmp_path_factory.mktemp("cache")
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(folder / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()  # Else jax goes by the folder of the process' first compilation.
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@pytest.fixture(autouse=True)
def tiny(monkeypatch, cache):
    monkeypatch.setenv("LBW_OPTAX_CACHE", str(cache))
    monkeypatch.setitem(presets.LR_STRESS_PRESETS, "tiny", lambda: TINY)


def run(results, *args, preset="tiny"):
    return main(["lr-stress", "--preset", preset, "--results", str(results), *args])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The user's own text, as an argument."""
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text("".join(f"Line {i} of {i * i}.\n" for i in range(200)))
    return f"--data={path}"


def measured(results):
    """All that must not depend on interruptions: times are left out."""
    folder = results / "lr_stress" / "tiny"
    with (folder / "summary.csv").open() as file:
        summary = [row | {"seconds": ""} for row in csv.DictReader(file)]
    return summary, *((folder / f"{name}.jsonl").read_text() for name in ("metrics", "events"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache, text):
    """The results of an uninterrupted job."""
    results = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("LBW_OPTAX_CACHE", str(cache))
        monkeypatch.setitem(presets.LR_STRESS_PRESETS, "tiny", lambda: TINY)
        assert run(results, text) == 0
    return results


class TestJob:
    def test_leaves_all_its_files(self, finished):
        folder = finished / "lr_stress" / "tiny"
        assert {path.name for path in folder.iterdir() if path.is_file()} == {
            "config.json",
            "events.jsonl",
            "metrics.jsonl",
            "perplexity.png",
            "report.md",
            "runs.json",
            "stressed_run.png",
            "summary.csv",
        }
        summary, metrics, _ = measured(finished)
        rows = [json.loads(line) for line in metrics.splitlines()]
        assert len(summary) == RUNS
        assert len(rows) == RUNS * TINY.finetune.steps
        assert [row["step"] for row in rows[:20]] == list(range(1, 21))
        guarded = [row for row in rows if row["run"].startswith("guard")]
        assert {row["regime"] for row in guarded} <= {"STABLE", "STRESS", "SPIKE", "RECOVERY"}
        assert all(0 < row["scale"] <= 1 for row in guarded)
        assert all(row["guard_events_dropped"] in ("", "0") for row in summary)
        text = (folder / "report.md").read_text()
        assert "(perplexity.png)" in text
        assert "python -m experiments" in text

    def test_second_run_only_prints(self, finished, text, monkeypatch, capsys):
        before = measured(finished)
        monkeypatch.setattr("experiments.lr_stress.pretrained", None)  # Fails when called.
        assert run(finished, text) == 0
        assert measured(finished) == before
        assert "Held-out perplexity" in capsys.readouterr().out

    def test_resumed_equals_uninterrupted(self, finished, text, tmp_path, monkeypatch, capsys):
        log_metrics, calls = Results.log_metrics, 0

        def interrupted(self, rows):
            nonlocal calls
            calls -= 1
            if calls < 0:
                with (self.folder / "metrics.jsonl").open("a") as file:
                    file.write('{"run": "half a li')
                raise KeyboardInterrupt
            log_metrics(self, rows)

        # In the first run, before and after its checkpoint at step 10; then in the third run.
        for allowed in (1, 3, 9):
            calls = allowed
            with monkeypatch.context() as patch:
                patch.setattr(Results, "log_metrics", interrupted)
                assert run(tmp_path, text) == 130
            assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted: ")
        assert run(tmp_path, text) == 0
        assert measured(tmp_path) == measured(finished)
        assert not any((tmp_path / "lr_stress" / "tiny" / "checkpoints").iterdir())

    def test_other_settings_are_not_mixed(self, finished, text, capsys):
        before = measured(finished)
        assert run(finished, text, "--seed=1") == 2
        assert "(different seed): choose another --results, or --fresh" in capsys.readouterr().err
        assert measured(finished) == before


def test_fresh_drops_the_job_and_keeps_the_users_files(tmp_path):
    results = Results(tmp_path, {"seed": 0}, fresh=False)
    results.log_metrics([{"run": "a", "step": 1}])
    results.finish("a", {"heldout_loss": float("nan")})
    (tmp_path / "notes.txt").touch()
    assert Results(tmp_path, {"seed": 0}, fresh=False).runs == {"a": {"heldout_loss": None}}
    results = Results(tmp_path, {"seed": 1}, fresh=True)
    assert results.runs == {}
    assert results.metrics("a") == []
    assert (tmp_path / "notes.txt").exists()


class TestErrors:
    """Each is one line on stderr and exit code 2."""

    @pytest.fixture
    def fails(self, tmp_path, capsys):
        def check(message, *args, results=tmp_path, preset="tiny"):
            assert run(results, *args, preset=preset) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("error: ")
            assert message in line

        return check

    def test_unknown_preset(self, fails):
        fails("--preset huge: unknown; choose one of nano, small", preset="huge")

    def test_seed_out_of_range(self, fails):
        fails("--seed -1: must be in", "--seed=-1")

    def test_cache_that_cannot_be_written(self, fails, tmp_path, monkeypatch):
        (tmp_path / "cache").touch()
        monkeypatch.setenv("LBW_OPTAX_CACHE", str(tmp_path / "cache"))
        fails("cannot write checkpoints to")

    def test_missing_data(self, fails, tmp_path):
        fails("no such file or folder", "--data", str(tmp_path / "absent"))

    def test_empty_data(self, fails, tmp_path):
        (tmp_path / "empty").touch()
        fails("no text", "--data", str(tmp_path / "empty"))

    def test_short_data(self, fails, tmp_path):
        (tmp_path / "short").write_text("too short")
        fails("9 bytes of text, but 170 are needed", "--data", str(tmp_path / "short"))

    def test_folder_that_cannot_be_written(self, fails, tmp_path):
        (tmp_path / "file").touch()
        fails("cannot write results to", results=tmp_path / "file")

    def test_damaged_results(self, fails, tmp_path):
        folder = tmp_path / "lr_stress" / "tiny"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{")
        fails("damaged: use --fresh")


def test_diverged_runs_can_be_drawn():
    png = plots.lr_curves({"AdamW": [(1e-3, math.inf), (1e-1, math.inf)]}, 5.0, math.inf, "title")
    assert png.startswith(b"\x89PNG")


def test_presets_are_consistent():
    for name in ("nano", "small"):
        preset = presets.lr_stress_preset(name)
        for recipe in (preset.pretrain, preset.finetune):
            assert recipe.steps % recipe.chunk_steps == 0
            assert recipe.checkpoint_steps % recipe.chunk_steps == 0
        assert preset.seq_len <= preset.model.max_position_embeddings
        assert {1, PLOTTED_MULTIPLE} <= set(preset.lr_multiples)
