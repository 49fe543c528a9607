"""Batches as pure functions of a key and a step, so that a resumed run needs no iterator state."""

from __future__ import annotations

import abc
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import crop_batch


class Batch(NamedTuple):
    """Sequences for one step, or for several with a leading axis of steps.

    Attributes:
      tokens: Token ids, int32 of shape (b, t + 1): inputs are [:, :-1], targets [:, 1:].
      segments: Number of the document in its row, from 1 on; 0 is padding. Like `tokens`. A token
        is predicted from those before it in its segment.
    """

    tokens: np.ndarray
    segments: np.ndarray


class Batches(abc.ABC):
    """The batches of a run, on the host."""

    @abc.abstractmethod
    def chunk(self, step: int, count: int) -> Batch:
        """The batches of `count` steps, from `step` on, of shape (count, b, t + 1)."""

    def at(self, step: int) -> Batch:
        """The batch of one step, of shape (b, t + 1)."""
        return Batch(*(array[0] for array in self.chunk(step, 1)))


class CroppedBatches(Batches):
    """Sequences from uniformly random places of one text, which is a single segment.

    Args:
      tokens: Token ids, shape (n,).
      key: Random key of the run; `fold_in(key, step)` is that of a step.
      batch_size: Number of sequences b.
      seq_len: Number of predicted tokens t per sequence.
    """

    def __init__(self, tokens: np.ndarray, key: jax.Array, *, batch_size: int, seq_len: int):
        self._tokens = jnp.asarray(tokens)
        self._key = key
        self._batch_size = batch_size
        self._seq_len = seq_len

    def chunk(self, step: int, count: int) -> Batch:
        """The batches of `count` steps, from `step` on, of shape (count, b, t + 1)."""
        steps = np.arange(step, step + count)
        tokens = _crops(self._tokens, self._key, steps, self._batch_size, self._seq_len)
        tokens = np.asarray(tokens)
        return Batch(tokens, np.ones_like(tokens))


@functools.partial(jax.jit, static_argnums=(3, 4))
@functools.partial(jax.vmap, in_axes=(None, None, 0, None, None))
def _crops(tokens, key, step, batch_size, seq_len):
    return crop_batch(tokens, jax.random.fold_in(key, step), batch_size, seq_len)
