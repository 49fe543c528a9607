"""An idle guard is not to be seen, neither in a bit of the update nor of the inner state."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import at, bits, default_jit, exact_jit, normal, train

from lbw_optax import guard, report

IDLE_INNERS = {
    "adamw": lambda: optax.adamw(1e-4),
    "clip_adamw": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-4)),
    "momentum": lambda: optax.sgd(1e-4, momentum=0.9, nesterov=True),
    "lion": lambda: optax.lion(1e-5),
}


def idle_problem(dtype):
    params = {"w": normal(6, 3, dtype=dtype), "b": normal(3, dtype=dtype, seed=1)}
    x, y = normal(20, 16, 6), normal(20, 16, 3, seed=2)

    def loss_fn(params, batch):
        x, y = batch
        h = jnp.tanh(x.astype(dtype) @ params["w"]) + params["b"][None]
        return jnp.mean((h - y.astype(dtype)).astype(jnp.float32) ** 2)

    return params, (x, y), loss_fn


def by_steps(jit_update, jit_step):
    """Returns a training loop in Python, with `update` and the whole step compiled as given."""

    def loop(tx, loss_fn, params, batches):
        tx = optax.with_extra_args_support(tx)

        def update(g, s, p, value):
            return tx.update(g, s, p, value=value)

        def step(params, state, batch):
            value, grads = jax.value_and_grad(loss_fn)(params, batch)
            updates, state = jit_update(update)(grads, state, params, value)
            return optax.apply_updates(params, updates), state

        step, state = jit_step(step), tx.init(params)
        for i in range(len(batches[0])):
            params, state = step(params, state, at(batches, i))
        return params, state

    return loop


def scanned(jit):
    def loop(tx, loss_fn, params, batches):
        call = jit(lambda p, b: train.__wrapped__(tx, loss_fn, p, len(b[0]), b))
        return call(params, batches)[:2]

    return loop


def as_is(fn):
    return fn


LOOPS = {
    "eager": by_steps(as_is, as_is),
    "update": by_steps(default_jit, as_is),
    "step": by_steps(as_is, exact_jit),
    "scan": scanned(exact_jit),
}


IDLE_CASES = [
    ("eager", "momentum", jnp.float32),
    ("eager", "adamw", jnp.bfloat16),
    ("update", "momentum", jnp.float32),
    ("update", "clip_adamw", jnp.bfloat16),
    ("step", "adamw", jnp.float32),
    ("step", "momentum", jnp.float32),
    *(("scan", inner, dtype) for inner in IDLE_INNERS for dtype in (jnp.float32, jnp.bfloat16)),
]


@pytest.mark.parametrize(("loop", "inner", "dtype"), IDLE_CASES)
def test_5_idle_means_identical(loop, inner, dtype):
    params, batches, loss_fn = idle_problem(dtype)
    tx = IDLE_INNERS[inner]()
    if loop == "eager":
        batches = at(batches, slice(0, 3))
    expected, bare = LOOPS[loop](tx, loss_fn, params, batches)
    got, state = LOOPS[loop](guard(tx), loss_fn, params, batches)
    assert report(state).actions["PASS"] == len(batches[0])
    assert bits(got) == bits(expected)
    assert bits(state.inner_state) == bits(bare)


@pytest.mark.parametrize("inner", ["adamw", "clip_adamw"])
@pytest.mark.parametrize("jit", ["step", "scan"])
def test_5_idle_means_identical_as_compiled_by_default(jit, inner):
    loop = {"step": by_steps(as_is, default_jit), "scan": scanned(default_jit)}[jit]
    params, batches, loss_fn = idle_problem(jnp.float32)
    tx = IDLE_INNERS[inner]()
    expected, bare = loop(tx, loss_fn, params, batches)
    got, state = loop(guard(tx), loss_fn, params, batches)
    assert report(state).actions["PASS"] == len(batches[0])
    assert bits(got) == bits(expected)
    assert bits(state.inner_state) == bits(bare)
