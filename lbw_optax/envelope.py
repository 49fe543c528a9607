"""Envelope: how long a step may be. Pure functions of scalars."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lbw_optax.controller import NO_LIMIT, Controller, Limits, started_at_zero
from lbw_optax.law import Law
from lbw_optax.sensing import Telemetry
from lbw_optax.statistics import Signals


class Envelope(NamedTuple):
    """How long a step may be, `NO_LIMIT` where the parameters are not given.

    Attributes:
      relative: longest healthy step for parameters of this size.
      healthy: longest healthy step; more than `relative` if it has proved safe.
      hard: longest step of all.
    """

    relative: jax.Array  # shape=(), dtype=float32
    healthy: jax.Array  # shape=(), dtype=float32
    hard: jax.Array  # shape=(), dtype=float32


def step_bounds(
    controller: Controller,
    telemetry: Telemetry,
    signals: Signals,
    has_params: bool,
    law: Law,
    limits: Limits,
) -> Envelope:
    r"""Computes how long a step may be.

    .. math::

      \rho^0_t &= \rho_0 (t + 1)^{-\alpha}, \quad
        \rho_t = \max(\rho, \min(\rho^0_t, d_1 / (w \|p\| A)), \min(A - 1, 1) \, \rho^0_t) \\
      \text{healthy} &= \min(\max(\rho_t w \|p\| A, f), \text{hard}), \quad
        \text{hard} = R \max(\|p\|, \sqrt{n})

    with :math:`\rho` = ``law.relative_step``, :math:`\rho_0` = ``law.relative_step_start``,
    :math:`\alpha` = ``law.relative_step_power``, :math:`t` the accepted observations so far,
    :math:`w` the reach, :math:`f` the trust radius, :math:`R` = ``limits.relative_step_limit``,
    :math:`n` the number of parameters, :math:`A` the controller's ``allowance`` for those that
    started at zero, and :math:`d_1` its ``first_length``: the long steps of the start are for runs
    that start with one.

    Args:
      controller: the policy's memory.
      telemetry: this step.
      signals: this step compared with the run so far.
      has_params: whether the caller gives the parameters; without them nothing bounds a step.
      law: the constants.
      limits: the hard limits.

    Returns:
      The `Envelope`, in units of the parameters; never 0.
    """
    if not has_params:
        unbounded = jnp.full([], NO_LIMIT, jnp.float32)
        return Envelope(unbounded, unbounded, unbounded)
    t, reach = telemetry, signals.reach

    def length(share):
        # An infinite share is a threshold that is switched off; no length is infinite.
        share = jnp.minimum(share, NO_LIMIT / 4)
        return jnp.minimum(share * reach * t.parameter_norm * controller.allowance, NO_LIMIT)

    falling = (signals.observations.astype(jnp.float32) + 1) ** -law.relative_step_power
    start = length(law.relative_step_start * falling)
    started = jnp.minimum(start, controller.first_length)
    early = jnp.maximum(started, started_at_zero(controller) * start)
    relative = jnp.maximum(length(law.relative_step), early)
    hard = limits.relative_step_limit * jnp.maximum(t.parameter_norm, jnp.sqrt(t.size))
    least = jnp.finfo(jnp.float32).tiny
    hard = jnp.clip(hard, least, NO_LIMIT)
    healthy = jnp.maximum(relative, _trust_radius(controller, t, law))
    return Envelope(
        relative=jnp.minimum(relative, hard),
        healthy=jnp.clip(healthy, least, hard),
        hard=hard,
    )


def next_first_length(controller: Controller, telemetry: Telemetry, law: Law) -> jax.Array:
    r"""Remembers how long the first inner step was, until a later one is certainly longer.

    Adam's first step at a constant rate is a sign, the longest that it ever makes; later ones are
    means. Where they grow instead, the rate does: after a warm-up steps are means from the start.

    But the first step may move few entries, those of the last layer where that starts at zero, or
    of the words in the batch. It counts as if it had moved all as far as it moved those:

    .. math:: d_1 = \|u_1\| \sqrt{k_1}, \quad k_1 = n \sum u_1^4 / (\sum u_1^2)^2

    with :math:`k_1` the step's ``kurtosis``: :math:`n / k_1` is how many entries it moves. Where
    that cannot be told, the next step is the first.
    """
    first, length = controller.first_length, jnp.minimum(telemetry.step_norm, NO_LIMIT)
    grown = length / law.stress_pressure > first
    known = telemetry.kurtosis < jnp.inf
    whole = length * jnp.sqrt(jnp.where(known, telemetry.kurtosis, 1))
    whole = jnp.where(known, jnp.minimum(whole, NO_LIMIT), NO_LIMIT)
    return jnp.where(first >= NO_LIMIT, whole, jnp.where(grown, 0, first))


def have_size(telemetry: Telemetry, law: Law) -> jax.Array:
    """Returns whether the parameters have a size, so that a relative step says something."""
    return telemetry.parameter_norm > law.unset_size * jnp.sqrt(telemetry.size)


def _trust_radius(controller: Controller, telemetry: Telemetry, law: Law) -> jax.Array:
    """At first everything if the parameters have no size yet, else what any step may have."""
    relative = law.relative_step * telemetry.parameter_norm
    start = jnp.where(have_size(telemetry, law), relative, NO_LIMIT)
    return jnp.where(controller.trust_radius > 0, controller.trust_radius, start)


def _least_radius(telemetry: Telemetry, law: Law) -> jax.Array:
    least = law.relative_step * law.unset_size * jnp.sqrt(telemetry.size)
    return jnp.minimum(least, NO_LIMIT / 4)


def next_trust_radius(
    controller: Controller,
    telemetry: Telemetry,
    bounds: Envelope,
    bound: jax.Array,
    harm: jax.Array,
    law: Law,
) -> jax.Array:
    r"""Moves the radius to a small part of the way to the minimum of the last step's parabola.

    .. math:: f' = f \, \mathrm{clip}(\nu a / (a + c), 1 / \Gamma, \Gamma)

    with :math:`a` and :math:`-c` the downward slope at the start and at the end of the step, so
    that it went :math:`(a + c) / a` of that way, :math:`\nu` = ``law.trust_way`` and
    :math:`\Gamma` = ``law.trust_growth``. An open radius, that of parameters without a size, stays
    open until a step did harm or the relative rule allows more.

    Args:
      controller: the policy's memory, with the radius and the last step's length and slope.
      telemetry: this step, whose overshoot is the slope at the end of the last one.
      bounds: this step's `Envelope`.
      bound: whether the last step was shortened under stress; no other lets the radius grow.
      harm: whether it did harm.
      law: the constants.

    Returns:
      The new radius, a float32 scalar in units of the parameters; the old one without the
      parameters.

    References:
      Conn, Gould and Toint, `Trust Region Methods <https://doi.org/10.1137/1.9780898719857>`_, 2000
    """
    c, t = controller, telemetry
    radius = _trust_radius(c, t, law)
    least = _least_radius(t, law)
    descent, lost = -c.last_slope, t.overshoot - c.last_slope
    factor = law.trust_way * descent / jnp.maximum(lost, jnp.finfo(jnp.float32).tiny)
    factor = jnp.clip(factor, 1 / law.trust_growth, jnp.where(bound, law.trust_growth, 1))
    factor = jnp.where((descent > 0) & jnp.isfinite(lost), factor, 1)
    learned = jnp.clip(radius * factor, least, NO_LIMIT / 4)
    # Parameters without a size: open until a step did harm or the parameters have outgrown them.
    wide_open = radius >= NO_LIMIT
    outgrown = (t.step_norm > 0) & (t.step_norm <= bounds.relative)
    closed = jnp.maximum(jnp.where(harm, c.last_length / law.trust_growth, t.step_norm), least)
    new = jnp.where(wide_open, jnp.where(harm | outgrown, closed, radius), learned)
    # Without the parameters nothing bounds a step, and nothing is learned of how long it may be.
    return jnp.where(bounds.relative < NO_LIMIT, new, c.trust_radius)
