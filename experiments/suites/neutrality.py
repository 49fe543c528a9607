"""The suite `neutrality`: what is inside the guard, and what it does to a run that needs none.

These are the questions that referees of the paper asked.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lbw_optax
from experiments import jobs, plots
from experiments.curvature import hessian_trace
from experiments.finetune import Finetune, Run
from experiments.jobs import Job
from experiments.lab import Arguments, Lab, Record, perplexities
from experiments.methods import ADAMW, GUARD, Method, adamw, guard
from experiments.models.sharding import on_mesh
from experiments.report import Table, number, with_spread
from experiments.suites.study import SWITCHED_OFF


@dataclasses.dataclass(frozen=True)
class NeutralityConfig:
    """Settings of the suite."""

    job: Job
    """What is fine-tuned."""
    multiples: tuple[float, ...] = (1, 10)
    """Learning rates of the ablation, in units of the job's reference."""
    path_multiples: tuple[float, ...] = (0.5, 1, 10)
    """Learning rates at which the paths with and without guard are compared."""
    stops: int = 4
    """Places along each path that are looked at, equally far apart."""
    probes: int = 32
    """Probes of the Hessian at each place."""


PRESETS = {
    "nano": NeutralityConfig(jobs.NANO_SHORT),
    "small": NeutralityConfig(jobs.SMALL),
    "paper": NeutralityConfig(jobs.PAPER["7B"], multiples=(1, 5), path_multiples=(0.5, 1, 5)),
}
"""Name -> settings."""


def neutrality(options: Arguments) -> None:
    """Takes the guard apart, and compares a healthy run's path with and without it.

    Args:
      options: What every suite asks.
    """
    lab = Lab("neutrality", options, PRESETS)
    job = lab.config.job
    ablation, norms = _ablation(lab)
    lab.publish(
        "Neutrality",
        f"Which of the guard's sensors does what in a fine-tune of {job.base.name}, does the guard "
        "leave a healthy run alone, and where does it lead a stressed one?",
        [ablation, *_paths(lab)],
        {"gradient_norms.png": plots.histograms(norms, "gradient norm")},
    )


def _ablation(lab: Lab[NeutralityConfig]) -> tuple[Table, dict[str, list[float]]]:
    """Held-out perplexity with sensors and actions switched off; gradient norms of whole runs."""
    config, job = lab.config, lab.config.job
    methods: dict[str, Method] = {ADAMW: adamw, GUARD: guard, "no loss given": _guard_without_loss}
    for name, changes in SWITCHED_OFF.items():
        methods[name] = functools.partial(_guard_with, lbw_optax.Law(**changes))
    runs = {
        (name, multiple): Run(f"{name} at {multiple:g}x", name, job.rate(multiple))
        for name in methods
        for multiple in config.multiples
    }
    zero_step = lab.zero_step(job)
    records = lab.measure(job, runs, methods)
    rows = [[name, *(perplexities(records[name, m]) for m in config.multiples)] for name in methods]
    table = Table(
        f"Held-out perplexity without a sensor or an action (zero-step {number(zero_step)})",
        ["guard", *(f"{multiple:g}x" for multiple in config.multiples)],
        rows,
        "Rows below the second are the guard with something switched off or kept from it.",
    )
    norms = {
        f"{name} at {multiple:g}x": [
            row["grad_norm"] for row in lab.folder.metrics(*lab.names(runs[name, multiple]))
        ]
        for name in (ADAMW, GUARD)
        for multiple in config.multiples
    }
    return table, norms


def _guard_with(law: lbw_optax.Law, learning_rate: Any) -> optax.GradientTransformation:
    return lbw_optax.guard(adamw(learning_rate), law=law)


def _guard_without_loss(learning_rate: Any) -> optax.GradientTransformation:
    inner = guard(learning_rate)
    return optax.GradientTransformation(inner.init, lambda u, s, p=None: inner.update(u, s, p))


def _paths(lab: Lab[NeutralityConfig]) -> list[Table]:
    """How the paths with and without guard differ, and how curved the loss is along them."""
    config, job = lab.config, lab.config.job
    stride = job.steps // config.stops // job.chunk_steps * job.chunk_steps
    stops = [stride * i for i in range(1, config.stops + 1)]
    distances, traces, errors = [], [], []
    for multiple in config.path_multiples:
        paths: list[list[Record]] = []
        for seed in lab.seeds:
            name = f"paths at {multiple:g}x, seed {seed}"
            if name not in lab.folder.runs:
                finetune = lab.finetune(job)
                with on_mesh(lab.mesh):
                    found = _compare(finetune, job.rate(multiple), stops, seed, config.probes)
                lab.folder.finish(name, {"stops": found})
            paths.append(_numbers(lab.folder.runs[name]["stops"]))
        places = list(zip(*paths, strict=True))
        distances.append([f"{multiple:g}x", *map(_difference, places)])
        for method in (ADAMW, GUARD):
            found = [[record["traces"][method] for record in place] for place in places]
            errors += [error for place in found for _, error in place if math.isfinite(error)]
            cells = (with_spread([mean for mean, _ in place], number) for place in found)
            traces.append([f"{multiple:g}x", method, *cells])
    columns = [f"step {stop}" for stop in stops]
    return [
        Table(
            "Distance of the paths with and without guard",
            ["LR", *columns],
            distances,
            "`identical` is bit for bit, with every seed. Otherwise the cosine of the two "
            "displacements from the start, and their mean lengths without and with the guard.",
        ),
        Table(
            "Trace of the Hessian",
            ["LR", "method", *columns],
            traces,
            f"Hutchinson's estimate with {config.probes} probes on one batch, of the loss as a "
            "function of what trains; mean ± standard deviation over the seeds. The standard error "
            f"of a single estimate is at most {number(max(errors, default=0))}.",
        ),
    ]


def _compare(
    finetune: Finetune, rate: float, stops: list[int], seed: int, probes: int
) -> list[Record]:
    start = finetune.start(seed)
    paths = [list(finetune.path(m, rate, seed, stops)) for m in (adamw, guard)]
    inputs = (start.frozen, finetune.batch(seed))
    key = jax.random.key(seed)
    records = []
    for plain, guarded in zip(*paths, strict=True):
        steps = [jax.tree.map(jnp.subtract, end, start.params) for end in (plain, guarded)]
        lengths = [float(optax.tree.norm(step)) for step in steps]
        same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), plain, guarded)
        records.append(
            {
                "identical": all(jax.tree.leaves(same)),
                "cosine": float(optax.tree.vdot(*steps)) / (lengths[0] * lengths[1]),
                "lengths": lengths,
                "traces": {
                    name: [
                        float(x) for x in hessian_trace(finetune.loss, params, inputs, key, probes)
                    ]
                    for name, params in ((ADAMW, plain), (GUARD, guarded))
                },
            }
        )
    return records


def _numbers(found: Any) -> Any:
    """What the folder has, with NaN for what is no number."""
    return jax.tree.map(lambda x: math.nan if x is None else x, found, is_leaf=lambda x: x is None)


def _difference(place: Sequence[Record]) -> str:
    if all(record["identical"] for record in place):
        return "identical"
    lengths = zip(*(record["lengths"] for record in place), strict=True)
    shown = " and ".join(f"{statistics.fmean(found):.3g}" for found in lengths)
    return f"{with_spread([record['cosine'] for record in place])} ({shown})"
