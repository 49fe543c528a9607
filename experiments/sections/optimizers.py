"""Other optimizers inside the guard, at ten times the best learning rate of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax
from optax import contrib

from experiments.bench import (
    Bar,
    Bench,
    Findings,
    Table,
    at_multiple,
    best_rate,
    difference,
    losses,
    mean,
    with_spread,
)
from experiments.sweep import sweep
from lbw_optax import guard

TASK = "scratch"

MULTIPLE = 10
"""Learning rate of the stressed runs, in units of the best."""

TOLERANCE = 0.1
"""Nats that the guarded run may end above the optimizer's best."""

INNER: dict[str, tuple[Callable[[Any], optax.GradientTransformation], tuple[float, ...]]] = {
    "SGD + momentum": (lambda rate: optax.sgd(rate, momentum=0.9), (1e-2, 3e-2, 1e-1, 3e-1)),
    "Lion": (optax.lion, (1e-4, 3e-4, 1e-3, 3e-3)),
    "Adafactor": (optax.adafactor, (1e-2, 3e-2, 1e-1, 3e-1)),
    "Muon": (contrib.muon, (1e-3, 3e-3, 1e-2, 3e-2)),
}
"""Name -> optimizer, and the learning rates among which its best is found."""


def optimizers(bench: Bench) -> Findings:
    """Measures each optimizer at its best learning rate and at ten times that."""
    found, lines = Findings([], [], []), []
    for name, (make_tx, rates) in INNER.items():
        search = bench.cell(
            f"optimizers/{name}/search",
            lambda name=name, make_tx=make_tx, rates=rates: _rows(bench, name, make_tx, rates),
        )
        best = best_rate(search, rates)
        high = at_multiple(best, MULTIPLE)
        plain = bench.cell(
            f"optimizers/{name}/plain",
            lambda name=name, make_tx=make_tx, high=high: _rows(bench, name, make_tx, [high]),
        )
        guarded = bench.cell(
            f"optimizers/{name}/guarded",
            lambda name=name, make_tx=make_tx, best=best, high=high: _rows(
                bench, f"guard({name})", _guarded(make_tx), [best, high]
            ),
        )
        found.rows.extend([*search, *plain, *guarded])
        goal = losses(search, rate=best)
        results = [
            losses(rows, rate=r) for rows, r in ((plain, high), (guarded, best), (guarded, high))
        ]
        healthy, stressed = (mean(values) - mean(goal) for values in results[1:])
        found.bars.extend(
            [
                Bar(f"{name} {MULTIPLE}x: guard - its best", stressed, TOLERANCE),
                Bar(f"{name} 1x: guard - its best", healthy, TOLERANCE),
            ]
        )
        lines.append(
            [
                name,
                f"{best:g}",
                with_spread(goal),
                *map(with_spread, results),
                difference(healthy, TOLERANCE),
                difference(stressed, TOLERANCE),
            ]
        )
    heading = ["inside", "best LR", "plain 1x", "plain 10x", "guard 1x", "guard 10x"]
    heading += ["guard 1x - best", "guard 10x - best"]
    at_edge = "A best rate at an end of its grid may not be the best of all."
    found.tables.append(Table(f"Other optimizers, {TASK}", heading, lines, at_edge))
    return found


def _rows(bench: Bench, method: str, make_tx: Callable, rates: Any) -> list[dict[str, Any]]:
    p = bench.preset
    rows = sweep(bench.task(TASK), make_tx, p.steps, rates, p.seeds)
    return [{**row, "section": "optimizers", "method": method} for row in rows]


def _guarded(make_tx: Callable) -> Callable:
    return lambda rate: guard(make_tx(rate))
