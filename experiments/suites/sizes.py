"""The suite `sizes`: does the guard do the same for models of other sizes?"""

from __future__ import annotations

import dataclasses

from experiments import jobs
from experiments.jobs import Job
from experiments.lab import Arguments, Lab, Methods, at_rates, perplexities
from experiments.methods import ADAMW, GUARD, baselines, chosen
from experiments.paper import paper_table, perplexity_rows
from experiments.report import Table, guard_table, number


@dataclasses.dataclass(frozen=True)
class SizesConfig:
    """Settings of the suite."""

    sizes: dict[str, Job]
    """Name of a size -> what is fine-tuned."""
    multiples: tuple[float, ...] = (1, 10)
    """Learning rates, in units of the job's reference."""
    methods: tuple[str, ...] = (ADAMW, "AdamW + clip", GUARD)
    """What is compared, where the user does not choose."""


def _sizes(job: Job, recipe: jobs.PretrainConfig, shapes: dict[str, tuple[int, int, int]]):
    """A job with bases of other widths, depths and numbers of heads."""
    return {
        name: dataclasses.replace(
            job,
            base=dataclasses.replace(
                job.base,
                name=name,
                config=jobs.byte_decoder(*shape, job.base.config.max_position_embeddings),
                recipe=recipe,
            ),
        )
        for name, shape in shapes.items()
    }


# Narrow and deep, wide and shallow, wide and deep: as 3B, 7B and 14B stand to each other.
_NANO = {"width 64, 3 layers": (64, 3, 8), "width 112, 2 layers": (112, 2, 8)}
_NANO["width 160, 4 layers"] = (160, 4, 8)
_SMALL = {"58M": (512, 20, 8), "91M": (768, 14, 12), "159M": (896, 18, 14)}

PRESETS = {
    "nano": SizesConfig(_sizes(jobs.NANO_SHORT, jobs.NANO_RECIPE, _NANO)),
    "small": SizesConfig(_sizes(jobs.SMALL, jobs.SMALL_RECIPE, _SMALL)),
    "paper": SizesConfig({size: jobs.PAPER[size] for size in ("3B", "7B", "14B")}, (1, 5)),
}
"""Name -> settings."""


def sizes(options: Arguments, methods: Methods = ()) -> None:
    """Fine-tunes three sizes of one family, at the reference learning rate and above.

    Args:
      options: What every suite asks.
      methods: What is compared.
    """
    lab = Lab("sizes", options, PRESETS)
    config = lab.config
    columns, guarded, beside = {}, {}, []
    for size, job in config.sizes.items():
        compared = chosen(methods, config.methods, baselines(job.steps))
        runs = at_rates(job, compared, config.multiples, prefix=f"{size}, ")
        zero_step = lab.zero_step(job)
        records = lab.measure(job, runs, compared)
        beside += perplexity_rows(job, records)
        for multiple in config.multiples:
            column = f"{size}, {multiple:g}x"
            columns[column] = {"zero-step": number(zero_step)} | {
                method: perplexities(records[method, multiple]) for method in compared
            }
            if GUARD in compared:
                guarded[column] = records[GUARD, multiple]
    rows = [
        [method, *(column[method] for column in columns.values())]
        for method in next(iter(columns.values()))
    ]
    tables = [Table("Held-out perplexity", ["method", *columns], rows), *paper_table(beside)]
    if guarded:
        tables.append(guard_table(guarded))
    lab.publish(
        "Sizes",
        "Does the guard do for models of other sizes what it does for one?",
        tables,
        {},
    )
