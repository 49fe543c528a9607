"""The suite `throughput`: tokens per second of a whole training step, and the guard's share."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import jobs
from experiments.batches import Batch
from experiments.environment import described, made_with
from experiments.errors import preset_of
from experiments.finetune import decoder_config, random_start
from experiments.flops import step_flops
from experiments.jobs import Job
from experiments.methods import Method
from experiments.models.zoo import TINYLLAMA
from experiments.report import Table, number, write_report
from experiments.results import Results
from experiments.timing import LEARNING_RATE, contestants, in_turns
from experiments.train import Trainer

PEAK = {
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
"""Device -> bfloat16 operations per second, without sparsity, by its vendor's data sheet."""


@dataclasses.dataclass(frozen=True)
class ThroughputConfig:
    """Settings of the suite."""

    jobs: Mapping[str, Job]
    """Label -> job; its model gets random weights, its text is random."""
    rounds: int = 10
    """How often every optimizer is timed, one after the other in each round."""


def _with_and_without_lora(label: str, job: Job, lora: jobs.LoraConfig) -> dict[str, Job]:
    return {
        f"{label}, LoRA": dataclasses.replace(job, lora=lora),
        f"{label}, all parameters": dataclasses.replace(job, lora=None),
    }


def _published(label: str, repo: str) -> dict[str, Job]:
    job = dataclasses.replace(jobs.PAPER["TinyLlama"], base=jobs.Base(repo))
    return _with_and_without_lora(label, job, jobs.PAPER_LORA)


PRESETS = {
    "nano": ThroughputConfig(_with_and_without_lora("0.2M", jobs.NANO, jobs.LoraConfig())),
    "small": ThroughputConfig(_with_and_without_lora("91M", jobs.SMALL, jobs.LoraConfig())),
    "paper": ThroughputConfig(
        _published("Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B") | _published("TinyLlama-1.1B", TINYLLAMA)
    ),
}
"""Name -> settings; `paper` has the two published models that one GPU trains whole."""


def throughput(preset: str = "nano", results: Path = Path("results"), fresh: bool = False) -> None:
    """Times whole training steps with and without the guard; no checkpoint and no text is needed.

    Run the same command again to go on with an interrupted job; finished models are reused.

    Args:
      preset: Size of the models: nano (two CPU cores), small or paper (one GPU).
      results: Folder for the results; the suite writes to throughput/PRESET in it.
      fresh: Start over, dropping the results of an earlier job in that folder.
    """
    config = preset_of(PRESETS, preset)
    folder = Results(
        results / "throughput" / preset, described("throughput", preset, config), fresh=fresh
    )
    methods = contestants()
    for label, job in config.jobs.items():
        if label not in folder.runs:
            folder.finish(label, _measure(label, job, methods, config.rounds))
    records = {label: folder.runs[label] for label in config.jobs}
    folder.write_csv(
        "summary.csv",
        [
            {"model": label, "optimizer": name, **measured}
            for label, record in records.items()
            for name, measured in record["optimizers"].items()
        ],
    )
    write_report(
        folder,
        f"Throughput, {preset}",
        "What does a whole training step cost, and which part of it is the guard's?",
        [_table(label, config.jobs[label], record) for label, record in records.items()],
        {},
        made_with(),
    )


def _measure(
    label: str, job: Job, methods: Mapping[str, Method], rounds: int
) -> dict[str, dict[str, Any] | int]:
    """Times a model's whole steps, and counts their memory and their arithmetic."""
    start, config = jax.jit(random_start, static_argnums=0)(job), decoder_config(job)
    shape = (job.chunk_steps, job.batch_size, job.seq_len + 1)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size, jnp.int32)
    batches, rate = Batch(tokens, jnp.ones_like(tokens)), jnp.float32(LEARNING_RATE)

    def prepare(method: Method) -> tuple[Callable[[], float], int]:
        trainer = Trainer(
            start.graphdef, method, chunk_steps=job.chunk_steps, vocabulary=config.vocab_size
        )
        state = trainer.init(start.params, LEARNING_RATE)
        program = trainer.lower(state, start.frozen, batches, rate).compile()

        def seconds() -> float:
            # One state at a time: several of a large model would not fit. The first chunk warms up.
            state = trainer.init(start.params, LEARNING_RATE)
            state, _ = jax.block_until_ready(program(state, start.frozen, batches, rate, None))
            started = time.perf_counter()
            jax.block_until_ready(program(state, start.frozen, batches, rate, None))
            return (time.perf_counter() - started) / job.chunk_steps

        found = program.memory_analysis()
        made = found.output_size_in_bytes - found.alias_size_in_bytes
        return seconds, found.argument_size_in_bytes + made + found.temp_size_in_bytes

    clocks, sizes = {}, {}
    for name, method in methods.items():
        clocks[name], sizes[name] = prepare(method)
    optimizers = {
        name: {"seconds": seconds, "share": [1 - 1 / q for q in ratio], "bytes": sizes[name]}
        for name, (seconds, ratio) in in_turns(clocks, rounds, label).items()
    }
    corrections = sum(x.size for x in jax.tree.leaves(start.params)) if job.lora else None
    flops = step_flops(
        config, batch_size=job.batch_size, seq_len=job.seq_len, corrections=corrections
    )
    return {"optimizers": optimizers, "flops": flops}


def _table(label: str, job: Job, record: Mapping[str, Any]) -> Table:
    heading = ["optimizer", "ms per step", "tokens/s", "TFLOP/s", "utilisation", "GB", "share"]
    device = jax.devices()[0].device_kind
    peak = PEAK.get(device) if job.dtype == "bfloat16" else None
    rows = []
    for name, measured in record["optimizers"].items():
        per_second = record["flops"] / measured["seconds"]
        rows.append(
            [
                name,
                f"{1000 * measured['seconds']:.2f}",
                f"{job.batch_size * job.seq_len / measured['seconds']:,.0f}",
                number(per_second / 1e12),
                f"{per_second / peak:.1%}" if peak else "not known",
                number(measured["bytes"] / 1e9),
                "{1:.1%} ({0:.1%} to {2:.1%})".format(*measured["share"]),
            ]
        )
    return Table(
        f"{label}: {job.batch_size} x {job.seq_len} tokens, {job.dtype}, on {device}",
        heading,
        rows,
        "Medians. `share` is the part of the step that AdamW's does not have, with quartiles, from "
        "steps of the same round. `TFLOP/s` counts the matrix products that the model needs, not "
        "those that are computed again; `utilisation` is its part of what the device can do in "
        "bfloat16. `GB` is what XLA sets aside for the program: arguments, results, temporaries.",
    )
