"""Next-token cross-entropy, computed a few positions at a time.

The logits of a batch in float32 are its largest array by far: 10 GB for 8 x 2048 tokens and
Qwen2.5's vocabulary. Here they exist for `chunk` positions only, forward and backward.

Axis letters as in `decoder`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from experiments.models.decoder import Decoder

CHUNK = 128
"""Positions whose logits exist at a time: 0.6 GB for 8 rows and Qwen2.5's vocabulary."""


def next_token_loss(
    model: Decoder,
    tokens_bt: jax.Array,
    segments_bt: jax.Array | None = None,
    *,
    chunk: int = CHUNK,
) -> jax.Array:
    """Mean cross-entropy of each token given those before it in its document.

    Args:
      model: The model.
      tokens_bt: Token ids, integers of shape (b, t + 1).
      segments_bt: Documents of a packed batch, as for `Decoder.__call__`, shape (b, t + 1). A token
        counts as a target if it continues the document of the token before it.
      chunk: Positions whose logits exist at a time.

    Returns:
      The mean over the targets in nats, float32 of shape (); 0 where there is no target.
    """
    total, count = next_token_sums(model, tokens_bt, segments_bt, chunk=chunk)
    return total / jnp.maximum(count, 1)


def next_token_sums(
    model: Decoder,
    tokens_bt: jax.Array,
    segments_bt: jax.Array | None = None,
    counted_bt: jax.Array | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the cross-entropies and their number, for means over several batches.

    Args:
      model: The model.
      tokens_bt: As for `next_token_loss`.
      segments_bt: As for `next_token_loss`.
      counted_bt: Which of the targets, `tokens_bt[:, 1:]`, count; booleans of shape (b, t).
        Strided evaluation leaves out those of a window's context. None: all.
      chunk: As for `next_token_loss`.

    Returns:
      The sum in nats and the number of targets, each float32 of shape ().
    """
    inputs_bt, targets_bt = tokens_bt[:, :-1], tokens_bt[:, 1:]
    counts_bt = jnp.ones(targets_bt.shape, bool) if counted_bt is None else counted_bt
    if segments_bt is not None:
        before_bt, after_bt = segments_bt[:, :-1], segments_bt[:, 1:]
        counts_bt = counts_bt & (before_bt == after_bt) & (after_bt > 0)
        segments_bt = before_bt
    hidden_btd, logits = model.hidden(inputs_bt, segments_bt), model.head()

    @jax.checkpoint
    def add_chunk(total, inputs):
        x_btd, targets_bt, counts_bt = inputs
        losses_bt = optax.softmax_cross_entropy_with_integer_labels(logits(x_btd), targets_bt)
        return total + jnp.sum(losses_bt, where=counts_bt), None

    chunks = jax.tree.map(lambda x: _split_positions(x, chunk), (hidden_btd, targets_bt, counts_bt))
    total, _ = jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), chunks)
    return total, jnp.sum(counts_bt, dtype=jnp.float32)


def _split_positions(x_bt: jax.Array, chunk: int) -> jax.Array:
    """From (b, t, ...) to (chunks, b, chunk, ...), zeros filling the last chunk."""
    b, t = x_bt.shape[:2]
    chunk = min(chunk, t)
    padding = [(0, 0)] * x_bt.ndim
    padding[1] = (0, -t % chunk)
    chunks = jnp.pad(x_bt, padding).reshape(b, -1, chunk, *x_bt.shape[2:])
    return jnp.moveaxis(chunks, 1, 0)
