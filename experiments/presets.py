"""Named sizes of the experiments: every number that a result depends on, in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from experiments.data import BYTE_VOCABULARY
from experiments.errors import UserError
from experiments.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """How the base model is made."""

    steps: int
    """Number of steps, a multiple of `chunk_steps`."""
    batch_size: int
    """Sequences per step."""
    learning_rate: float
    """Peak of the cosine schedule."""
    chunk_steps: int
    """Steps per call of the compiled function."""
    checkpoint_steps: int
    """Steps between checkpoints, a multiple of `chunk_steps`."""


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """How the base model is fine-tuned, at each learning rate and with each method."""

    steps: int
    """Number of steps, a multiple of `chunk_steps`."""
    batch_size: int
    """Sequences per step."""
    reference_lr: float
    """AdamW's best learning rate on this task, on the grid 1e-4, 3e-4, 1e-3, ..."""
    chunk_steps: int
    """Steps per call of the compiled function."""
    checkpoint_steps: int
    """Steps between checkpoints, a multiple of `chunk_steps`."""
    lora_rank: int = 8
    """Width of the LoRA corrections; 8 is the default of the LoRA paper and of PEFT."""
    lora_alpha: float = 16.0
    """Scale of the corrections in units of the rank: twice the rank, a common choice."""


@dataclasses.dataclass(frozen=True)
class LrStressPreset:
    """One size of the suite `lr-stress`."""

    model: DecoderConfig
    """Shape of the decoder."""
    dtype: str
    """Compute dtype; parameters and optimizer state are float32."""
    seq_len: int
    """Predicted tokens per sequence."""
    pretrain: PretrainConfig
    """How the base model is made."""
    finetune: FinetuneConfig
    """What is measured."""
    heldout_batch_size: int
    """Held-out windows that the model sees at once."""
    heldout_windows: int
    """Most held-out windows that are used."""
    lr_multiples: tuple[float, ...] = (1, 3, 10, 30, 100, 300)
    """Learning rates, in units of `finetune.reference_lr`."""


def nano() -> LrStressPreset:
    """A 0.2M-parameter byte model, for two CPU cores.

    Expected: zero-step perplexity 5.21, AdamW 4.13 at 1x and above 19 from 10x on, guarded 4.1
    everywhere.

    Command: `python -m experiments lr-stress`
    Hardware: CPU, 1 GB of memory, no download; 8.5 minutes on one core.
    """
    return LrStressPreset(
        model=DecoderConfig(
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            vocab_size=BYTE_VOCABULARY,
            max_position_embeddings=128,
        ),
        dtype="float32",
        seq_len=128,
        pretrain=PretrainConfig(
            steps=2000, batch_size=16, learning_rate=3e-3, chunk_steps=20, checkpoint_steps=500
        ),
        # AdamW's held-out perplexity after 400 steps: 4.18 at 1e-3, 4.13 at 3e-3, 4.39 at 1e-2
        # (zero-step: 5.21).
        finetune=FinetuneConfig(
            steps=400, batch_size=8, reference_lr=3e-3, chunk_steps=20, checkpoint_steps=200
        ),
        heldout_batch_size=32,
        heldout_windows=256,
    )


def small() -> LrStressPreset:
    """An 88M-parameter byte model in bfloat16, for one GPU. Its numbers are guesses: not run yet.

    Command: `python -m experiments lr-stress --preset small`
    Hardware: one GPU with 24 GB of memory; guess: 30 minutes.
    """
    return LrStressPreset(
        model=DecoderConfig(
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=14,
            num_attention_heads=12,
            num_key_value_heads=4,
            head_dim=64,
            vocab_size=BYTE_VOCABULARY,
            max_position_embeddings=1024,
        ),
        dtype="bfloat16",
        seq_len=512,
        # The learning rate is GPT-3's for 125M parameters; 4000 steps are 13 epochs of the 10 MB.
        pretrain=PretrainConfig(
            steps=4000, batch_size=64, learning_rate=6e-4, chunk_steps=50, checkpoint_steps=1000
        ),
        # The reference rate is a guess from LoRA practice (1e-4 to 1e-3), still to be tuned.
        finetune=FinetuneConfig(
            steps=500, batch_size=32, reference_lr=3e-4, chunk_steps=25, checkpoint_steps=250
        ),
        heldout_batch_size=16,
        heldout_windows=256,
    )


LR_STRESS_PRESETS = {"nano": nano, "small": small}


def lr_stress_preset(name: str) -> LrStressPreset:
    """The preset of a name, or one clear line."""
    if name not in LR_STRESS_PRESETS:
        raise UserError(f"--preset {name}: unknown; choose one of {', '.join(LR_STRESS_PRESETS)}")
    return LR_STRESS_PRESETS[name]()


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
    problem_steps: int = 30_000
    """Most steps of the small problems, as in optax's own tests."""
    heldout_windows: int = 128
    """Held-out windows."""
    lora_rank: int = 8
    """Width of the LoRA corrections."""
    lora_alpha: float = 16.0
    """Scale of the corrections, in units of the rank."""


def _byte_decoder(width: int, layers: int, seq_len: int) -> DecoderConfig:
    return DecoderConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        vocab_size=BYTE_VOCABULARY,
        max_position_embeddings=seq_len,
    )


def half_decades(decade: int, count: int) -> tuple[float, ...]:
    """3 x 10^decade, 10 x 10^decade, 30 x 10^decade, ..."""
    return tuple(float(f"{3 - 2 * (i % 2)}e{decade + (i + 1) // 2}") for i in range(count))


def quality_nano() -> BenchPreset:
    """A 63k-parameter byte model with two layers, for two CPU cores.

    Command: `python -m experiments quality`
    Hardware: CPU, 2 GB of memory, no download.
    """
    return BenchPreset(
        model=_byte_decoder(48, 2, 32),
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
    return BenchPreset(
        model=_byte_decoder(32, 1, 32),
        pretrain=PretrainConfig(
            steps=1500, batch_size=16, learning_rate=3e-3, chunk_steps=50, checkpoint_steps=1500
        ),
        seq_len=32,
        batch_size=8,
        steps=300,
        seeds=(0, 1, 2),
        rates=half_decades(-4, 9),
    )


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


QUALITY_PRESETS = {"nano": quality_nano, "pico": quality_pico}
STUDY_PRESETS = {"nano": study_nano, "pico": study_pico}


def bench_preset(presets: Mapping[str, Callable[[], BenchPreset]], name: str) -> BenchPreset:
    """The preset of a name, or one clear line."""
    if name not in presets:
        raise UserError(f"--preset {name}: unknown; choose one of {', '.join(presets)}")
    return presets[name]()
