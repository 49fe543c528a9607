"""The suite `lr-stress`: what a too-high learning rate does to a fine-tune, with and without guard.

By default a small decoder is pretrained on Python code and fine-tuned with LoRA on English prose,
from a tuned learning rate to 300 times that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from experiments import jobs, plots
from experiments.jobs import Job
from experiments.lab import (
    Arguments,
    Lab,
    Methods,
    Options,
    Record,
    at_rates,
    mean_perplexity,
    perplexities,
    perplexity,
)
from experiments.methods import ADAMW, GUARD, RATE_FREE, baselines, chosen
from experiments.paper import paper_table, perplexity_rows
from experiments.report import Table, guard_table, number, with_spread

PLOTTED_MULTIPLE = 100
"""Largest learning rate of the two runs that are drawn over time, in units of the reference."""

METHODS = (ADAMW, "AdamW + clip", GUARD)
"""What is compared by default."""

STRONGEST = ("mechanize", *RATE_FREE)
"""The peers that no learning rate of the nano table ruins."""


@dataclasses.dataclass(frozen=True)
class LrStressConfig:
    """Settings of the suite."""

    job: Job
    """What is fine-tuned."""
    multiples: tuple[float, ...] = (1, 3, 10, 30, 100, 300)
    """Learning rates, in units of the job's reference."""
    methods: tuple[str, ...] = METHODS
    """What is compared, where the user does not choose."""


PRESETS = {
    "nano": LrStressConfig(jobs.NANO),
    "small": LrStressConfig(jobs.SMALL, methods=(ADAMW, *STRONGEST, GUARD)),
    "stories": LrStressConfig(jobs.STORIES, (0.1, 0.3, 1, 3, 10, 30, 100)),
    "paper": LrStressConfig(jobs.PAPER["7B"], (0.5, 1, 2.5, 5, 15, 50)),
}
"""Name -> settings."""


def lr_stress(options: Arguments, methods: Methods = ()) -> None:
    """Fine-tunes at the reference learning rate and far above it, with and without guard.

    Run the same command again to resume an interrupted job, or to see the results of a finished
    one.

    Args:
      options: What every suite asks.
      methods: What is compared.
    """
    sweep_rates("lr-stress", "Learning-rate stress", options, PRESETS, methods)


def sweep_rates(
    suite: str,
    title: str,
    options: Options,
    presets: Mapping[str, LrStressConfig],
    methods: tuple[str, ...],
) -> None:
    """Measures methods over learning rates, as a suite.

    Args:
      suite: Name of the suite.
      title: Title of its report.
      options: What every suite asks.
      presets: Name -> the suite's settings.
      methods: What is compared; see `chosen`.
    """
    lab = Lab(suite, options, presets)
    job, multiples = lab.config.job, lab.config.multiples
    compared = chosen(methods, lab.config.methods, baselines(job.steps))
    runs = at_rates(job, compared, multiples)
    zero_step = lab.zero_step(job)
    records = lab.measure(job, runs, compared)
    curves = {
        method: [(job.rate(multiple), records[method, multiple]) for multiple in multiples]
        for method in compared
    }
    means = {
        method: [(rate, mean_perplexity(found)) for rate, found in points]
        for method, points in curves.items()
    }
    tables = [_curve_table(curves, multiples, zero_step), _sensitivity_table(curves, zero_step)]
    tables += paper_table(perplexity_rows(job, records))
    if GUARD in compared:
        tables.append(guard_table({f"{m:g}x": records[GUARD, m] for m in multiples}))
    best = min(ppl for _, ppl in means[ADAMW]) if ADAMW in compared else None
    heading = f"{job.base.name} on {options.data or job.corpus}"
    pictures = {"perplexity.png": plots.lr_curves(means, zero_step, best, heading)}
    if {ADAMW, GUARD} <= compared.keys():
        drawn = max(m for m in multiples if m <= PLOTTED_MULTIPLE)
        stressed = {method: lab.names(runs[method, drawn])[0] for method in (ADAMW, GUARD)}
        pictures["stressed_run.png"] = plots.stressed_run(
            *((method, lab.folder.metrics(name)) for method, name in stressed.items()),
            math.log(zero_step),
            f"Learning rate {drawn:g}x the reference ({job.rate(drawn):g})",
        )
    lab.publish(
        title,
        f"What does a learning rate above the reference do to the fine-tune of {job.base.name}, "
        f"and what is left of that with the guard? 1x is {job.reference_lr:g}.",
        tables,
        pictures,
    )


def sensitivity(curve: Sequence[tuple[float, float]], zero_step: float) -> float:
    r"""Learning-rate sensitivity: the mean loss above the best, over the sweep.

    .. math:: E_\eta[\min(\ell(\eta), \ell_0) - \min_\eta \ell(\eta)]

    Args:
      curve: (learning rate, perplexity) points.
      zero_step: Perplexity before the first step, whose logarithm is :math:`\ell_0`.

    Returns:
      The sensitivity in nats.

    References:
      Wortsman et al., `Small-scale proxies for large-scale Transformer training instabilities
      <https://arxiv.org/abs/2309.14322>`_, 2023.
    """
    worst = math.log(zero_step)
    losses = [min(math.log(ppl), worst) if math.isfinite(ppl) else worst for _, ppl in curve]
    return max(sum(losses) / len(losses) - min(losses), 0.0)


Curves = Mapping[str, Sequence[tuple[float, Sequence[Record]]]]
"""Method -> its (learning rate, records of the seeds) points."""


def _curve_table(curves: Curves, multiples: Sequence[float], zero_step: float) -> Table:
    rates = [rate for rate, _ in next(iter(curves.values()))]
    columns = [f"{rate:g} ({m:g}x)" for m, rate in zip(multiples, rates, strict=True)]
    rows = [
        [method, *(perplexities(found) for _, found in points)] for method, points in curves.items()
    ]
    title = f"Held-out perplexity (zero-step {number(zero_step)})"
    return Table(title, ["learning rate", *columns], rows)


def _sensitivity_table(curves: Curves, zero_step: float) -> Table:
    rows = []
    for name, points in curves.items():
        seeds = zip(*(map(perplexity, found) for _, found in points), strict=True)
        rates = [rate for rate, _ in points]
        values = [sensitivity([*zip(rates, ppl, strict=True)], zero_step) for ppl in seeds]
        rows.append([name, with_spread(values)])
    return Table(
        "Learning-rate sensitivity",
        ["method", "nats"],
        rows,
        "Mean held-out loss over the sweep, above the method's best; losses count up to the "
        "zero-step one. A method that does not learn at all is insensitive too: read it with the "
        "table above.",
    )
