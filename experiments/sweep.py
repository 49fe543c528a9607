"""Many short runs of one task in one compiled program: vmapped over all that is a number."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import BYTE_VOCABULARY
from experiments.faults import Fault, rate_factor, spoil_batch, spoil_gradients
from experiments.methods import evaluated
from lbw_optax import Action

MOST_AT_ONCE = 54
"""Runs that share a call of the compiled program: enough to hide its overhead, few for memory."""


class Trainable(Protocol):
    """Something to minimise, as pure functions that vmap."""

    @property
    def name(self) -> str:
        """Name in tables."""
        ...

    @property
    def init(self) -> Callable[[jax.Array], Any]:
        """From a random key to the parameters."""
        ...

    @property
    def loss(self) -> Callable[[Any, Any], jax.Array]:
        """From the parameters and a batch to the loss."""
        ...

    def batch(self, key: jax.Array, over: Any) -> Any:
        """The batch of a step, from its random key and how much of the run is over."""
        ...

    def evaluate(self, params: Any) -> jax.Array:
        """The loss that counts."""
        ...


class Case(NamedTuple):
    """One run, or, with a leading axis, all runs of a sweep."""

    rate: Any
    """Learning rate."""
    seed: Any
    """Seed of the initial values and of the batches."""
    fault: Fault | None
    """What goes wrong; None compiles a program without faults."""
    extra: Any
    """What else the method depends on, a tuple of numbers or of trees of them."""


class Outcome(NamedTuple):
    """How a run ended."""

    loss: jax.Array
    """Held-out loss."""
    guard: dict[str, jax.Array]
    """The guard's counters; empty without a guard."""
    params: Any
    """The parameters."""


def sweep(
    task: Trainable,
    make_tx: Callable[..., optax.GradientTransformation],
    steps: int,
    rates: Sequence[float],
    seeds: Sequence[int],
    *,
    faults: Mapping[str, Fault] | None = None,
    extras: Mapping[str, tuple] | None = None,
    give_loss: bool = True,
    dtype: Any = None,
) -> list[dict[str, Any]]:
    """Trains at every combination of what is given.

    Args:
      task: The task.
      make_tx: From the learning rate, a scalar or (with faults) a schedule, and from what `extras`
        holds, to the optimizer.
      steps: Length of the runs.
      rates: Learning rates.
      seeds: Seeds.
      faults: Name -> fault.
      extras: Name -> further arguments of `make_tx`.
      give_loss: Whether the optimizer is given the loss.
      dtype: Dtype of the parameters, if not the task's own.

    Returns:
      A row per run with `task`, `rate`, `seed`, `fault`, `extra`, `loss` and the guard's counters.
    """
    names, cases = [], []
    for (fault, numbers), (extra, arguments), rate, seed in itertools.product(
        (faults or {"none": None}).items(), (extras or {"": ()}).items(), rates, seeds
    ):
        names.append({"task": task.name, "fault": fault, "extra": extra, "rate": rate})
        names[-1]["seed"] = seed
        cases.append(Case(np.float32(rate), np.uint32(seed), numbers, arguments))
    run = make_run(task, make_tx, steps, give_loss=give_loss, dtype=dtype)
    together = jax.jit(jax.vmap(lambda case: run(case)._replace(params=())))
    rows = []
    for start in range(0, len(cases), MOST_AT_ONCE):
        chunk = cases[start : start + MOST_AT_ONCE]
        if start:  # The last chunk is filled up, so that one program does for all.
            chunk += [chunk[-1]] * (MOST_AT_ONCE - len(chunk))
        outcome = jax.device_get(together(jax.tree.map(_stack, *chunk)))
        rows += [
            {**name, "loss": float(outcome.loss[i])}
            | {key: float(values[i]) for key, values in outcome.guard.items()}
            for i, name in enumerate(names[start : start + MOST_AT_ONCE])
        ]
    return rows


def make_run(
    task: Trainable,
    make_tx: Callable[..., optax.GradientTransformation],
    steps: int,
    *,
    give_loss: bool = True,
    dtype: Any = None,
) -> Callable[[Case], Outcome]:
    """One run as a pure function of its case; for the arguments see `sweep`."""

    def run(case: Case) -> Outcome:
        key_init, key_batches, key_fault = jax.random.split(jax.random.key(case.seed), 3)
        params = task.init(key_init)
        if dtype is not None:
            params = jax.tree.map(lambda x: x.astype(dtype), params)
        rate = case.rate
        if case.fault is not None:
            rate = lambda step: case.rate * rate_factor(case.fault, key_fault, step)  # noqa: E731
        tx = optax.with_extra_args_support(make_tx(rate, *case.extra))

        def train_step(carry, step):
            params, opt_state = carry
            batch = task.batch(jax.random.fold_in(key_batches, step), step / steps)
            if case.fault is not None:
                batch = spoil_batch(case.fault, key_fault, step, batch, BYTE_VOCABULARY)
            loss, grads = jax.value_and_grad(task.loss)(params, batch)
            if case.fault is not None:
                loss, grads = spoil_gradients(case.fault, key_fault, step, loss, grads)
            # What is inside must not depend on what is outside: fused, roundings may differ.
            loss, grads = jax.lax.optimization_barrier((loss, grads))
            extra = {"value": loss} if give_loss else {}
            updates, opt_state = tx.update(grads, opt_state, params, **extra)
            updates, opt_state = jax.lax.optimization_barrier((updates, opt_state))
            return (optax.apply_updates(params, updates), opt_state), None

        (params, opt_state), _ = jax.lax.scan(
            train_step, (params, tx.init(params)), jnp.arange(steps)
        )
        return Outcome(
            task.evaluate(evaluated(opt_state, params)), guard_counters(opt_state), params
        )

    return run


def guard_counters(opt_state: Any) -> dict[str, jax.Array]:
    """The guard's counters that the tables show; empty without a guard. Works inside jit."""
    ledger = optax.tree.get(opt_state, "ledger")
    if ledger is None:
        return {}
    return {
        "active": ledger.control_active_steps,
        "holds": ledger.action_counts[Action.HOLD],
        "backtracks": ledger.action_counts[Action.BACKTRACK],
        "min_scale": ledger.min_scale_seen,
    }


def _stack(*leaves: Any) -> np.ndarray:
    kinds = {np.asarray(leaf).dtype.kind for leaf in leaves}
    dtype = np.float32 if "f" in kinds else np.asarray(leaves[0]).dtype
    return np.stack([np.asarray(leaf, np.int32 if dtype == np.int64 else dtype) for leaf in leaves])
