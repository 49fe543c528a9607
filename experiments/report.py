"""Tables and reports, on the terminal and in `report.md`."""

from __future__ import annotations

import math
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import rich.table
from rich.console import Console

from experiments.results import Results

_WIDEST = 10_000
"""Columns of the widest table; more than any has."""


class Table(NamedTuple):
    """A table of a report.

    Attributes:
      title: What it shows.
      heading: Names of the columns.
      rows: The rows, as text.
      note: What a reader needs to know to read it.
    """

    title: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def number(value: Any) -> str:
    """A number for a reader: two digits or more, `diverged` where it is none."""
    if isinstance(value, str | int):
        return str(value)
    if not math.isfinite(value):
        return "diverged"
    if abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.2f}"


def with_spread(values: Sequence[float], form: Callable[[float], str] = "{:.3f}".format) -> str:
    """Mean and standard deviation over seeds, for a reader.

    Args:
      values: One value per seed.
      form: How a number is written.

    Returns:
      Both, or the value of the only one; of the finite values, with the number of the others.
    """
    finite = list(filter(math.isfinite, values))
    if not finite:
        return "diverged"
    middle = form(statistics.fmean(finite))
    found = middle if len(finite) < 2 else f"{middle} ± {form(statistics.stdev(finite))}"
    lost = len(values) - len(finite)
    return f"{found} ({lost} of {len(values)} diverged)" if lost else found


def guard_table(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """What the guard did in each run.

    Args:
      records: Label -> the records of a guarded run, one per seed.

    Returns:
      The table, a row per run; seeds stand beside each other where they differ.
    """
    columns = {
        "guard_control_active_steps": "active steps",
        "guard_min_scale_seen": "min scale",
        "guard_backtracks": "backtracks",
        "guard_held_steps": "held",
        "guard_regime_switches": "switches",
        "guard_regime": "last regime",
    }
    rows = [
        [label, *(_side_by_side(record[field] for record in found) for field in columns)]
        for label, found in records.items()
    ]
    return Table("What the guard did", ["run", *columns.values()], rows)


def _side_by_side(values: Iterable[Any]) -> str:
    texts = list(map(number, values))
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def write_report(
    folder: Results,
    title: str,
    question: str,
    tables: Sequence[Table],
    pictures: Mapping[str, bytes],
    made: Sequence[str] = (),
) -> None:
    """Writes pictures and `report.md`, and prints the tables.

    Args:
      folder: Where to.
      title: Heading of the report.
      question: What the suite asks, in Markdown.
      tables: What came out.
      pictures: File name -> PNG file.
      made: How the report was made besides the command, a point each.
    """
    for name, picture in pictures.items():
        folder.write(name, picture)
    parts = [f"# {title}", question, *(f"![{name}]({name})" for name in pictures)]
    for table in tables:
        parts += [f"## {table.title}", _markdown(table)]
        if table.note:
            parts.append(table.note)
    command = f"command: `python -m experiments {shlex.join(sys.argv[1:])}`"
    parts += ["## How it was made", "\n".join(f"- {point}" for point in (command, *made))]
    folder.write("report.md", "\n\n".join(parts) + "\n")
    console = Console()
    for table in tables:
        _print(console, table)
    console.print(f"report, pictures and logs: {folder.folder}", soft_wrap=True)


def _print(console: Console, table: Table) -> None:
    shown = rich.table.Table(title=table.title, title_justify="left")
    for name, *cells in zip(table.heading, *table.rows, strict=True):
        longest = max(len(word) for text in (name, *cells) for word in [*text.split(), ""])
        shown.add_column(name, justify="right", min_width=longest)
    for row in table.rows:
        shown.add_row(*row)
    # Lines break between words; a number or a name cut short is none.
    found = console.measure(shown, options=console.options.update(max_width=_WIDEST))
    needed = found.minimum if console.is_terminal else found.maximum
    console.width = max(console.width, needed)
    console.print(shown)


def _markdown(table: Table) -> str:
    lines = [table.heading, ["---:"] * len(table.heading), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
