"""The suite `quality`: how good the guard's control is, with one set of defaults everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments import plots
from experiments.bench import Bench, Findings, Row, losses, mean
from experiments.errors import check_names
from experiments.presets import QUALITY_PRESETS
from experiments.sections.drills import faults
from experiments.sections.idle import idle
from experiments.sections.optimizers import optimizers
from experiments.sections.problems import problems
from experiments.sections.schedules import schedules
from experiments.sections.stress import stress

QUESTION = "Does one set of defaults leave healthy runs alone, and carry the others?"

SECTIONS: dict[str, Callable[[Bench], Findings]] = {
    "stress": stress,
    "idle": idle,
    "problems": problems,
    "faults": faults,
    "optimizers": optimizers,
    "schedules": schedules,
}
"""Name on the command line -> section."""


def quality(
    preset: str = "nano",
    sections: tuple[str, ...] = tuple(SECTIONS),
    seeds: tuple[int, ...] = (),
    results: Path = Path("results"),
    fresh: bool = False,
) -> None:
    """Measures the quality of control: stress, healthy runs, small problems, faults.

    Run the same command again to go on with an interrupted job; cells that are finished are reused.

    Args:
      preset: Size of the job: nano or pico, both for two CPU cores.
      sections: What to measure: any of stress, idle, problems, faults, optimizers, schedules.
      seeds: Seeds of the runs, but of the idle ones; by default the preset's.
      results: Folder for the results; the job writes to quality/PRESET in it.
      fresh: Start over, dropping the results of an earlier job in that folder.
    """
    check_names("--sections", sections, SECTIONS)
    bench = Bench("quality", preset, QUALITY_PRESETS, seeds, results, fresh)
    found = [SECTIONS[name](bench) for name in sections]
    pictures = {}
    if "stress" in sections:
        rows = found[sections.index("stress")].rows
        pictures["stress.png"] = plots.loss_panels(_curves(rows), "learning rate / AdamW's best")
    bench.publish(f"Quality of control, {preset}", QUESTION, found, pictures)


def _curves(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Task -> method -> its (multiple, mean loss) points."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    methods = dict.fromkeys(row["method"] for row in rows)
    multiples = sorted({row["multiple"] for row in rows})
    return {
        task: {
            method: [
                (m, mean(losses(rows, task=task, method=method, multiple=m)) or math.inf)
                for m in multiples
            ]
            for method in methods
        }
        for task in tasks
    }
