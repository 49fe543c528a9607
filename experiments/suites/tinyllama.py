"""The suite `tinyllama`: the same stress when all parameters train, without LoRA."""

from __future__ import annotations

import dataclasses

from experiments import jobs
from experiments.jobs import Job
from experiments.lab import Arguments, Methods
from experiments.suites.lr_stress import LrStressConfig, sweep_rates


def _llama(job: Job, name: str, reference_lr: float) -> Job:
    """A job that trains all parameters of a Llama of the same shape."""
    # What makes a Llama of a Qwen2.5: no bias on queries, keys and values, a head of its own.
    config = dataclasses.replace(
        job.base.config, attention_bias=False, tie_word_embeddings=False, rms_norm_eps=1e-5
    )
    base = dataclasses.replace(job.base, name=name, config=config)
    return dataclasses.replace(job, base=base, lora=None, reference_lr=reference_lr)


PRESETS = {
    "nano": LrStressConfig(_llama(jobs.NANO_SHORT, "llama-0.2M", 1e-3), (0.3, 1, 3, 10, 30, 100)),
    "small": LrStressConfig(_llama(jobs.SMALL, "llama-91M", 1e-4), (0.3, 1, 3, 10, 30, 100)),
    "stories": LrStressConfig(
        dataclasses.replace(jobs.STORIES, lora=None, reference_lr=1e-3),
        (0.1, 0.3, 1, 3, 10, 30, 100),
    ),
    "paper": LrStressConfig(jobs.PAPER["TinyLlama"], (0.5, 1, 5, 50, 150)),
}
"""Name -> settings."""


def tinyllama(options: Arguments, methods: Methods = ()) -> None:
    """Fine-tunes every parameter of a Llama, from a low learning rate to 100 times the best.

    Args:
      options: What every suite asks.
      methods: What is compared.
    """
    sweep_rates("tinyllama", "Every parameter of a Llama", options, PRESETS, methods)
