"""Healthy runs at learning rates below the best: the guard should leave them alone, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import Bar, Bench, Findings, Row, mean
from experiments.methods import ADAMW, GUARD, PEERS, at_multiple
from experiments.report import Table
from experiments.sections.stress import adamw_best_rate
from experiments.sweep import Case, Outcome, make_run
from experiments.tasks import Task

FRACTIONS = (0.5, 0.25, 0.1)
"""Learning rates, in units of AdamW's best."""

TASKS = ("lora", "scratch")

BATCH_DIVISORS = (1, 4)
"""Batch sizes, as the preset's over these: a smaller batch has noisier losses and gradients."""


def idle(bench: Bench) -> Findings:
    """Counts the healthy runs that the guard changed, or only acted in."""
    p = bench.preset
    found, lines = Findings([], [], []), []
    for name in TASKS:
        best = adamw_best_rate(bench, name)
        for batch_size in (p.batch_size // divisor for divisor in BATCH_DIVISORS):
            rows = bench.cell(
                f"idle/{name}/batch {batch_size}",
                lambda name=name, best=best, batch_size=batch_size: _measure(
                    bench, dataclasses.replace(bench.task(name), batch_size=batch_size), best
                ),
            )
            found.rows.extend(rows)
            for fraction in FRACTIONS:
                at = [row for row in rows if row["multiple"] == fraction]
                acted = mean([row["active"] > 0 for row in at])
                differing = mean([not row["identical"] for row in at])
                title = f"{name}, batch {batch_size}, {fraction:g}x"
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
        f"{p.idle_steps} steps. Two programs may round `a * b + c` differently: a run without any "
        "action in which bits differ was changed by the compiler, not by the guard."
    )
    found.tables.append(Table("Idle", heading, lines, note))
    return found


def _measure(bench: Bench, task: Task, best: float) -> list[Row]:
    p = bench.preset
    rates = np.repeat([at_multiple(best, fraction) for fraction in FRACTIONS], p.idle_seeds)
    seeds = np.tile(np.arange(p.idle_seeds, dtype=np.uint32), len(FRACTIONS))
    # One run after the other, as a user would: a program for many runs at once is fused in another
    # way with the guard than without it, and rounds differently.
    plain, guarded = (
        _one_by_one(jax.jit(make_run(task, method, p.idle_steps)), rates, seeds)
        for method in (PEERS[ADAMW], PEERS[GUARD])
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
            "multiple": FRACTIONS[i // p.idle_seeds],
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
