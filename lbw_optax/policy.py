"""Policy: the bounded control law, from a diagnosis to a command. Pure functions of scalars."""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lbw_optax.controller import NO_LIMIT, Controller, Limits, had_warm_up, started_at_zero
from lbw_optax.envelope import Envelope, have_size, next_first_length, next_trust_radius
from lbw_optax.interpretation import Cause, Diagnosis, Regime, is_nonfinite
from lbw_optax.law import Law
from lbw_optax.sensing import Telemetry, has_data
from lbw_optax.statistics import Signals


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


def decide(
    controller: Controller,
    regime: jax.Array,
    diagnosis: Diagnosis,
    telemetry: Telemetry,
    signals: Signals,
    bounds: Envelope,
    can_undo: bool,
    law: Law,
    limits: Limits,
) -> tuple[Command, Controller]:
    r"""Decides what to do with one step.

    Under stress the scale is the product of what the envelope imposes and what the overshoot earns:

    .. math::

      E &= -\langle g_1, u_1 \rangle \|p_1\| / (\|u_1\| |L_1|), \quad
        \eta_n = \mathrm{clip}((N / n)^{1/4}, \eta_0, 1) \\
      \eta &= \max(\eta_n + (1 - \eta_n) \min(A - 1, 1), \min(\sqrt{E_0 / E}, \eta_1),
        m \min(k_0 / k_t, 1)), \quad r_t = \eta \, \text{healthy}_t / \|u_t\| \\
      \ell_t &= \min(1, \mathrm{clip}(\ell_{t-1} (1 + m / t), \lambda r_t, r_t)) \\
      h_t &= h_{t-1} \cdot \begin{cases}
        \gamma & q + 2 e_q < 0 \text{ and } -q s > \beta \bar a \\
        1 / \gamma & (q - e_q) s^2 > \theta \text{ without an excuse} \\
        1 & \text{otherwise} \end{cases}, \quad
        \ell_t h_t \le r_t \\
      s_t &= \max(s_0, \min(1, \ell_t h_t, G s_{t-1}, \text{hard}_t / \|u_t\|))

    with :math:`\ell` the latch, :math:`m` 1 after a warm-up and else 0, :math:`h` the earned
    factor, :math:`q \pm e_q` the mean overshoot per squared scale and its standard error,
    :math:`\bar a` the mean slope, :math:`\theta` the bearable overshoot, :math:`n` the number of
    parameters, :math:`k_t` the step's ``kurtosis``, :math:`E` the controller's ``elasticity``, that
    of the first step, and :math:`A` its ``allowance``, :math:`N` = ``law.share_size``,
    :math:`\eta_0` = ``law.share_least``, :math:`k_0` = ``law.share_kurtosis``, :math:`E_0` =
    ``law.share_elasticity``, :math:`\eta_1` = ``law.share_most``, :math:`\lambda` = ``law.slack``,
    :math:`\gamma` = ``law.growth``, :math:`\beta` = ``law.earn_straight``, :math:`G` =
    ``law.rise_limit`` and :math:`s_0` = ``limits.min_scale``. Where the elasticity cannot be told,
    its term is 0. The latch holds the scale, not the step: the inner optimizer's own shortening of
    its steps survives. After a warm-up it rises with the age :math:`t` of the run, as far as there
    is room. An excuse is that steps are productive or at the edge of stability, or, after a
    warm-up, that the loss has not risen; see `Signals`.

    Args:
      controller: the policy's memory.
      regime: this step's `Regime`.
      diagnosis: this step's `Diagnosis`.
      telemetry: this step.
      signals: this step compared with the run so far.
      bounds: this step's `Envelope`.
      can_undo: whether the last step is remembered.
      law: the constants.
      limits: the hard limits.

    Returns:
      The `Command` and the new `Controller`.
    """
    c, t = controller, telemetry
    verdict = _judge(c, diagnosis, can_undo, law, limits)
    nonfinite, harm, rejected, exhausted, undone = verdict
    taken = ~rejected | exhausted

    # How long?
    elasticity = _elasticity(c, t, law)
    longest = _share(c, t, elasticity, law) * bounds.healthy
    room = longest / jnp.where(t.step_norm > 0, t.step_norm, bounds.healthy)
    latch, earned = _regulate(c, regime, room, signals, law)
    # What is left of a step that did harm: so much that it would have overshot by little.
    left = law.cut_noise * signals.noise / jnp.where(t.overshoot > 0, t.overshoot, jnp.inf)
    keep = jnp.where(harm, jnp.clip(jnp.sqrt(left), law.cut_limit, law.cut), law.cut)
    lowest = jnp.float32(limits.min_scale)
    # Anything else may be the batches' fault: it shortens the last step and not the next ones.
    cut = jnp.where(harm, jnp.maximum(c.step_scale * keep, lowest), c.step_scale)
    latch = jnp.where(harm, jnp.minimum(latch, cut), latch)
    earned = jnp.where(harm, jnp.minimum(earned, 1), earned)
    latch = jnp.where(exhausted, lowest, latch)
    scale = jnp.minimum(latch * earned, law.rise_limit * c.step_scale)
    scale = jnp.where(exhausted, lowest, jnp.clip(scale, lowest, 1))
    factor = jnp.minimum(scale, jnp.where(t.step_norm > 0, bounds.hard / t.step_norm, jnp.inf))
    limited = factor < scale
    scale = jnp.maximum(factor, lowest)
    # An empty step (a micro-batch that is only accumulated) is passed, and leaves all as it was.
    factor = jnp.where(diagnosis.empty, 1, factor)

    # By half a step at least: at 1, where it often rests, rounding would choose the name.
    annealed = earned < law.growth**-0.5
    action, cause = _name(verdict, diagnosis.alarm, regime, factor, limited, annealed)

    moved = taken & ~diagnosis.empty
    # A step without data, which may be weight decay alone, is no first one.
    shown = moved & has_data(t)
    bound = (regime == Regime.STRESS) & (c.step_scale < 1)
    radius = next_trust_radius(c, t, bounds, bound, harm, law)
    # What cannot be undone is blamed all the same, also where a micro-batch shows it.
    blamed = harm & (undone | (not can_undo))
    learned = blamed | (moved & ~nonfinite)
    next_controller = Controller(
        step_scale=jnp.select([undone, moved | exhausted, blamed], [cut, scale, cut], c.step_scale),
        latch=jnp.where(learned | exhausted, latch, c.latch),
        earned=jnp.where(learned, earned, c.earned),
        trust_radius=jnp.where(learned, radius, c.trust_radius),
        first_length=jnp.where(shown, next_first_length(c, t, law), c.first_length),
        # A step is blamed once: where it cannot be undone, it is forgotten.
        last_length=jnp.select(
            [undone, moved, blamed],
            [c.last_length * keep, _product(factor, t.step_norm), 0],
            c.last_length,
        ),
        last_slope=jnp.select(
            [undone, moved], [c.last_slope * keep, _product(factor, t.slope)], c.last_slope
        ),
        rejections=jnp.where(taken, 0, c.rejections + 1),
        allowance=c.allowance,
        elasticity=jnp.where(shown & ~nonfinite, elasticity, c.elasticity),
        too_long=jnp.where(moved, jnp.where(diagnosis.long, c.too_long + 1, 0), c.too_long),
    )
    command = Command(
        action=action,
        cause=cause,
        scale=next_controller.step_scale,
        factor=jnp.where(undone, keep, factor),
    )
    return command, next_controller


def _product(factor: jax.Array, x: jax.Array) -> jax.Array:
    """The product; 0 where `x` is not finite, as the length of a step that no limit can shorten."""
    return jnp.where(jnp.isfinite(x), factor * x, 0)


class Verdict(NamedTuple):
    """Whether a step is taken.

    Attributes:
      nonfinite: something in it is not finite.
      harm: the last step did harm.
      rejected: it is not taken, unless the run is exhausted.
      exhausted: too many in a row were rejected, so it is taken all the same.
      undone: it is rejected, and a part of the last step is taken back.
    """

    nonfinite: jax.Array  # shape=(), dtype=bool
    harm: jax.Array  # shape=(), dtype=bool
    rejected: jax.Array  # shape=(), dtype=bool
    exhausted: jax.Array  # shape=(), dtype=bool
    undone: jax.Array  # shape=(), dtype=bool


def _judge(
    controller: Controller, diagnosis: Diagnosis, can_undo: bool, law: Law, limits: Limits
) -> Verdict:
    """Rejects or takes a step."""
    c, alarm = controller, diagnosis.alarm
    nonfinite = is_nonfinite(alarm)
    harm = (alarm >= Cause.OVERSHOOT) & (alarm <= Cause.LOSS_JUMP)
    rejected = nonfinite | (alarm == Cause.GRADIENT_SPIKE) | (harm & can_undo)
    exhausted = rejected & (c.rejections >= limits.max_rejections)
    # The first bad observation is likely the batch's fault. The next ones are of other batches at
    # the same parameters: they may be the last step's.
    suspect = (c.rejections >= 1) & (c.rejections <= law.repeat_backtracks)
    undone = rejected & ~exhausted & (harm | suspect) & can_undo & (c.last_length > 0)
    return Verdict(nonfinite, harm, rejected, exhausted, undone)


def _name(
    verdict: Verdict,
    alarm: jax.Array,
    regime: jax.Array,
    factor: jax.Array,
    limited: jax.Array,
    annealed: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The `Action` and its `Cause`."""
    v = verdict
    actions = (Action.PROCEED, Action.BACKTRACK, Action.HOLD, Action.SCALE)
    action = jnp.select(
        [v.exhausted, v.undone, v.rejected, factor < 1],
        [jnp.int32(a) for a in actions],
        jnp.int32(Action.PASS),
    )
    cause = jnp.select(
        [
            v.exhausted,
            alarm != Cause.NONE,
            action == Action.PASS,
            limited,
            regime != Regime.STRESS,
            annealed,
        ],
        [
            jnp.int32(Cause.EXHAUSTED),
            alarm,
            jnp.int32(Cause.NONE),
            jnp.int32(Cause.ENVELOPE),
            jnp.int32(Cause.RELEASE),
            jnp.int32(Cause.BOUNCE),
        ],
        jnp.int32(Cause.ENVELOPE),
    )
    return action, cause


def _elasticity(controller: Controller, telemetry: Telemetry, law: Law) -> jax.Array:
    """By what share of it the first step lowers the loss, per share of the parameters' norm."""
    t = telemetry
    # Without a loss, and of parameters without a size, nothing can be told.
    known = have_size(t, law) & (t.slope < 0) & (t.step_norm > 0) & (t.loss != 0)
    steepness = -t.slope / jnp.where(known, t.step_norm, 1)
    found = steepness * (t.parameter_norm / jnp.where(known, jnp.abs(t.loss), 1))
    found = jnp.clip(jnp.where(known, found, NO_LIMIT), jnp.finfo(jnp.float32).tiny, NO_LIMIT)
    return jnp.where(controller.elasticity > 0, controller.elasticity, found)


def _share(
    controller: Controller, telemetry: Telemetry, elasticity: jax.Array, law: Law
) -> jax.Array:
    """How much of the healthy length a step may have under stress."""
    # At a given depth the number of parameters grows with the square of the width, and the best
    # relative step falls with the square root of the width.
    sized = jnp.clip((law.share_size / telemetry.size) ** 0.25, law.share_least, 1)
    sized = sized + (1 - sized) * started_at_zero(controller)
    inelastic = jnp.minimum(jnp.sqrt(law.share_elasticity / elasticity), law.share_most)
    # Such a share is a warm-up. After one, what is left to fear are entries far longer than others.
    even = jnp.minimum(law.share_kurtosis / telemetry.kurtosis, 1)
    even = jnp.where(had_warm_up(controller), even, 0)
    return jnp.maximum(jnp.maximum(sized, inelastic), even)


def _regulate(
    controller: Controller,
    regime: jax.Array,
    room: jax.Array,
    signals: Signals,
    law: Law,
) -> tuple[jax.Array, jax.Array]:
    """Moves latch and earned factor: by the control law under stress, else back to 1.

    `room` is the scale at which the step has all the length that it may have under stress.
    """
    c, s, warmed = controller, signals, had_warm_up(controller)
    # At a constant rate Adam's first step is the longest, and what it needs shows in it. A warm-up
    # ends among steps of any length, and a schedule goes on from there: what the longest needed is
    # forgotten as the run gets older, on the scale on which a schedule acts.
    aged = 1 + jnp.where(warmed, 1 / jnp.maximum(s.observations, 1), 0)
    latch = jnp.minimum(jnp.clip(aged * c.latch, law.slack * room, room), 1)
    straight = -s.overshoot * c.step_scale > law.earn_straight * s.slope
    too_short = straight & (s.overshoot + 2 * s.overshoot_error < 0)
    costly = (s.overshoot - s.overshoot_error) * c.step_scale**2 > s.bearable
    # A schedule anneals by itself: before its end there is no more to mend than what steps spoil.
    excused = s.productive | s.scaled_edge | (warmed & ~s.risen)
    rate = jnp.where(too_short, law.growth, jnp.where(costly & ~excused, 1 / law.growth, 1))
    # No step under stress is longer than the latch alone may make it, whatever has been earned.
    most = jnp.minimum(law.earned_most, room / jnp.where(latch > 0, latch, 1))
    earned = jnp.clip(rate * c.earned, law.earned_least, most)
    released = jnp.minimum(c.latch * law.release, 1)
    forgotten = jnp.clip(1, c.earned / law.release, c.earned * law.release)
    stressed = regime == Regime.STRESS
    return jnp.where(stressed, latch, released), jnp.where(stressed, earned, forgotten)
