"""The language-model tasks of the suites `quality` and `study`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.data import (
    crop_batch,
    heldout_windows,
    python_manual,
    split,
    split_tokens,
    standard_library,
    word_tokens,
)
from experiments.lora import add_lora
from experiments.models.decoder import Decoder
from experiments.presets import BenchPreset
from experiments.pretrain import pretrained
from experiments.train import next_token_loss

BYTE_TASKS = ("lora", "scratch", "full")
"""LoRA fine-tune of the pretrained base, training from random values, full fine-tune of the base;
all three on the bytes of the Python manual."""

TASKS = (*BYTE_TASKS, "words", "usual")
"""The same; training from random values on the words of Python's standard library, where most
parameters are embeddings, which start far smaller than the other ones; and `scratch` from the
values that published models start from."""

USUAL_DEVIATION = 0.02
"""Standard deviation at which the matrices of published models start, GPT-2's, Llama's and
Qwen2's among them (`initializer_range`)."""

VOCABULARY = 4096
"""Words that are told apart."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A language model to train, see `experiments.sweep.Trainable`."""

    name: str
    """Name in tables."""
    init: Callable[[jax.Array], Any]
    """From a random key to the parameters."""
    loss: Callable[[Any, jax.Array], jax.Array]
    """From the parameters and tokens of shape (b, t + 1) to the loss in nats."""
    tokens: jax.Array
    """What is trained on, integers of shape (n,)."""
    windows: jax.Array
    """What is held out, int32 of shape (m, b, t + 1)."""
    batch_size: int
    """Sequences per step."""
    seq_len: int
    """Predicted tokens per sequence."""

    def batch(self, key: jax.Array, over: Any) -> jax.Array:
        """The tokens of one step, int32 of shape (b, t + 1), wherever in the run it is."""
        return crop_batch(self.tokens, key, self.batch_size, self.seq_len)

    def evaluate(self, params: Any) -> jax.Array:
        """The held-out loss in nats."""
        return jax.lax.map(lambda tokens: self.loss(params, tokens), self.windows).mean()


def language_tasks(preset: BenchPreset, names: tuple[str, ...] = TASKS) -> dict[str, Task]:
    """Makes the tasks of a preset; pretrains their base where one of them needs it.

    Args:
      preset: The size.
      names: Which tasks, from `TASKS`.

    Returns:
      Name -> task.
    """
    base = None
    if set(names) & {"lora", "full"}:
        base = pretrained(preset.model, "float32", preset.seq_len, preset.pretrain)
    makers = {
        "lora": (_lora, _bytes),
        "scratch": (_scratch, _bytes),
        "full": (_full, _bytes),
        "words": (_scratch_words, _words),
        "usual": (_scratch_usual, _bytes),
    }
    tasks = {}
    for name in names:
        trainable, text = makers[name]
        init, loss = trainable(preset, base)
        tokens, windows = map(jnp.asarray, text(preset))
        tasks[name] = Task(name, init, loss, tokens, windows, preset.batch_size, preset.seq_len)
    return tasks


def _bytes(preset: BenchPreset) -> tuple[np.ndarray, np.ndarray]:
    """The tokens and the held-out windows of the tasks over bytes."""
    p = preset
    tokens, heldout = split(python_manual(), p.seq_len)
    return tokens, heldout_windows(heldout, p.seq_len, p.heldout_windows, p.heldout_windows)


def _words(preset: BenchPreset) -> tuple[np.ndarray, np.ndarray]:
    """The same over words, whose logits are many: fewer windows at a time."""
    p = preset
    tokens, heldout = split_tokens(word_tokens(standard_library(), VOCABULARY))
    at_once = max(p.heldout_windows // 8, 1)
    return tokens, heldout_windows(heldout, p.seq_len, at_once, p.heldout_windows)


def _scratch(preset: BenchPreset, base: nnx.Module | None):
    return _trainable(lambda key: Decoder(preset.model, rngs=nnx.Rngs(key)), nnx.Param)


def _scratch_words(preset: BenchPreset, base: nnx.Module | None):
    model = dataclasses.replace(preset.model, vocab_size=VOCABULARY)
    return _scratch(dataclasses.replace(preset, model=model), base)


def _scratch_usual(preset: BenchPreset, base: nnx.Module | None):
    init, loss = _scratch(preset, base)

    def rescale(x):
        constant = x.min() == x.max()  # Gains and biases.
        return jnp.where(constant, x, x * (USUAL_DEVIATION / jnp.where(constant, 1, x.std())))

    return lambda key: jax.tree.map(rescale, init(key)), loss


def _full(preset: BenchPreset, base: nnx.Module):
    graphdef, state = nnx.split(base)
    return _trainable(lambda key: nnx.merge(graphdef, state), nnx.Param)


def _lora(preset: BenchPreset, base: nnx.Module):
    graphdef, state = nnx.split(base)

    def make(key):
        model = nnx.merge(graphdef, state)
        return add_lora(model, preset.lora_rank, preset.lora_alpha, rngs=nnx.Rngs(key))

    return _trainable(make, nnx.LoRAParam)


def _trainable(make: Callable[[jax.Array], nnx.Module], kind: type):
    """The `init` and `loss` of a task whose parameters are the variables of one kind."""
    graphdef, _, frozen = nnx.split(make(jax.random.key(0)), kind, ...)

    def init(key):
        _, params, _ = nnx.split(make(key), kind, ...)
        return params

    def loss(params, tokens_bt):
        return next_token_loss(graphdef, params, frozen, tokens_bt)

    return init, loss
