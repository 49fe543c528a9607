"""The suite `lr-stress`: what a too-high learning rate does to a fine-tune, with and without guard.

A small decoder is pretrained on Python code and fine-tuned with LoRA on English prose, from a tuned
learning rate to 300 times that, with every method of `METHODS`.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from tqdm import tqdm

from experiments import plots
from experiments.checkpoint import Checkpoints
from experiments.data import (
    heldout_windows,
    python_manual,
    read_text,
    split,
    standard_library,
)
from experiments.environment import versions
from experiments.errors import UserError
from experiments.lora import add_lora
from experiments.methods import METHODS, REGIMES, guard_record
from experiments.presets import LrStressPreset, lr_stress_preset
from experiments.pretrain import pretrained
from experiments.report import guard_rows, markdown_table, number, perplexity_rows, print_table
from experiments.results import Results
from experiments.train import Metrics, Trainer, make_evaluate

ZERO_STEP = "zero-step"
"""Name of the record of the model before fine-tuning."""

PLAIN, GUARDED = "AdamW", "guard(AdamW)"
"""The two methods whose stressed runs are drawn over time."""

PLOTTED_MULTIPLE = 100
"""Learning rate of those two runs, in units of the reference."""


class Run(NamedTuple):
    """One cell of the sweep."""

    method: str
    multiple: float
    learning_rate: float

    @property
    def name(self) -> str:
        """What the results folder calls it."""
        return f"{self.method} at {self.multiple:g}x"


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
      seed: Seed of the adapters and of the fine-tuning batches; the pretrained model is shared.
      fresh: Start over, dropping the results of an earlier job in that folder.
    """
    settings = lr_stress_preset(preset)
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: must be in 0 ... 2**32 - 1")
    text = python_manual() if data is None else read_text(data)
    train_tokens, heldout_tokens = split(text, settings.seq_len)
    base_text = standard_library()
    config = {
        "suite": "lr-stress",
        "preset": preset,
        "settings": dataclasses.asdict(settings),
        "seed": seed,
        "data": {"name": text.name, "bytes": len(text.content), "sha256": text.sha256},
        "pretraining data": {"name": base_text.name, "sha256": base_text.sha256},
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }
    folder = Results(results / "lr_stress" / preset, config, fresh=fresh)
    todo = [run for run in _runs(settings) if run.name not in folder.runs]
    if todo:
        windows = heldout_windows(
            heldout_tokens,
            settings.seq_len,
            settings.heldout_batch_size,
            settings.heldout_windows,
        )
        base = pretrained(
            settings.model, settings.dtype, settings.seq_len, settings.pretrain, base_text
        )
        _measure(settings, base, train_tokens, windows, seed, folder, todo)
    _publish(settings, config, folder)


def _runs(settings: LrStressPreset) -> list[Run]:
    return [
        # Nine digits: 3 * 3e-3 is 0.009 to a reader, and the same float32.
        Run(method, multiple, float(f"{multiple * settings.finetune.reference_lr:.9g}"))
        for multiple in settings.lr_multiples
        for method in METHODS
    ]


# Fine-tuning


def _measure(
    settings: LrStressPreset,
    base: nnx.Module,
    train_tokens: np.ndarray,
    windows: np.ndarray,
    seed: int,
    folder: Results,
    todo: list[Run],
) -> None:
    """Does the unfinished runs, one after the other."""
    recipe = settings.finetune
    key_adapters, key_batches = jax.random.split(jax.random.key(seed))
    model = add_lora(base, recipe.lora_rank, recipe.lora_alpha, rngs=nnx.Rngs(key_adapters))
    graphdef, adapters, frozen = nnx.split(model, nnx.LoRAParam, ...)
    tokens, windows = jnp.asarray(train_tokens), jnp.asarray(windows)

    evaluate = make_evaluate(graphdef)
    trainers = {
        method: Trainer(
            graphdef,
            make_tx,
            batch_size=recipe.batch_size,
            seq_len=settings.seq_len,
            chunk_steps=recipe.chunk_steps,
        )
        for method, make_tx in METHODS.items()
    }
    if ZERO_STEP not in folder.runs:
        folder.finish(ZERO_STEP, {"heldout_loss": float(evaluate(adapters, frozen, windows))})

    all_steps = len(_runs(settings)) * recipe.steps
    with tqdm(
        total=all_steps, initial=all_steps - len(todo) * recipe.steps, unit="step"
    ) as progress:
        for run in todo:
            started = time.time()
            progress.set_description(run.name)
            checkpoints = Checkpoints(folder.checkpoint_folder(run.name))
            trainer = trainers[run.method]
            state = checkpoints.restore_or(trainer.init(adapters, run.learning_rate))
            folder.start(run.name, int(state.step))
            progress.update(int(state.step))

            def log(step: int, metrics: Metrics, run: Run = run) -> None:
                folder.log_metrics(_metric_rows(run, step, metrics))
                progress.set_postfix(loss=f"{metrics.loss[-1]:.3f}", refresh=False)
                progress.update(len(metrics.loss))

            state = trainer.fit(
                state,
                frozen,
                tokens,
                key_batches,
                run.learning_rate,
                steps=recipe.steps,
                checkpoints=checkpoints,
                checkpoint_steps=recipe.checkpoint_steps,
                log=log,
            )
            loss = float(evaluate(state.params, frozen, windows))
            guard, events = guard_record(state.opt_state)
            record = {**run._asdict(), "heldout_loss": loss, "seconds": time.time() - started}
            checkpoints.close()
            folder.finish(run.name, record | guard, events)


def _metric_rows(run: Run, step: int, metrics: Metrics) -> list[dict[str, Any]]:
    rows = [
        {"run": run.name, "step": step + i + 1, "loss": float(loss), "grad_norm": float(norm)}
        for i, (loss, norm) in enumerate(zip(metrics.loss, metrics.grad_norm, strict=True))
    ]
    if metrics.guard is not None:
        for row, scale, regime in zip(rows, *metrics.guard, strict=True):
            row |= {"scale": float(scale), "regime": REGIMES[regime]}
    return rows


# Results


def _publish(settings: LrStressPreset, config: dict[str, Any], folder: Results) -> None:
    """Writes tables, pictures and the report of a finished job, and prints the tables."""
    records = {run: folder.runs[run.name] for run in _runs(settings)}
    for record in records.values():
        record["heldout_perplexity"] = _perplexity(record["heldout_loss"])
    zero_step_loss = folder.runs[ZERO_STEP]["heldout_loss"]
    zero_step = _perplexity(zero_step_loss)
    curves = {
        method: [
            (run.learning_rate, record["heldout_perplexity"])
            for run, record in records.items()
            if run.method == method
        ]
        for method in METHODS
    }
    best = min(perplexity for _, perplexity in curves[PLAIN])
    guarded = [record for run, record in records.items() if run.method == GUARDED]

    folder.write_csv("summary.csv", list(records.values()))
    title = f"LoRA fine-tune of a decoder ({config['preset']}) on {config['data']['name']}"
    folder.write("perplexity.png", plots.lr_curves(curves, zero_step, best, title))
    rate = PLOTTED_MULTIPLE * settings.finetune.reference_lr
    picture = plots.stressed_run(
        *(
            (method, folder.metrics(Run(method, PLOTTED_MULTIPLE, rate).name))
            for method in (PLAIN, GUARDED)
        ),
        zero_step_loss,
        f"Learning rate {PLOTTED_MULTIPLE}x too high ({rate:g})",
    )
    folder.write("stressed_run.png", picture)

    tables = {
        f"Held-out perplexity (zero-step {number(zero_step)})": perplexity_rows(
            curves, settings.lr_multiples
        ),
        "What the guard did": guard_rows(guarded, settings.lr_multiples),
    }
    folder.write("report.md", _markdown(config, tables, zero_step, best, records.values()))
    console = Console()
    for name, table in tables.items():
        print_table(console, name, *table)
    console.print(f"report, pictures and logs: {folder.folder}", soft_wrap=True)


def _markdown(
    config: dict[str, Any],
    tables: dict[str, tuple[list[str], list[list[str]]]],
    zero_step: float,
    best: float,
    records: Iterable[dict[str, Any]],
) -> str:
    (perplexity_title, perplexity), (guard_title, guard) = tables.items()
    finetune = config["settings"]["finetune"]
    seconds = sum(record["seconds"] for record in records)
    packages = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    return f"""# Learning-rate stress, {config["preset"]}

A decoder pretrained on {config["pretraining data"]["name"]} is fine-tuned with LoRA on
{config["data"]["name"]} for {finetune["steps"]} steps. 1x is AdamW's tuned learning rate,
{finetune["reference_lr"]:g}. Perplexity is per byte, on text that was never trained on.

## {perplexity_title}

{markdown_table(*perplexity)}

Before fine-tuning: {number(zero_step)}. Best AdamW: {number(best)}.

![Held-out perplexity against the learning rate](perplexity.png)

## {guard_title}

{markdown_table(*guard)}

![Loss, scale and regimes of a stressed run](stressed_run.png)

Every intervention is in `events.jsonl`, every step in `metrics.jsonl`.

## How it was made

    python -m experiments {shlex.join(sys.argv[1:])}

- seed: {config["seed"]}
- device: {config["device"]}
- fine-tuning runs: {seconds:.0f} s in all, compilation included
- versions: {packages}
"""


def _perplexity(loss: float | None) -> float:
    # exp(700) is near the largest float; null is a loss that is not finite.
    return math.exp(loss) if loss is not None and loss < 700 else math.inf
