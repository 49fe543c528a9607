"""Sensing: what one step shows (`Telemetry`) and what the run has shown so far (`Statistics`)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lbw_optax.law import Law

_LARGEST = 1e15
"""Largest observation that a running statistic takes as it is; float32 holds the square of 1e19."""


class Telemetry(NamedTuple):
    """One step's observations, each a scalar.

    Attributes:
      loss: minibatch loss; 0 where it was not given.
      gradient_norm: Euclidean norm of the incoming gradients.
      step_norm: norm of the finite part of the inner optimizer's step.
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
    parameter_norm: jax.Array  # shape=(), dtype=float32
    slope: jax.Array  # shape=(), dtype=float32
    overshoot: jax.Array  # shape=(), dtype=float32
    alignment: jax.Array  # shape=(), dtype=float32
    size: jax.Array  # shape=(), dtype=float32
    loss_finite: jax.Array  # shape=(), dtype=bool
    gradient_finite: jax.Array  # shape=(), dtype=bool
    step_finite: jax.Array  # shape=(), dtype=bool


class Statistics(NamedTuple):
    """Running statistics of the accepted observations.

    Attributes:
      observations: how many observations were accepted.
      losses: in how many of them the loss was given.
      strays: how many of the latest losses in a row were beyond `loss_clip`.
      gradient_mean: mean gradient norm; 0 until there is one.
      spike_tolerance: log of the factor by which spikes that recur have widened their test.
      loss_mean: mean of the loss over about the last 10 steps.
      loss_trend: mean of the loss over about the last 50 steps.
      index_mean: the first mean applied to the index of the loss; with `index_trend` it turns the
        distance of the two loss means into progress per step.
      index_trend: the second mean applied to the index of the loss.
      loss_variance: variance of the loss around its mean, not yet bias-corrected.
      overshoots: how many overshoots were accepted.
      overshoot_mean: mean of overshoot / scale^2, not yet bias-corrected.
      overshoot_square: mean of its square, not yet bias-corrected.
      slopes: how many of the accepted steps were not empty.
      slope_mean: mean of |<g_t, u_t>| of those, not yet bias-corrected.
      persistence: mean cosine of a step with the one before it; 1 until there are two.
    """

    observations: jax.Array  # shape=(), dtype=int32
    losses: jax.Array  # shape=(), dtype=int32
    strays: jax.Array  # shape=(), dtype=int32
    gradient_mean: jax.Array  # shape=(), dtype=float32
    spike_tolerance: jax.Array  # shape=(), dtype=float32
    loss_mean: jax.Array  # shape=(), dtype=float32
    loss_trend: jax.Array  # shape=(), dtype=float32
    index_mean: jax.Array  # shape=(), dtype=float32
    index_trend: jax.Array  # shape=(), dtype=float32
    loss_variance: jax.Array  # shape=(), dtype=float32
    overshoots: jax.Array  # shape=(), dtype=int32
    overshoot_mean: jax.Array  # shape=(), dtype=float32
    overshoot_square: jax.Array  # shape=(), dtype=float32
    slopes: jax.Array  # shape=(), dtype=int32
    slope_mean: jax.Array  # shape=(), dtype=float32
    persistence: jax.Array  # shape=(), dtype=float32


def init_statistics() -> Statistics:
    """Returns the statistics of a run that has not begun."""
    whole = ("observations", "losses", "strays", "overshoots", "slopes")
    # Each field is an array of its own: shared buffers could not be donated.
    zeros = {
        name: jnp.zeros([], jnp.int32 if name in whole else jnp.float32)
        for name in Statistics._fields
    }
    return Statistics(**zeros | {"persistence": jnp.ones([], jnp.float32)})


def is_inexact(x: Any) -> bool:
    """Returns whether `x` is a floating-point leaf, the only kind that is sensed and scaled."""
    return jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.inexact)


def inner_product(a: Any, b: Any) -> jax.Array:
    """Returns <a, b> over all floating-point leaves, accumulated in float32."""
    products = [
        jnp.sum(jnp.asarray(x, jnp.float32) * jnp.asarray(y, jnp.float32))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        if is_inexact(x) and is_inexact(y)
    ]
    return sum(products, jnp.zeros([], jnp.float32))


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
    products = [
        jnp.size(z) / jnp.size(x) * inner_product(x, y)
        for x, y, z in zip(*map(jax.tree.leaves, (a, b, whole)), strict=True)
        if is_inexact(y) and jnp.size(y)
    ]
    return sum(products, jnp.zeros([], jnp.float32))


def finite_part(tree: Any) -> Any:
    """Returns `tree` with zero in the place of every entry that is not finite."""
    return jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0) if is_inexact(x) else x, tree)


def has_nonfinite(x: jax.Array) -> jax.Array:
    """Returns whether an array has an entry that is not finite.

    x - x is 0 where x is finite and NaN elsewhere. A sum of it is made in the same pass over the
    memory as the other sums of an array, a truth value in one of its own: on a TPU that was a
    quarter of all bytes that the step moved.
    """
    return jnp.isnan(jnp.sum(x - x))


def count_nonfinite(tree: Any) -> jax.Array:
    """Counts the leaves of a tree with an entry that is not finite, an int32 scalar."""
    found = [has_nonfinite(x) for x in jax.tree.leaves(tree) if is_inexact(x)]
    return sum(found, jnp.zeros([], jnp.int32))


def became_nonfinite(old: Any, new: Any, scalars: bool) -> jax.Array:
    """Counts the leaves that have such an entry and had none before.

    Args:
      old: a tree of arrays.
      new: a tree like `old`.
      scalars: whether leaves without axes count; an optimizer's own bookkeeping may well store an
        infinite best value or error there.

    Returns:
      An int32 scalar.
    """
    found = [
        has_nonfinite(y) & ~has_nonfinite(x)
        for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
        if is_inexact(y) and (scalars or jnp.ndim(y) > 0)
    ]
    return sum(found, jnp.zeros([], jnp.int32))


def _ema(mean: jax.Array, value: jax.Array, weight: Any) -> jax.Array:
    return mean + weight * (value - mean)


def _debias(mean: jax.Array, decay: float, observations: jax.Array) -> jax.Array:
    n = jnp.maximum(observations, 1).astype(jnp.float32)
    return mean / (1 - jnp.float32(decay) ** n)


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
    finite_params = finite_part(params)
    sampled = any(is_inexact(x) and jnp.size(x) for x in jax.tree.leaves(last_step))
    scalars = any(jnp.ndim(x) == 0 for x in jax.tree.leaves(gradients))
    sums = {
        "gradient": inner_product(gradients, gradients),
        "step": inner_product(usable, usable),
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
        sums = jax.lax.psum(sums, axis_name)
    step_norm = jnp.sqrt(sums["step"])
    known = sampled & (step_norm > 0) & (last_length > 0)
    cosine = sums["alignment"] / jnp.where(known, step_norm, 1)
    cosine = cosine / jnp.where(known, last_length, 1)
    loss = jnp.float32(0) if loss is None else jnp.asarray(loss).astype(jnp.float32)
    telemetry = Telemetry(
        loss=loss,
        gradient_norm=jnp.sqrt(sums["gradient"]),
        step_norm=step_norm,
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


class Signals(NamedTuple):
    """What the statistics say before this step is added to them, each a scalar.

    Attributes:
      noise: standard deviation of the loss, the yardstick of the overshoot; without the loss, the
        mean slope.
      innovation: loss minus its mean; 0 without the loss.
      reach: how much longer steps may be because they do not add up as AdamW's do; at least 1.
      bearable: mean overshoot per step that the progress is worth.
      slope: mean of |<g_t, u_t>|.
      spike: gradient norm in units of what counts as a spike.
      spike_allowed: what the spikes of the run so far let pass, in the same units.
      faded: whether the gradient norm is far below its running mean.
      overshoot: mean of overshoot / scale^2.
      overshoot_error: standard error of that mean.
    """

    noise: jax.Array  # shape=(), dtype=float32
    innovation: jax.Array  # shape=(), dtype=float32
    reach: jax.Array  # shape=(), dtype=float32
    bearable: jax.Array  # shape=(), dtype=float32
    slope: jax.Array  # shape=(), dtype=float32
    spike: jax.Array  # shape=(), dtype=float32
    spike_allowed: jax.Array  # shape=(), dtype=float32
    faded: jax.Array  # shape=(), dtype=bool
    overshoot: jax.Array  # shape=(), dtype=float32
    overshoot_error: jax.Array  # shape=(), dtype=float32


def compare(
    statistics: Statistics, telemetry: Telemetry, last_scale: jax.Array, has_loss: bool, law: Law
) -> Signals:
    """Compares one step with the run so far.

    Args:
      statistics: the run so far.
      telemetry: this step.
      last_scale: the scale of the step whose overshoot was measured.
      has_loss: whether the caller gives the loss.
      law: the constants.

    Returns:
      The signals on which interpretation and policy act.
    """
    s, t = statistics, telemetry
    n = s.observations
    slope = _debias(s.slope_mean, law.overshoot_decay, s.slopes)
    if has_loss:
        early = s.losses < law.noise_warmup
        floor = jnp.where(early, law.noise_floor_start, law.noise_floor) * jnp.abs(s.loss_mean)
        noise = jnp.sqrt(_debias(s.loss_variance, law.noise_decay, s.losses))
        noise = jnp.maximum(noise, floor)
        innovation = jnp.where(s.losses > 0, t.loss - s.loss_mean, 0)
        # The distance of two means of different age over the difference of their ages.
        lag = s.index_mean - s.index_trend
        progress = (s.loss_trend - s.loss_mean) / jnp.where(lag > 0, lag, jnp.inf)
        bearable = jnp.clip(
            law.horizon * progress, law.bearable_least * noise, law.bearable_most * noise
        )
    else:
        noise = law.blind_noise * last_scale * slope
        innovation = jnp.zeros([], jnp.float32)
        bearable = law.bearable_most * noise
    ratio = t.gradient_norm / jnp.where(s.gradient_mean > 0, s.gradient_mean, jnp.inf)
    warmup = jnp.maximum(law.gradient_warmup / jnp.maximum(n, 1).astype(jnp.float32), 1)
    overshoot = _debias(s.overshoot_mean, law.overshoot_decay, s.overshoots)
    square = _debias(s.overshoot_square, law.overshoot_decay, s.overshoots)
    # Standard error of an exponential mean: its weights' squares add up to (1 - b) / (1 + b).
    share = (1 - law.overshoot_decay) / (1 + law.overshoot_decay)
    error = jnp.sqrt(jnp.maximum(square - overshoot**2, 0) * share)
    reach = _reach(s.persistence, law)
    return Signals(
        noise=noise,
        innovation=innovation,
        reach=reach,
        bearable=bearable * reach**2,
        slope=slope,
        spike=ratio / (law.spike_ratio * warmup),
        spike_allowed=jnp.exp(s.spike_tolerance),
        # A gradient of exactly zero is a batch without data, not a model that has faded.
        faded=(ratio * law.collapse_ratio * warmup < 1) & (ratio > 0),
        overshoot=overshoot,
        overshoot_error=error,
    )


def _reach(persistence: jax.Array, law: Law) -> jax.Array:
    r"""How much longer than AdamW's steps may be for the same distance in the long run.

    .. math:: \sqrt{\frac{T}{1 - k + k T}}, \quad k = \min(1, |\kappa| / \kappa_0), \quad
      T = \frac{1 + \kappa_0}{1 - \kappa_0}

    with :math:`\kappa` = ``persistence`` and :math:`\kappa_0` = ``law.persistence``. Noise that
    persists for :math:`T` steps, as AdamW's does, moves the parameters by :math:`\sqrt T` times the
    length of a step; here the share :math:`k` of a step persists like that, the rest not at all.
    """
    lasting = (1 + law.persistence) / (1 - law.persistence)
    share = jnp.minimum(jnp.abs(persistence) / law.persistence, 1)
    return jnp.sqrt(lasting / ((1 - share) + share * lasting))


def learn_gradient(statistics: Statistics, gradient_norm: jax.Array, law: Law) -> jax.Array:
    """Returns the mean gradient norm with one more observation.

    A norm above the mean is learned fast and at most at twice the mean, one below it slowly (but as
    a plain average at first, in case the very first norm was the outlier), and a gradient of zero
    not at all: a level shift is accepted in a bounded number of steps, and a model whose gradients
    are mostly absent keeps a useful reference.

    Args:
      statistics: the run so far.
      gradient_norm: norm of the gradients, finite.
      law: the constants.

    Returns:
      The new mean, a float32 scalar.
    """
    mean = statistics.gradient_mean
    first = mean == 0
    bounded = jnp.where(first, gradient_norm, jnp.minimum(gradient_norm, 2 * mean))
    average = 1 / (statistics.observations.astype(jnp.float32) + 1)
    fall = jnp.maximum(law.gradient_fall, average)
    weight = jnp.where(bounded > mean, law.gradient_rise, fall)
    new = _ema(mean, bounded, jnp.where(first, 1, weight))
    return jnp.where(gradient_norm > 0, new, mean)


def learn_spike(
    statistics: Statistics, gradient_norm: jax.Array, first: jax.Array, law: Law
) -> Statistics:
    r"""Returns the statistics with one gradient spike that was held.

    A fault is rare; spikes that recur are data, such as the positives of a rare class. Each widens
    its own test by a factor that decays with every accepted step, a quantile by stochastic
    approximation: in the long run the share :math:`q` of the steps, ``law.spike_share``, is held.
    Spikes in a row are one.

    .. math:: \tau \leftarrow \min(\tau + r, \log c) \text{ if held, the first in a row; }
      \max(\tau - r q, 0) \text{ if accepted}

    with :math:`\tau` = ``spike_tolerance``, :math:`r` = ``law.spike_rise``, :math:`c` =
    ``law.spike_most``.

    Args:
      statistics: the run so far.
      gradient_norm: norm of the gradients, finite.
      first: whether the step before this one was accepted.
      law: the constants.

    Returns:
      The new statistics; those of the gradient alone have changed.

    References:
      Robbins and Monro, `A Stochastic Approximation Method
      <https://doi.org/10.1214/aoms/1177729586>`_, 1951
    """
    widened = statistics.spike_tolerance + jnp.where(first, law.spike_rise, 0)
    return statistics._replace(
        gradient_mean=learn_gradient(statistics, gradient_norm, law),
        spike_tolerance=jnp.minimum(widened, math.log(law.spike_most)),
    )


def learn_loss(statistics: Statistics, loss: jax.Array, signals: Signals, law: Law) -> Statistics:
    """Returns the statistics with one more loss.

    A loss that is far from the mean enters clipped; a second one in a row is a new level.

    Args:
      statistics: the run so far.
      loss: the loss, finite.
      signals: this step compared with the run so far.
      law: the constants.

    Returns:
      The new statistics; those of the loss alone have changed.
    """
    s = statistics
    index = s.losses.astype(jnp.float32)
    # Until a mean has enough observations for its decay, it is their plain average.
    fast = jnp.maximum(1 - law.loss_decay, 1 / (index + 1))
    slow = jnp.maximum(1 - law.trend_decay, 1 / (index + 1))
    far = law.loss_clip * signals.noise
    stray = jnp.abs(signals.innovation) > far
    clipped = jnp.clip(loss, s.loss_mean - far, s.loss_mean + far)
    loss = jnp.where(stray & (s.strays == 0), clipped, jnp.clip(loss, -_LARGEST, _LARGEST))
    innovation = jnp.clip(signals.innovation, -_LARGEST, _LARGEST)
    bound = law.noise_clip * signals.noise
    variance = jnp.clip(innovation, -bound, bound) ** 2
    return s._replace(
        losses=optax.safe_increment(s.losses),
        strays=jnp.where(stray, optax.safe_increment(s.strays), 0),
        loss_mean=_ema(s.loss_mean, loss, fast),
        loss_trend=_ema(s.loss_trend, loss, slow),
        index_mean=_ema(s.index_mean, index, fast),
        index_trend=_ema(s.index_trend, index, slow),
        loss_variance=_ema(s.loss_variance, variance, 1 - law.noise_decay),
    )


def observe(
    statistics: Statistics,
    telemetry: Telemetry,
    signals: Signals,
    last_scale: jax.Array,
    moved: jax.Array,
    has_loss: bool,
    law: Law,
) -> Statistics:
    """Adds one accepted step to the statistics.

    Args:
      statistics: the run so far.
      telemetry: this step, all of it finite.
      signals: this step compared with the run so far.
      last_scale: the scale of the step whose overshoot was measured.
      moved: whether there is such a step.
      has_loss: whether the caller gives the loss.
      law: the constants.

    Returns:
      The new statistics.
    """
    t = telemetry
    s = learn_loss(statistics, t.loss, signals, law) if has_loss else statistics
    # Bounded so that its square stays far inside float32, whatever a step shows.
    normalised = jnp.clip(t.overshoot / last_scale**2, -_LARGEST, _LARGEST)
    b = law.overshoot_decay
    empty = t.step_norm == 0
    return s._replace(
        observations=optax.safe_increment(s.observations),
        gradient_mean=learn_gradient(s, t.gradient_norm, law),
        spike_tolerance=jnp.maximum(s.spike_tolerance - law.spike_rise * law.spike_share, 0),
        overshoots=jnp.where(moved, optax.safe_increment(s.overshoots), s.overshoots),
        overshoot_mean=jnp.where(
            moved, _ema(s.overshoot_mean, normalised, 1 - b), s.overshoot_mean
        ),
        overshoot_square=jnp.where(
            moved, _ema(s.overshoot_square, normalised**2, 1 - b), s.overshoot_square
        ),
        slopes=jnp.where(empty, s.slopes, optax.safe_increment(s.slopes)),
        slope_mean=jnp.where(empty, s.slope_mean, _ema(s.slope_mean, jnp.abs(t.slope), 1 - b)),
        persistence=jnp.where(
            moved & ~empty, _ema(s.persistence, t.alignment, 1 - b), s.persistence
        ),
    )
