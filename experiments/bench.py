"""What the suites `quality` and `study` share: results folder, tasks, finished cells, report."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from experiments.environment import described, made_with
from experiments.errors import check_names, checked_seeds, preset_of
from experiments.methods import Method
from experiments.presets import BenchPreset
from experiments.report import Table, write_report
from experiments.results import Results
from experiments.sweep import sweep
from experiments.tasks import TASKS, Task, language_tasks

Row = dict[str, Any]


class Bar(NamedTuple):
    """A requirement: a measured value and the most it may be."""

    name: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether the value is at most the limit; a value that is no number is not."""
        return self.value <= self.limit


class Findings(NamedTuple):
    """What a section found."""

    rows: list[Row]
    tables: list[Table]
    bars: list[Bar]


class Bench:
    """The tasks of a preset, and a results folder that remembers finished cells.

    Args:
      suite: Name of the suite.
      preset: Name of its size.
      presets: Name -> size.
      tasks: Names of the language-model tasks to measure on.
      seeds: Seeds of the runs; empty for the preset's.
      results: Folder for the results; the suite writes to SUITE/PRESET in it.
      fresh: Whether to start over.
    """

    def __init__(
        self,
        suite: str,
        preset: str,
        presets: Mapping[str, Callable[[], BenchPreset]],
        tasks: tuple[str, ...],
        seeds: tuple[int, ...],
        results: Path,
        fresh: bool,
    ):
        check_names("--tasks", tasks, TASKS)
        self.tasks = tuple(name for name in TASKS if name in tasks)
        chosen = preset_of(presets, preset)()
        self.preset = dataclasses.replace(chosen, seeds=checked_seeds(seeds) or chosen.seeds)
        config = described(suite, preset, self.preset)
        self._folder = Results(results / suite / preset, config, fresh=fresh)
        self._console = Console()
        self.task: Callable[[str], Task] = functools.cache(
            lambda name: language_tasks(self.preset, (name,))[name]
        )

    def cell(self, name: str, measure: Callable[[], Iterable[Row]]) -> list[Row]:
        """The rows of a cell: measured now, or by an earlier job in the same folder.

        Args:
          name: Name of the cell.
          measure: Makes its rows, at least one.

        Returns:
          The rows; a loss that is not finite is infinite.
        """
        rows = self._folder.cell(name)
        if not rows:
            started = time.time()
            measured = list(measure())
            seconds = time.time() - started
            self._folder.finish_cell(name, ({**row, "seconds": seconds} for row in measured))
            self._console.print(f"{name}: {seconds:.0f} s", highlight=False, soft_wrap=True)
            rows = self._folder.cell(name)
        return [row | {"loss": math.inf} if row.get("loss", 0.0) is None else row for row in rows]

    def sweep(
        self, section: str, task: str, name: str, method: Method, rates: Iterable[float]
    ) -> list[Row]:
        """The rows of one method over learning rates, with every seed: a cell of its own.

        Args:
          section: Name of the section.
          task: Name of the task.
          name: Name of the method.
          method: The method.
          rates: Learning rates.

        Returns:
          The rows of `sweep`, with `section` and `method`.
        """
        p = self.preset
        return self.cell(
            f"{section}/{task}/{name}",
            lambda: (
                {**row, "section": section, "method": name}
                for row in sweep(self.task(task), method, p.steps, list(rates), p.seeds)
            ),
        )

    def publish(
        self,
        title: str,
        question: str,
        found: Sequence[Findings],
        pictures: Mapping[str, bytes],
    ) -> None:
        """Writes summary, pictures and report, and prints the tables.

        Args:
          title: Title of the report.
          question: What the suite asks.
          found: What was found.
          pictures: File name -> PNG file.
        """
        tables = [table for findings in found for table in findings.tables]
        bars = [bar for findings in found for bar in findings.bars]
        if bars:
            tables.insert(0, _bar_table(bars))
        self._folder.write_csv("summary.csv", [row for findings in found for row in findings.rows])
        write_report(self._folder, title, question, tables, pictures, made_with())


def _bar_table(bars: Sequence[Bar]) -> Table:
    missed = [bar for bar in bars if not bar.met]
    rows = [[bar.name, f"{bar.value:+.3f}", f"{bar.limit:g}"] for bar in missed]
    heading = ["bar", "measured", "at most"]
    return Table(f"Bars missed: {len(missed)} of {len(bars)}", heading, rows)


def losses(rows: Iterable[Row], **where: Any) -> list[float]:
    """The losses of the rows with the given values."""
    return [row["loss"] for row in rows if all(row[key] == value for key, value in where.items())]


def mean(values: Sequence[float]) -> float:
    """The mean; infinite if one of them is."""
    return statistics.fmean(values)


def difference(value: float, limit: float = math.inf) -> str:
    """A difference for a reader; bold where it is above its limit."""
    text = f"{value:+.3f}" if math.isfinite(value) else "diverged"
    return text if value <= limit else f"**{text}**"


def ratio(value: float, limit: float) -> str:
    """A ratio for a reader; bold where it is above its limit."""
    return f"{value:.2f}" if value <= limit else f"**{value:.2f}**"


def best_rate(rows: Iterable[Row], rates: Sequence[float]) -> float:
    """The learning rate with the lowest mean loss."""
    rows = list(rows)
    return min(rates, key=lambda rate: mean(losses(rows, rate=rate)))
