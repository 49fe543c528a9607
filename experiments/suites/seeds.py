"""The suite `seeds`: how far apart do runs end that differ in nothing but their seed?"""

from __future__ import annotations

import dataclasses

from experiments import jobs
from experiments.errors import preset_of
from experiments.jobs import Job
from experiments.lab import Arguments, Lab, Methods, at_rates, perplexities
from experiments.methods import ADAMW, GUARD, USUAL, baselines, chosen
from experiments.paper import paper_table, perplexity_rows
from experiments.report import Table, number


@dataclasses.dataclass(frozen=True)
class SeedsConfig:
    """Settings of the suite."""

    job: Job
    """What is fine-tuned."""
    seeds: tuple[int, ...] = tuple(range(5))
    """The seeds, where the user does not choose."""
    multiples: tuple[float, ...] = (1, 10)
    """Learning rates, in units of the job's reference."""
    methods: tuple[str, ...] = (ADAMW, USUAL, "Prodigy", GUARD)
    """What is compared, where the user does not choose."""


PRESETS = {
    "nano": SeedsConfig(jobs.NANO_SHORT),
    "small": SeedsConfig(jobs.SMALL, seeds=(0, 1, 2)),
    "paper": SeedsConfig(jobs.PAPER["3B"], seeds=(0, 1, 2)),
}
"""Name -> settings."""


def seeds(options: Arguments, methods: Methods = ()) -> None:
    """Repeats the same runs with several seeds: mean and standard deviation.

    Args:
      options: What every suite asks.
      methods: What is compared.
    """
    several = options.seeds or preset_of(PRESETS, options.preset).seeds
    lab = Lab("seeds", dataclasses.replace(options, seeds=several), PRESETS)
    config, job = lab.config, lab.config.job
    compared = chosen(methods, config.methods, baselines(job.steps))
    runs = at_rates(job, compared, config.multiples)
    zero_step = lab.zero_step(job)
    records = lab.measure(job, runs, compared)
    rows = [
        [method, *(perplexities(records[method, multiple]) for multiple in config.multiples)]
        for method in compared
    ]
    columns = [f"{multiple:g}x" for multiple in config.multiples]
    tables = [
        Table(
            f"Held-out perplexity, seeds: {len(lab.seeds)} (zero-step {number(zero_step)})",
            ["method", *columns],
            rows,
            "Mean ± standard deviation. A seed sets the adapters, the batches and nothing else.",
        ),
        *paper_table(perplexity_rows(job, records)),
    ]
    lab.publish(
        "Seeds",
        f"How far apart do fine-tunes of {job.base.name} end that differ in their seed only? "
        f"1x is {job.reference_lr:g}.",
        tables,
        {},
    )
