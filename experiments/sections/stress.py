"""Learning rates up to 300 times too high: the guard against AdamW and against every peer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from experiments.bench import (
    Bar,
    Bench,
    Findings,
    Row,
    best_rate,
    difference,
    losses,
    mean,
)
from experiments.methods import ADAMW, GUARD, LOWER, RATE_FREE, baselines, chosen
from experiments.report import Table, with_spread

TOLERANCE = {"lora": 0.01, "scratch": 0.02, "full": 0.02, "words": 0.02, "usual": 0.02}
"""Nats that the guard may end above AdamW's best when the learning rate is too high."""

HEALTHY_TOLERANCE = 0.02
"""Nats that the guard may end above AdamW at the same learning rate, up to the best one."""


def stress(bench: Bench, methods: Sequence[str] = ()) -> Findings:
    """Measures methods at multiples of AdamW's best learning rate on each task.

    Args:
      bench: Where to measure.
      methods: What is compared with AdamW and the guard; empty for every peer.

    Returns:
      What was found.
    """
    found = Findings([], [], [])
    compared = _compared(bench.preset.steps, methods)
    for name in bench.tasks:
        multiples = multiples_of_best(bench, name)
        rows = [row for method in compared for row in _rows(bench, name, method, multiples)]
        found.rows.extend(rows)
        table, bars = _judge(name, multiples, rows)
        found.tables.append(table)
        found.bars.extend(bars)
    return found


def _compared(steps: int, methods: Sequence[str]) -> list[str]:
    """The names of AdamW, of what is compared with it, and of the guard, in this order.

    AdamW at a tenth of the rate is never among them: that has a column of its own.
    """
    known = {name: method for name, method in baselines(steps).items() if name != LOWER}
    kept = {ADAMW, GUARD, *chosen(methods, tuple(known), known)}
    return [name for name in known if name in kept]


def adamw_best_rate(bench: Bench, name: str) -> float:
    """AdamW's best learning rate on a task, on the preset's grid."""
    return best_rate(_cell(bench, name, ADAMW, bench.preset.rates), bench.preset.rates)


def multiples_of_best(bench: Bench, name: str) -> dict[float, float]:
    """Learning rate -> its name in units of AdamW's best on a task: 0.33, 1, 3, 10, ..."""
    rates = bench.preset.rates
    best = rates.index(adamw_best_rate(bench, name))
    names = (0.33, 1, 3, 10, 30, 100, 300, 1000)[: bench.preset.stressed_rates + 2]
    first = best - 1
    return {rates[first + i]: n for i, n in enumerate(names) if 0 <= first + i < len(rates)}


def _cell(bench: Bench, name: str, method: str, rates: Iterable[float]) -> list[Row]:
    make = baselines(bench.preset.steps)[method]
    return bench.sweep("stress", name, method, make, rates)


def _rows(bench: Bench, name: str, method: str, multiples: dict[float, float]) -> list[Row]:
    if method in RATE_FREE:
        rows = _cell(bench, name, method, [1.0])  # Whatever the rate: measured once.
        return [row | {"multiple": multiple} for multiple in multiples.values() for row in rows]
    rates = bench.preset.rates if method == ADAMW else multiples
    rows = _cell(bench, name, method, rates)
    return [row | {"multiple": multiples[row["rate"]]} for row in rows if row["rate"] in multiples]


def _judge(name: str, rates: dict[float, float], rows: list[Row]) -> tuple[Table, list[Bar]]:
    multiples = list(rates.values())
    methods = list(dict.fromkeys(row["method"] for row in rows))
    at = {
        (method, multiple): losses(rows, method=method, multiple=multiple)
        for method in methods
        for multiple in multiples
    }
    best = min(mean(at[ADAMW, multiple]) for multiple in multiples)
    lines = [[method, *(with_spread(at[method, m]) for m in multiples)] for method in methods]
    above_best, above_peers, bars = [], [], []
    for m in multiples:
        guarded = mean(at[GUARD, m])
        rivals = {method: mean(at[method, m]) for method in methods if method != GUARD}
        rival = min(rivals, key=rivals.get)
        if m > 1:
            bar = Bar(f"{name} {m:g}x: guard - AdamW's best", guarded - best, TOLERANCE[name])
            other = Bar(f"{name} {m:g}x: guard - best peer ({rival})", guarded - rivals[rival], 0.0)
            bars += [bar, other]
        else:
            same = guarded - rivals[ADAMW]
            bar = Bar(f"{name} {m:g}x: guard - AdamW", same, HEALTHY_TOLERANCE)
            other = Bar("", guarded - rivals[rival], float("inf"))
            bars.append(bar)
        above_best.append(difference(bar.value, bar.limit))
        above_peers.append(f"{difference(other.value, other.limit)} ({rival})")
    guard = [row for row in rows if row["method"] == GUARD]
    counters = [
        [
            f"guard: {label}",
            *(
                f"{mean([row[key] for row in guard if row['multiple'] == m]):.3g}"
                for m in multiples
            ),
        ]
        for key, label in (
            ("active", "control-active steps"),
            ("holds", "held"),
            ("backtracks", "backtracks"),
            ("min_scale", "lowest scale"),
        )
    ]
    lines += [
        ["guard - AdamW (best, or the same up to 1x)", *above_best],
        ["guard - best peer", *above_peers],
        *counters,
    ]
    heading = ["learning rate", *(f"{rate:g} ({m:g}x)" for rate, m in rates.items())]
    note = (
        f"Held-out loss in nats. AdamW's best: {best:.3f}. {' and '.join(RATE_FREE)} set their "
        "own learning rate: their multiplier is 1, as their authors advise, in every column."
    )
    return Table(f"Stress, {name}", heading, lines, note), bars
