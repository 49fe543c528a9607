"""A results folder: what a suite has measured so far, safe against interruption.

- `config.json`: all that the numbers depend on.
- `metrics.jsonl`: one object per step, and one per measurement of the held-out loss; `null` stands
  for a number that is not finite.
- `events.jsonl`: what the guard did, one object per event; steps count from 1 there, too.
- `runs.json`: one record per finished run.
- `rows.jsonl`: for suites of many short runs, one object per run, whole cells at a time.
- `checkpoints`: the state of the unfinished run.

Files are replaced in one move, so that a reader never sees half of one; `metrics.jsonl` and
`events.jsonl` grow while a run goes on, and lose what is past its checkpoint when it is resumed.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import io
import json
import math
import os
import shutil
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.locks import claim

_CONFIG, _METRICS, _EVENTS, _RUNS = "config.json", "metrics.jsonl", "events.jsonl", "runs.json"
_ROWS = "rows.jsonl"
_CHECKPOINTS = "checkpoints"
_SHOWN = ("report.md", "summary.csv")
"""What a job makes of its records at the end; without them it would speak of another."""
_KEYS = {_METRICS: {"run", "step"}, _EVENTS: {"run"}, _ROWS: {"cell"}}
"""What each object of a file has."""
_MEASURED = (_METRICS, _EVENTS, _RUNS, _ROWS, _CHECKPOINTS)


class Results:
    """The results folder of one suite with one configuration, for one process at a time.

    Args:
      folder: The folder; made if it is missing.
      config: All that the numbers depend on, as JSON types.
      fresh: Whether to start over, dropping what the folder holds of an earlier job at the first
        write.
    """

    def __init__(self, folder: Path, config: dict[str, Any], *, fresh: bool):
        self.folder = folder
        self._config = config
        self._stale = fresh
        """Whether the folder holds what the first write will drop: a job that fails before it
        measured anything takes nothing away."""
        with self._writable():
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = claim(folder)
            if not fresh:
                self._adopt()
        self.runs: dict[str, dict[str, Any]] = self._read_json(_RUNS, {})

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write results to {self.folder}: {error.strerror}") from error

    def of_another(self, what: str) -> UserError:
        """The error for a folder whose results are of something else."""
        return UserError(
            f"{self.folder} holds results of another {what}: choose another --results, or --fresh "
            "to start over"
        )

    def damaged(self, name: str = _METRICS) -> UserError:
        """The error for a file of the folder that is not as it was written."""
        return UserError(f"{self.folder / name} is damaged: use --fresh to start over")

    def checkpoint_folder(self, run: str) -> Path:
        """Where an unfinished run keeps its state; that of an earlier job is dropped first."""
        self._begin()
        return self.folder / _CHECKPOINTS / urllib.parse.quote(run, safe=" ")

    def start(self, run: str, step: int) -> list[dict[str, Any]]:
        """Prepares the logs for a run that goes on after `step` steps.

        Returns:
          The run's rows of the metrics up to there; what is past it is dropped.
        """
        kept = self._filter(_METRICS, lambda row: row["run"] != run or row["step"] <= step)
        self._filter(_EVENTS, lambda row: row["run"] != run)
        rows = [row for row in kept if row["run"] == run]
        if sum("loss" in row for row in rows) != step:
            raise self.damaged()
        return rows

    def log_metrics(self, rows: Iterable[dict[str, Any]]) -> None:
        """Appends objects with `run` and `step` to the metrics."""
        self._append(_METRICS, rows)

    def finish(
        self, run: str, record: dict[str, Any], events: Iterable[dict[str, Any]] = ()
    ) -> None:
        """Records a finished run and drops its checkpoint."""
        self._append(_EVENTS, ({"run": run, **event} for event in events))
        self.runs[run] = _finite(record)
        self.write(_RUNS, json.dumps(self.runs, indent=2, allow_nan=False))
        shutil.rmtree(self.checkpoint_folder(run), ignore_errors=True)

    def finish_cell(self, cell: str, rows: Iterable[dict[str, Any]]) -> None:
        """Records the rows of a finished cell: a group of runs that were measured together."""
        lines = [*self._read_jsonl(_ROWS), *({"cell": cell, **row} for row in rows)]
        self.write(_ROWS, "".join(map(_json_line, lines)))

    def cell(self, cell: str) -> list[dict[str, Any]]:
        """The rows of a finished cell, in order; none if it is not finished."""
        return [row for row in self._read_jsonl(_ROWS) if row["cell"] == cell]

    def metrics(self, *runs: str) -> list[dict[str, Any]]:
        """The metrics of the steps of some runs, in order; a finished run's are complete."""
        rows = [row for row in self._read_jsonl(_METRICS) if row["run"] in runs and "loss" in row]
        steps = collections.Counter(row["run"] for row in rows)
        if any(run in self.runs and steps[run] != self.runs[run]["steps"] for run in runs):
            raise self.damaged()
        return rows

    def evaluations(self, run: str) -> list[dict[str, Any]]:
        """The measurements of the held-out loss of one run, in order."""
        rows = self._read_jsonl(_METRICS)
        return [row for row in rows if row["run"] == run and "heldout_loss" in row]

    def write(self, name: str, content: str | bytes) -> None:
        """Replaces a file of the folder in one move."""
        self._begin()
        replace_file(self.folder / name, content)

    def write_csv(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Replaces a table of the folder; its columns are the keys of all rows, in order."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.write(name, buffer.getvalue())

    def _begin(self) -> None:
        """Drops what an earlier job left, if the user said so."""
        if self._stale:
            with self._writable():
                self._clear()
                self._stale = False
                self._adopt()

    def _adopt(self) -> None:
        config = json.loads(json.dumps(self._config))  # As it will be read back: tuples as lists.
        found = self._read_json(_CONFIG, {})
        differing = sorted(k for k in config.keys() | found.keys() if config.get(k) != found.get(k))
        # A job that failed before it measured anything leaves its settings and nothing else.
        if differing and any((self.folder / name).exists() for name in _MEASURED):
            raise self.of_another(f"job (different {', '.join(differing)})")
        self.write(_CONFIG, json.dumps(config, indent=2))

    def _clear(self) -> None:
        # Only what a job writes: the folder is the user's, and may hold more.
        shutil.rmtree(self.folder / _CHECKPOINTS, ignore_errors=True)
        # The settings last: a kill before that leaves a folder that another job does not adopt.
        for name in (*_SHOWN, _METRICS, _EVENTS, _RUNS, _ROWS, _CONFIG):
            (self.folder / name).unlink(missing_ok=True)

    def _read_json(self, name: str, default: Any) -> Any:
        text = self._read(name)
        return default if text is None else self._parse(name, text)

    def _read_jsonl(self, name: str) -> list[dict[str, Any]]:
        return [self._parse(name, line) for line in self._lines(name)[:-1]]

    def _parse(self, name: str, text: str) -> Any:
        try:
            found = json.loads(text)
        except ValueError as error:
            raise self.damaged(name) from error
        if not isinstance(found, dict) or not _KEYS.get(name, set()) <= found.keys():
            raise self.damaged(name)
        return found

    def _lines(self, name: str) -> list[str]:
        """The lines of a file; the last is empty, or one that a killed job did not finish."""
        return (self._read(name) or "").split("\n")

    def _read(self, name: str) -> str | None:
        """A file of this job, if there is one; bytes that are no text will not parse."""
        path = self.folder / name
        if self._stale or not path.exists():
            return None
        return path.read_text(errors="replace")

    def _filter(self, name: str, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        *lines, torn = self._lines(name)
        rows = [self._parse(name, line) for line in lines]
        kept = [row for row in rows if keep(row)]
        if torn or len(kept) < len(rows):  # A new run has nothing to drop.
            self.write(name, "".join(map(_json_line, kept)))
        return kept

    def _append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        self._begin()
        with (self.folder / name).open("a") as file:
            file.write("".join(map(_json_line, rows)))


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file in one move, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def _json_line(row: dict[str, Any]) -> str:
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The value with None in the place of every number that is not finite, at any depth."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
