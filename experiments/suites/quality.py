"""The suite `quality`: how good the guard's control is, with one set of defaults everywhere."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import plots
from experiments.bench import Bar, Bench, Findings, Row, losses, mean
from experiments.data import python_manual, standard_library
from experiments.environment import versions
from experiments.errors import UserError
from experiments.methods import PEERS
from experiments.presets import QUALITY_PRESETS, bench_preset
from experiments.report import Table, write_report
from experiments.results import Results
from experiments.sections.drills import faults
from experiments.sections.idle import idle
from experiments.sections.optimizers import optimizers
from experiments.sections.problems import problems
from experiments.sections.stress import stress

QUESTION = "Does one set of defaults leave healthy runs alone, and carry the others?"

SECTIONS: dict[str, Callable[[Bench], Findings]] = {
    "stress": stress,
    "idle": idle,
    "problems": problems,
    "faults": faults,
    "optimizers": optimizers,
}
"""Name on the command line -> section."""


def quality(
    preset: str = "nano",
    sections: tuple[str, ...] = tuple(SECTIONS),
    results: Path = Path("results"),
    fresh: bool = False,
) -> None:
    """Measures the quality of control: stress, idle runs, small problems, faults, optimizers.

    Run the same command again to go on with an interrupted job; cells that are finished are reused.

    Args:
      preset: Size of the job: nano or pico, both for two CPU cores.
      sections: What to measure: any of stress, idle, problems, faults, optimizers.
      results: Folder for the results; the job writes to quality/PRESET in it.
      fresh: Start over, dropping the results of an earlier job in that folder.
    """
    for name in sections:
        if name not in SECTIONS:
            raise UserError(f"--sections {name}: unknown; choose from {', '.join(SECTIONS)}")
    settings = bench_preset(QUALITY_PRESETS, preset)
    folder = Results(
        results / "quality" / preset, job_config("quality", preset, settings), fresh=fresh
    )
    bench = Bench(settings, folder)
    found = [SECTIONS[name](bench) for name in sections]
    pictures = {}
    if "stress" in sections:
        rows = found[sections.index("stress")].rows
        pictures["stress.png"] = plots.loss_panels(_curves(rows), "learning rate / AdamW's best")
    publish(folder, f"Quality of control, {preset}", QUESTION, found, pictures)


def job_config(suite: str, preset: str, settings: Any) -> dict[str, Any]:
    """All that the numbers of a job depend on."""
    return {
        "suite": suite,
        "preset": preset,
        "settings": dataclasses.asdict(settings),
        "data": {"name": python_manual().name, "sha256": python_manual().sha256},
        "pretraining data": {
            "name": standard_library().name,
            "sha256": standard_library().sha256,
        },
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }


def publish(
    folder: Results,
    title: str,
    question: str,
    found: Sequence[Findings],
    pictures: dict[str, bytes],
) -> None:
    """Writes summary, pictures and report of a job, and prints its tables.

    Args:
      folder: Where to.
      title: Title of the report.
      question: What the suite asks.
      found: What was found.
      pictures: File name -> PNG file.
    """
    tables = [table for findings in found for table in findings.tables]
    bars = [bar for findings in found for bar in findings.bars]
    if bars:
        tables.insert(0, _bar_table(bars))
    folder.write_csv("summary.csv", [row for findings in found for row in findings.rows])
    write_report(folder, title, question, tables, pictures)


def _bar_table(bars: Sequence[Bar]) -> Table:
    missed = [bar for bar in bars if not bar.met]
    rows = [[bar.name, f"{bar.value:+.3f}", f"{bar.limit:g}"] for bar in missed]
    heading = ["bar", "measured", "at most"]
    return Table(f"Bars missed: {len(missed)} of {len(bars)}", heading, rows)


def _curves(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Task -> method -> its (multiple, mean loss) points."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    multiples = sorted({row["multiple"] for row in rows})
    return {
        task: {
            method: [
                (m, mean(losses(rows, task=task, method=method, multiple=m)) or math.inf)
                for m in multiples
            ]
            for method in PEERS
        }
        for task in tasks
    }
