"""Documents packed into rows of equal length."""

from __future__ import annotations

import jax
import numpy as np

from experiments.batches import Batch, Batches
from experiments.errors import UserError
from experiments.token_cache import TokenStream


class PackedBatches(Batches):
    """Documents one after the other, cut into rows of t + 1 tokens; every epoch shuffles the rows.

    A document that crosses the end of a row goes on in the next one as a segment of its own,
    without its earlier tokens as context. Every token is in exactly one row, so an epoch has each
    of them once; the last row is padded. Epochs follow each other without a gap: a batch may have
    the last rows of one and the first rows of the next.

    Args:
      stream: The documents.
      key: Random key of the run.
      batch_size: Number of rows b.
      seq_len: Number of predicted tokens t per row.
    """

    def __init__(self, stream: TokenStream, key: jax.Array, *, batch_size: int, seq_len: int):
        if len(stream.tokens) < 2:
            raise UserError(f"{len(stream.tokens)} tokens of text, but 2 are needed")
        self._stream = stream
        self._seed = np.asarray(jax.random.key_data(key)).tolist()
        self._batch_size = batch_size
        self._width = seq_len + 1
        self.rows = -(-len(stream.tokens) // self._width)
        """Number of rows in an epoch."""
        self._shuffled: tuple[int, np.ndarray] | None = None

    def chunk(self, step: int, count: int) -> Batch:
        """The batches of `count` steps, from `step` on, of shape (count, b, t + 1)."""
        places = np.arange(step * self._batch_size, (step + count) * self._batch_size)
        epochs, places = np.divmod(places, self.rows)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            rows[epochs == epoch] = self._order(int(epoch))[places[epochs == epoch]]
        shape = (count, self._batch_size, self._width)
        return Batch(*(array.reshape(shape) for array in self._read(rows)))

    def _order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in the order of their use."""
        # The last one is kept: a permutation takes longer than a batch.
        if self._shuffled is None or self._shuffled[0] != epoch:
            generator = np.random.default_rng([*self._seed, epoch])
            self._shuffled = epoch, generator.permutation(self.rows)
        return self._shuffled[1]

    def _read(self, rows: np.ndarray) -> Batch:
        tokens, starts = self._stream
        places = rows[:, None] * self._width + np.arange(self._width)
        is_text = places < len(tokens)
        places = np.minimum(places, len(tokens) - 1)
        documents = np.searchsorted(starts, places, side="right")
        segments = documents - documents[:, :1] + 1
        return Batch(
            np.where(is_text, tokens[places], 0).astype(np.int32),
            np.where(is_text, segments, 0).astype(np.int32),
        )
