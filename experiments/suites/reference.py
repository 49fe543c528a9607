"""The suite `reference`: what the guard costs and gives where nothing goes wrong."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from experiments import jobs, plots
from experiments.finetune import Run
from experiments.jobs import Job
from experiments.lab import Arguments, Lab, Record, of_loss, perplexities
from experiments.methods import ADAMW, GUARD, baselines
from experiments.paper import paper_table, perplexity_rows, seconds_rows
from experiments.report import Table, guard_table, number, with_spread


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """Settings of the suite."""

    job: Job
    """What is fine-tuned."""
    eval_steps: int
    """Steps between measurements of the held-out loss, for the time to a perplexity."""


PRESETS = {
    "nano": ReferenceConfig(jobs.NANO, eval_steps=40),
    "small": ReferenceConfig(jobs.SMALL, eval_steps=50),
    "paper": ReferenceConfig(jobs.PAPER["7B"], eval_steps=20),
}
"""Name -> settings."""


def reference(options: Arguments) -> None:
    """Fine-tunes at the reference learning rate with AdamW, the guard and every peer.

    Args:
      options: What every suite asks.
    """
    lab = Lab("reference", options, PRESETS)
    job = lab.config.job
    methods = baselines(job.steps)
    runs = {name: Run(name, name, job.reference_lr) for name in methods}
    zero_step = lab.zero_step(job)
    records = lab.measure(job, runs, methods, lab.config.eval_steps)
    curves = {
        name: [_curve(lab, seeded) for seeded in lab.names(run)] for name, run in runs.items()
    }
    targets = [record["heldout_loss"] for record in records[ADAMW]]
    rows = []
    for name, found in records.items():
        seconds = [record["seconds"] for record in found]
        times = map(_time_to, curves[name], targets)
        rows.append(
            [
                name,
                perplexities(found),
                _whole(found),
                with_spread(seconds, _tenths),
                with_spread([1000 * s / job.steps for s in seconds], _tenths),
                _reached([time for time in times if time is not None], len(found)),
            ]
        )
    heading = [
        "method",
        "perplexity",
        "seconds, end to end",
        "of training",
        "ms per step",
        "seconds to AdamW's perplexity",
    ]
    tables = [
        Table(
            f"Reference setting (zero-step {number(zero_step)})",
            heading,
            rows,
            "End to end is the first seed's run, with compilation, evaluations and checkpoints, "
            f"{ADAMW}'s also with what a process does once, since it is the first; the other times "
            "are of training alone. The time to AdamW's final perplexity is known "
            f"to {lab.config.eval_steps} steps, and counts seeds that reach it.",
        )
    ]
    tables += paper_table(
        perplexity_rows(job, {(name, 1): found for name, found in records.items()})
        + seconds_rows(job, _whole(records[ADAMW]), _whole(records[GUARD]))
    )
    guarded = [name for name in records if "guard_regime" in records[name][0]]
    tables.append(guard_table({name: records[name] for name in guarded}))
    finite = {
        name: [(s, of_loss(loss)) for s, loss in first if math.isfinite(of_loss(loss))]
        for name, (first, *_) in curves.items()
    }
    lab.publish(
        "Reference setting",
        f"What does each method make of {job.base.name} at its reference learning rate "
        f"({job.reference_lr:g}), and what does it cost?",
        tables,
        {"perplexity.png": plots.over_time(finite, "seconds", "held-out perplexity")},
    )


_tenths = "{:.1f}".format


def _whole(records: Sequence[Record]) -> str:
    """Seconds of the first seed's run, end to end."""
    seconds = records[0]["end_to_end_seconds"]
    return "resumed" if seconds is None else _tenths(seconds)


Curve = Sequence[tuple[float, float | None]]


def _curve(lab: Lab[ReferenceConfig], run: str) -> Curve:
    """(Seconds of training, held-out loss) over a run."""
    return [(row["seconds"], row["heldout_loss"]) for row in lab.folder.evaluations(run)]


def _time_to(curve: Curve, target: float | None) -> float | None:
    """Seconds until a held-out loss is reached, if it is; None stands for one that is no number."""
    found = (s for s, loss in curve if loss is not None and (target is None or loss <= target))
    return next(found, None)


def _reached(times: Sequence[float], seeds: int) -> str:
    """Mean time of the seeds that reach their target."""
    if not times:
        return "not reached"
    some = f" ({len(times)} of {seeds} seeds)" if len(times) < seeds else ""
    return f"{with_spread(times, _tenths)}{some}"
