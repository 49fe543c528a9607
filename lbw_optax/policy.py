"""Policy: the bounded control law, from a diagnosis to a command. Pure functions of scalars."""

import contextlib
import enum
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lbw_optax.interpretation import Cause, Diagnosis, Regime
from lbw_optax.law import Law
from lbw_optax.sensing import Signals, Telemetry, is_inexact


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
      scale: the scale in force, that of the last applied step, in [min_scale, 1].
      latch: scale that the envelope has imposed; it follows the envelope down at once.
      earned: factor on the latch that the measured overshoot has earned; below 1 it anneals.
      trust_radius: absolute step length that has proved safe; 0 before the first step.
      last_length: norm of the last applied step; 0 before the first.
      last_slope: slope at the start of the last applied step, in units of the loss.
      rejections: held or undone steps in a row.
      nonfinites: non-finite observations in a row.
      too_long: steps in a row that were `Diagnosis.long`.
      allowance: what the norm of the parameters is multiplied with; above 1 if some of them started
        at zero.
    """

    scale: jax.Array  # shape=(), dtype=float32
    latch: jax.Array  # shape=(), dtype=float32
    earned: jax.Array  # shape=(), dtype=float32
    trust_radius: jax.Array  # shape=(), dtype=float32
    last_length: jax.Array  # shape=(), dtype=float32
    last_slope: jax.Array  # shape=(), dtype=float32
    rejections: jax.Array  # shape=(), dtype=int32
    nonfinites: jax.Array  # shape=(), dtype=int32
    too_long: jax.Array  # shape=(), dtype=int32
    allowance: jax.Array  # shape=(), dtype=float32


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
      relative: longest healthy step for parameters of this size.
      healthy: longest healthy step; more than `relative` if it has proved safe.
      hard: longest step of all.
    """

    relative: jax.Array  # shape=(), dtype=float32
    healthy: jax.Array  # shape=(), dtype=float32
    hard: jax.Array  # shape=(), dtype=float32


def init_controller(params: Any, axis_name: Any, law: Law) -> Controller:
    """Returns the controller of a run that has not begun; its very first steps are not excused."""
    start = {"scale": 1, "latch": 1, "earned": 1}
    start |= {"too_long": law.brief_steps, "allowance": _allowance(params, axis_name, law)}
    whole = ("rejections", "nonfinites", "too_long")
    return Controller(
        **{
            name: jnp.asarray(start.get(name, 0), jnp.int32 if name in whole else jnp.float32)
            for name in Controller._fields
        }
    )


def _allowance(params: Any, axis_name: Any, law: Law) -> jax.Array:
    r"""Allows for entries that start at zero: :math:`\min(n / n_0, \text{allowance_most})`.

    Such entries, half of LoRA's for instance, will get a size but have none yet. :math:`n_0` is the
    number of those that are not zero. Counting them as large as the others would be the square root
    of it, which ends .005 to .02 nats worse on LoRA.
    """
    count, nonzero = 0.0, jnp.zeros([], jnp.float32)
    for leaf in filter(is_inexact, jax.tree.leaves(params)):
        size = float(math.prod(getattr(leaf, "shape", ())))
        count += size
        # A shape without values says nothing: it counts as not zero.
        known = not isinstance(leaf, jax.ShapeDtypeStruct)
        nonzero += _count_nonzero(jnp.asarray(leaf)) if known else size
    sums = (jnp.float32(count), nonzero)
    if axis_name is not None:
        with contextlib.suppress(NameError):  # Outside shard_map the arrays are whole.
            sums = jax.lax.psum(sums, axis_name)
    count, nonzero = sums
    ratio = jnp.minimum(count / jnp.maximum(nonzero, 1), law.allowance_most)
    return jnp.where(nonzero > 0, ratio, 1.0)


def _count_nonzero(x: jax.Array) -> jax.Array:
    """The number of entries that are not zero: by rows, since a large array's overflows int32."""
    rows = jnp.count_nonzero(x, axis=-1) if x.ndim else jnp.count_nonzero(x)
    return jnp.sum(rows.astype(jnp.float32))


def envelope(
    controller: Controller,
    telemetry: Telemetry,
    observations: jax.Array,
    reach: jax.Array,
    has_params: bool,
    law: Law,
    limits: Limits,
) -> Envelope:
    r"""Computes how long a step may be.

    .. math::

      \rho_t = \max(\rho, \rho_0 (t + 1)^{-a}), \quad
      \text{healthy} = \max(\rho_t w \|p\| \, n / n_0, f), \quad
      \text{hard} = \ell \max(\|p\|, \sqrt{n})

    with :math:`\rho` = ``law.relative_step``, :math:`\rho_0` = ``law.relative_step_start``,
    :math:`a` = ``law.relative_step_power``, :math:`w` = ``reach``, :math:`f` the trust radius,
    :math:`\ell` = ``limits.relative_step_limit``, :math:`n` the number of parameters and
    :math:`n / n_0` the controller's ``allowance`` for those that started at zero.

    Args:
      controller: the policy's memory.
      telemetry: this step.
      observations: accepted observations so far.
      reach: how much longer steps may be because they do not add up.
      has_params: whether the caller gives the parameters; without them nothing bounds a step.
      law: the constants.
      limits: the hard limits.

    Returns:
      The `Envelope`, in units of the parameters; never 0.
    """
    number = jnp.finfo(jnp.float32)
    if not has_params:
        unbounded = jnp.full([], number.max, jnp.float32)
        return Envelope(unbounded, unbounded, unbounded)
    t = telemetry
    start = (
        law.relative_step_start * (observations.astype(jnp.float32) + 1) ** -law.relative_step_power
    )
    share = jnp.maximum(law.relative_step, start)
    relative = share * reach * t.parameter_norm * controller.allowance
    hard = limits.relative_step_limit * jnp.maximum(t.parameter_norm, jnp.sqrt(t.size))
    hard = jnp.clip(hard, number.tiny, number.max)
    healthy = jnp.maximum(relative, _trust_radius(controller, t, law))
    return Envelope(
        relative=jnp.minimum(relative, hard),
        healthy=jnp.clip(healthy, number.tiny, hard),
        hard=hard,
    )


def _trust_radius(controller: Controller, telemetry: Telemetry, law: Law) -> jax.Array:
    """At first everything if the parameters have no size yet, else what any step may have."""
    start = jnp.where(
        telemetry.parameter_norm <= law.unset_size * jnp.sqrt(telemetry.size),
        jnp.finfo(jnp.float32).max,
        law.relative_step * telemetry.parameter_norm,
    )
    return jnp.where(controller.trust_radius > 0, controller.trust_radius, start)


def _least_radius(telemetry: Telemetry, law: Law) -> jax.Array:
    return law.relative_step * law.unset_size * jnp.sqrt(telemetry.size)


def _next_trust_radius(
    controller: Controller,
    telemetry: Telemetry,
    bounds: Envelope,
    bound: jax.Array,
    harm: jax.Array,
    law: Law,
) -> jax.Array:
    r"""Moves the radius to a small part of the way to the minimum of the last step's parabola.

    .. math:: f' = f \, \mathrm{clip}(\nu a / (a + c), 1 / G, G)

    with :math:`a` and :math:`-c` the downward slope at the start and at the end of the step, so
    that it went :math:`(a + c) / a` of that way, :math:`\nu` = ``law.trust_way`` and :math:`G` =
    ``law.trust_growth``. Only a step that was bound lets the radius grow.
    """
    c, t = controller, telemetry
    radius = _trust_radius(c, t, law)
    least = _least_radius(t, law)
    descent, lost = -c.last_slope, t.overshoot - c.last_slope
    factor = law.trust_way * descent / jnp.maximum(lost, jnp.finfo(jnp.float32).tiny)
    factor = jnp.clip(factor, 1 / law.trust_growth, jnp.where(bound, law.trust_growth, 1))
    factor = jnp.where((descent > 0) & jnp.isfinite(lost), factor, 1)
    learned = jnp.clip(radius * factor, least, jnp.finfo(jnp.float32).max / 4)
    # Parameters without a size: open until a step did harm or the parameters have outgrown them.
    wide_open = radius >= jnp.finfo(jnp.float32).max
    outgrown = (t.step_norm > 0) & (t.step_norm <= bounds.relative)
    closed = jnp.maximum(jnp.where(harm, c.last_length / law.trust_growth, t.step_norm), least)
    return jnp.where(wide_open, jnp.where(harm | outgrown, closed, radius), learned)


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

      r_t &= \eta \, \text{healthy}_t / \|u_t\| \\
      a_t &= \min(1, \mathrm{clip}(a_{t-1}, \lambda r_t, r_t)) \\
      h_t &= h_{t-1} \cdot \begin{cases}
        \gamma & q + 2 e_q < 0 \text{ and } -q s > \beta \bar a \\
        1 / \gamma & (q - e_q) s^2 > \theta \\
        1 & \text{otherwise} \end{cases}, \quad
        h_t a_t \|u_t\| \le \text{healthy}_t \\
      s_t &= \min(1, a_t h_t, \text{hard}_t / \|u_t\|)

    with :math:`a` the latch, :math:`h` the earned factor, :math:`q \pm e_q` the mean overshoot per
    squared scale and its standard error, :math:`\bar a` the mean slope, :math:`\theta` the bearable
    overshoot, :math:`\eta` = ``law.share``, :math:`\lambda` = ``law.slack``, :math:`\gamma` =
    ``law.growth`` and :math:`\beta` = ``law.earn_straight``. The latch holds the scale, not the
    step: the inner optimizer's own shortening of its steps survives.

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
    latch, earned = _regulate(c, regime, t, signals, bounds, law)
    # What is left of a step that did harm: so much that its overshoot would have been bearable.
    bearable = law.stress_noise * signals.noise / jnp.where(t.overshoot > 0, t.overshoot, jnp.inf)
    keep = jnp.where(harm, jnp.clip(jnp.sqrt(bearable), law.cut_limit, law.cut), law.cut)
    lowest = jnp.float32(limits.min_scale)
    # A non-finite value may be the batch's fault: it shortens the last step and not the next ones.
    cut = jnp.where(harm, jnp.maximum(c.scale * keep, lowest), c.scale)
    latch = jnp.where(harm, jnp.minimum(latch, cut), latch)
    earned = jnp.where(harm, jnp.minimum(earned, 1), earned)
    latch = jnp.where(exhausted, lowest, latch)
    scale = jnp.minimum(latch * earned, law.rise_limit * c.scale)
    scale = jnp.where(exhausted, lowest, jnp.clip(scale, lowest, 1))
    factor = jnp.minimum(scale, jnp.where(t.step_norm > 0, bounds.hard / t.step_norm, jnp.inf))
    limited = factor < scale
    scale = jnp.maximum(factor, lowest)
    # An empty step (a micro-batch that is only accumulated) is passed, and leaves all as it was.
    factor = jnp.where(diagnosis.empty, 1, factor)

    action, cause = _name(verdict, diagnosis.alarm, regime, factor, limited, earned)

    moved = taken & ~diagnosis.empty
    bound = (regime == Regime.STRESS) & (c.scale < 1)
    radius = _next_trust_radius(c, t, bounds, bound, harm, law)
    learned = (undone & harm) | (moved & ~nonfinite)
    next_controller = Controller(
        scale=jnp.select([undone, moved | exhausted], [cut, scale], c.scale),
        latch=jnp.where(learned | exhausted, latch, c.latch),
        earned=jnp.where(learned, earned, c.earned),
        trust_radius=jnp.where(learned, radius, c.trust_radius),
        last_length=jnp.select(
            [undone, moved], [c.last_length * keep, _product(factor, t.step_norm)], c.last_length
        ),
        last_slope=jnp.select(
            [undone, moved], [c.last_slope * keep, _product(factor, t.slope)], c.last_slope
        ),
        rejections=jnp.where(taken, 0, c.rejections + 1),
        nonfinites=jnp.where(nonfinite, c.nonfinites + 1, 0),
        allowance=c.allowance,
        too_long=jnp.where(moved, jnp.where(diagnosis.long, c.too_long + 1, 0), c.too_long),
    )
    command = Command(
        action=action,
        cause=cause,
        scale=next_controller.scale,
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
    nonfinite = (alarm >= Cause.NONFINITE_GRADIENT) & (alarm <= Cause.NONFINITE_STEP)
    harm = (alarm >= Cause.OVERSHOOT) & (alarm <= Cause.LOSS_JUMP)
    rejected = nonfinite | (alarm == Cause.GRADIENT_SPIKE) | (harm & can_undo)
    exhausted = rejected & (c.rejections >= limits.max_rejections)
    # The first non-finite value is likely the batch's fault; the next ones may be the last step's.
    suspect = (c.nonfinites >= 1) & (c.nonfinites <= law.nonfinite_backtracks)
    undone = rejected & ~exhausted & (harm | (nonfinite & suspect)) & can_undo & (c.last_length > 0)
    return Verdict(nonfinite, harm, rejected, exhausted, undone)


def _name(
    verdict: Verdict,
    alarm: jax.Array,
    regime: jax.Array,
    factor: jax.Array,
    limited: jax.Array,
    earned: jax.Array,
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
            earned < 1,
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


def _regulate(
    controller: Controller,
    regime: jax.Array,
    telemetry: Telemetry,
    signals: Signals,
    bounds: Envelope,
    law: Law,
) -> tuple[jax.Array, jax.Array]:
    """Moves latch and earned factor: by the control law under stress, else back to 1."""
    c, t, s = controller, telemetry, signals
    room = law.share * bounds.healthy / jnp.where(t.step_norm > 0, t.step_norm, bounds.healthy)
    latch = jnp.minimum(jnp.clip(c.latch, law.slack * room, room), 1)
    straight = -s.overshoot * c.scale > law.earn_straight * s.slope
    too_short = straight & (s.overshoot + 2 * s.overshoot_error < 0)
    too_long = (s.overshoot - s.overshoot_error) * c.scale**2 > s.bearable
    rate = jnp.where(too_short, law.growth, jnp.where(too_long, 1 / law.growth, 1))
    # No step under stress is longer than is healthy, whatever has been earned.
    most = jnp.minimum(law.earned_most, room / (law.share * jnp.where(latch > 0, latch, 1)))
    earned = jnp.clip(rate * c.earned, law.earned_least, most)
    released = jnp.minimum(c.latch * law.release, 1)
    forgotten = jnp.clip(1, c.earned / law.release, c.earned * law.release)
    stressed = regime == Regime.STRESS
    return jnp.where(stressed, latch, released), jnp.where(stressed, earned, forgotten)
