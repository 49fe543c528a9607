"""The update lowers for every platform, without a machine that has it, and never calls the host."""

import jax
import jax.numpy as jnp
import optax
import pytest

from lbw_optax import guard


@pytest.mark.parametrize("memory", ["none", "sparse", "step"])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_update_lowers_without_a_call_of_the_host(platform, memory):
    params = {"w": jnp.ones((256, 64), jnp.bfloat16), "b": jnp.zeros(64)}
    tx = guard(optax.adamw(1e-3), memory=memory)
    update = jax.jit(lambda grads, state, loss: tx.update(grads, state, params, value=loss))
    traced = update.trace(params, tx.init(params), jnp.float32(1))
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.reduce" in program
    assert "callback" not in program
