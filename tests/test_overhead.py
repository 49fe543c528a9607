"""The suite `overhead`: what it counts is right, and a second run only prints."""

import csv
import json
from types import SimpleNamespace

import jax
import pytest

from experiments.command_line import main
from experiments.suites import overhead
from experiments.timing import contestants

WIDTH, ARRAYS = 64, 2
TINY = overhead.OverheadConfig(WIDTH, ARRAYS, rounds=2, steps=1)
MANY = overhead.OverheadConfig(8, 5)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the suite at a size of seconds; returns the rows of its summary."""
    monkeypatch.setitem(overhead.PRESETS, "tiny", TINY)
    monkeypatch.setattr(overhead, "MANY", MANY)
    monkeypatch.setattr(overhead, "compile_devices", lambda count: jax.devices("cpu"))

    def call(*flags):
        assert main(["overhead", "--preset", "tiny", "--results", str(tmp_path), *flags]) == 0
        with (tmp_path / "overhead/tiny/summary.csv").open() as file:
            return {row["optimizer"]: row for row in csv.DictReader(file)}

    return call


def test_counts_what_each_memory_keeps(run):
    state = {name: float(row["state_bytes"]) for name, row in run().items()}
    fixed = 40_000 / (ARRAYS * WIDTH**2)  # The log of 1,024 events and all scalars: below 40 kB.
    assert state["AdamW"] == pytest.approx(8, abs=0.01)
    assert state["AdamW + clip"] == state["AdamW"]
    for name, kept in {"none": 0, "sparse": 4 / 16, "step": 4}.items():
        more = state[f"guard(AdamW), {name}"] - state["AdamW"]
        assert kept < more < kept + fixed


def test_second_run_measures_nothing(run, monkeypatch):
    first = run()
    monkeypatch.delattr(overhead, "_measure")
    assert run() == first


def test_bytes_on_a_tpu_that_need_not_be_there(run, monkeypatch, tmp_path):
    tpu = SimpleNamespace(platform="tpu", device_kind="TPU v0")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    monkeypatch.setattr(overhead, "compile_devices", lambda count: [tpu])
    monkeypatch.setattr(overhead, "SingleDeviceSharding", lambda device: here)
    monkeypatch.setattr(overhead, "COMPILED", TINY)
    rows = run()
    records = json.loads((tmp_path / "overhead/tiny/runs.json").read_text())
    for name in contestants():
        label = f"{name}, {ARRAYS} arrays on TPU v0"
        timed, compiled = records[name], records[label]
        seconds = compiled.pop("compile_seconds")
        assert compiled == {key: timed[key] for key in overhead.BYTES}
        timed, compiled = rows[name], rows[label]
        assert compiled == dict.fromkeys(timed, "") | {
            "optimizer": label,
            "compile_seconds": str(seconds),
            **{key: timed[key] for key in overhead.BYTES},
        }
    assert (
        "Compiled for a TPU v0: 2 arrays of 64 x 64"
        in (tmp_path / "overhead/tiny/report.md").read_text()
    )
    monkeypatch.delattr(overhead, "_compile")
    run()


def test_unknown_preset(capsys):
    assert main(["overhead", "--preset", "huge"]) == 2
    assert "--preset huge: unknown; choose one of nano, small" in capsys.readouterr().err
