"""Sensing: what one step shows, each quantity of the entries that it is about."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import norm, normal

from lbw_optax import guard, memory
from lbw_optax.sensing import estimated_product, measure


def measured(gradients, step, last_step=None, mode="step", before=(), after=()):
    last = jax.tree.map(jnp.zeros_like, gradients) if last_step is None else last_step
    kept = memory.pick(last, memory.allocate(mode, gradients))
    return measure(
        gradients=gradients,
        step=step,
        params=None,
        loss=None,
        last_step=kept,
        sampled_gradients=memory.pick(gradients, kept),
        sampled_step=memory.pick(step, kept),
        last_length=jnp.float32(norm(last)),
        inner_states=(before, after),
        axis_name=None,
    )


def test_a_product_with_the_last_step_beyond_float32_is_a_bad_gradient():
    found = measured(jnp.full(2, 1e15), jnp.ones(2), last_step=jnp.full(2, 1e30))
    assert np.isfinite(found.gradient_norm)
    assert not found.gradient_finite


def test_a_step_whose_norm_is_beyond_float32_is_not_finite():
    assert not measured(jnp.ones(2), jnp.full(2, 1e30)).step_finite


@pytest.mark.parametrize("scalar", [True, False])
def test_a_stored_scalar_counts_where_the_parameters_have_one(scalar):
    x = jnp.ones([] if scalar else [1])
    before, after = {"best": jnp.float32(0)}, {"best": jnp.float32(jnp.inf)}
    assert measured(x, x, before=before, after=after).step_finite == (not scalar)
    assert measured(x, x, before=after, after=after).step_finite


def test_a_stored_flag_may_become_a_number():
    x, flag = jnp.ones(2), jnp.array([True, False])
    assert measured(x, x, before=flag, after=x).step_finite
    assert not measured(x, x, before=flag, after=x * jnp.nan).step_finite


def test_the_size_counts_what_is_floating_point():
    tree = {"w": jnp.ones((2, 3)), "index": jnp.ones(4, jnp.int32)}
    assert measured(tree, tree).size == 6


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
def test_the_kurtosis_is_that_of_all_entries(unit):
    tree = {"w": unit * normal(64, 32), "b": 5 * unit * normal(7, seed=1)}
    entries = np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(tree)])
    expected = np.mean(entries**4) / np.mean(entries**2) ** 2
    assert measured(tree, tree).kurtosis == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("entry", [0.0, 1e-12, 1e12])
def test_a_kurtosis_beyond_float32_is_unknown(entry):
    assert measured(jnp.ones(8), jnp.full(8, entry)).kurtosis == np.inf


def test_slope_and_overshoot_are_of_the_same_entries():
    gradients, step = normal(64, 32), normal(64, 32, seed=1)
    found = measured(gradients, step, last_step=step, mode="sparse")
    assert found.slope == found.overshoot
    kept = memory.pick(step, memory.allocate("sparse", gradients))
    sampled = memory.pick(gradients, kept)
    np.testing.assert_allclose(found.slope, estimated_product(sampled, kept, gradients), rtol=1e-6)
    whole = measured(gradients, step, last_step=step)
    assert whole.slope == whole.overshoot != found.slope


def test_the_cosine_of_a_sample_is_a_cosine():
    """The sample of a step may be much longer than the step."""
    step = jnp.zeros((64, 32)).at[:, 0].set(1.0).at[0].set(1.0)
    for sign in (1, -1):
        assert measured(step, sign * step, last_step=step, mode="sparse").alignment == sign


def test_no_kernel_takes_a_sum_of_every_array():
    """It would be compiled in a time that grows with the square of their number."""
    params = {f"w{i}": jnp.ones((4, 4)) for i in range(40)}
    tx = guard(optax.sgd(1e-3), memory="none")
    step = jax.jit(lambda g, s, p: tx.update(g, s, p, value=jnp.float32(1)))
    program = step.lower(params, tx.init(params), params).compile().as_text()
    kernels = [x for x in re.split(r"\n(?=%|ENTRY)", program) if not x.startswith("ENTRY")]
    assert kernels
    assert max(len(re.findall(r" parameter\(\d+\)", x)) for x in kernels) < len(params)
