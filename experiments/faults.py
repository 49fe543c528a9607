"""Faults for the drills of the suites: what goes wrong, at which steps, as pure functions.

A fault is a tuple of numbers, so that one compiled program runs all of them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Fault(NamedTuple):
    """What goes wrong. The defaults are a healthy run.

    Attributes:
      start: First step that may be hit.
      stop: The step after the last one.
      hits: How many random steps between them are hit, one in each of so many equal parts; 0 means
        all of them.
      gradient: What the gradients of a hit step are multiplied with.
      entry: What is added to one entry of the gradients of a hit step.
      loss: What is added to the loss of a hit step, as the optimizer sees it.
      tokens: Share of the tokens of a hit step that become random.
      sequences: Share of its sequences that become random from end to end.
      rate: What the learning rate of a hit step is multiplied with.
    """

    start: int | jax.Array = 0
    stop: int | jax.Array = 0
    hits: int | jax.Array = 0
    gradient: float | jax.Array = 1.0
    entry: float | jax.Array = 0.0
    loss: float | jax.Array = 0.0
    tokens: float | jax.Array = 0.0
    sequences: float | jax.Array = 0.0
    rate: float | jax.Array = 1.0


def drills(steps: int) -> dict[str, Fault]:
    """Every fault of the suite, for runs of a number of steps.

    Args:
      steps: Length of a run. Random hits come after its first tenth, so that there is something
        to lose.

    Returns:
      Name -> fault; `none` is the healthy run.
    """
    after, middle = steps // 10, steps // 2
    rare = {"start": after, "stop": steps, "hits": max(steps // 100, 1)}
    few = {"start": after, "stop": steps, "hits": 3}
    return {
        "none": Fault(),
        "NaN gradient, 1 % of steps": Fault(**rare, gradient=math.nan),
        "Inf gradient, 1 % of steps": Fault(**rare, gradient=math.inf),
        "NaN loss, 1 % of steps": Fault(**rare, loss=math.nan),
        "gradient x1e2, 3 steps": Fault(**few, gradient=1e2),
        "gradient x1e6, 3 steps": Fault(**few, gradient=1e6),
        "one entry 1e25, 1 step": Fault(after, steps, 1, entry=1e25),
        "learning rate x30, 50 steps": Fault(middle, middle + 50, rate=30.0),
        "20 % random tokens, 30 steps": Fault(middle, middle + 30, tokens=0.2),
        "20 % random sequences, 30 steps": Fault(middle, middle + 30, sequences=0.2),
    }


def is_hit(fault: Fault, key: jax.Array, step: jax.Array) -> jax.Array:
    """Whether a step is hit.

    Args:
      fault: The fault.
      key: Random key of the run.
      step: The step.

    Returns:
      A bool of shape ().
    """
    width = jnp.maximum((fault.stop - fault.start) // jnp.maximum(fault.hits, 1), 1)
    part, place = jnp.divmod(step - fault.start, width)
    drawn = jax.random.randint(jax.random.fold_in(key, part), (), 0, width)
    inside = (step >= fault.start) & (step < fault.stop)
    return inside & ((fault.hits == 0) | ((part < fault.hits) & (place == drawn)))


def spoil_batch(
    fault: Fault, key: jax.Array, step: jax.Array, tokens_bt: jax.Array, vocabulary: int
) -> jax.Array:
    """Replaces a share of the tokens of a hit step, and of its sequences, by random ones.

    Args:
      fault: The fault.
      key: Random key of the run.
      step: The step.
      tokens_bt: Its tokens.
      vocabulary: Number of token ids.

    Returns:
      The tokens that the model sees.
    """
    key_where, key_what, key_which = jax.random.split(jax.random.fold_in(key, step), 3)
    tokens = jax.random.uniform(key_where, tokens_bt.shape) < fault.tokens
    sequences = jax.random.uniform(key_which, (tokens_bt.shape[0], 1)) < fault.sequences
    noise = jax.random.randint(key_what, tokens_bt.shape, 0, vocabulary)
    return jnp.where(is_hit(fault, key, step) & (tokens | sequences), noise, tokens_bt)


def spoil_gradients(
    fault: Fault, key: jax.Array, step: jax.Array, loss: jax.Array, grads: Any
) -> tuple[jax.Array, Any]:
    """Spoils the loss and the gradients of a hit step.

    Args:
      fault: The fault.
      key: Random key of the run.
      step: The step.
      loss: Its loss.
      grads: Its gradients.

    Returns:
      The loss and the gradients that the optimizer sees.
    """
    hit = is_hit(fault, key, step)
    factor, entry = jnp.where(hit, fault.gradient, 1), jnp.where(hit, fault.entry, 0)
    leaves, treedef = jax.tree.flatten(grads)
    leaves = [(leaf * factor).astype(leaf.dtype) for leaf in leaves]
    first = leaves[0].ravel()
    leaves[0] = first.at[0].add(entry.astype(first.dtype)).reshape(leaves[0].shape)
    return loss + jnp.where(hit, fault.loss, 0), jax.tree.unflatten(treedef, leaves)


def rate_factor(fault: Fault, key: jax.Array, step: jax.Array) -> jax.Array:
    """What the learning rate of a step is multiplied with."""
    return jnp.where(is_hit(fault, key, step), fault.rate, 1)
