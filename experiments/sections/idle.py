"""Healthy runs at learning rates below the best: the guard should leave them alone, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import Bar, Bench, Findings, Row, mean
from experiments.methods import adamw, at_multiple, behind_guard
from experiments.report import Table
from experiments.sections.stress import adamw_best_rate
from experiments.sweep import Case, Outcome, make_run

FRACTIONS = (0.5, 0.25, 0.1)
"""Learning rates, in units of AdamW's best."""

BATCH_DIVISORS = (1, 4)
"""Batch sizes, as the preset's over these: a smaller batch has noisier losses and gradients."""


class Setting(NamedTuple):
    """What the runs at the three learning rates have in common.

    Attributes:
      task: name of the task.
      batch_size: sequences per step.
      steps: length of a run.
      seeds: runs per learning rate.
    """

    task: str
    batch_size: int
    steps: int
    seeds: int

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"{self.task}, batch {self.batch_size}, {self.steps} steps"


def idle(bench: Bench) -> Findings:
    """Counts the healthy runs that the guard changed, or only acted in."""
    p = bench.preset
    found, lines = Findings([], [], []), []
    settings = [
        Setting(task, p.batch_size // divisor, p.idle_steps, p.idle_seeds)
        for task in bench.tasks
        for divisor in BATCH_DIVISORS
    ]
    settings += [
        Setting(task, p.batch_size, p.long_idle_steps, p.long_idle_seeds) for task in bench.tasks
    ]
    for setting in settings:
        best = adamw_best_rate(bench, setting.task)
        rows = bench.cell(
            f"idle/{setting.name}",
            lambda setting=setting, best=best: _measure(bench, setting, best),
        )
        found.rows.extend(rows)
        for fraction in FRACTIONS:
            at = [row for row in rows if row["multiple"] == fraction]
            acted = mean([row["active"] > 0 for row in at])
            differing = mean([not row["identical"] for row in at])
            title = f"{setting.name}, {fraction:g}x"
            found.bars.append(Bar(f"idle {title}: share of runs with an action", acted, 0.0))
            active = mean([row["active"] for row in at])
            gain = mean([row["loss"] - row["plain_loss"] for row in at])
            lines.append(
                [
                    title,
                    str(len(at)),
                    f"{1 - acted:.0%}",
                    f"{1 - differing:.0%}",
                    f"{active:.1f}",
                    f"{gain:+.4f}",
                ]
            )
    heading = ["task", "runs", "no action", "bit-identical", "mean active steps", "guard - AdamW"]
    note = (
        "Two programs may round `a * b + c` differently: a run without any action in which bits "
        "differ was changed by the compiler, not by the guard."
    )
    found.tables.append(Table("Idle", heading, lines, note))
    return found


def _measure(bench: Bench, setting: Setting, best: float) -> list[Row]:
    task = dataclasses.replace(bench.task(setting.task), batch_size=setting.batch_size)
    rates = np.repeat([at_multiple(best, fraction) for fraction in FRACTIONS], setting.seeds)
    seeds = np.tile(np.arange(setting.seeds, dtype=np.uint32), len(FRACTIONS))
    # One run after the other, as a user would: a program for many runs at once is fused in another
    # way with the guard than without it, and rounds differently.
    plain, guarded = (
        _one_by_one(jax.jit(make_run(task, method, setting.steps)), rates, seeds)
        for method in (adamw, behind_guard(adamw))
    )
    same = [
        np.all(np.asarray(a == b), axis=tuple(range(1, a.ndim)))
        for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(guarded.params), strict=True)
    ]
    identical = np.all(same, axis=0)
    return [
        {
            "section": "idle",
            "task": task.name,
            "batch_size": task.batch_size,
            "steps": setting.steps,
            "multiple": FRACTIONS[i // setting.seeds],
            "rate": float(rates[i]),
            "seed": int(seeds[i]),
            "loss": float(guarded.loss[i]),
            "plain_loss": float(plain.loss[i]),
            "active": float(guarded.guard["active"][i]),
            "identical": bool(identical[i]),
        }
        for i in range(len(rates))
    ]


def _one_by_one(run: Callable[[Case], Outcome], rates: np.ndarray, seeds: np.ndarray) -> Outcome:
    outcomes = [
        jax.device_get(run(Case(jnp.float32(rate), jnp.uint32(seed), None, ())))
        for rate, seed in zip(rates, seeds, strict=True)
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *outcomes)
