"""The suite `study`: which part of the guard does what, and how much each constant matters."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optax

import lbw_optax
from experiments.bench import Bench, Findings, Row, difference, losses, mean
from experiments.faults import drills
from experiments.methods import Method, adamw, warmup_cosine
from experiments.presets import STUDY_PRESETS
from experiments.report import Table, with_spread
from experiments.sections.stress import adamw_best_rate
from experiments.sweep import sweep
from experiments.tasks import BYTE_TASKS

MULTIPLES = (1, 10, 100)
"""Learning rates, in units of AdamW's best."""

FAULTS = ("gradient x1e6, 3 steps", "learning rate x30, 50 steps")
"""Faults at AdamW's best learning rate, from `drills`."""

SCHEDULED = 10
"""Peak of the run with warmup and cosine, in units of AdamW's best learning rate."""

SCHEDULE = f"{SCHEDULED}x, warmup + cosine"
"""Name of that run."""

COLUMNS = (*(f"{m}x" for m in MULTIPLES), SCHEDULE, *FAULTS)
"""Columns of the tables."""

DEFAULTS = "defaults"

LAWS_PER_CELL = 18
"""Laws that are measured together: enough to share a compiled program, few to lose."""

OFF = 1e9
"""A threshold that is never reached."""

SWITCHED_OFF: dict[str, dict[str, float]] = {
    "no envelope": {"relative_step": OFF, "relative_step_start": OFF},
    "no envelope, no backtrack": {
        "relative_step": OFF,
        "relative_step_start": OFF,
        "backtrack_noise": OFF,
        "jump_noise": OFF,
    },
    "no overshoot, only envelope": {
        "stress_noise": OFF,
        "backtrack_noise": OFF,
        "jump_overshoot": OFF,
        "earned_most": 1.0,
        "earned_least": 1.0,
    },
    "no suspicion from overshoot": {"stress_noise": OFF},
    "suspicion and annealing whether or not the run gains": {"gain_noise": OFF},
    "annealing whether or not steps are productive": {"gain_slopes": OFF},
    "no edge of stability": {"edge_noise": 1e-9},
    "no gradient spike test, so no hold of finite gradients": {"spike_ratio": OFF},
    "no jump and no collapse test": {"jump_noise": OFF},
    "no backtrack for overshoot": {"backtrack_noise": OFF},
    "no backtrack at all": {"backtrack_noise": OFF, "jump_noise": OFF},
    "no trust radius": {"trust_way": 1e-9},
    "no allowance for zeros": {"allowance_most": 1.0},
    "no elasticity": {"share_elasticity": 1e-9},
    "no kurtosis": {"share_kurtosis": 1e-9},
    "no earned growth": {"earned_most": 1.0},
    "no earned annealing": {"earned_least": 1.0},
    "no persistence": {"persistence": 1e-6},
    "no slack of the latch": {"slack": 0.999},
}
"""Row -> the constants of `Law` that switch a sensor or an action off."""

SCALED = tuple(field.name for field in dataclasses.fields(lbw_optax.Law))
"""Constants of `Law` that are halved and doubled: all."""

MEMORIES = ("loss_decay", "trend_decay", "noise_decay", "overshoot_decay", "persistence")
"""Decays: what is halved and doubled is the number of steps that they last, 1 / (1 - decay)."""

NEAR_ONE = ("growth", "release", "rise_limit", "trust_growth")
"""Factors near 1: what is halved and doubled is their distance from it."""


class Setting(NamedTuple):
    """What is not a number, and so is a program of its own."""

    arguments: dict[str, Any]
    """Arguments of `guard`."""
    give_loss: bool = True
    """Whether the guard is given the loss."""


SETTINGS = {
    "no loss given": Setting({}, give_loss=False),
    "no scaling": Setting({"min_scale": 1.0}),
    'memory="none"': Setting({"memory": "none"}),
    'memory="sparse"': Setting({"memory": "sparse"}),
}
"""Row -> setting; every other row has `memory="step"`."""


def study(
    preset: str = "nano",
    tasks: tuple[str, ...] = BYTE_TASKS,
    seeds: tuple[int, ...] = (),
    results: Path = Path("results"),
    fresh: bool = False,
) -> None:
    """Switches the guard's sensors and actions off one by one, and halves and doubles constants.

    Run the same command again to go on with an interrupted job; cells that are finished are reused.

    Args:
      preset: Size of the job: nano or pico, both for two CPU cores.
      tasks: What to measure on: any of lora, scratch, full, words, usual; by default the first
        three.
      seeds: Seeds of the runs; by default the preset's.
      results: Folder for the results; the job writes to study/PRESET in it.
      fresh: Start over, dropping the results of an earlier job in that folder.
    """
    laws = law_variants()
    bench = Bench("study", preset, STUDY_PRESETS, tasks, seeds, results, fresh)
    found = [_of_task(bench, task, laws) for task in bench.tasks]
    question = "What does each sensor and each action do, and how much does each constant matter?"
    bench.publish(f"Ablations and sensitivities, {preset}", question, found, {})


def law_variants() -> dict[str, dict[str, float]]:
    """Row of the tables -> the constants of `Law` that differ from the defaults."""
    variants = {DEFAULTS: {}, **SWITCHED_OFF}
    for name, factor in itertools.product(SCALED, (0.5, 2)):
        variants[f"{name} x{factor:g}"] = {name: scaled(name, factor)}
    for changes in variants.values():
        dataclasses.replace(lbw_optax.Law(), **changes)  # Raises where a value is out of range.
    return variants


def scaled(name: str, factor: float) -> float:
    """A constant of `Law`, made smaller or larger within its range."""
    value = getattr(lbw_optax.Law(), name)
    if name in MEMORIES:
        return 1 - (1 - value) / factor
    if name in NEAR_ONE:
        return 1 + (value - 1) * factor
    if name == "cut":
        return min(value * factor, 0.99)
    return type(value)(value * factor)


def law_of_numbers(changes: Mapping[str, Any]) -> lbw_optax.Law:
    """A law whose changed constants may be traced, so that one program runs all variants.

    Args:
      changes: Constants of `Law`, already checked by `law_variants`.

    Returns:
      The law. `dataclasses.replace` would check the values, which a traced one does not have.
    """
    law = copy.copy(lbw_optax.Law())
    for name, value in changes.items():
        object.__setattr__(law, name, value)
    return law


def _of_task(bench: Bench, task: str, laws: dict[str, dict[str, float]]) -> Findings:
    best = adamw_best_rate(bench, task)
    plain = bench.cell(
        f"study/{task}/AdamW", lambda: _rows(bench, task, best, lambda tx: tx, None, {})
    )
    # Every variant gives all constants, so that the same program runs them in whatever cells.
    base = dataclasses.asdict(lbw_optax.Law())
    extras = {name: (base | changes,) for name, changes in laws.items()}

    def with_law(inner, changes):
        return lbw_optax.guard(inner, law=law_of_numbers(changes))

    rows = []
    for first in range(0, len(laws), LAWS_PER_CELL):
        part = dict(itertools.islice(extras.items(), first, first + LAWS_PER_CELL))
        rows += bench.cell(
            f"study/{task}/{next(iter(part))} ...",
            lambda part=part: _rows(bench, task, best, with_law, part, {}),
        )
    for name, setting in SETTINGS.items():

        def with_setting(inner, setting=setting):
            return lbw_optax.guard(inner, **setting.arguments)

        given = {"give_loss": setting.give_loss}
        rows += bench.cell(
            f"study/{task}/{name}",
            lambda name=name, with_setting=with_setting, given=given: _rows(
                bench, task, best, with_setting, {name: ()}, given
            ),
        )
    return Findings([*plain, *rows], _tables(task, best, plain, rows), [])


def _rows(
    bench: Bench,
    task: str,
    best: float,
    around: Callable[..., optax.GradientTransformation],
    extras: Mapping[str, tuple] | None,
    given: dict[str, Any],
) -> list[Row]:
    """Trains with what is `around` AdamW and each of `extras`, once for every column."""
    p = bench.preset
    named = drills(p.steps)

    def train(method: Method, multiples: Sequence[int], faults: Any = None) -> list[Row]:
        return sweep(
            bench.task(task),
            lambda rate, *extra: around(method(rate), *extra),
            p.steps,
            [float(f"{best * multiple:.9g}") for multiple in multiples],
            p.seeds,
            faults=faults,
            extras=extras,
            **given,
        )

    healthy = train(adamw, MULTIPLES)
    scheduled = train(functools.partial(warmup_cosine, steps=p.steps), [SCHEDULED])
    faulty = train(adamw, [1], {fault: named[fault] for fault in FAULTS})
    return [
        *(row | {"column": f"{row['rate'] / best:.0f}x"} for row in healthy),
        *(row | {"column": SCHEDULE} for row in scheduled),
        *(row | {"column": row["fault"]} for row in faulty),
    ]


def _tables(task: str, best: float, plain: list[Row], rows: list[Row]) -> list[Table]:
    base = {column: losses(rows, extra=DEFAULTS, column=column) for column in COLUMNS}
    first = [
        ["AdamW", *(with_spread(losses(plain, column=column)) for column in COLUMNS), ""],
        [f"guard, {DEFAULTS}", *(with_spread(base[column]) for column in COLUMNS), ""],
    ]

    def line(name: str) -> list[str]:
        deltas = [
            mean(losses(rows, extra=name, column=column)) - mean(base[column]) for column in COLUMNS
        ]
        worst = max(deltas, key=lambda d: abs(d) if math.isfinite(d) else math.inf)
        return [name, *map(difference, deltas), difference(worst)]

    changed = [name for name in dict.fromkeys(row["extra"] for row in rows) if name != DEFAULTS]
    ablations = [name for name in changed if name in SWITCHED_OFF or name in SETTINGS]
    constants = [name for name in changed if name not in ablations]
    parts = {"switched off": ablations, "constants halved and doubled": constants}
    return [
        Table(
            f"Study, {task} (1x = {best:g}): {what}",
            ["guard", *COLUMNS, "largest change"],
            [*first, *map(line, names)],
            "Held-out loss in nats; below the second row, the difference from the defaults.",
        )
        for what, names in parts.items()
    ]
