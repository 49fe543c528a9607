"""Text from a model, one most likely token after the other."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.decoder import Decoder


@functools.partial(nnx.jit, static_argnames="length")
def generate(model: Decoder, prompt_bt: jax.Array, length: int) -> jax.Array:
    """Continues prompts greedily.

    Each token costs a forward pass over the whole text: for looking at small models.

    Args:
      model: The model.
      prompt_bt: Tokens to continue, integers of shape (b, t).
      length: Tokens per row in the end, the prompt's included.

    Returns:
      Prompts and continuations, integers of shape (b, length).
    """
    t = prompt_bt.shape[1]
    tokens_bt = jnp.pad(prompt_bt, ((0, 0), (0, length - t)))

    def add_token(position, tokens_bt):
        # What comes after a position does not reach it: the zeros there are harmless.
        last_bd = model.hidden(tokens_bt)[:, position - 1]
        return tokens_bt.at[:, position].set(jnp.argmax(model.head()(last_bd), axis=-1))

    return jax.lax.fori_loop(t, length, add_token, tokens_bt)
