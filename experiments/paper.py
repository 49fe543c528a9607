"""What the LBW-Guard paper reports, to stand beside what comes out here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.jobs import Job
from experiments.lab import Record, perplexities
from experiments.methods import ADAMW, GUARD
from experiments.report import Table

REFERENCE = "reference"
"""The paper's reference setting, whose learning rate it does not say."""

PERPLEXITIES = {
    ("Qwen/Qwen2.5-3B", REFERENCE): ("12.68 ± 0.14", "9.69 ± 0.06"),
    ("Qwen/Qwen2.5-7B", REFERENCE): ("13.21", "10.74"),
    ("Qwen/Qwen2.5-7B", "LR 0.001"): ("659.76", "10.33"),
    ("Qwen/Qwen2.5-7B", "LR 0.003"): ("1885.24", "11.57"),
}
"""(Model, setting) -> final perplexity of AdamW and of LBW-Guard."""

SECONDS = {"Qwen/Qwen2.5-7B": ("392.54", "357.02")}
"""Model -> seconds of AdamW and of LBW-Guard, end to end, at the reference setting."""

Rows = list[list[str]]


def perplexity_rows(job: Job, records: Mapping[tuple[str, float], Sequence[Record]]) -> Rows:
    """A job's perplexities beside the paper's.

    Args:
      job: What was fine-tuned.
      records: (Method, multiple of the reference learning rate) -> records, one per seed.

    Returns:
      A row for each setting that both have, for `paper_table`.
    """
    rows = []
    for multiple in sorted({multiple for _, multiple in records}):
        setting = REFERENCE if multiple == 1 else f"LR {job.rate(multiple):g}"
        theirs = PERPLEXITIES.get((job.base.name, setting))
        if theirs and {(ADAMW, multiple), (GUARD, multiple)} <= records.keys():
            ours = (perplexities(records[method, multiple]) for method in (ADAMW, GUARD))
            rows.append(_row(f"{job.base.name}, {setting}: perplexity", theirs, tuple(ours)))
    return rows


def seconds_rows(job: Job, adamw: str, guarded: str) -> Rows:
    """Seconds of two runs at the reference setting, end to end, beside the paper's, if it has them.

    Args:
      job: What was fine-tuned.
      adamw: Seconds of AdamW.
      guarded: Seconds of the guard.

    Returns:
      A row or none, for `paper_table`.
    """
    theirs = SECONDS.get(job.base.name)
    label = f"{job.base.name}, {REFERENCE}: seconds, end to end"
    return [_row(label, theirs, (adamw, guarded))] if theirs else []


def paper_table(rows: Rows) -> list[Table]:
    """The table of what the paper has too; none without rows."""
    heading = ["", "AdamW, paper", "AdamW, here", "LBW-Guard, paper", "guard, here"]
    return [Table("Beside the paper", heading, rows)] if rows else []


def _row(label: str, theirs: tuple[str, str], ours: tuple[str, str]) -> list[str]:
    return [label, theirs[0], ours[0], theirs[1], ours[1]]
