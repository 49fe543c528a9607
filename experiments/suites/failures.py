"""The suite `failures`: what goes wrong in training, and how much compute is lost to it."""

from __future__ import annotations

import dataclasses
import math
import statistics

from experiments import jobs
from experiments.faults import Fault, drills
from experiments.finetune import Run
from experiments.jobs import Job
from experiments.lab import Arguments, Lab, Methods, Record, perplexities, perplexity
from experiments.methods import (
    ADAMW,
    GUARD,
    LOWER,
    RATE_FREE,
    USUAL,
    Method,
    adamw,
    at_one,
    baselines_and,
    chosen,
    only_finite,
)
from experiments.report import Table, number

IF_FINITE: dict[str, Method] = {
    "AdamW + clip, if finite": only_finite(adamw),
    "Prodigy + clip, if finite": only_finite(at_one(RATE_FREE["Prodigy"])),
}
"""Name -> method, of the peers that this suite alone has: something is NaN here. Prodigy sets its
own learning rate, so that a wrong one does not reach it."""

CLEAN = "nothing"
"""Name of the scenario in which nothing goes wrong."""


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Something that goes wrong."""

    job: Job
    """The job in which it does."""
    multiple: float = 1
    """Learning rate, in units of the job's reference."""
    fault: str = "none"
    """Name of a fault of `experiments.faults.drills`."""


@dataclasses.dataclass(frozen=True)
class FailuresConfig:
    """Settings of the suite."""

    job: Job
    """What is fine-tuned where nothing goes wrong."""
    methods: tuple[str, ...] = (
        ADAMW,
        LOWER,
        "AdamW + clip",
        USUAL,
        "skip-step",
        *IF_FINITE,
        GUARD,
    )
    """What is compared."""

    def scenarios(self) -> dict[str, Scenario]:
        """Name -> what goes wrong."""
        job = self.job
        bfloat16 = dataclasses.replace(job, dtype="bfloat16", param_dtype="bfloat16")
        return {
            CLEAN: Scenario(job),
            "learning rate x10": Scenario(job, multiple=10),
            "learning rate x30 for 50 steps": Scenario(job, fault="learning rate x30, 50 steps"),
            "learning rate x3, no warmup": Scenario(job, multiple=3),
            "one sequence per step": Scenario(dataclasses.replace(job, batch_size=1)),
            "bad data: 20 % random tokens, 30 steps": Scenario(
                job, fault="20 % random tokens, 30 steps"
            ),
            "three gradients x1e6": Scenario(job, fault="gradient x1e6, 3 steps"),
            "NaN gradients, 1 % of steps": Scenario(job, fault="NaN gradient, 1 % of steps"),
            "everything in bfloat16": Scenario(bfloat16),
        }


PRESETS = {
    "nano": FailuresConfig(jobs.NANO_SHORT),
    "small": FailuresConfig(jobs.SMALL),
    "paper": FailuresConfig(jobs.PAPER["7B"]),
}
"""Name -> settings."""


def failures(options: Arguments, methods: Methods = ()) -> None:
    """Lets training fail in eight ways, and counts the compute that was for nothing.

    Args:
      options: What every suite asks.
      methods: What is compared.
    """
    lab = Lab("failures", options, PRESETS)
    config = lab.config
    compared = chosen(methods, config.methods, baselines_and(config.job.steps, IF_FINITE))
    zero_step = lab.zero_step(config.job)
    faults: dict[str, Fault | None] = {**drills(config.job.steps), "none": None}
    records: dict[str, dict[str, list[Record]]] = {}
    for name, scenario in config.scenarios().items():
        job = scenario.job
        runs = {
            method: Run(
                f"{name}: {method}",
                method,
                job.rate(scenario.multiple),
                fault=faults[scenario.fault],
            )
            for method in compared
        }
        records[name] = lab.measure(job, runs, compared)
    tables = [
        Table(
            f"Held-out perplexity (zero-step {number(zero_step)})",
            ["what goes wrong", *compared],
            [
                [name, *(perplexities(found) for found in cells.values())]
                for name, cells in records.items()
            ],
        )
    ]
    if ADAMW in compared:
        tables.append(_productive_table(records, zero_step))
    lab.publish(
        "Failures",
        f"What becomes of a fine-tune of {config.job.base.name} when something goes wrong, and how "
        "much of the compute ends in a run that can be used?",
        tables,
        {},
    )


def _productive_table(records: dict[str, dict[str, list[Record]]], zero_step: float) -> Table:
    """The compute that ended in a usable run; no rows where clean AdamW learns nothing."""
    columns = ["method", "usable runs", "productive steps", "steps", "share"]
    clean = statistics.fmean(math.log(perplexity(record)) for record in records[CLEAN][ADAMW])
    if clean >= math.log(zero_step):
        note = "None can be told: clean AdamW does not end better than the untrained model."
        return Table("Productive compute", columns, [], note)
    bar = (math.log(zero_step) + clean) / 2
    failing = [cells for name, cells in records.items() if name != CLEAN]
    return Table(
        "Productive compute",
        columns,
        [
            [method, *_share([record for cells in failing for record in cells[method]], bar)]
            for method in records[CLEAN]
        ],
        "Over all scenarios but the first. A run is usable if it ends nearer to clean "
        f"AdamW than to the untrained model: a held-out loss below {bar:.3f} nats. Its "
        "steps are productive, those of the other runs are not.",
    )


def _share(records: list[Record], bar: float) -> list[str]:
    """Usable runs, their steps, all steps, and the share of the former in the latter."""
    good = [r for r in records if r["heldout_loss"] is not None and r["heldout_loss"] < bar]
    steps, useful = (sum(record["steps"] for record in group) for group in (records, good))
    share = f"{useful / steps:.0%}"
    return [f"{len(good)} of {len(records)}", str(useful), str(steps), share]
