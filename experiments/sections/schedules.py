"""Schedules inside the guard: AdamW as many users have it, from its best learning rate on."""

from __future__ import annotations

import functools

from experiments.bench import Bar, Bench, Findings, Row, best_rate, difference, losses, mean
from experiments.methods import (
    Method,
    behind_guard,
    pretraining,
    reduce_on_plateau,
    warmup_cosine,
)
from experiments.report import Table, with_spread
from experiments.sections.stress import HEALTHY_TOLERANCE, TOLERANCE, multiples_of_best


def _methods(steps: int) -> dict[str, Method]:
    """Name -> AdamW with a schedule, for runs of so many steps."""
    return {
        "reduce on plateau": reduce_on_plateau,
        "warmup + cosine": functools.partial(warmup_cosine, steps=steps),
        "the whole recipe": functools.partial(pretraining, steps=steps),
    }


def schedules(bench: Bench) -> Findings:
    """Measures every schedule alone and in the guard, at multiples of plain AdamW's best rate."""
    found = Findings([], [], [])
    for task in bench.tasks:
        rates = {r: m for r, m in multiples_of_best(bench, task).items() if m >= 1}
        lines = []
        for name, method in _methods(bench.preset.steps).items():
            guarded = f"guard({name})"
            alone = bench.sweep("schedules", task, name, method, rates)
            ours = bench.sweep("schedules", task, guarded, behind_guard(method), rates)
            found.rows.extend(row | {"multiple": rates[row["rate"]]} for row in [*alone, *ours])
            bars = _bars(f"{task}, {name}", alone, ours, rates, TOLERANCE[task])
            found.bars.extend(bars)
            lines += [
                [name, *(with_spread(losses(alone, rate=rate)) for rate in rates)],
                [guarded, *(with_spread(losses(ours, rate=rate)) for rate in rates)],
                [
                    "guard - without (best, or the same up to it)",
                    *(difference(bar.value, bar.limit) for bar in bars),
                ],
            ]
        heading = ["learning rate", *(f"{rate:g} ({m:g}x)" for rate, m in rates.items())]
        note = "Held-out loss in nats; 1x is the best rate of AdamW without a schedule."
        found.tables.append(Table(f"Schedules, {task}", heading, lines, note))
    return found


def _bars(
    name: str, alone: list[Row], ours: list[Row], rates: dict[float, float], tolerance: float
) -> list[Bar]:
    """Up to the schedule's best rate the guard must not harm it; above, it is to end as well."""
    best = best_rate(alone, list(rates))
    bars = []
    for rate, multiple in rates.items():
        rival = mean(losses(alone, rate=min(rate, best)))
        gap = mean(losses(ours, rate=rate)) - rival
        limit = tolerance if rate > best else HEALTHY_TOLERANCE
        bars.append(Bar(f"{name}, {multiple:g}x: guard - without", gap, limit))
    return bars
