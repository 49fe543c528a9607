"""What several test files share: training in one scan, and reading a guard's state per step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lbw_optax import Action, GuardState, Law
from lbw_optax.sensing import Telemetry, is_inexact
from lbw_optax.statistics import Signals

# XLA contracts `p + a * b` or not, as it happens to fuse: without this equal programs differ.
exact_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# As users compile: with XLA's defaults for what `conftest` turns off.
default_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_cpu_use_fusion_emitters": True,
        "xla_cpu_parallel_codegen_split_count": 32,
    },
)


def normal(*shape, dtype=jnp.float32, seed=0):
    """Returns an array of normal random values, always the same for the same arguments."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def telemetry(**known) -> Telemetry:
    """Returns the telemetry of a step of which only `known` is not 0, and its kurtosis unknown."""
    unknown = dict.fromkeys(Telemetry._fields, jnp.float32(0)) | {"kurtosis": jnp.float32(jnp.inf)}
    return Telemetry(**unknown | {name: jnp.float32(x) for name, x in known.items()})


_QUIET = {
    "noise": 1.0,
    "reach": 1.0,
    "bearable": 0.05,
    "slope": 0.1,
    "spike": 0.1,
    "spike_allowed": 1.0,
}


def signals(**known) -> Signals:
    """Returns the signals of a quiet step, with a noise of 1, but for what is `known`."""
    unknown = dict.fromkeys(Signals._fields, jnp.float32(0)) | dict.fromkeys(
        ("faded", "risen", "gaining", "productive", "edge", "scaled_edge"), jnp.bool_(False)
    )
    return Signals(**unknown | {name: jnp.asarray(x) for name, x in (_QUIET | known).items()})


def rejected(steps):
    """Returns what is done with so many bad observations in a row, more than are undone."""
    undone = [Action.BACKTRACK] * Law().repeat_backtracks
    return [Action.HOLD, *undone, *[Action.HOLD] * (steps - 1 - len(undone))]


def find(opt_state) -> GuardState:
    """Returns the only guard state inside `opt_state`."""
    (found,) = [
        x
        for x in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, GuardState))
        if isinstance(x, GuardState)
    ]
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def train(tx, loss_fn, params, steps, batches=None):
    """Minimises `loss_fn(params)`, or `loss_fn(params, batch)`; returns params, state, losses."""

    def body(carry, batch):
        params, state = carry
        args = (params,) if batch is None else (params, batch)
        value, grads = jax.value_and_grad(loss_fn)(*args)
        updates, state = optax.with_extra_args_support(tx).update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), value

    (params, state), losses = jax.lax.scan(body, (params, tx.init(params)), batches, length=steps)
    return params, state, losses


def feed(tx, params, stream):
    """Feeds a stream of gradients (and of extra arguments) to `tx`, whatever the parameters do.

    Args:
      tx: the transformation.
      params: the parameters at the start.
      stream: a dict with `grads`, and with the extra arguments of update; a leading axis of steps.

    Returns:
      For each step: the parameters before it, the emitted update, the optimizer state after it.
    """

    def body(carry, now):
        params, state = carry
        extra = {k: v for k, v in now.items() if k != "grads"}
        updates, new = tx.update(now["grads"], state, params, **extra)
        return (optax.apply_updates(params, updates), new), (params, updates, new)

    return jax.lax.scan(body, (params, tx.init(params)), stream)[1]


def actions(state) -> list[Action]:
    """Returns the action of every step from the states of `feed`."""
    counts = np.asarray(find(state).ledger.action_counts)
    steps = np.diff(counts, axis=0, prepend=np.zeros_like(counts[:1]))
    return [Action(int(i)) for i in steps.argmax(axis=1)]


def norm(tree) -> float:
    """Returns the Euclidean norm of the floating-point leaves, in float64."""
    leaves = [np.asarray(x).astype(np.float64) for x in jax.tree.leaves(tree) if is_inexact(x)]
    return float(np.sqrt(sum(np.sum(x**2) for x in leaves)))


def is_finite(tree) -> bool:
    """Returns whether every floating-point entry is finite."""
    return all(
        np.all(np.isfinite(np.asarray(x).astype(np.float64)))
        for x in jax.tree.leaves(tree)
        if is_inexact(x)
    )


def at(tree, i):
    """Returns entry `i` along the first axis of every leaf."""
    return jax.tree.map(lambda x: x[i], tree)


def bits(tree) -> list[bytes]:
    """Returns the bytes of every leaf, so that equal means equal bit for bit."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def types(tree):
    """Returns the tree of the leaves' types: shape, dtype, weak type and sharding."""
    return jax.tree.map(jax.typeof, tree)


def with_gain(inner):
    """Returns `inner` with a step that the extra argument `gain` multiplies."""
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, *, gain=1.0, **extra):
        step, state = inner.update(updates, state, params, **extra)
        return jax.tree.map(
            lambda u: (gain * u.astype(jnp.float32)).astype(u.dtype) if is_inexact(u) else u, step
        ), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
