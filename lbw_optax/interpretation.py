"""Interpretation: from telemetry and signals to a named regime. Pure functions of scalars."""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lbw_optax.law import Law
from lbw_optax.sensing import Telemetry
from lbw_optax.statistics import Signals


class Regime(enum.IntEnum):
    """What the run is going through."""

    STABLE = 0
    """Nothing is suspected: the guard passes every step on, bit for bit, that
    `relative_step_limit` allows."""
    STRESS = 1
    """Steps are, or were lately, longer than is healthy: the control law sets the scale."""
    SPIKE = 2
    """This observation is bad: it is held, or the last step is undone, or blamed."""
    RECOVERY = 3
    """The alarm or the stress is over: the scale returns to 1 before the run counts as stable."""


class Cause(enum.IntEnum):
    """Why the guard acted; of several causes the first counts.

    But a spiking gradient comes before harm where the last step cannot be undone, and EXHAUSTED
    replaces every other.
    """

    NONE = 0
    """Nothing is wrong; an event with this cause is a mere switch of the regime."""
    NONFINITE_GRADIENT = 1
    """NaN or Inf in the gradients, or a norm whose square is beyond float32."""
    NONFINITE_LOSS = 2
    """NaN or Inf loss, or one beyond float32."""
    NONFINITE_STEP = 3
    """The inner optimizer emitted or stored NaN or Inf, or a step whose norm is beyond 1.8e19."""
    OVERSHOOT = 4
    """The last step went far past the minimum along its own direction."""
    COLLAPSE = 5
    """The loss jumped and the gradients died away: a blow-up that one-sided tests miss."""
    LOSS_JUMP = 6
    """The loss jumped and the overshoot blames the last step."""
    GRADIENT_SPIKE = 7
    """The gradient norm is far above its running mean."""
    ENVELOPE = 8
    """The step is longer than the envelope allows."""
    BOUNCE = 9
    """Steps overshoot on average: the learning rate is too high for what is left to gain."""
    RELEASE = 10
    """No suspicion any more; the scale is on its way back to 1."""
    EXHAUSTED = 11
    """Too many rejected steps in a row: the run proceeds at the lowest scale."""


def is_nonfinite(alarm: jax.Array) -> jax.Array:
    """Returns whether something in the step that raised an alarm is not finite."""
    return (alarm >= Cause.NONFINITE_GRADIENT) & (alarm <= Cause.NONFINITE_STEP)


class Diagnosis(NamedTuple):
    """What one step looks like.

    Attributes:
      alarm: the `Cause` of an alarm, or `NONE`.
      size: the observation that raised it, in units of its own threshold.
      long: whether the step is so long that it is suspected if the next ones are too.
      suspicion: whether steps are longer than is healthy or overshoot on average.
      calm: whether the step is well inside what is healthy.
      empty: whether there is no step, as after a micro-batch that is only accumulated.
    """

    alarm: jax.Array  # shape=(), dtype=int32
    size: jax.Array  # shape=(), dtype=float32
    long: jax.Array  # shape=(), dtype=bool
    suspicion: jax.Array  # shape=(), dtype=bool
    calm: jax.Array  # shape=(), dtype=bool
    empty: jax.Array  # shape=(), dtype=bool


def diagnose(
    telemetry: Telemetry,
    signals: Signals,
    pressure: jax.Array,
    too_long: jax.Array,
    moved: jax.Array,
    can_undo: bool,
    law: Law,
) -> Diagnosis:
    """Names what is wrong with one step.

    A hard batch and a harmful step both raise the loss. They are told apart at once: a hard batch
    says nothing about the last step and has larger gradients than usual, while after a harmful step
    either the overshoot is positive or the gradients have died away.

    At the edge of stability every other step overshoots, and the next one comes back: only the loss
    says there whether one did harm.

    A step that did harm is undone, whatever else its successor shows. Where it cannot be undone, a
    spiking gradient comes first: that one can still be held.

    Args:
      telemetry: this step.
      signals: this step compared with the run so far.
      pressure: length of the inner step over the longest healthy length.
      too_long: steps in a row, before this one, that were `long`.
      moved: whether there is a last step, and it has not been blamed yet.
      can_undo: whether the last step is remembered.
      law: the constants.

    Returns:
      The `Diagnosis`.
    """
    t, s = telemetry, signals
    # A spiking gradient inflates its own product with the last step: measured as if it did not.
    overshoot = jnp.where(moved, t.overshoot / jnp.maximum(s.spike, 1), 0)
    noise = jnp.where(s.noise > 0, s.noise, jnp.inf)
    overshot = overshoot / (law.backtrack_noise * noise)
    jump = s.innovation / (law.jump_noise * noise)
    blamed = overshoot > law.jump_overshoot * noise
    collapse = moved & (jump > 1) & s.faded
    nonfinite = [
        (Cause.NONFINITE_GRADIENT, ~t.gradient_finite, 0.0),
        (Cause.NONFINITE_LOSS, ~t.loss_finite, 0.0),
        (Cause.NONFINITE_STEP, ~t.step_finite, 0.0),
    ]
    harm = [
        (Cause.OVERSHOOT, (overshot > 1) & ~s.edge, overshot),
        (Cause.COLLAPSE, collapse, jump),
        (Cause.LOSS_JUMP, (jump > 1) & blamed, jump),
    ]
    spike = [(Cause.GRADIENT_SPIKE, s.spike > s.spike_allowed, s.spike / s.spike_allowed)]
    table = nonfinite + (harm + spike if can_undo else spike + harm)
    found = [flag for _, flag, _ in table]
    alarm = jnp.select(found, [jnp.int32(c) for c, _, _ in table], jnp.int32(Cause.NONE))
    size = jnp.select(found, [jnp.asarray(x, jnp.float32) for _, _, x in table], pressure)
    size = jnp.minimum(size, jnp.finfo(jnp.float32).max)
    # A healthy run overshoots as well: where some directions are done, while it gains in the
    # others, and where the curvature has grown until it just holds the steps.
    certain = s.overshoot - s.overshoot_error
    bounce = (certain > law.stress_noise * s.reach**2 * noise) & ~s.gaining & ~s.edge
    # One hard batch makes one long step: only a far too long one is suspected at once.
    long = pressure > law.stress_pressure
    pressed = (pressure > law.brief_pressure) | (long & (too_long >= law.brief_steps))
    return Diagnosis(
        alarm=alarm,
        size=size,
        long=long,
        suspicion=pressed | bounce,
        # The overshoot is that of a whole step: what it is once the scale is back at 1.
        calm=(pressure < law.calm_ratio) & (certain <= s.bearable) & ~bounce,
        empty=t.step_norm == 0,
    )


def next_regime(
    regime: jax.Array,
    dwell: jax.Array,
    stressed: jax.Array,
    diagnosis: Diagnosis,
    scale: jax.Array,
    law: Law,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Moves the regime, with hysteresis and dwell.

    An alarm interrupts stress and does not end it; where there was none, it begins none.

    Args:
      regime: the `Regime` so far.
      dwell: quiet steps spent in it in a row.
      stressed: whether it is STRESS, or was before an alarm.
      diagnosis: this step.
      scale: the scale so far; STABLE is entered only at 1.
      law: the constants.

    Returns:
      The new regime and its dwell, both int32 scalars, and whether the run is stressed, a bool.
    """
    d = diagnosis
    alarm = d.alarm != Cause.NONE
    quiet = ~alarm & jnp.where(regime == Regime.STRESS, d.calm, ~d.suspicion)
    waited = jnp.where(quiet, dwell + jnp.int32(~d.empty), 0)
    after_spike = jnp.where(stressed, Regime.STRESS, Regime.RECOVERY)
    after_stress = jnp.where(waited >= law.calm_steps, Regime.RECOVERY, Regime.STRESS)
    ready = (waited >= law.recovery_steps) & (scale >= 1)
    after_recovery = jnp.where(ready, Regime.STABLE, Regime.RECOVERY)
    new = jnp.select(
        [
            alarm,
            d.suspicion,
            regime == Regime.STABLE,
            regime == Regime.STRESS,
            regime == Regime.SPIKE,
        ],
        [Regime.SPIKE, Regime.STRESS, Regime.STABLE, after_stress, after_spike],
        after_recovery,
    ).astype(jnp.int32)
    stressed = jnp.where(new == Regime.SPIKE, stressed, new == Regime.STRESS)
    return new, jnp.where(new == regime, waited, 0), stressed
