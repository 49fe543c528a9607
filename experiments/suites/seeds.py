"""The suite `seeds`: how far apart do runs end that differ in nothing but their seed?"""

from __future__ import annotations

import dataclasses

from experiments import jobs
from experiments.finetune import Run
from experiments.jobs import Job
from experiments.lab import Arguments, Lab, perplexities
from experiments.methods import ADAMW, GUARD, baselines
from experiments.report import Table, number

PAPER_PERPLEXITIES = ("12.68 ± 0.14", "9.69 ± 0.06")
"""The paper's AdamW and LBW-Guard, for Qwen2.5-3B."""


@dataclasses.dataclass(frozen=True)
class SeedsConfig:
    """Settings of the suite."""

    job: Job
    """What is fine-tuned."""
    seeds: int = 5
    """Number of seeds, from the chosen one on."""
    multiples: tuple[float, ...] = (1, 10)
    """Learning rates, in units of the job's reference."""
    methods: tuple[str, ...] = (ADAMW, "AdamW, warmup + cosine", "Prodigy", GUARD)
    """What is compared."""


PRESETS = {
    "nano": SeedsConfig(jobs.NANO_SHORT),
    "small": SeedsConfig(jobs.SMALL, seeds=3),
    "paper": SeedsConfig(jobs.PAPER["3B"], seeds=3),
}
"""Name -> settings."""


def seeds(options: Arguments) -> None:
    """Repeats the same runs with several seeds: mean and standard deviation.

    Args:
      options: What every suite asks.
    """
    lab = Lab("seeds", options, PRESETS)
    config, job = lab.config, lab.config.job
    runs = {
        (method, multiple, seed): Run(
            f"{method} at {multiple:g}x, seed {seed}",
            method,
            job.rate(multiple),
            seed,
        )
        for method in config.methods
        for multiple in config.multiples
        for seed in range(options.seed, options.seed + config.seeds)
    }
    zero_step = lab.zero_step(job)
    records = lab.measure(job, runs, baselines(job.steps))
    rows = [
        [
            method,
            *(
                perplexities(
                    [record for key, record in records.items() if key[:2] == (method, multiple)]
                )
                for multiple in config.multiples
            ),
        ]
        for method in config.methods
    ]
    columns = [f"{multiple:g}x" for multiple in config.multiples]
    tables = [
        Table(
            f"Held-out perplexity over {config.seeds} seeds (zero-step {number(zero_step)})",
            ["method", *columns],
            rows,
            "Mean ± standard deviation. A seed sets the adapters, the batches and nothing else.",
        )
    ]
    if options.preset == "paper":
        theirs = [["AdamW", PAPER_PERPLEXITIES[0]], ["LBW-Guard", PAPER_PERPLEXITIES[1]]]
        tables.append(Table("The paper's, at its reference setting", ["method", "paper"], theirs))
    lab.publish(
        "Seeds",
        f"How far apart do fine-tunes of {job.base.name} end that differ in their seed only? "
        f"1x is {job.reference_lr:g}.",
        tables,
        {},
    )
