"""Schedules inside the guard: AdamW as many users have it, from its best learning rate on."""

from __future__ import annotations

from experiments.bench import Bar, Bench, Findings, Row, difference, losses, mean
from experiments.methods import Method, behind_guard, reduce_on_plateau, warmup_cosine
from experiments.report import Table, with_spread
from experiments.sections.stress import HEALTHY_TOLERANCE, TOLERANCE, multiples_of_best
from experiments.sweep import sweep
from experiments.tasks import TASKS


def _methods(steps: int) -> dict[str, Method]:
    """Name -> AdamW with a schedule, for runs of so many steps."""
    return {
        "reduce on plateau": reduce_on_plateau,
        "warmup + cosine": lambda learning_rate: warmup_cosine(learning_rate, steps),
    }


def schedules(bench: Bench, tasks: tuple[str, ...] = TASKS) -> Findings:
    """Measures every schedule alone and in the guard, at multiples of plain AdamW's best rate."""
    found = Findings([], [], [])
    for task in tasks:
        rates = {r: m for r, m in multiples_of_best(bench, task).items() if m >= 1}
        lines = []
        for name, method in _methods(bench.preset.steps).items():
            rows = _rows(bench, task, name, method, rates)
            rows += _rows(bench, task, f"guard({name})", behind_guard(method), rates)
            found.rows.extend(rows)
            alone = {m: losses(rows, method=name, multiple=m) for m in rates.values()}
            ours = {m: losses(rows, method=f"guard({name})", multiple=m) for m in rates.values()}
            bars = _bars(f"{task}, {name}", alone, ours, TOLERANCE[task])
            found.bars.extend(bars)
            lines += [
                [name, *map(with_spread, alone.values())],
                [f"guard({name})", *map(with_spread, ours.values())],
                ["guard - without (best, or the same up to it)"]
                + [difference(bar.value, bar.limit) for bar in bars],
            ]
        heading = ["learning rate", *(f"{rate:g} ({m:g}x)" for rate, m in rates.items())]
        note = "Held-out loss in nats; 1x is the best rate of AdamW without a schedule."
        found.tables.append(Table(f"Schedules, {task}", heading, lines, note))
    return found


Losses = dict[float, list[float]]
"""Multiple of the learning rate -> the loss of every seed."""


def _bars(name: str, alone: Losses, ours: Losses, tolerance: float) -> list[Bar]:
    """Up to the schedule's best rate the guard must not harm it; above, it is to end as well."""
    best = min(alone, key=lambda multiple: mean(alone[multiple]))
    bars = []
    for multiple, guarded in ours.items():
        stressed = multiple > best
        rival = mean(alone[best if stressed else multiple])
        limit = tolerance if stressed else HEALTHY_TOLERANCE
        bars.append(Bar(f"{name}, {multiple:g}x: guard - without", mean(guarded) - rival, limit))
    return bars


def _rows(
    bench: Bench, task: str, name: str, method: Method, rates: dict[float, float]
) -> list[Row]:
    p = bench.preset
    return bench.cell(
        f"schedules/{task}/{name}",
        lambda: (
            row | {"section": "schedules", "method": name, "multiple": rates[row["rate"]]}
            for row in sweep(bench.task(task), method, p.steps, list(rates), p.seeds)
        ),
    )
