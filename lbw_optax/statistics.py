"""Statistics: what the run has shown so far, and one step compared with it. Scalars alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lbw_optax.law import Law
from lbw_optax.sensing import Telemetry

_LARGEST = 1e15
"""Largest observation that a running statistic takes as it is; float32 holds the square of 1e19."""


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
      loss_lowest: the lowest that `loss_trend` was.
      loss_gain: how far `loss_mean` is below a mean of the loss over the run in which later steps
        count for more.
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
    loss_lowest: jax.Array  # shape=(), dtype=float32
    loss_gain: jax.Array  # shape=(), dtype=float32
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


def _ema(mean: jax.Array, value: jax.Array, weight: Any) -> jax.Array:
    return mean + weight * (value - mean)


def _debias(mean: jax.Array, decay: float, observations: jax.Array) -> jax.Array:
    n = jnp.maximum(observations, 1).astype(jnp.float32)
    return mean / (1 - jnp.float32(decay) ** n)


class Signals(NamedTuple):
    """What the statistics say before this step is added to them, each a scalar.

    Attributes:
      observations: how many observations were accepted so far, the age of the run.
      noise: standard deviation of the loss, the yardstick of the overshoot; without the loss, what
        stands for it. This, `innovation`, `bearable` and `slope` have the unit of the loss.
      innovation: loss minus its mean; 0 without the loss.
      reach: how much longer steps may be because they do not add up as AdamW's do; at least 1.
      bearable: mean overshoot that what the run gains is worth.
      risen: whether the loss is certainly above the lowest that it was; without the loss it may be.
      gaining: whether the loss has fallen for certain in the last 50 steps.
      productive: whether it has, and by enough of what the steps promise.
      slope: mean of |<g_t, u_t>|.
      spike: gradient norm in units of what counts as a spike.
      spike_allowed: what the spikes of the run so far let pass, in the same units.
      faded: whether the gradient norm is far below its running mean.
      overshoot: mean of overshoot / scale^2.
      overshoot_error: standard error of that mean.
      edge: whether whole steps are at the edge of stability, where overshoots do no harm.
      scaled_edge: whether steps at the scale in force are.
    """

    observations: jax.Array  # shape=(), dtype=int32
    noise: jax.Array  # shape=(), dtype=float32
    innovation: jax.Array  # shape=(), dtype=float32
    reach: jax.Array  # shape=(), dtype=float32
    bearable: jax.Array  # shape=(), dtype=float32
    risen: jax.Array  # shape=(), dtype=bool
    gaining: jax.Array  # shape=(), dtype=bool
    productive: jax.Array  # shape=(), dtype=bool
    slope: jax.Array  # shape=(), dtype=float32
    spike: jax.Array  # shape=(), dtype=float32
    spike_allowed: jax.Array  # shape=(), dtype=float32
    faded: jax.Array  # shape=(), dtype=bool
    overshoot: jax.Array  # shape=(), dtype=float32
    overshoot_error: jax.Array  # shape=(), dtype=float32
    edge: jax.Array  # shape=(), dtype=bool
    scaled_edge: jax.Array  # shape=(), dtype=bool


def compare(
    statistics: Statistics, telemetry: Telemetry, last_scale: jax.Array, has_loss: bool, law: Law
) -> Signals:
    r"""Compares one step with the run so far.

    .. math::

      \sigma &= \max(\sigma_L, \nu |\bar L_\text{fast}|), \quad
        \theta = w^2 \max((\bar L_\text{past} - \bar L_\text{fast}) / T, \epsilon \sigma) \\
      \text{risen} &: \bar L_\text{slow} - \min \bar L_\text{slow} > \zeta \sigma \\
      \text{gaining} &: \bar L_\text{slow} - \bar L_\text{fast} > \zeta \sigma, \quad
        \text{productive} : \text{gaining and }
        \bar L_\text{slow} - \bar L_\text{fast} > \xi s \bar a / w^2 \\
      e_q &= \sqrt{(\overline{(c / s^2)^2} - q^2) (1 - \delta) / (1 + \delta)} \\
      \text{edge}(s) &: q s > \psi \bar a \text{ and } (q - e_q) s^2 < \omega \sigma

    with :math:`\sigma` the noise, :math:`\sigma_L` the standard deviation of the loss, :math:`\nu`
    = ``law.noise_floor``, at first ``law.noise_floor_start``, :math:`\bar L` the means of the loss,
    :math:`\theta` what is bearable, :math:`w` the reach, :math:`T` = ``law.mixing_steps``,
    :math:`\epsilon` = ``law.bearable_least``, :math:`\zeta` = ``law.gain_noise``, :math:`\xi` =
    ``law.gain_slopes``, :math:`s` = ``last_scale``, :math:`\bar a` the mean slope per loss,
    :math:`q` and :math:`e_q` the mean overshoot per squared scale and its standard error,
    :math:`\delta` = ``law.overshoot_decay``, :math:`\psi` = ``law.edge_share`` and :math:`\omega` =
    ``law.edge_noise``.

    Args:
      statistics: the run so far.
      telemetry: this step.
      last_scale: the scale of the step whose overshoot was measured.
      has_loss: whether the caller gives the loss.
      law: the constants.

    Returns:
      The signals on which interpretation and policy act.

    References:
      Cohen et al., `Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability
      <https://arxiv.org/abs/2103.00065>`_, 2021
    """
    s, t = statistics, telemetry
    n = s.observations
    slope = _debias(s.slope_mean, law.overshoot_decay, s.slopes)
    reach = _reach(s.persistence, law)
    overshoot = _debias(s.overshoot_mean, law.overshoot_decay, s.overshoots)
    square = _debias(s.overshoot_square, law.overshoot_decay, s.overshoots)
    # Standard error of an exponential mean: its weights' squares add up to (1 - b) / (1 + b).
    share = (1 - law.overshoot_decay) / (1 + law.overshoot_decay)
    error = jnp.sqrt(jnp.maximum(square - overshoot**2, 0) * share)
    if has_loss:
        early = s.losses < law.noise_warmup
        floor = jnp.where(early, law.noise_floor_start, law.noise_floor) * jnp.abs(s.loss_mean)
        noise = jnp.sqrt(_debias(s.loss_variance, law.noise_decay, s.losses))
        noise = jnp.maximum(noise, floor)
        innovation = jnp.where(s.losses > 0, t.loss - s.loss_mean, 0)
        gain = s.loss_trend - s.loss_mean
        gaining = gain > law.gain_noise * noise
        risen = s.loss_trend - s.loss_lowest > law.gain_noise * noise
        # Per loss: micro-batches have one each, and only the last of them makes a step.
        promise = last_scale * slope * (s.slopes / jnp.maximum(s.losses, 1))
        # Of steps that do not add up, a smaller part can be progress.
        productive = gaining & (gain * reach**2 / law.gain_slopes > promise)
        bearable = jnp.maximum(s.loss_gain / law.mixing_steps, law.bearable_least * noise)
        edge, scaled_edge = (
            (overshoot * scale > law.edge_share * slope)
            & ((overshoot - error) * scale**2 < law.edge_noise * noise)
            for scale in (1, last_scale)
        )
    else:
        noise = law.blind_noise * last_scale * slope
        innovation = jnp.zeros([], jnp.float32)
        bearable = law.bearable_blind * noise
        gaining = productive = edge = scaled_edge = jnp.zeros([], bool)
        risen = jnp.ones([], bool)
    ratio = t.gradient_norm / jnp.where(s.gradient_mean > 0, s.gradient_mean, jnp.inf)
    warmup = jnp.maximum(law.gradient_warmup / jnp.maximum(n, 1).astype(jnp.float32), 1)
    return Signals(
        observations=n,
        noise=noise,
        innovation=innovation,
        reach=reach,
        bearable=bearable * reach**2,
        risen=risen,
        gaining=gaining,
        productive=productive,
        slope=slope,
        spike=ratio / (law.spike_ratio * warmup),
        spike_allowed=jnp.exp(s.spike_tolerance),
        # A gradient of exactly zero is a batch without data, not a model that has faded.
        faded=(ratio * law.collapse_ratio * warmup < 1) & (ratio > 0),
        overshoot=overshoot,
        overshoot_error=error,
        edge=edge,
        scaled_edge=scaled_edge,
    )


def _reach(persistence: jax.Array, law: Law) -> jax.Array:
    r"""How much longer than AdamW's steps may be for the same distance in the long run.

    .. math:: \sqrt{\frac{P}{1 - \phi + \phi P}}, \quad \phi = \min(1, |\kappa| / \kappa_0), \quad
      P = \frac{1 + \kappa_0}{1 - \kappa_0}

    with :math:`\kappa` = ``persistence`` and :math:`\kappa_0` = ``law.persistence``. Noise that
    persists for :math:`P` steps, as AdamW's does, moves the parameters by :math:`\sqrt P` times the
    length of a step; here the share :math:`\phi` of a step persists like that, the rest not at all.
    """
    lasting = (1 + law.persistence) / (1 - law.persistence)
    share = jnp.minimum(jnp.abs(persistence) / law.persistence, 1)
    return jnp.sqrt(lasting / ((1 - share) + share * lasting))


def learn_gradient(statistics: Statistics, gradient_norm: jax.Array, law: Law) -> jax.Array:
    """Returns the mean gradient norm with one more observation.

    A norm above the mean is learned fast and at most at twice the mean, one below it slowly (but as
    a plain average at first, in case the very first norm was the outlier): a level shift is
    accepted in a bounded number of steps.

    Args:
      statistics: the run so far.
      gradient_norm: norm of the gradients, finite and above 0.
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
    return _ema(mean, bounded, jnp.where(first, 1, weight))


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
        spike_tolerance=jnp.minimum(widened, jnp.log(law.spike_most)),
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
    # The loss of step i counts as i^(power - 1): the mean is as old as 1 / (power + 1) of the run.
    power = 1 / law.past_age - 1
    far = law.loss_clip * signals.noise
    stray = jnp.abs(signals.innovation) > far
    clipped = jnp.clip(loss, s.loss_mean - far, s.loss_mean + far)
    loss = jnp.where(stray & (s.strays == 0), clipped, jnp.clip(loss, -_LARGEST, _LARGEST))
    innovation = jnp.clip(signals.innovation, -_LARGEST, _LARGEST)
    bound = law.noise_clip * signals.noise
    variance = jnp.clip(innovation, -bound, bound) ** 2
    mean = _ema(s.loss_mean, loss, fast)
    trend = _ema(s.loss_trend, loss, slow)
    # The mean over the run moves by millionths of what it gained: beside the loss itself float32
    # would lose that. What `loss_mean` really moved by is a difference with hardly an error.
    above = loss - s.loss_mean
    gain = _ema(s.loss_gain, above, power / (index + power)) - (mean - s.loss_mean)
    return s._replace(
        losses=optax.safe_increment(s.losses),
        strays=jnp.where(stray, optax.safe_increment(s.strays), 0),
        loss_mean=mean,
        loss_trend=trend,
        loss_lowest=jnp.where(s.losses > 0, jnp.minimum(s.loss_lowest, trend), trend),
        loss_gain=gain,
        loss_variance=_ema(s.loss_variance, variance, 1 - law.noise_decay),
    )


def observe(
    statistics: Statistics,
    telemetry: Telemetry,
    signals: Signals,
    last_scale: jax.Array,
    moved: jax.Array,
    stressed: jax.Array,
    has_loss: bool,
    law: Law,
) -> Statistics:
    """Adds one accepted step to the statistics.

    Args:
      statistics: the run so far.
      telemetry: this step, all of it finite, with a gradient.
      signals: this step compared with the run so far.
      last_scale: the scale of the step whose overshoot was measured.
      moved: whether there is such a step.
      stressed: whether the run was stressed then; else the scale is at 1, or on its way back.
      has_loss: whether the caller gives the loss.
      law: the constants.

    Returns:
      The new statistics.
    """
    t = telemetry
    s = learn_loss(statistics, t.loss, signals, law) if has_loss else statistics
    # From below what one backtrack leaves, as after PROCEED, the scale comes back no slower than a
    # mean per squared scale forgets: what was seen there would be taken for that of whole steps.
    moved = moved & (stressed | (last_scale >= law.cut_limit))
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
