"""The suite `quality`: how good the guard's control is, with one set of defaults everywhere."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments import plots
from experiments.bench import Bench, Findings, Row, losses, mean
from experiments.errors import UserError, check_names
from experiments.presets import QUALITY_PRESETS
from experiments.sections.drills import faults
from experiments.sections.idle import idle
from experiments.sections.networks import networks, warmups
from experiments.sections.optimizers import optimizers
from experiments.sections.problems import problems
from experiments.sections.schedules import schedules
from experiments.sections.stress import stress
from experiments.tasks import TASKS

QUESTION = "Does one set of defaults leave healthy runs alone, and carry the others?"

SECTIONS: dict[str, Callable[[Bench], Findings]] = {
    "stress": stress,
    "idle": idle,
    "problems": problems,
    "networks": networks,
    "warmups": warmups,
    "faults": faults,
    "optimizers": optimizers,
    "schedules": schedules,
}
"""Name on the command line -> section."""


def quality(
    preset: str = "nano",
    sections: tuple[str, ...] = tuple(SECTIONS),
    tasks: tuple[str, ...] = TASKS,
    methods: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    results: Path = Path("results"),
    fresh: bool = False,
) -> None:
    """Measures the quality of control: stress, healthy runs, small problems, faults.

    Run the same command again to go on with an interrupted job; cells that are finished are reused.

    Args:
      preset: Size of the job: nano, pico (a smaller model), long (longer runs) or deep (a larger
        model), all for two CPU cores.
      sections: What to measure: any of stress, idle, problems, networks, warmups, faults,
        optimizers, schedules.
      tasks: What to measure on: any of lora, scratch, full, words, usual. Faults have lora and
        scratch; problems, networks, warmups and optimizers have tasks of their own.
      methods: What stress compares with AdamW and the guard, by the names in its tables; by default
        every peer.
      seeds: Seeds of the runs, but of the idle ones; by default the preset's.
      results: Folder for the results; the job writes to quality/PRESET in it.
      fresh: Start over, dropping the results of an earlier job in that folder.
    """
    check_names("--sections", sections, SECTIONS)
    bench = Bench("quality", preset, QUALITY_PRESETS, tasks, seeds, results, fresh)
    measure = SECTIONS | {"stress": functools.partial(stress, methods=methods)}
    found = [measure[name](bench) for name in sections]
    if not any(findings.rows for findings in found):
        asked = f"--tasks {' '.join(tasks)} --sections {' '.join(sections)}"
        raise UserError(f"{asked}: nothing to measure; faults have fewer tasks")
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
