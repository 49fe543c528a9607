"""Report: reads a guard's state on the host, wherever it sits inside an optimizer state."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from lbw_optax.guard import GuardState
from lbw_optax.interpretation import Cause, Regime
from lbw_optax.policy import Action


@dataclasses.dataclass(frozen=True)
class Event:
    """One intervention or regime switch.

    Attributes:
      step: index of the call of ``update``, from 0.
      cause: name of a :class:`lbw_optax.Cause`; ``"NONE"`` for a mere switch of the regime.
      regime_before: name of the :class:`lbw_optax.Regime` before the step.
      regime_after: the same after it.
      action: name of a :class:`lbw_optax.Action`.
      scale: the scale in force after it.
      size: with an alarm the decisive observation in units of its own threshold, else the length
        of the inner step over the longest healthy length.
    """

    step: int
    cause: str
    regime_before: str
    regime_after: str
    action: str
    scale: float
    size: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What the guard saw and did since the run began.

    Attributes:
      steps: calls of ``update``.
      regime: name of the current :class:`lbw_optax.Regime`.
      scale: the scale in force.
      min_scale_seen: lowest scale so far.
      control_active_steps: steps whose action was not ``PASS``.
      regime_switches: steps that changed the regime.
      control_energy: sum over all steps of log(scale)^2.
      backtracks: steps that took back a part of the last one.
      held_steps: steps that were held; those undone in part are ``backtracks``.
      nonfinite_steps: steps with a non-finite loss, gradient or inner step.
      exhausted_steps: steps taken at the lowest scale after too many rejected ones.
      causes: events per :class:`lbw_optax.Cause`, those that occurred.
      actions: steps per :class:`lbw_optax.Action`.
      events_recorded: events so far.
      events_dropped: events that the log no longer holds.
      sensors_off: sensors without input in the last update.
    """

    steps: int
    regime: str
    scale: float
    min_scale_seen: float
    control_active_steps: int
    regime_switches: int
    control_energy: float
    backtracks: int
    held_steps: int
    nonfinite_steps: int
    exhausted_steps: int
    causes: dict[str, int]
    actions: dict[str, int]
    events_recorded: int
    events_dropped: int
    sensors_off: tuple[str, ...]

    def __str__(self) -> str:
        """Returns the report in words."""
        share = 100 * self.control_active_steps / max(self.steps, 1)
        lines = [
            f"guard: {self.regime} after {self.steps} steps, scale {self.scale:.3g}"
            f" (lowest {self.min_scale_seen:.3g})",
            f"  control active in {self.control_active_steps} steps ({share:.1f} %),"
            f" {self.regime_switches} regime switches, control energy {self.control_energy:.3g}",
            f"  held {self.held_steps}, backtracked {self.backtracks},"
            f" non-finite {self.nonfinite_steps}, exhausted {self.exhausted_steps}",
        ]
        if self.causes:
            lines.append("  causes: " + ", ".join(f"{k} {v}" for k, v in self.causes.items()))
        if self.events_dropped:
            lines.append(f"  the log dropped its {self.events_dropped} oldest events")
        if self.sensors_off:
            lines.append("  sensors off: " + ", ".join(self.sensors_off))
        return "\n".join(lines)


def _find(opt_state: Any) -> GuardState:
    found = _guards(opt_state)
    if len(found) != 1:
        raise ValueError(f"opt_state must hold exactly one guard, found {len(found)}")
    if any(isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in jax.tree.leaves(found[0].regime)):
        raise ValueError(
            "opt_state must hold numbers, got a tracer or a shape: read it outside jit and scan"
        )
    # nnx keeps each array in a variable of its own.
    state = jax.tree.map(lambda x: x[...] if _is_variable(x) else x, found[0], is_leaf=_is_variable)
    runs = np.shape(state.regime)
    if runs:
        raise ValueError(
            f"opt_state must be that of one run, got axes {runs} of vmap or scan: pick one run, as "
            "with jax.tree.map(lambda x: x[0], opt_state)"
        )
    return state


def _guards(opt_state: Any) -> list[GuardState]:
    """Every guard's state, those inside another's too."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, GuardState))
    found = [x for x in leaves if isinstance(x, GuardState)]
    return found + [inner for x in found for inner in _guards(x.inner_state)]


def _is_variable(x: Any) -> bool:
    return hasattr(x, "get_metadata")


def report(opt_state: Any) -> Report:
    """Summarises what the guard saw and did.

    Args:
      opt_state: any optimizer state with one guard somewhere inside it (``chain``, ``masked``,
        ``nnx.Optimizer``, ``TrainState``).

    Returns:
      A :class:`Report`, which prints as a few lines of text.

    Raises:
      ValueError: if there is no guard in it, or more than one, or if it holds several runs.

    Example:
      >>> import jax.numpy as jnp, optax, lbw_optax
      >>> state = lbw_optax.guard(optax.sgd(0.1)).init(jnp.ones(2))
      >>> lbw_optax.report(state).held_steps
      0
    """
    s = _find(opt_state)
    log, regime, scale, has_loss, has_params = jax.device_get(
        (s.ledger, s.regime, s.controller.step_scale, s.has_loss, s.has_params)
    )
    sensors_off = ()
    if log.steps > 0:
        sensors_off += () if has_loss else ("loss",)
        sensors_off += () if has_params else ("relative step",)
    remembered = sum(x.size for x in jax.tree.leaves(s.last_step))
    if not remembered:
        sensors_off += ("overshoot",)
    actions = {a.name: int(n) for a, n in zip(Action, log.action_counts, strict=True)}
    return Report(
        steps=int(log.steps),
        regime=Regime(int(regime)).name,
        scale=float(scale),
        min_scale_seen=float(log.min_scale_seen),
        control_active_steps=int(log.control_active_steps),
        regime_switches=int(log.regime_switches),
        control_energy=float(log.control_energy),
        backtracks=actions["BACKTRACK"],
        held_steps=actions["HOLD"],
        nonfinite_steps=int(log.nonfinite_steps),
        exhausted_steps=actions["PROCEED"],
        causes={c.name: int(n) for c, n in zip(Cause, log.cause_counts, strict=True) if n},
        actions=actions,
        events_recorded=int(log.recorded),
        events_dropped=max(int(log.recorded) - len(log.ring.event_step), 0),
        sensors_off=sensors_off,
    )


def events(opt_state: Any) -> list[Event]:
    """Lists the events that the log still holds, oldest first.

    Args:
      opt_state: any optimizer state with one guard somewhere inside it.

    Returns:
      A list of :class:`Event`; ``dataclasses.asdict`` turns one into a dictionary.

    Raises:
      ValueError: if there is no guard in it, or more than one, or if it holds several runs.

    Example:
      >>> import jax.numpy as jnp, optax, lbw_optax
      >>> tx = lbw_optax.guard(optax.sgd(0.1))
      >>> params = jnp.ones(2)
      >>> _, state = tx.update(jnp.full(2, jnp.nan), tx.init(params), params)
      >>> [(event.step, event.cause, event.action) for event in lbw_optax.events(state)]
      [(0, 'NONFINITE_GRADIENT', 'HOLD')]
    """
    log = jax.device_get(_find(opt_state).ledger)
    size = len(log.ring.event_step)
    kept = min(int(log.recorded), size)
    order = [(int(log.recorded) - kept + i) % size for i in range(kept)]
    r = jax.tree.map(np.asarray, log.ring)
    return [
        Event(
            step=int(r.event_step[i]),
            cause=Cause(int(r.event_cause[i])).name,
            regime_before=Regime(int(r.event_before[i])).name,
            regime_after=Regime(int(r.event_after[i])).name,
            action=Action(int(r.event_action[i])).name,
            scale=float(r.event_scale[i]),
            size=float(r.event_size[i]),
        )
        for i in order
    ]
