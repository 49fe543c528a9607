"""Controller: what the policy remembers of the run, and the limits that always hold."""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lbw_optax.law import Law
from lbw_optax.sensing import is_inexact, total

NO_LIMIT = jnp.finfo(jnp.float32).max
"""Length of a step that nothing bounds."""


class Limits(NamedTuple):
    """What holds whatever the sensors say; see `lbw_optax.guard`."""

    min_scale: float
    relative_step_limit: float
    max_rejections: int


class Controller(NamedTuple):
    """The policy's memory.

    Attributes:
      step_scale: the scale in force, that of the last applied step, in [min_scale, 1].
      latch: scale that the envelope has imposed; it follows the envelope down at once, and rises
        slowly.
      earned: factor on the latch that the measured overshoot has earned; below 1 it anneals.
      trust_radius: absolute step length that has proved safe; 0 before the first step.
      first_length: norm that the first inner step would have, had it moved all entries as far as
        those that it moved; `NO_LIMIT` before it, and 0 once a later step was certainly longer, as
        in a warm-up.
      last_length: norm of the last applied step; 0 before the first, and once a step that cannot be
        undone has been blamed.
      last_slope: slope at the start of the last applied step, in units of the loss.
      rejections: held or undone steps in a row.
      too_long: steps in a row that were `Diagnosis.long`.
      allowance: what the norm of the parameters is multiplied with; above 1 if some of them started
        at zero.
      elasticity: by what share the first step lowers the loss, for each share of the parameters'
        norm that it takes; 0 before it, and `NO_LIMIT` where it cannot be told.
    """

    step_scale: jax.Array  # shape=(), dtype=float32
    latch: jax.Array  # shape=(), dtype=float32
    earned: jax.Array  # shape=(), dtype=float32
    trust_radius: jax.Array  # shape=(), dtype=float32
    first_length: jax.Array  # shape=(), dtype=float32
    last_length: jax.Array  # shape=(), dtype=float32
    last_slope: jax.Array  # shape=(), dtype=float32
    rejections: jax.Array  # shape=(), dtype=int32
    too_long: jax.Array  # shape=(), dtype=int32
    allowance: jax.Array  # shape=(), dtype=float32
    elasticity: jax.Array  # shape=(), dtype=float32


def started_at_zero(controller: Controller) -> jax.Array:
    """Returns how near the parameters are to a half that started at zero, as LoRA's; in [0, 1]."""
    return jnp.minimum(controller.allowance - 1, 1)


def had_warm_up(controller: Controller) -> jax.Array:
    """Returns whether a step was certainly longer than the first one, as in a warm-up."""
    return controller.first_length == 0


def init_controller(params: Any, axis_name: Any, law: Law) -> Controller:
    """Returns the controller of a run that has not begun; its very first steps are not excused."""
    start = {"step_scale": 1, "latch": 1, "earned": 1, "first_length": NO_LIMIT}
    start |= {"too_long": law.brief_steps, "allowance": _allowance(params, axis_name, law)}
    whole = ("rejections", "too_long")
    return Controller(
        **{
            name: jnp.asarray(start.get(name, 0), jnp.int32 if name in whole else jnp.float32)
            for name in Controller._fields
        }
    )


def _allowance(params: Any, axis_name: Any, law: Law) -> jax.Array:
    r"""Allows for entries that start at zero: they will get a size, but have none yet.

    .. math:: A = \min(n / n_0, A_0)

    with :math:`n` the number of entries, :math:`n_0` that of those that are not zero, and
    :math:`A_0` = ``law.allowance_most``.

    Args:
      params: the parameters; shapes without values say nothing.
      axis_name: mesh axes over which the leaves are split, or None.
      law: the constants.

    Returns:
      A float32 scalar, at least 1.
    """
    leaves = [x for x in jax.tree.leaves(params) if is_inexact(x)]
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        return jnp.float32(1)
    # Decisions are no function to differentiate, see `sensing.measure`.
    leaves = jax.lax.stop_gradient(leaves)
    sums = (jnp.float32(sum(map(jnp.size, leaves))), _nonzero(leaves))
    if axis_name is not None:
        with contextlib.suppress(NameError):  # Outside shard_map the arrays are whole.
            sums = jax.lax.psum(sums, axis_name)
    count, nonzero = sums
    found = jnp.minimum(count / jnp.maximum(nonzero, 1), law.allowance_most)
    return jnp.where(nonzero > 0, found, 1.0)


@jax.jit  # In one pass: eagerly each count would make a copy of its array.
def _nonzero(leaves: list[jax.Array]) -> jax.Array:
    """The number of entries that are not zero."""
    # By rows, since the number of a large array's entries overflows int32.
    rows = [jnp.count_nonzero(x, axis=-1 if jnp.ndim(x) else None) for x in leaves]
    return total(jnp.sum(x.astype(jnp.float32)) for x in rows)
