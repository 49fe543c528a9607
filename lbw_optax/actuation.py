"""Actuation: carries a command out on the step and on the inner state, by selection alone."""

from typing import Any

import jax
import jax.numpy as jnp

from lbw_optax.policy import Action, Command
from lbw_optax.sensing import is_inexact


def _wide(dtype: Any) -> Any:
    """What products are made in; float8 has no promotion to it of its own."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def emit(command: Command, step: Any, last_step: Any) -> Any:
    """Builds the emitted update.

    Args:
      command: the policy's decision.
      step: what the inner optimizer emitted.
      last_step: the last applied step, or None where it is not remembered.

    Returns:
      A tree like `step`: `step` itself, a multiple of its finite part, zero, or the opposite of a
      part of the last step. Multiplication is done in float32 or more and never used to reject.
    """
    passed = command.action == Action.PASS
    shortened = (command.action == Action.SCALE) | (command.action == Action.PROCEED)
    undone = command.action == Action.BACKTRACK

    def leaf(u, d):
        if getattr(u, "dtype", None) == jax.dtypes.float0:
            return u
        u = jnp.asarray(u)
        if not is_inexact(u):
            return jnp.where(passed | shortened, u, jnp.zeros_like(u))
        wide = _wide(u.dtype)
        factor = command.factor.astype(wide)
        usable = jnp.where(jnp.isfinite(u), u, 0).astype(wide)
        other = jnp.where(shortened, factor * usable, 0)
        if d is not None and is_inexact(d):
            other = jnp.where(undone, (factor - 1) * d.astype(wide), other)
        return jnp.where(passed, u, other.astype(u.dtype))

    if last_step is None:
        return jax.tree.map(lambda u: leaf(u, None), step)
    return jax.tree.map(leaf, step, last_step)


def keep_step(command: Command, moved: jax.Array, applied: Any, last_step: Any) -> Any:
    """Updates what is remembered of the last applied step.

    Args:
      command: the policy's decision.
      moved: whether a new step was taken.
      applied: the entries of the emitted update that match `last_step`.
      last_step: what is remembered so far.

    Returns:
      A tree like `last_step`.
    """
    undone = command.action == Action.BACKTRACK

    def leaf(d, e):
        if not is_inexact(d):
            return d
        wide = _wide(d.dtype)
        kept = command.factor.astype(wide) * d.astype(wide)
        shorter = jnp.where(undone, kept.astype(d.dtype), d)
        if e.dtype != d.dtype:
            # Without the parameters nothing keeps a step inside the range of their dtype.
            largest = float(jnp.finfo(d.dtype).max)
            e = jnp.clip(e, -largest, largest).astype(d.dtype)
        return jnp.where(moved, e, shorter)

    return jax.tree.map(leaf, last_step, applied)


def keep_inner_state(command: Command, old: Any, new: Any) -> Any:
    """Selects the inner state that stays.

    Args:
      command: the policy's decision.
      old: the inner state before the step.
      new: the inner state that `inner.update` made.

    Returns:
      `old` for a held or undone step, else `new`; PROCEED alone keeps a finite old entry where the
      new one is not finite, so that the run can go on once the fault is over.
    """
    rejected = (command.action == Action.HOLD) | (command.action == Action.BACKTRACK)
    proceeded = command.action == Action.PROCEED

    def leaf(x, y):
        kept = rejected
        if is_inexact(y):
            kept = kept | (proceeded & jnp.isfinite(x) & ~jnp.isfinite(y))
        return jnp.where(kept, x, y)

    return jax.tree.map(leaf, old, new)
