"""Faults and variants at AdamW's best learning rate: what they cost AdamW, and what the guard."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from experiments.bench import Bar, Bench, Findings, Row, difference, losses, mean
from experiments.faults import drills
from experiments.methods import adamw, behind_guard, warmup_cosine
from experiments.report import Table, with_spread
from experiments.sections.stress import adamw_best_rate
from experiments.sweep import sweep

TASKS = ("lora", "scratch")

TOLERANCE = 0.05
"""Nats that the guarded run with a fault may end above plain AdamW without one."""

PLAIN, GUARDED = "AdamW", "guard"


class Variant(NamedTuple):
    """Another way to train, without faults."""

    make_tx: Callable[[Any, int], optax.GradientTransformation]
    """From the learning rate and the number of steps to the optimizer."""
    batch_factor: float = 1.0
    """Sequences per step, in units of the preset's."""
    dtype: Any = None
    """Dtype of the parameters."""


VARIANTS = {
    "b2 = 0.95": Variant(lambda rate, steps: optax.adamw(rate, b2=0.95)),
    "b2 = 0.99": Variant(lambda rate, steps: optax.adamw(rate, b2=0.99)),
    "batch x4": Variant(lambda rate, steps: adamw(rate), batch_factor=4),
    "batch / 4": Variant(lambda rate, steps: adamw(rate), batch_factor=0.25),
    "warmup + cosine": Variant(warmup_cosine),
    "bfloat16 parameters": Variant(lambda rate, steps: adamw(rate), dtype=jnp.bfloat16),
}
"""Name -> variant; AdamW's own `b2 = 0.999` is what all faults are measured with."""


def faults(bench: Bench) -> Findings:
    """Measures every fault and every variant on two tasks."""
    found = Findings([], [], [])
    tasks = [name for name in TASKS if name in bench.tasks]
    for task in tasks:
        rate = adamw_best_rate(bench, task)
        rows = _faulty_rows(bench, task, rate) + _variant_rows(bench, task, rate)
        found.rows.extend(rows)
        lines = []
        for name in dict.fromkeys(row["fault"] for row in rows):
            plain, guarded = (losses(rows, fault=name, method=m) for m in (PLAIN, GUARDED))
            clean = plain if name in VARIANTS else losses(rows, fault="none", method=PLAIN)
            cost = mean(guarded) - mean(clean)
            found.bars.append(Bar(f"{task}, {name}: guard - clean AdamW", cost, TOLERANCE))
            active = [row["active"] for row in rows if row["fault"] == name and "active" in row]
            lines.append(
                [
                    name,
                    with_spread(clean),
                    with_spread(plain),
                    with_spread(guarded),
                    difference(cost, TOLERANCE),
                    f"{mean(active):.0f}",
                ]
            )
        heading = ["fault or variant", "clean AdamW", "AdamW", "guard", "guard - clean", "active"]
        found.tables.append(Table(f"Faults, {task} at {rate:g}", heading, lines))
    return found


def _faulty_rows(bench: Bench, task: str, rate: float) -> list[Row]:
    p = bench.preset

    def measure(method: str):
        make_tx = behind_guard(adamw) if method == GUARDED else adamw
        rows = sweep(bench.task(task), make_tx, p.steps, [rate], p.seeds, faults=drills(p.steps))
        return [row | {"section": "faults", "method": method} for row in rows]

    return [
        row
        for method in (PLAIN, GUARDED)
        for row in bench.cell(f"faults/{task}/{method}", lambda method=method: measure(method))
    ]


def _variant_rows(bench: Bench, task: str, rate: float) -> list[Row]:
    p = bench.preset

    def measure(name: str, variant: Variant):
        size = max(round(p.batch_size * variant.batch_factor), 1)
        changed = dataclasses.replace(bench.task(task), batch_size=size)
        for method in (PLAIN, GUARDED):
            make_tx = lambda rate: variant.make_tx(rate, p.steps)  # noqa: E731
            make_tx = behind_guard(make_tx) if method == GUARDED else make_tx
            rows = sweep(changed, make_tx, p.steps, [rate], p.seeds, dtype=variant.dtype)
            for row in rows:
                yield row | {"section": "faults", "method": method, "fault": name}

    return [
        row
        for name, variant in VARIANTS.items()
        for row in bench.cell(
            f"faults/{task}/{name}",
            lambda name=name, variant=variant: measure(name, variant),
        )
    ]
