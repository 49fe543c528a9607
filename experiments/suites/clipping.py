"""The suite `clipping`: does clipping the gradient do what the guard does?"""

from __future__ import annotations

import dataclasses

import optax

from experiments import jobs, peers, plots
from experiments.finetune import Run
from experiments.jobs import Job
from experiments.lab import Arguments, Lab, Methods, perplexities
from experiments.methods import ADAMW, GUARD, Method, adamw, baselines_and, chosen
from experiments.paper import paper_table, perplexity_rows
from experiments.report import Table, guard_table, number

AGC_CLIPPING = 0.01
"""Largest gradient of a unit over its parameters' norm; the value of the AGC paper."""


@dataclasses.dataclass(frozen=True)
class ClippingConfig:
    """Settings of the suite."""

    job: Job
    """What is fine-tuned."""
    multiple: float = 10
    """The stress rate, in units of the job's reference."""
    norms: tuple[float, ...] = (0.1, 0.5, 1.0)
    """Norms that the whole gradient is clipped to."""


PRESETS = {
    "nano": ClippingConfig(jobs.NANO_SHORT),
    "small": ClippingConfig(jobs.SMALL),
    "paper": ClippingConfig(jobs.PAPER["7B"], multiple=5),  # 1e-3, as in the paper.
}
"""Name -> settings."""


def clipping(options: Arguments, methods: Methods = ()) -> None:
    """Clips gradients at a stressed learning rate, in five ways, beside the guard.

    Args:
      options: What every suite asks.
      methods: What is compared.
    """
    lab = Lab("clipping", options, PRESETS)
    job = lab.config.job
    clips = clippers(lab.config.norms)
    known = baselines_and(job.steps, clips)
    del known["AdamW + clip"]  # It is one of those by norm.
    compared = chosen(methods, (ADAMW, *clips, GUARD), known)
    rate = job.rate(lab.config.multiple)
    runs = {name: Run(name, name, rate) for name in compared}
    healthy = Run("AdamW at 1x", ADAMW, job.reference_lr)
    zero_step = lab.zero_step(job)
    records = lab.measure(job, {healthy.name: healthy, **runs}, known)
    norms = {
        name: [row["grad_norm"] for row in lab.folder.metrics(*lab.names(run))]
        for name, run in runs.items()
    }
    rows = [
        [name, perplexities(records[name]), *map(number, plots.quartiles(norms[name]))]
        for name in runs
    ]
    stressed = {(name, lab.config.multiple): records[name] for name in runs}
    rows.append([healthy.name, perplexities(records[healthy.name]), "", "", ""])
    tables = [
        Table(
            f"Held-out perplexity (zero-step {number(zero_step)}) and gradient norms",
            ["method", "perplexity", "norm, first quartile", "median", "third quartile"],
            rows,
            "Norms are of the gradients as the model gives them, before clipping.",
        ),
        *paper_table(perplexity_rows(job, stressed)),
    ]
    if GUARD in compared:
        tables.append(guard_table({GUARD: records[GUARD]}))
    lab.publish(
        "Clipping against the guard",
        f"Does clipping help {job.base.name} at {lab.config.multiple:g}x its reference learning "
        f"rate ({rate:g})? Adam divides by the size of past gradients: a gradient that is clipped "
        "at every step gives the same step. What is left of clipping is what it does to outliers.",
        tables,
        {"gradient_norms.png": plots.histograms(norms, "gradient norm")},
    )


def clippers(norms: tuple[float, ...]) -> dict[str, Method]:
    """AdamW behind each way of clipping that is compared with the guard.

    Args:
      norms: Norms that the whole gradient is clipped to.

    Returns:
      Name -> method.
    """

    def behind(clip: optax.GradientTransformation) -> Method:
        return lambda learning_rate: optax.chain(clip, adamw(learning_rate))

    return {
        **{f"clip {norm:g}": behind(optax.clip_by_global_norm(norm)) for norm in norms},
        f"AGC {AGC_CLIPPING:g}": behind(peers.per_layer(optax.adaptive_grad_clip(AGC_CLIPPING))),
        "ZClip": behind(peers.zclip()),
    }
