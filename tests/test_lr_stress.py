"""The suite lr-stress at a size that takes seconds: files, resume, reuse, errors."""

import csv
import errno
import json
import math
import os
import re
import shutil

import orbax.checkpoint as ocp
import pytest
from suite_helpers import CHUNK, TINY_JOB

from experiments import plots
from experiments.checkpoint import Checkpoints
from experiments.command_line import main
from experiments.errors import UserError
from experiments.results import Results
from experiments.suites import lr_stress

TINY = lr_stress.LrStressConfig(TINY_JOB, multiples=(1, 100))
RUNS = 6


@pytest.fixture(autouse=True)
def tiny(monkeypatch, cache):
    monkeypatch.setenv("LBW_OPTAX_CACHE", str(cache))
    monkeypatch.setitem(lr_stress.PRESETS, "tiny", TINY)


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
        summary = [row | {"seconds": "", "end_to_end_seconds": ""} for row in csv.DictReader(file)]
    logs = ((folder / f"{name}.jsonl").read_text() for name in ("metrics", "events"))
    return summary, *(re.sub(r'"seconds": [^,}]+', '"seconds": 0', log) for log in logs)


def _shorten(results, rows):
    """Leaves the first rows of the metrics, and a half."""
    path = results / "lr_stress" / "tiny" / "metrics.jsonl"
    kept = path.read_text().splitlines(keepends=True)[: rows + 1]
    path.write_text("".join(kept)[: -len(kept[-1]) // 2])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache, text):
    """The results of an uninterrupted job."""
    results = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("LBW_OPTAX_CACHE", str(cache))
        monkeypatch.setitem(lr_stress.PRESETS, "tiny", TINY)
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
        summary, *logs = measured(finished)
        rows, events = ([json.loads(line) for line in log.splitlines()] for log in logs)
        assert len(summary) == RUNS + 1  # And the model before the first step.
        assert len(rows) == RUNS * (TINY_JOB.steps + 1)  # And a held-out loss.
        assert [row["step"] for row in rows[:21]] == [*range(1, 21), 20]
        guarded = [row for row in rows if row["run"].startswith("guard") and "loss" in row]
        assert {row["regime"] for row in guarded} <= {"STABLE", "STRESS", "SPIKE", "RECOVERY"}
        assert all(0 < row["scale"] <= 1 for row in guarded)
        scales = {(row["run"], row["step"]): row["scale"] for row in guarded}
        assert events
        assert all(event["scale"] == scales[event["run"], event["step"]] for event in events)
        assert all(row["guard_events_dropped"] in ("", "0") for row in summary)
        text = (folder / "report.md").read_text()
        assert "(perplexity.png)" in text
        assert "python -m experiments" in text

    def test_second_run_only_prints(self, finished, text, monkeypatch, capsys):
        before = measured(finished)
        monkeypatch.setattr("experiments.lab.Finetune", None)  # Fails when called.
        assert run(finished, text) == 0
        assert measured(finished) == before
        assert "Held-out perplexity" in capsys.readouterr().out

    def test_resumed_equals_uninterrupted(self, finished, text, tmp_path, monkeypatch):
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
                with pytest.raises(KeyboardInterrupt):
                    run(tmp_path, text)
        assert run(tmp_path, text) == 0
        assert measured(tmp_path) == measured(finished)
        assert not any((tmp_path / "lr_stress" / "tiny" / "checkpoints").iterdir())

    def test_lost_metrics_of_an_unfinished_run_are_noticed(
        self, text, tmp_path, monkeypatch, capsys
    ):
        log_metrics = Results.log_metrics

        def interrupted(self, rows):
            if rows[0]["step"] > 2 * CHUNK:
                raise KeyboardInterrupt
            log_metrics(self, rows)

        with monkeypatch.context() as patch:
            patch.setattr(Results, "log_metrics", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path, text)
        _shorten(tmp_path, rows=4)
        assert run(tmp_path, text) == 2
        assert "metrics.jsonl is damaged: use --fresh" in capsys.readouterr().err

    def test_lost_metrics_of_a_finished_run_are_noticed(self, finished, text, tmp_path, capsys):
        shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
        _shorten(tmp_path, rows=4)
        assert run(tmp_path, text) == 2
        assert "metrics.jsonl is damaged: use --fresh" in capsys.readouterr().err

    def test_a_seed_that_is_added_reuses_the_others(self, finished, text, tmp_path):
        shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
        assert run(tmp_path, text, "--methods", "AdamW", "--seeds", "0", "1") == 0
        before, after = (
            json.loads((folder / "lr_stress" / "tiny" / "runs.json").read_text())
            for folder in (finished, tmp_path)
        )
        added = {f"AdamW at {multiple}x, seed 1" for multiple in TINY.multiples}
        assert {name: after.pop(name)["seed"] for name in added} == dict.fromkeys(added, 1)
        assert after == before
        assert "±" in (tmp_path / "lr_stress" / "tiny" / "report.md").read_text()

    def test_a_model_pretrained_on_the_users_text_is_another(self, finished, text, tmp_path):
        own = tmp_path / "own"
        own.write_text("x" * 400)
        given = ("--pretrain-data", str(own), "--methods", "AdamW")
        assert run(tmp_path, text, *given) == 0
        ours, theirs = (measured(folder)[0][0] for folder in (tmp_path, finished))
        assert ours["run"] == theirs["run"] == "zero-step, tiny, LoRA"
        assert ours["heldout_loss"] != theirs["heldout_loss"]
        assert run(tmp_path, text) == 2

    def test_a_method_that_sets_its_own_rate_runs_once(self, text, tmp_path):
        assert run(tmp_path, text, "--methods", "Prodigy") == 0
        _, only = measured(tmp_path)[0]
        assert only["run"] == "Prodigy, seed 0"
        report = (tmp_path / "lr_stress" / "tiny" / "report.md").read_text()
        found = re.search(r"\| Prodigy \| (\S+) \| (\S+) \|", report)
        assert found[1] == found[2]
        assert "What the guard did" not in report

    def test_other_settings_are_not_mixed(self, finished, text, capsys):
        before = measured(finished)
        assert run(finished) == 2
        assert "(different data): choose another --results, or --fresh" in capsys.readouterr().err
        assert measured(finished) == before


def test_fresh_drops_the_job_and_keeps_the_users_files(tmp_path):
    results = Results(tmp_path, {"seed": 0}, fresh=False)
    results.log_metrics([{"run": "a", "step": 1}])
    results.finish("a", {"heldout_loss": float("nan")})
    for name in ("notes.txt", "report.md"):
        (tmp_path / name).touch()
    assert Results(tmp_path, {"seed": 0}, fresh=False).runs == {"a": {"heldout_loss": None}}
    results = Results(tmp_path, {"seed": 1}, fresh=True)
    assert results.runs == {}
    assert results.metrics("a") == []
    results.log_metrics([{"run": "b", "step": 1}])
    assert (tmp_path / "notes.txt").exists()
    assert not (tmp_path / "report.md").exists()


def test_settings_of_a_job_that_measured_nothing_are_replaced(tmp_path):
    Results(tmp_path, {"models": "mistyped"}, fresh=False)
    results = Results(tmp_path, {"models": "right"}, fresh=False)
    results.finish("a", {"heldout_loss": 1.0})
    with pytest.raises(UserError, match="different models"):
        Results(tmp_path, {"models": "other"}, fresh=False)


def test_starting_over_drops_nothing_before_there_is_something_new(tmp_path):
    Results(tmp_path, {"seed": 0}, fresh=False).finish("a", {"heldout_loss": 1.0})
    started = Results(tmp_path, {"seed": 1}, fresh=True)
    assert started.runs == {}
    assert started.metrics("a") == []
    del started  # It failed, and held the folder's lock.
    assert Results(tmp_path, {"seed": 0}, fresh=False).runs.keys() == {"a"}
    Results(tmp_path, {"seed": 1}, fresh=True).finish("b", {"heldout_loss": 2.0})
    assert Results(tmp_path, {"seed": 1}, fresh=False).runs.keys() == {"b"}


def test_a_kill_while_clearing_leaves_nothing_to_another_job(tmp_path, monkeypatch):
    Results(tmp_path, {"seed": 0}, fresh=False).finish("a", {"heldout_loss": 1.0})
    removed = []

    def unlink(path, missing_ok):
        removed.append(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            Results(tmp_path, {"seed": 1}, fresh=True).finish("b", {"heldout_loss": 2.0})
    assert removed
    with pytest.raises(UserError, match="different seed"):
        Results(tmp_path, {"seed": 1}, fresh=False)


class TestErrors:
    """Each is one line on stderr and exit code 2."""

    @pytest.fixture
    def error(self, tmp_path, capsys):
        def of(*args, results=tmp_path, preset="tiny"):
            assert run(results, *args, preset=preset) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("error: ")
            return line

        return of

    def test_unknown_preset(self, error):
        assert "--preset huge: unknown; choose one of nano, small" in error(preset="huge")

    def test_seed_out_of_range(self, error):
        assert "--seeds -1: must be in" in error("--seeds", "-1")

    def test_seed_twice(self, error):
        assert "--seeds 1 1: must differ" in error("--seeds", "1", "1")

    def test_cache_that_cannot_be_written(self, error, tmp_path, monkeypatch):
        (tmp_path / "cache").touch()
        monkeypatch.setenv("LBW_OPTAX_CACHE", str(tmp_path / "cache"))
        assert "cannot write tokens to" in error()

    def test_missing_data(self, error, tmp_path):
        assert "no such file or folder" in error("--data", str(tmp_path / "absent"))

    def test_missing_data_to_pretrain_on(self, error, tmp_path):
        line = error("--pretrain-data", str(tmp_path / "absent"))
        assert "--pretrain-data" in line
        assert "no such file or folder" in line

    def test_short_data_to_pretrain_on(self, error, tmp_path):
        (tmp_path / "text").mkdir()
        (tmp_path / "text" / "train.txt").write_text("far too short")
        line = error("--pretrain-data", str(tmp_path / "text"))
        assert "train: 13 bytes, but 17 are needed" in line

    def test_empty_data(self, error, tmp_path):
        (tmp_path / "empty").touch()
        assert "no text" in error("--data", str(tmp_path / "empty"))

    def test_short_data(self, error, tmp_path):
        (tmp_path / "short").write_text("too short")
        message = "9 characters of text, but 20 are needed"
        assert message in error("--data", str(tmp_path / "short"))

    def test_short_split(self, error, tmp_path):
        text = tmp_path / "text"
        text.mkdir()
        (text / "train.txt").write_text("far too short")
        (text / "test.txt").write_text("also short")
        assert f"--data {text}, train: 14 tokens, but 17 are needed" in error("--data", str(text))

    def test_folder_that_cannot_be_written(self, error, tmp_path):
        (tmp_path / "file").touch()
        assert "cannot write results to" in error(results=tmp_path / "file")

    @pytest.mark.parametrize("content", ["{", "[]"])
    def test_damaged_results(self, error, tmp_path, content):
        folder = tmp_path / "lr_stress" / "tiny"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(content)
        assert "config.json is damaged: use --fresh" in error()

    def test_checkpoints_for_a_model_that_is_trained_here(self, error, tmp_path):
        assert "--models: tiny is trained here" in error("--models", str(tmp_path))

    def test_folder_that_cannot_be_read(self, error, tmp_path, monkeypatch):
        (tmp_path / "text" / "private").mkdir(parents=True)
        scandir = os.scandir

        def refused(path):
            if str(path).endswith("private"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refused)
        line = error("--data", str(tmp_path / "text"))
        assert line == f"error: --data {tmp_path / 'text' / 'private'}: Permission denied"

    def test_full_disk(self, tmp_path, capsys, monkeypatch):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Results, "_append", full)
        assert run(tmp_path) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line == "error: results or output: No space left on device"

    def test_full_disk_for_a_checkpoint(self, tmp_path, monkeypatch):
        def full(*_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: Error writing, and a thousand words")

        monkeypatch.setattr(ocp.CheckpointManager, "save", full)
        checkpoints = Checkpoints(tmp_path)
        with pytest.raises(UserError, match=f"^{tmp_path}: no space left for a checkpoint$"):
            checkpoints.save(1, {})

    @pytest.mark.parametrize("row", [b'{"run": "a", "st', b"\xff\xfe", b"{}"])
    def test_damaged_metrics(self, tmp_path, row):
        results = Results(tmp_path, {}, fresh=False)
        (tmp_path / "metrics.jsonl").write_bytes(row + b'\n{"run": "a", "step": 2}\n')
        for read in (lambda: results.start("a", 1), lambda: results.metrics("a")):
            with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: use --fresh"):
                read()


@pytest.mark.parametrize("title", ["title", "x$_$y.txt"])
def test_diverged_runs_can_be_drawn(title):
    """And on a text of any name: dollar signs are no formula."""
    png = plots.lr_curves({"AdamW": [(1e-3, math.inf), (1e-1, math.inf)]}, 5.0, math.inf, title)
    assert png.startswith(b"\x89PNG")


def test_sensitivity_is_the_mean_loss_above_the_best():
    curve = [(1e-3, math.exp(1.0)), (1e-2, math.exp(1.5)), (1e-1, math.inf)]
    assert lr_stress.sensitivity(curve, math.exp(2.0)) == pytest.approx((1 + 1.5 + 2) / 3 - 1)


def test_presets_draw_a_stressed_run():
    for name in ("nano", "small"):
        assert {1, lr_stress.PLOTTED_MULTIPLE} <= set(lr_stress.PRESETS[name].multiples)
