"""The table of a learning-rate sweep, on the terminal and in `report.md`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

GUARD_COLUMNS = {
    "guard_control_active_steps": "active steps",
    "guard_min_scale_seen": "min scale",
    "guard_backtracks": "backtracks",
    "guard_held_steps": "held",
    "guard_regime_switches": "switches",
    "guard_regime": "last regime",
}
"""Key of a guarded run's record -> heading of its column."""


def number(value: Any) -> str:
    """A number for a reader: three to four significant digits, `diverged` where it is none."""
    if isinstance(value, str | int):
        return str(value)
    if not math.isfinite(value):
        return "diverged"
    return f"{value:.3g}" if value < 0.1 or value >= 1000 else f"{value:.2f}"


def perplexity_rows(
    curves: Mapping[str, Sequence[tuple[float, float]]], multiples: Sequence[float]
) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of perplexity by learning rate (down) and method (across).

    Args:
      curves: Method -> its (learning rate, perplexity) points.
      multiples: The learning rates in units of the reference.

    Returns:
      The heading, and the rows, all as text.
    """
    rates = [rate for rate, _ in next(iter(curves.values()))]
    rows = [
        [f"{multiple:g}x", f"{rate:g}", *(number(points[i][1]) for points in curves.values())]
        for i, (multiple, rate) in enumerate(zip(multiples, rates, strict=True))
    ]
    return ["LR", "learning rate", *curves], rows


def guard_rows(
    records: Sequence[Mapping[str, Any]], multiples: Sequence[float]
) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of what the guard did.

    Args:
      records: The records of the guarded runs, by learning rate.
      multiples: The learning rates in units of the reference.

    Returns:
      The heading, and the rows, all as text.
    """
    rows = [
        [f"{multiple:g}x", *(number(record[field]) for field in GUARD_COLUMNS)]
        for multiple, record in zip(multiples, records, strict=True)
    ]
    return ["LR", *GUARD_COLUMNS.values()], rows


def print_table(console: Console, title: str, heading: list[str], rows: list[list[str]]) -> None:
    """Prints a table to the terminal."""
    table = Table(title=title, title_justify="left")
    for name in heading:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown_table(heading: list[str], rows: list[list[str]]) -> str:
    """The same table in Markdown."""
    lines = [heading, ["---:"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
