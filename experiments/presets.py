"""Named sizes of the experiments: every number that a result depends on, in one place."""

from __future__ import annotations

import dataclasses

from experiments.jobs import PretrainConfig, byte_decoder
from experiments.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class BenchPreset:
    """One size of the suites `quality` and `study`."""

    model: DecoderConfig
    """Shape of the decoder."""
    pretrain: PretrainConfig
    """How the base model of the fine-tuning tasks is made."""
    seq_len: int
    """Predicted tokens per sequence."""
    batch_size: int
    """Sequences per step."""
    steps: int
    """Steps of a run."""
    seeds: tuple[int, ...]
    """Seeds of the initial values and of the batches."""
    rates: tuple[float, ...]
    """Learning rates of AdamW, half a decade apart, around its best."""
    stressed_rates: int = 5
    """The other methods are measured at the learning rate below AdamW's best, at the best, and at
    so many above it."""
    idle_steps: int = 1000
    """Steps of the runs that the guard should leave alone."""
    idle_seeds: int = 10
    """How many of them there are per learning rate."""
    long_idle_steps: int = 10_000
    """Steps of some longer ones."""
    long_idle_seeds: int = 2
    """How many of these there are per learning rate."""
    problem_steps: int = 30_000
    """Most steps of the small problems, as in optax's own tests."""
    network_steps: int = 2000
    """Steps of the networks of many kinds."""
    heldout_windows: int = 128
    """Held-out windows."""
    lora_rank: int = 8
    """Width of the LoRA corrections."""
    lora_alpha: float = 16.0
    """Scale of the corrections, in units of the rank."""


def half_decades(decade: int, count: int) -> tuple[float, ...]:
    """3 x 10^decade, 10 x 10^decade, 30 x 10^decade, ..."""
    return tuple(float(f"{3 - 2 * (i % 2)}e{decade + (i + 1) // 2}") for i in range(count))


def quality_nano() -> BenchPreset:
    """A 63k-parameter byte model with two layers, for two CPU cores.

    Command: `python -m experiments quality`
    Hardware: CPU, 2 GB of memory, no download.
    """
    return BenchPreset(
        model=byte_decoder(48, 2, 4, 32),
        pretrain=PretrainConfig(
            steps=1500, batch_size=16, learning_rate=3e-3, chunk_steps=50, checkpoint_steps=1500
        ),
        seq_len=32,
        batch_size=8,
        steps=300,
        seeds=(0, 1, 2),
        rates=half_decades(-4, 9),
    )


def quality_pico() -> BenchPreset:
    """A 20k-parameter byte model with one layer, for a first look at everything.

    Command: `python -m experiments quality --preset pico`
    Hardware: CPU, 1 GB of memory, no download.
    """
    return dataclasses.replace(quality_nano(), model=byte_decoder(32, 1, 4, 32))


def quality_long() -> BenchPreset:
    """The runs of `quality_nano`, 1,000 steps long.

    Command: `python -m experiments quality --preset long`
    Hardware: CPU, 2 GB of memory, no download.
    """
    return dataclasses.replace(quality_nano(), steps=1000)


def quality_deep() -> BenchPreset:
    """A 197k-parameter byte model with four layers, in runs of 600 steps.

    Command: `python -m experiments quality --preset deep --sections stress --tasks scratch`
    Hardware: CPU, 2 GB of memory, no download.
    """
    return dataclasses.replace(quality_nano(), model=byte_decoder(64, 4, 4, 32), steps=600)


def study_nano() -> BenchPreset:
    """The model of `quality_nano` with two seeds.

    Command: `python -m experiments study`
    Hardware: CPU, 2 GB of memory, no download.
    """
    return dataclasses.replace(quality_nano(), seeds=(0, 1))


def study_pico() -> BenchPreset:
    """The model of `quality_pico` with two seeds.

    Command: `python -m experiments study --preset pico`
    Hardware: CPU, 1 GB of memory, no download.
    """
    return dataclasses.replace(quality_pico(), seeds=(0, 1))


QUALITY_PRESETS = {
    "nano": quality_nano,
    "pico": quality_pico,
    "long": quality_long,
    "deep": quality_deep,
}
STUDY_PRESETS = {"nano": study_nano, "pico": study_pico}
