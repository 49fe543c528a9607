"""What a fresh controller knows of the parameters: how many start at zero."""

import hypothesis
import hypothesis.extra.numpy as npst
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normal

from lbw_optax import Law, guard
from lbw_optax.controller import init_controller

LAW = Law()


def allowance(params, **law):
    return float(guard(optax.sgd(1.0), law=Law(**law)).init(params).controller.allowance)


def test_steps_may_be_longer_where_parameters_start_at_zero():
    assert allowance({"a": jnp.ones(6), "b": jnp.zeros(6)}) == 2
    assert allowance({"a": jnp.ones(6), "b": jnp.zeros((0,))}) == 1
    assert allowance({"a": jnp.ones(6), "count": jnp.zeros(3, jnp.int32)}) == 1
    assert allowance({"a": jnp.zeros(6)}) == 1
    # Of a few parameters with a size the others say nothing: the envelope would be none.
    assert allowance({"bias": jnp.ones(2), "w": jnp.zeros(60)}) == LAW.allowance_most


def test_what_starts_at_zero_counts_by_entry():
    whole = jnp.asarray([1.0, 2.0, 0.0, 0.0])
    assert allowance({"a": whole}) == allowance({"a": whole[:2], "b": whole[2:]}) == 2


def test_small_entries_are_no_more_than_zeros():
    zeros = {"a": jnp.ones(30), "b": jnp.zeros(70)}
    small = {"a": jnp.ones(30), "b": jnp.full(70, 1e-6)}
    assert allowance(small) < allowance(zeros) == pytest.approx(100 / 30)


@pytest.mark.parametrize("draw", ["normal", "uniform", "laplace"])
def test_entries_of_one_distribution_are_usual(draw):
    p = getattr(np.random.default_rng(0), draw)(size=(64, 64)) - 0.5 * (draw == "uniform")
    assert allowance({"w": jnp.asarray(p, jnp.float32)}) == 1


@hypothesis.given(
    npst.arrays(np.float32, st.integers(1, 12), elements=st.floats(-1e4, 1e4, width=32)),
    st.integers(0, 12),
    st.sampled_from([1e-3, 0.25, 64.0]),
)
@hypothesis.settings(max_examples=100, deadline=None)
def test_neither_the_tree_nor_the_unit_of_the_parameters_matters(p, cut, unit):
    p[np.abs(p) < 1e-4] = 0
    whole = allowance(p)
    assert 1 <= whole <= LAW.allowance_most
    assert allowance([p[cut:], {"rest": p[:cut]}]) == pytest.approx(whole, rel=1e-5)
    assert allowance(p * np.float32(unit)) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("entry", [1e38, 1e-30, np.nan, np.inf])
def test_sizes_that_float32_cannot_square_allow_nothing(entry):
    assert allowance(jnp.asarray([entry, 1.0, 1.0], jnp.float32)) == 1
    assert allowance(jnp.full(9, entry, jnp.float32)) == 1
    assert allowance(jnp.asarray([entry, 1.0, 0.0, 0.0], jnp.float32)) == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_counts_are_float32_whatever_the_parameters_are(dtype):
    p = jnp.concatenate([normal(3000), jnp.zeros(900)])
    found = init_controller({"w": p.astype(dtype)}, None, LAW).allowance
    assert found.dtype == jnp.float32
    assert 1 < float(found) == pytest.approx(allowance(p), rel=0.01)


def test_shapes_without_values_say_nothing():
    shapes = {"a": jax.ShapeDtypeStruct((6,), jnp.float32)}
    assert allowance(shapes) == allowance({**shapes, "b": jnp.zeros(6)}) == 1
