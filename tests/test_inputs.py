"""What callers may hand over: other precisions, NumPy's numbers, derivatives, few losses."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import is_finite, norm

from lbw_optax import Law, guard, report
from lbw_optax.sensing import inner_product


def test_double_precision_stays_finite():
    with jax.enable_x64(True):
        tx = guard(optax.chain(optax.clip(1.0), optax.scale(1e200)), max_rejections=1)
        params = jnp.ones(3, jnp.float64)
        state = tx.init(params)
        for _ in range(4):
            updates, state = tx.update(jnp.ones(3), state, params, value=1.0)
            assert updates.dtype == jnp.float64
            assert is_finite(updates)


@pytest.mark.parametrize("every", [2, 7, 50, None])
def test_losses_now_and_then_raise_no_alarm(every):
    """A step without the loss says nothing of it; it counted as a loss of 0 once."""
    tx = guard(optax.adam(1e-3))
    params = jnp.ones(50)
    state = tx.init(params)

    @functools.partial(jax.jit, static_argnums=3)
    def step(params, state, key, with_loss):
        keys = jax.random.split(key)
        x, noise = jax.random.normal(keys[0], (16, 50)), jax.random.normal(keys[1], (16,))
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((x @ (p - 1) - noise / 2) ** 2))(params)
        extra = {"value": loss} if with_loss else {}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    for i in range(300):
        given = i >= 200 if every is None else i % every == 0
        params, state = step(params, state, jax.random.key(i), given)
    assert report(state).backtracks == 0
    assert state.statistics.losses == (100 if every is None else -(-300 // every))


@pytest.mark.parametrize("inner", [optax.sgd, optax.adam])
@pytest.mark.parametrize("memory", ["none", "sparse", "step"])
def test_derivatives_go_through_an_idle_guard(inner, memory):
    def end(rate, start, wrap):
        tx, params = wrap(inner(rate)), start
        tx = optax.with_extra_args_support(tx)
        state = tx.init(params)
        for _ in range(4):
            loss, grads = jax.value_and_grad(lambda p: jnp.sum((p - 3) ** 2))(params)
            updates, state = tx.update(grads, state, params, value=loss)
            params = params + updates
        return jnp.sum((params - 3) ** 2)

    derivatives = jax.grad(end, argnums=(0, 1))
    start = jnp.array([1.0, 2.0, 3.5])
    plain = derivatives(1e-3, start, lambda tx: tx)
    chex.assert_trees_all_close(
        derivatives(1e-3, start, lambda tx: guard(tx, memory=memory)), plain, rtol=1e-5
    )
    stressed = jax.grad(end)(10.0, start, lambda tx: guard(tx, memory=memory))
    assert jnp.isfinite(stressed)


@pytest.mark.parametrize("start", [[0.0, 0.0, 0.0], [1.0, 1e-3, 0.0]])
def test_decisions_are_constants_to_derivatives(start):
    """What `init` learned of the start decides how long a step may be; it made a NaN of them."""
    tx = guard(optax.sgd(10.0))

    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: jnp.sum((p - 3) ** 2))(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return jnp.sum(updates), state

    start = jnp.array(start)
    state = tx.init(start)
    assert report(step(start, state)[1]).actions["SCALE"] == 1
    through_init = jax.grad(lambda p: step(p, tx.init(p))[0])(start)
    chex.assert_trees_all_equal(through_init, jax.grad(lambda p: step(p, state)[0])(start))
    assert is_finite(through_init)


@pytest.mark.parametrize("memory", ["none", "sparse", "step"])
@pytest.mark.parametrize("params", [{"w": jnp.zeros(3)}, {"w": jnp.zeros(0)}, {}])
def test_a_start_at_zero_makes_no_nan(memory, params):
    tx = guard(optax.adamw(1e-3), memory=memory)
    with jax.debug_nans(True):
        updates, _ = tx.update(params, tx.init(params), params, value=1.0)
    assert is_finite(updates)


@pytest.mark.parametrize("memory", ["none", "sparse", "step"])
def test_parameters_in_eight_bits_may_be_frozen(memory):
    params = {"w": jnp.ones((4, 4)), "frozen": jnp.ones((4, 4), jnp.float8_e4m3fn)}
    inner = optax.masked(optax.adam(0.1), {"w": True, "frozen": False})
    tx = guard(inner, memory=memory)
    grads = jax.tree.map(jnp.zeros_like, params) | {"w": jnp.ones((4, 4))}
    updates, _ = tx.update(grads, tx.init(params), params, value=1.0)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    assert norm(updates["w"]) > 0


def test_state_may_be_of_numpy_and_gradients_of_python():
    tx = guard(optax.sgd(0.1))
    params = {"x": 5.0}
    state = jax.device_get(tx.init(params))
    updates, state = tx.update({"x": 0.5}, state, params, value=1.0)
    assert updates["x"] == pytest.approx(-0.05)
    assert report(state).steps == 1


def test_numbers_of_numpy_change_no_dtype():
    with jax.enable_x64(True):
        law = Law(stress_noise=np.float64(0.2), cut=np.float64(0.3), calm_steps=np.int64(9))
        tx = guard(optax.adam(0.1), relative_step_limit=np.float64(0.5), law=law)
        params = jnp.ones(3, jnp.float32)
        state = tx.init(params)
        _, new = tx.update(params, state, params, value=jnp.float32(1.0))
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_norms_are_summed_in_single_precision(dtype):
    tree = {"w": jnp.full((64, 64), 300, dtype)}
    assert float(inner_product(tree, tree)) == 64 * 64 * 300**2


@pytest.mark.parametrize("memory", ["none", "sparse", "step"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_the_guard_promotes_no_dtype_on_its_own(dtype, memory):
    """Nor does it where the gradients are wider than the parameters."""
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
        p, tx = {"w": jnp.ones(3, dtype)}, guard(optax.sgd(1e-3), memory=memory)
        grads = {"w": jnp.ones(3, "float32" if dtype == "bfloat16" else dtype)}
        _, state = tx.update(grads, tx.init(p), p, value=jnp.float32(1))
    assert report(state).steps == 1
