"""The suite `memory`: what a preset needs of which device, before anybody rents one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from experiments import jobs
from experiments.compilers import compile_devices
from experiments.environment import made_with, versions
from experiments.errors import preset_of
from experiments.jobs import Job
from experiments.memory import MemoryPlan, plan_memory
from experiments.memory_check import MemoryCheck, check_memory
from experiments.methods import ADAMW, GUARD, Method, guards
from experiments.report import Table, number, write_report
from experiments.results import Results

PRESETS = {"nano": {"nano": jobs.NANO}, "small": {"small": jobs.SMALL}, "paper": jobs.PAPER}
"""Name -> label -> job."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What a job may run on."""

    name: str
    """What reports call it."""
    devices: int
    """Number of devices."""
    memory: float
    """Bytes of each, as it is sold."""
    share: float
    """Part of them that jax takes by default."""


HARDWARE = (
    Hardware("80 GB GPU", 1, 80e9, 0.75),
    Hardware("H200", 1, 141e9, 0.75),
    Hardware("TPU v5e-8", 8, 16e9, 1.0),
)
"""What the paper's models are planned for."""

DEFAULT_GUARD = f"{GUARD}, step"
"""The guard with its default memory, which needs the most."""

CHECKED = (ADAMW, DEFAULT_GUARD)
"""What is compiled."""


def memory(preset: str = "nano", results: Path = Path("results"), fresh: bool = False) -> None:
    """Says what memory each of a preset's jobs needs; nothing is allocated or downloaded.

    Run the same command again to go on with an interrupted check.

    Args:
      preset: Size of the jobs: nano, small or paper.
      results: Folder for the results; the suite writes to memory/PRESET in it.
      fresh: Start over, dropping the results of an earlier job in that folder.
    """
    todo = preset_of(PRESETS, preset)
    counts = sorted({hardware.devices for hardware in HARDWARE})
    devices = {count: compile_devices(count) for count in counts}
    methods = guards()
    described = {
        "suite": "memory",
        "preset": preset,
        "settings": {label: dataclasses.asdict(job) for label, job in todo.items()},
        "devices": [found[0].device_kind for found in devices.values()],
        "versions": versions(),
    }
    folder = Results(results / "memory" / preset, described, fresh=fresh)
    plans = {
        (label, name, count): plan_memory(job, method, count)
        for label, job in todo.items()
        for name, method in methods.items()
        for count in counts
    }
    checks = {
        (label, name, count): _checked(
            folder, f"{label}, {name}, {count}", job, methods[name], devices[count]
        )
        for label, job in todo.items()
        for name in CHECKED
        for count in counts
    }
    folder.write_csv(
        "summary.csv",
        [
            {"job": label, "optimizer": name, "devices": count, **plan._asdict()}
            | {"total": plan.total}
            for (label, name, count), plan in plans.items()
        ],
    )
    write_report(
        folder,
        f"Memory, {preset}",
        "What does each job need of a device's memory? All numbers are of one device, in GB (1e9 "
        "bytes); on several, the parameters, the optimizer's state and the batch are split over "
        "them.",
        [_parts_table(plans), _fits_table(plans), _check_table(checks)],
        {},
        made_with(),
    )


def _checked(
    folder: Results, name: str, job: Job, method: Method, devices: Sequence[jax.Device]
) -> MemoryCheck:
    """A check from the folder, or made and put there."""
    if name not in folder.runs:
        folder.finish(name, check_memory(job, method, devices)._asdict())
    return MemoryCheck(**folder.runs[name])


Plans = dict[tuple[str, str, int], MemoryPlan]


def _parts_table(plans: Plans) -> Table:
    extra = [name for name in guards() if name != ADAMW]
    rows = []
    for (label, name, count), plan in plans.items():
        if name == ADAMW:
            grown = [plans[label, other, count].optimizer - plan.optimizer for other in extra]
            shown = (
                *(plan.frozen, plan.trained, plan.initial, plan.gradients, plan.optimizer),
                *(*grown, plans[label, DEFAULT_GUARD, count].update, plan.saved, plan.working),
            )
            rows.append([label, str(count), *map(_gigabytes, shown)])
    heading = ["job", "devices", "frozen", "trained", "initial", "gradients", "AdamW's state"]
    heading += [f"+ {name.removeprefix(GUARD + ', ')}" for name in extra]
    heading += ["guard's update", "activations", "working"]
    return Table(
        "Parts",
        heading,
        rows,
        "`initial` is a copy of what trains, from before the first step, that a suite keeps. "
        "`+ none`, `+ sparse` and `+ step` are what the guard's memories add to AdamW's state. "
        "`guard's update` is AdamW's step and new moments, beside the old ones until the guard has "
        "decided; compilers differ most in this. `activations` is what is saved of the forward "
        "pass. `working` is the larger of one layer computed again and one chunk of logits, with "
        "the weights that are gathered for it.",
    )


def _fits_table(plans: Plans) -> Table:
    heading = ["job", "optimizer", *(f"{h.name}: {h.memory * h.share / 1e9:g}" for h in HARDWARE)]
    rows = []
    for label, name in dict.fromkeys((label, name) for label, name, _ in plans):
        totals = [plans[label, name, hardware.devices].total for hardware in HARDWARE]
        fits = [
            f"{_gigabytes(total)} {'fits' if total <= h.memory * h.share else 'too much'}"
            for total, h in zip(totals, HARDWARE, strict=True)
        ]
        rows.append([label, name, *fits])
    return Table(
        "Sum, and what it fits on",
        heading,
        rows,
        "The head of a column says how much jax takes of each device: by default three quarters of "
        "a GPU (`XLA_PYTHON_CLIENT_MEM_FRACTION`).",
    )


def _check_table(checks: dict[tuple[str, str, int], MemoryCheck]) -> Table:
    rows = [
        [
            *(label, name, str(count), check.compiler),
            *(f"{size:,}" for size in (check.planned_arguments, check.arguments)),
            *map(_gigabytes, (check.planned_temporaries, check.temporaries)),
        ]
        for (label, name, count), check in checks.items()
    ]
    heading = ["job", "optimizer", "devices", "compiled for"]
    heading += ["arguments, bytes: planned", "by XLA", "temporaries, GB: planned", "by XLA"]
    return Table(
        "Plan and compiler",
        heading,
        rows,
        "The step, compiled and not run. Arguments are parameters, "
        "optimizer state and batches; temporaries are all else, `initial` excepted. A CPU has no "
        "bfloat16: XLA computes in float32 there and would add float32 copies of all weights, so "
        "the step is planned and compiled in float32. None of these numbers are a GPU's unless the "
        "table says so.",
    )


def _gigabytes(size: float) -> str:
    return number(size / 1e9)
