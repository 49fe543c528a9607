"""The suite `lr-stress`: what a too-high learning rate does to a fine-tune, with and without guard.

A small decoder is pretrained on Python code and fine-tuned with LoRA on English prose, from a tuned
learning rate to 300 times that, with every method of `METHODS`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from tqdm import tqdm

import lbw_optax
from experiments import data, plots, report
from experiments.checkpoint import Checkpoints, cache_folder
from experiments.errors import UserError
from experiments.lora import add_lora
from experiments.methods import METHODS, REGIMES, guard_record, pretraining
from experiments.models.decoder import Decoder
from experiments.presets import LrStressPreset, lr_stress_preset
from experiments.results import Results
from experiments.train import Metrics, Trainer, make_evaluate

ZERO_STEP = "zero-step"
"""Name of the record of the model before fine-tuning."""

PLAIN, GUARDED = "AdamW", "guard(AdamW)"
"""The two methods whose stressed runs are drawn over time."""

PLOTTED_MULTIPLE = 100
"""The learning rate of those runs, in units of the reference."""


def lr_stress(
    preset: str = "nano",
    data: Path | None = None,
    results: Path = Path("results"),
    seed: int = 0,
    fresh: bool = False,
) -> None:
    """Fine-tunes at 1x to 300x the best learning rate, with and without guard.

    Run the same command again to resume an interrupted job, or to see the results of a finished
    one.

    Args:
      preset: Size of the job: nano (2 CPU cores, minutes) or small (one GPU).
      data: Text to fine-tune on instead of the Python reference manual: a file, or a folder of
        UTF-8 files. Its last tenth is held out. Pretraining stays on the standard library.
      results: Folder for the results; the job writes to lr_stress/PRESET in it.
      seed: Seed of the adapters and of the fine-tuning batches. The pretrained model is shared.
      fresh: Start over, dropping the results of an earlier job in that folder.
    """
    started = time.time()
    settings = lr_stress_preset(preset)
    base_text, text = _texts(data)
    train_tokens, heldout_tokens = _split(text, settings)
    config = {
        "suite": "lr-stress",
        "preset": preset,
        "settings": dataclasses.asdict(settings),
        "seed": seed,
        "data": {"name": text.name, "bytes": len(text.content), "sha256": text.sha256},
        "pretraining data": {"name": base_text.name, "sha256": base_text.sha256},
        "device": jax.devices()[0].device_kind,
        "versions": _versions(),
    }
    folder = Results(results / "lr_stress" / preset, config, fresh=fresh)
    runs = _runs(settings)
    if any(run not in folder.runs for run in (ZERO_STEP, *runs)):
        _measure(settings, base_text, train_tokens, heldout_tokens, seed, folder)
    _publish(settings, config, folder, time.time() - started)
