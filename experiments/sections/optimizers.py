"""Other optimizers inside the guard, at ten times the best learning rate of each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax import contrib

from experiments.bench import Bar, Bench, Findings, best_rate, difference, losses, mean
from experiments.methods import behind_guard
from experiments.presets import half_decades
from experiments.report import Table, with_spread
from experiments.sweep import sweep

TASK = "scratch"

TOLERANCE = 0.1
"""Nats that the guarded run may end above the optimizer's best."""


def _muon(learning_rate: Any) -> optax.GradientTransformation:
    """Muon for the layers' matrices, which are stacked, and Adam for all else.

    By default it would take the stacked norms and biases, one row per layer, for matrices.
    """
    matrix = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    kinds = functools.partial(jax.tree.map, lambda x: matrix if x.ndim == 3 else None)
    return contrib.muon(learning_rate, muon_weight_dimension_numbers=kinds)


INNER: dict[str, tuple[Callable[[Any], optax.GradientTransformation], tuple[float, ...]]] = {
    "SGD + momentum": (lambda rate: optax.sgd(rate, momentum=0.9), half_decades(-3, 7)),
    "Lion": (optax.lion, half_decades(-5, 7)),
    "Adafactor": (optax.adafactor, half_decades(-3, 7)),
    "Muon": (_muon, half_decades(-4, 7)),
}
"""Name -> optimizer, and learning rates half a decade apart: its best is among all but the last
two, so that ten times that is among them too."""


def optimizers(bench: Bench) -> Findings:
    """Measures each optimizer at its best learning rate and at ten times that."""
    found, lines = Findings([], [], []), []
    for name, (make_tx, rates) in INNER.items():
        plain = bench.cell(
            f"optimizers/{name}",
            lambda name=name, make_tx=make_tx, rates=rates: _rows(bench, name, make_tx, rates),
        )
        best = best_rate(plain, rates[:-2])
        high = rates[rates.index(best) + 2]
        guarded = bench.cell(
            f"optimizers/guard({name})",
            lambda name=name, make_tx=make_tx, chosen=(best, high): _rows(
                bench, f"guard({name})", behind_guard(make_tx), chosen
            ),
        )
        found.rows.extend([*plain, *guarded])
        results = [losses(rows, rate=rate) for rows in (plain, guarded) for rate in (best, high)]
        healthy, stressed = (mean(values) - mean(results[0]) for values in results[2:])
        found.bars.extend(
            [
                Bar(f"{name} 10x: guard - its best", stressed, TOLERANCE),
                Bar(f"{name} 1x: guard - its best", healthy, TOLERANCE),
            ]
        )
        differences = (difference(value, TOLERANCE) for value in (healthy, stressed))
        lines.append([name, f"{best:g}", *map(with_spread, results), *differences])
    heading = ["inside", "best LR", "plain 1x", "plain 10x", "guard 1x", "guard 10x"]
    heading += ["guard 1x - best", "guard 10x - best"]
    note = "A best rate at an end of its grid may not be the best of all."
    found.tables.append(Table(f"Other optimizers, {TASK}", heading, lines, note))
    return found


def _rows(bench: Bench, method: str, make_tx: Callable, rates: Any) -> list[dict[str, Any]]:
    p = bench.preset
    rows = sweep(bench.task(TASK), make_tx, p.steps, rates, p.seeds)
    return [{**row, "section": "optimizers", "method": method} for row in rows]
