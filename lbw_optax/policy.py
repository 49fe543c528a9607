"""Policy: the bounded control law, from a diagnosis to a command. Pure functions of scalars."""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lbw_optax.interpretation import Cause, Diagnosis, Regime
from lbw_optax.law import Law
from lbw_optax.sensing import Signals, Telemetry


class Action(enum.IntEnum):
    """What the guard does with a step."""

    PASS = 0
    """Take the inner optimizer's step, bit for bit."""
    SCALE = 1
    """Take it shortened."""
    HOLD = 2
    """Take no step and keep the inner state."""
    BACKTRACK = 3
    """Take back a part of the last step and keep the inner state."""
    PROCEED = 4
    """After too many rejected steps: take the finite part of the step at the lowest scale."""


class Limits(NamedTuple):
    """What holds whatever the sensors say; see `lbw_optax.guard`."""

    min_scale: float
    relative_step_limit: float
    max_rejections: int


class Controller(NamedTuple):
    """The policy's memory.

    Attributes:
      applied_scale: scale of the last applied step.
      annealed_scale: scale that the annealing allows.
      ceiling: upper bound that a backtrack leaves behind.
      widening: factor on the relative envelope.
      trust_radius: absolute step length that has proved safe; 0 before the first step.
      last_length: norm of the last applied step; 0 before the first.
      last_slope: slope at the start of the last applied step, in units of the loss.
      rejections: held or undone steps in a row.
      nonfinites: non-finite observations in a row.
    """

    applied_scale: jax.Array  # shape=(), dtype=float32
    annealed_scale: jax.Array  # shape=(), dtype=float32
    ceiling: jax.Array  # shape=(), dtype=float32
    widening: jax.Array  # shape=(), dtype=float32
    trust_radius: jax.Array  # shape=(), dtype=float32
    last_length: jax.Array  # shape=(), dtype=float32
    last_slope: jax.Array  # shape=(), dtype=float32
    rejections: jax.Array  # shape=(), dtype=int32
    nonfinites: jax.Array  # shape=(), dtype=int32


class Command(NamedTuple):
    """What actuation has to do.

    Attributes:
      action: an `Action`.
      cause: the `Cause` of the action.
      scale: the scale in force, in [min_scale, 1].
      factor: what the inner step (SCALE, PROCEED) or the last step (BACKTRACK) is multiplied with.
    """

    action: jax.Array  # shape=(), dtype=int32
    cause: jax.Array  # shape=(), dtype=int32
    scale: jax.Array  # shape=(), dtype=float32
    factor: jax.Array  # shape=(), dtype=float32


class Envelope(NamedTuple):
    """How long a step may be.

    Attributes:
      healthy: longest step that raises no suspicion.
      allowed: longest step under stress; at least `healthy`.
      hard: longest step of all.
    """

    healthy: jax.Array  # shape=(), dtype=float32
    allowed: jax.Array  # shape=(), dtype=float32
    hard: jax.Array  # shape=(), dtype=float32


def init_controller() -> Controller:
    """Returns the controller of a run that has not begun."""
    one, zero, none = (jnp.full([], x, d) for x, d in ((1, jnp.float32), (0, jnp.float32), (0, jnp.int32)))
    return Controller(one, one, one, one, zero, zero, zero, none, none)


def envelope(
    controller: Controller,
    telemetry: Telemetry,
    observations: jax.Array,
    has_params: bool,
    law: Law,
    limits: Limits,
) -> Envelope:
    r"""Computes how long a step may be.

    .. math::

      \rho_t = \max(\rho, \rho_0 / \sqrt{t + 1}), \quad
      \text{healthy} = \max(\rho_t \|p\|, f), \quad
      \text{allowed} = \max(e \rho_t \|p\|, f), \quad
      \text{hard} = \ell \max(\|p\|, \sqrt{n})

    with :math:`\rho` = ``law.relative_step``, :math:`\rho_0` = ``law.relative_step_start``,
    :math:`e` = ``controller.widening``, :math:`f` = the trust radius, :math:`\ell` =
    ``limits.relative_step_limit`` and :math:`n` the number of parameters.

    Args:
      controller: the policy's memory.
      telemetry: this step.
      observations: accepted observations so far.
      has_params: whether the caller gives the parameters; without them nothing bounds a step.
      law: the constants.
      limits: the hard limits.

    Returns:
      The `Envelope`.
    """
    if not has_params:
        unbounded = jnp.full([], jnp.finfo(jnp.float32).max, jnp.float32)
        return Envelope(unbounded, unbounded, unbounded)
    t = telemetry
    decayed = law.relative_step_start / jnp.sqrt(observations.astype(jnp.float32) + 1)
    relative = jnp.maximum(law.relative_step, decayed) * t.parameter_norm
    hard = limits.relative_step_limit * jnp.maximum(t.parameter_norm, jnp.sqrt(t.size))
    radius = _trust_radius(controller, t, law)
    return Envelope(
        healthy=jnp.minimum(jnp.maximum(relative, radius), hard),
        allowed=jnp.minimum(jnp.maximum(controller.widening * relative, radius), hard),
        hard=hard,
    )


def _trust_radius(controller: Controller, telemetry: Telemetry, law: Law) -> jax.Array:
    """Before the first step: everything if the parameters have no size yet, else next to nothing."""
    unset = law.unset_size * jnp.sqrt(telemetry.size)
    start = jnp.where(
        telemetry.parameter_norm <= unset, jnp.finfo(jnp.float32).max, law.relative_step * unset
    )
    return jnp.where(controller.trust_radius > 0, controller.trust_radius, start)


def decide(
    controller: Controller,
    regime: jax.Array,
    diagnosis: Diagnosis,
    telemetry: Telemetry,
    signals: Signals,
    bounds: Envelope,
    can_undo: bool,
    has_loss: bool,
    law: Law,
    limits: Limits,
) -> tuple[Command, Controller]:
    r"""Decides what to do with one step.

    Under stress the scale is annealed to hold the mean overshoot :math:`q s^2` at a threshold, and
    the step is kept inside the envelope:

    .. math::

      \theta = \mathrm{clip}(\kappa r, \tau \sigma, \tau_{max} \sigma), \quad
      s^* = \sqrt{\theta / (q - z\,\mathrm{se}_q)}, \quad
      \text{scale} = \min(s, \text{allowed} / \|u\|)

    with :math:`r` the progress and :math:`\sigma` the noise of the loss, :math:`q` the mean
    overshoot per squared scale and :math:`s` following :math:`s^*` at a bounded rate.

    Args:
      controller: the policy's memory.
      regime: this step's `Regime`.
      diagnosis: this step's `Diagnosis`.
      telemetry: this step.
      signals: this step compared with the run so far.
      bounds: this step's `Envelope`.
      can_undo: whether the last step is remembered.
      has_loss: whether the caller gives the loss.
      law: the constants.
      limits: the hard limits.

    Returns:
      The `Command` and the new `Controller`.
    """
    c, t, s = controller, telemetry, signals
    alarm = diagnosis.alarm
    is_nonfinite = (alarm >= Cause.NONFINITE_GRADIENT) & (alarm <= Cause.NONFINITE_STEP)
    is_harm = (alarm >= Cause.OVERSHOOT) & (alarm <= Cause.LOSS_JUMP)
    rejected = is_nonfinite | (alarm == Cause.GRADIENT_SPIKE) | (is_harm & can_undo)
    exhausted = rejected & (c.rejections >= limits.max_rejections)
    # The first non-finite value may be the batch's fault, a second one is likely the last step's.
    undone = can_undo & (is_harm | (is_nonfinite & (c.nonfinites >= 1) & (c.nonfinites <= 4)))
    undone = undone & (c.last_length > 0)
    action = jnp.select(
        [exhausted, rejected & undone, rejected],
        [jnp.int32(Action.PROCEED), jnp.int32(Action.BACKTRACK), jnp.int32(Action.HOLD)],
        jnp.int32(Action.SCALE),
    )

    # The annealing.
    stressed = regime == Regime.STRESS
    if has_loss:
        threshold = jnp.clip(
            law.horizon * s.progress, law.noise_share * s.noise, law.noise_share_limit * s.noise
        )
    else:
        threshold = law.blind_share * s.noise
    bounce = s.overshoot - law.caution * s.overshoot_error
    target = jnp.sqrt(threshold / jnp.where(bounce > 0, bounce, jnp.inf))
    target = jnp.where(stressed & (bounce > 0), target, 1)
    annealed = jnp.clip(target, law.cut * c.annealed_scale, law.release * c.annealed_scale)
    annealed = jnp.clip(jnp.minimum(annealed, c.ceiling), limits.min_scale, 1)

    # What is left of a step that did harm.
    ratio = jnp.sqrt(threshold / jnp.where(t.overshoot > 0, t.overshoot, 1))
    keep = jnp.where(is_harm, jnp.clip(ratio, law.cut_limit, law.cut), law.cut)
    blamed = jnp.minimum(c.annealed_scale, 2 * c.applied_scale) * keep

    # The step's scale.
    length = jnp.where(t.step_norm > 0, t.step_norm, 1)
    room = bounds.allowed / length
    wanted = jnp.where(is_harm, jnp.minimum(annealed, c.applied_scale * keep), annealed)
    scale = jnp.minimum(jnp.minimum(wanted, room), law.rise_limit * c.applied_scale)
    scale = jnp.where(exhausted, limits.min_scale, jnp.clip(scale, limits.min_scale, 1))
    factor = jnp.minimum(scale, bounds.hard / length)
    action = jnp.where((action == Action.SCALE) & (factor >= 1), jnp.int32(Action.PASS), action)

    taken = (action == Action.PASS) | (action == Action.SCALE)
    back = action == Action.BACKTRACK
    cause = jnp.select(
        [
            exhausted,
            alarm != Cause.NONE,
            action == Action.PASS,
            room < jnp.minimum(wanted, law.rise_limit * c.applied_scale),
            stressed,
        ],
        [
            jnp.int32(Cause.EXHAUSTED),
            alarm,
            jnp.int32(Cause.NONE),
            jnp.int32(Cause.ENVELOPE),
            jnp.int32(Cause.BOUNCE),
        ],
        jnp.int32(Cause.RELEASE),
    )

    # What the steps have proved about their own length.
    bound = stressed & (c.applied_scale < annealed)
    short = s.overshoot + 2 * s.overshoot_error < 0
    long = bounce > 0
    widening = jnp.where(bound & short, c.widening * law.growth, c.widening)
    widening = jnp.where(long | back, c.widening / law.growth, widening)
    radius = _trust_radius(c, t, law)
    agreed = (t.overshoot < 0) & (t.overshoot < law.trust_agreement * c.last_slope)
    open_wide = radius >= jnp.finfo(jnp.float32).max
    grown = jnp.where(bound & agreed, radius * law.trust_growth, radius)
    least = law.relative_step * law.unset_size * jnp.sqrt(t.size)
    grown = jnp.where(t.overshoot > 0, jnp.maximum(radius / law.trust_growth, least), grown)
    radius = jnp.where(open_wide, jnp.where(back, c.last_length * keep, radius), grown)

    accepted = taken | exhausted
    # An empty step (a micro-batch that is only accumulated) leaves the last one as it was.
    moved = accepted & (t.step_norm > 0)
    next_controller = Controller(
        applied_scale=jnp.select(
            [back, accepted],
            [jnp.maximum(c.applied_scale * keep, limits.min_scale), scale],
            c.applied_scale,
        ),
        annealed_scale=jnp.select(
            [exhausted, is_harm, taken],
            [jnp.float32(limits.min_scale), jnp.maximum(blamed, limits.min_scale), annealed],
            c.annealed_scale,
        ),
        ceiling=jnp.where(
            is_harm,
            jnp.maximum(law.cut * c.applied_scale, limits.min_scale),
            jnp.minimum(c.ceiling * law.ceiling_release, 1),
        ),
        widening=jnp.where(taken | back, jnp.clip(widening, 1, law.growth_limit), c.widening),
        trust_radius=jnp.where(taken | back, radius, c.trust_radius),
        last_length=jnp.select(
            [back, moved], [c.last_length * keep, factor * t.step_norm], c.last_length
        ),
        last_slope=jnp.select([back, moved], [c.last_slope * keep, factor * t.slope], c.last_slope),
        rejections=jnp.where(accepted, 0, c.rejections + 1),
        nonfinites=jnp.where(is_nonfinite, c.nonfinites + 1, 0),
    )
    command = Command(
        action=action,
        cause=cause,
        scale=next_controller.applied_scale,
        factor=jnp.where(back, keep, factor),
    )
    return command, next_controller
