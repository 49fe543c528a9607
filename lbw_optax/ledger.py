"""Ledger: what the guard did, in counters and in a ring of events, all of it in the state."""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lbw_optax.interpretation import Cause
from lbw_optax.policy import Action, Command


class EventRing(NamedTuple):
    """The latest events, each field an array with one entry per event.

    Attributes:
      event_step: index of the step, from 0.
      event_cause: a `Cause`.
      event_before: the `Regime` before.
      event_after: the `Regime` after.
      event_action: an `Action`.
      event_scale: the scale in force after the event.
      event_size: the observation in units of its own threshold.
    """

    event_step: jax.Array  # shape=(log_size,), dtype=int32
    event_cause: jax.Array  # shape=(log_size,), dtype=int32
    event_before: jax.Array  # shape=(log_size,), dtype=int32
    event_after: jax.Array  # shape=(log_size,), dtype=int32
    event_action: jax.Array  # shape=(log_size,), dtype=int32
    event_scale: jax.Array  # shape=(log_size,), dtype=float32
    event_size: jax.Array  # shape=(log_size,), dtype=float32


class Ledger(NamedTuple):
    """Counters since the run began.

    Attributes:
      steps: calls of `update`.
      control_active_steps: steps whose action was not PASS.
      regime_switches: steps after which the regime was another.
      nonfinite_steps: steps with a non-finite loss, gradient or inner step.
      recorded: events so far; those beyond the ring's size are dropped, oldest first.
      min_scale_seen: lowest scale so far.
      control_energy: sum over all steps of log(scale)^2.
      cause_counts: events per `Cause`.
      action_counts: steps per `Action`.
      ring: the latest events.
    """

    steps: jax.Array  # shape=(), dtype=int32
    control_active_steps: jax.Array  # shape=(), dtype=int32
    regime_switches: jax.Array  # shape=(), dtype=int32
    nonfinite_steps: jax.Array  # shape=(), dtype=int32
    recorded: jax.Array  # shape=(), dtype=int32
    min_scale_seen: jax.Array  # shape=(), dtype=float32
    control_energy: jax.Array  # shape=(), dtype=float32
    cause_counts: jax.Array  # shape=(len(Cause),), dtype=int32
    action_counts: jax.Array  # shape=(len(Action),), dtype=int32
    ring: EventRing


def init_ledger(log_size: int) -> Ledger:
    """Returns an empty ledger whose ring holds `log_size` events."""

    def zero():
        return jnp.zeros([], jnp.int32)

    ring = EventRing(
        **{
            name: jnp.zeros(
                [log_size], jnp.float32 if name in ("event_scale", "event_size") else jnp.int32
            )
            for name in EventRing._fields
        }
    )
    return Ledger(
        steps=zero(),
        control_active_steps=zero(),
        regime_switches=zero(),
        nonfinite_steps=zero(),
        recorded=zero(),
        min_scale_seen=jnp.ones([], jnp.float32),
        control_energy=jnp.zeros([], jnp.float32),
        cause_counts=jnp.zeros([len(Cause)], jnp.int32),
        action_counts=jnp.zeros([len(Action)], jnp.int32),
        ring=ring,
    )


def _count(n: jax.Array, happened: jax.Array | bool) -> jax.Array:
    """One more where it happened; at the end of int32 it stays there."""
    return jnp.where(happened, optax.safe_increment(n), n)


def record(
    ledger: Ledger,
    command: Command,
    before: jax.Array,
    after: jax.Array,
    size: jax.Array,
    nonfinite: jax.Array,
) -> Ledger:
    """Writes one step down.

    Args:
      ledger: the ledger so far.
      command: what was done.
      before: the `Regime` before the step.
      after: the `Regime` after it.
      size: the decisive observation in units of its own threshold.
      nonfinite: whether the step showed something non-finite.

    Returns:
      The new ledger. A step is an event if it was not passed or if it changed the regime.
    """
    ledger = jax.tree.map(jnp.asarray, ledger)  # A restored state may be of numpy arrays.
    active = command.action != Action.PASS
    switched = before != after
    is_event = active | switched
    log_size = ledger.ring.event_step.shape[0]
    # An index beyond the ring is dropped by the write: no event, no change.
    at = jnp.where(is_event, ledger.recorded % log_size, log_size)
    event = EventRing(
        ledger.steps, command.cause, before, after, command.action, command.scale, size
    )
    ring = jax.tree.map(lambda r, x: r.at[at].set(x, mode="drop"), ledger.ring, event)
    return Ledger(
        steps=_count(ledger.steps, True),
        control_active_steps=_count(ledger.control_active_steps, active),
        regime_switches=_count(ledger.regime_switches, switched),
        nonfinite_steps=_count(ledger.nonfinite_steps, nonfinite),
        recorded=_count(ledger.recorded, is_event),
        min_scale_seen=jnp.minimum(ledger.min_scale_seen, command.scale),
        control_energy=ledger.control_energy + jnp.log(command.scale) ** 2,
        cause_counts=_count(ledger.cause_counts, is_event & _is(command.cause, Cause)),
        action_counts=_count(ledger.action_counts, _is(command.action, Action)),
        ring=ring,
    )


def _is(member: jax.Array, kind: type[enum.IntEnum]) -> jax.Array:
    """One flag for each member of an enumeration."""
    return member == jnp.arange(len(kind), dtype=jnp.int32)
