"""Sensing: what one step shows. Reductions over trees to scalars."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Telemetry(NamedTuple):
    """One step's observations, each a scalar.

    Attributes:
      loss: minibatch loss; 0 where it was not given.
      gradient_norm: Euclidean norm of the incoming gradients.
      step_norm: norm of the finite part of the inner optimizer's step.
      kurtosis: how much longer than the others the longest entries of that part are; at least 1, 3
        of normally distributed ones, and infinite where it cannot be told.
      parameter_norm: norm of the finite part of the parameters.
      slope: <g_t, u_t>, the change of the loss that the new step predicts.
      overshoot: <g_t, d_{t-1}>, the slope at the end of the last applied step; positive means that
        the step went too far.
      alignment: cosine of u_t and d_{t-1}; 1 where it cannot be measured.
      size: number of floating-point entries.
      loss_finite: whether the loss is finite.
      gradient_finite: whether the gradients and their squared norm are finite.
      step_finite: whether what the inner optimizer emits and newly stores is finite.
    """

    loss: jax.Array  # shape=(), dtype=float32
    gradient_norm: jax.Array  # shape=(), dtype=float32
    step_norm: jax.Array  # shape=(), dtype=float32
    kurtosis: jax.Array  # shape=(), dtype=float32
    parameter_norm: jax.Array  # shape=(), dtype=float32
    slope: jax.Array  # shape=(), dtype=float32
    overshoot: jax.Array  # shape=(), dtype=float32
    alignment: jax.Array  # shape=(), dtype=float32
    size: jax.Array  # shape=(), dtype=float32
    loss_finite: jax.Array  # shape=(), dtype=bool
    gradient_finite: jax.Array  # shape=(), dtype=bool
    step_finite: jax.Array  # shape=(), dtype=bool


def is_inexact(x: Any) -> bool:
    """Returns whether `x` is a floating-point leaf, the only kind that is sensed and scaled."""
    return jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.inexact)


def total(scalars: Iterable[jax.Array]) -> jax.Array:
    """Adds up scalars, one of each leaf, in float32.

    Behind a barrier: else the compiler writes one addition per leaf into one kernel with all that
    follows, which took a CPU's 325 s instead of 34 with 392 arrays of 512 entries.
    """
    listed = [jnp.asarray(x, jnp.float32) for x in scalars]
    if not listed:
        return jnp.zeros([], jnp.float32)
    return jnp.sum(jax.lax.optimization_barrier(jnp.stack(listed)))


def has_data(telemetry: Telemetry) -> jax.Array:
    """Returns whether there is a gradient; a batch without any is one without data."""
    return telemetry.gradient_norm > 0


def inner_product(a: Any, b: Any) -> jax.Array:
    """Returns <a, b> over all floating-point leaves, accumulated in float32."""
    return estimated_product(a, b, a)


def estimated_product(a: Any, b: Any, whole: Any) -> jax.Array:
    """Estimates an inner product from the entries that the memory keeps.

    The product of each leaf counts for all of its entries: leaves are thinned by different factors,
    and their gradients and steps differ.

    Args:
      a: a tree with the shapes of what is remembered of the last step.
      b: a tree like `a`.
      whole: the tree that `a` is a sample of.

    Returns:
      A float32 scalar; exact where everything is remembered, 0 where nothing is.
    """
    if not jax.tree.leaves(a):
        return jnp.zeros([], jnp.float32)
    return total(
        jnp.size(z)
        / jnp.size(x)
        * jnp.sum(jnp.asarray(x, jnp.float32) * jnp.asarray(y, jnp.float32))
        for x, y, z in zip(*map(jax.tree.leaves, (a, b, whole)), strict=True)
        if is_inexact(x) and is_inexact(y) and jnp.size(y)
    )


def _squared(tree: Any) -> Any:
    """Squares every floating-point entry, in float32."""
    return jax.tree.map(
        lambda x: jnp.square(jnp.asarray(x, jnp.float32)) if is_inexact(x) else x, tree
    )


def _kurtosis(size: jax.Array, square: jax.Array, fourth: jax.Array) -> jax.Array:
    r"""Returns :math:`n \sum u^4 / (\sum u^2)^2`; infinite where float32 does not hold the sums."""
    held = (fourth > jnp.finfo(jnp.float32).tiny / jnp.finfo(jnp.float32).eps) & (fourth < jnp.inf)
    square = jnp.where(held, square, 1)
    return jnp.where(held, size * (fourth / square) / square, jnp.inf)


def finite_part(tree: Any) -> Any:
    """Returns `tree` with zero in the place of every entry that is not finite."""
    return jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0) if is_inexact(x) else x, tree)


def has_nonfinite(x: jax.Array) -> jax.Array:
    """Returns whether an array has an entry that is not finite; flags and integers have none.

    x - x is 0 where x is finite and NaN elsewhere. A sum of it is made in the same pass over the
    memory as the other sums of an array, a truth value in one of its own: on a TPU that was a
    quarter of all bytes that the step moved.
    """
    return jnp.isnan(jnp.sum(x - x)) if is_inexact(x) else jnp.zeros([], bool)


def count_nonfinite(tree: Any) -> jax.Array:
    """Counts the leaves of a tree with an entry that is not finite, a float32 scalar."""
    return total(has_nonfinite(x) for x in jax.tree.leaves(tree) if is_inexact(x))


def became_nonfinite(old: Any, new: Any, scalars: bool) -> jax.Array:
    """Counts the leaves that have an entry that is not finite, and had none before.

    Args:
      old: a tree of arrays.
      new: a tree like `old`.
      scalars: whether leaves without axes count; an optimizer's own bookkeeping may well store an
        infinite best value or error there.

    Returns:
      A float32 scalar.
    """
    return total(
        has_nonfinite(y) & ~has_nonfinite(x)
        for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
        if is_inexact(y) and (scalars or jnp.ndim(y) > 0)
    )


def measure(
    gradients: Any,
    step: Any,
    params: Any,
    loss: Any,
    last_step: Any,
    sampled_gradients: Any,
    sampled_step: Any,
    last_length: jax.Array,
    inner_states: tuple[Any, Any],
    axis_name: Any,
) -> Telemetry:
    """Measures one step.

    Args:
      gradients: what the inner optimizer received.
      step: what it emitted.
      params: the parameters, or None.
      loss: scalar loss, or None.
      last_step: what is remembered of the last applied step.
      sampled_gradients: the entries of the gradients that match `last_step`.
      sampled_step: the entries of the step that match it.
      last_length: norm of the last applied step; 0 before the first.
      inner_states: the inner optimizer's state before and after the step.
      axis_name: mesh axes over which the leaves are split, or None.

    Returns:
      The telemetry; a quantity that cannot be measured is 0.
    """
    usable, sampled_usable = finite_part(step), finite_part(sampled_step)
    finite_params, squares = finite_part(params), _squared(usable)
    sampled = any(is_inexact(x) and jnp.size(x) for x in jax.tree.leaves(last_step))
    scalars = any(jnp.ndim(x) == 0 for x in jax.tree.leaves(gradients))
    sums = {
        "gradient": inner_product(gradients, gradients),
        "step": inner_product(usable, usable),
        "fourth": inner_product(squares, squares),
        "params": inner_product(finite_params, finite_params),
        # Of the same entries as the overshoot, since the two are compared: a + c, not a and c.
        "slope": estimated_product(sampled_gradients, sampled_usable, gradients)
        if sampled
        else inner_product(gradients, usable),
        "overshoot": estimated_product(sampled_gradients, last_step, gradients),
        "alignment": estimated_product(sampled_usable, last_step, step),
        "nonfinite": count_nonfinite(step) + became_nonfinite(*inner_states, scalars=scalars),
        "size": jnp.float32(sum(jnp.size(x) for x in jax.tree.leaves(gradients) if is_inexact(x))),
    }
    if axis_name is not None:
        try:
            sums = jax.lax.psum(sums, axis_name)
        except NameError:
            raise ValueError(
                f"update: axis_name must be an axis of the shard_map around it, got {axis_name!r}"
            ) from None
    step_norm = jnp.sqrt(sums["step"])
    known = sampled & (step_norm > 0) & (last_length > 0)
    cosine = sums["alignment"] / jnp.where(known, step_norm, 1)
    cosine = cosine / jnp.where(known, last_length, 1)
    loss = jnp.float32(0) if loss is None else jnp.asarray(loss, jnp.float32)
    telemetry = Telemetry(
        loss=loss,
        gradient_norm=jnp.sqrt(sums["gradient"]),
        step_norm=step_norm,
        kurtosis=_kurtosis(sums["size"], sums["step"], sums["fourth"]),
        parameter_norm=jnp.sqrt(sums["params"]),
        slope=sums["slope"],
        overshoot=sums["overshoot"],
        alignment=jnp.where(known & jnp.isfinite(cosine), jnp.clip(cosine, -1, 1), 1),
        size=sums["size"],
        loss_finite=jnp.isfinite(loss),
        gradient_finite=jnp.isfinite(sums["gradient"]) & jnp.isfinite(sums["overshoot"]),
        step_finite=jnp.isfinite(sums["step"])
        & jnp.isfinite(sums["slope"])
        & (sums["nonfinite"] == 0),
    )
    # Decisions are no function to differentiate: a norm of 0 would make every derivative NaN.
    return jax.tree.map(jax.lax.stop_gradient, telemetry)
