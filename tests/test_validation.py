"""Bad arguments: a ValueError that names the argument, its value and the allowed range."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import is_finite

from lbw_optax import Law, guard

BAD = {
    "inner_none": ({"inner": None}, "inner", "None"),
    "inner_class": ({"inner": 1e-3}, "inner", "0.001"),
    "memory": ({"memory": "lots"}, "memory", "'lots'"),
    "memory_none": ({"memory": None}, "memory", "None"),
    "min_scale_zero": ({"min_scale": 0.0}, "min_scale", "0.0"),
    "min_scale_negative": ({"min_scale": -1e-3}, "min_scale", "-0.001"),
    "min_scale_large": ({"min_scale": 1.5}, "min_scale", "1.5"),
    "min_scale_nan": ({"min_scale": math.nan}, "min_scale", "nan"),
    "min_scale_text": ({"min_scale": "small"}, "min_scale", "'small'"),
    "min_scale_underflows": ({"min_scale": 1e-60}, "min_scale", "1e-60"),
    "limit_zero": ({"relative_step_limit": 0}, "relative_step_limit", "0"),
    "limit_negative": ({"relative_step_limit": -1.0}, "relative_step_limit", "-1.0"),
    "limit_nan": ({"relative_step_limit": math.nan}, "relative_step_limit", "nan"),
    "limit_infinite": ({"relative_step_limit": math.inf}, "relative_step_limit", "inf"),
    "rejections_zero": ({"max_rejections": 0}, "max_rejections", "0"),
    "rejections_float": ({"max_rejections": 2.5}, "max_rejections", "2.5"),
    "rejections_none": ({"max_rejections": None}, "max_rejections", "None"),
    "rejections_bool": ({"max_rejections": True}, "max_rejections", "True"),
    "rejections_overflow": ({"max_rejections": 2**31}, "max_rejections", "2147483648"),
    "log_zero": ({"log_size": 0}, "log_size", "0"),
    "log_negative": ({"log_size": -5}, "log_size", "-5"),
    "log_float": ({"log_size": 16.0}, "log_size", "16.0"),
    "axis_number": ({"axis_name": 0}, "axis_name", "0"),
    "axis_empty": ({"axis_name": ""}, "axis_name", "''"),
    "axis_list": ({"axis_name": ["x"]}, "axis_name", "['x']"),
    "law": ({"law": {"cut": 0.5}}, "law", "{'cut': 0.5}"),
}
RANGE = r"in [\[(]\S+, \S+[\])]"
RANGES = {
    "memory": r"none.*sparse.*step",
    "min_scale": RANGE,
    "relative_step_limit": RANGE,
    "max_rejections": RANGE,
    "log_size": RANGE,
    "axis_name": "name of a mesh axis or a tuple",
    "law": "Law",
    "inner": "transformation",
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_argument_is_named_when_guard_is_called(bad):
    kwargs, name, value = BAD[bad]
    kwargs = {"inner": optax.sgd(0.1)} | kwargs
    with pytest.raises(ValueError, match=name) as error:
        guard(kwargs.pop("inner"), **kwargs)
    error.match(RANGES[name])
    assert value in str(error.value)


@pytest.mark.parametrize(
    "good",
    [
        {"min_scale": 1},
        {"min_scale": np.float32(0.5)},
        {"relative_step_limit": 100},
        {"relative_step_limit": np.float64(2.0)},
        {"max_rejections": np.int64(3)},
        {"log_size": np.int32(1)},
        {"memory": "none"},
        {"law": Law(spike_ratio=math.inf)},
    ],
    ids=str,
)
def test_good_argument_is_taken(good):
    tx = guard(optax.sgd(0.1), **good)
    params = jnp.ones(3)
    updates, _ = tx.update(params, tx.init(params), params, value=1.0)
    assert jnp.all(jnp.isfinite(updates))


@pytest.mark.parametrize("params", [jnp.ones(3), jnp.zeros(3)], ids=["ones", "zeros"])
def test_an_envelope_that_is_switched_off_leaves_a_finite_state(params):
    law = Law(relative_step=math.inf, relative_step_start=math.inf)
    tx = guard(optax.adam(0.1), law=law)
    state = tx.init(params)
    for value in (1.0, 2.0, 3.0):
        updates, state = tx.update(value * jnp.ones(3), state, params, value=value)
        params = optax.apply_updates(params, updates)
    assert is_finite(state.controller)
    assert is_finite(params)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("relative_step", 0.0),
        ("noise_floor", -1e-3),
        ("spike_ratio", math.nan),
        ("loss_decay", 1.0),
        ("noise_decay", 0.99999999),
        ("cut_limit", 1e-60),
        ("cut", 1.5),
        ("calm_steps", "many"),
        ("growth", None),
        ("brief_steps", math.inf),
        ("noise_clip", math.inf),
        ("share_size", math.inf),
        ("share_least", 1.0),
        ("cut_limit", 0.6),
        ("earned_least", 3.0),
        ("past_age", 1.0),
        ("brief_steps", 2**31),
        ("brief_steps", 2.5),
        ("calm_steps", 50.0),
        ("cut_noise", True),
        ("noise_clip", 1e39),
        ("stress_noise", 10**400),
    ],
)
def test_bad_constant_of_the_law_is_named(name, value):
    with pytest.raises(ValueError, match=name) as error:
        Law(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("memory", ["none", "sparse", "step"])
@pytest.mark.parametrize("jit", [False, True])
def test_bad_loss_is_refused(memory, jit):
    tx, params = guard(optax.sgd(0.1), memory=memory), jnp.ones(3)
    update = jax.jit(tx.update) if jit else tx.update
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"value=.*loss="):
        update(params, state, params, value=1.0, loss=1.0)
    with pytest.raises(ValueError, match=r"value must be a scalar.*\(2,\)"):
        update(params, state, params, value=jnp.ones(2))
    with pytest.raises(ValueError, match=r"loss must be a scalar.*\(1, 1\)"):
        update(params, state, params, loss=jnp.ones((1, 1)))
    with pytest.raises(ValueError, match=r"value must be real.*complex64"):
        update(params, state, params, value=jnp.complex64(1))
    with pytest.raises(ValueError, match=r"value must be real.*key"):
        update(params, state, params, value=jax.random.key(0))
    with pytest.raises(ValueError, match=r"value must be a real scalar, got 'low'"):
        tx.update(params, state, params, value="low")
    with pytest.raises(ValueError, match=r"value must be a real scalar, got \(Array\(1"):
        tx.update(params, state, params, value=(jnp.float32(1), {"accuracy": 1}))
    with pytest.raises(ValueError, match=r"loss must be a real scalar, got array\('a'"):
        tx.update(params, state, params, loss=np.array("a"))


@pytest.mark.parametrize("memory", ["none", "sparse", "step"])
def test_gradients_per_example_are_refused(memory):
    inner = optax.contrib.differentially_private_aggregate(1.0, 0.1, key=0)
    tx, params = guard(inner, memory=memory), {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"\(4, 3\) for \['w'\], whose step has \(3,\)"):
        tx.update({"w": jnp.ones((4, 3))}, tx.init(params), params)


def test_a_step_of_other_arrays_is_refused():
    inner = optax.stateless(lambda updates, params: {"w": updates["w"]})
    tx, params = guard(inner), {"w": jnp.ones(3), "b": jnp.ones(1)}
    with pytest.raises(ValueError, match="got 2 for a step of 1"):
        tx.update(params, tx.init(params), params)


def test_inner_state_of_another_structure_is_refused():
    tx = guard(optax.sgd(0.1, momentum=0.9))
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    loaded = state._replace(inner_state=list(state.inner_state))
    with pytest.raises(ValueError, match="state must keep its structure"):
        tx.update(params, loaded, params)


@pytest.mark.parametrize("memory", ["none", "sparse", "step"])
def test_state_of_something_else_is_refused(memory):
    tx, params = guard(optax.sgd(0.1), memory=memory), jnp.ones((64, 64))
    with pytest.raises(ValueError, match=r"got a tuple;.*_replace\(inner_state=state\)"):
        tx.update(params, optax.sgd(0.1).init(params), params)
    others = {"none": ["sparse", "step"], "sparse": ["none"], "step": ["none", "sparse"]}
    for other in others[memory]:
        state = guard(optax.sgd(0.1), memory=other).init(params)
        with pytest.raises(ValueError, match=f"memory='{memory}', got one of another mode"):
            tx.update(params, state, params)


@pytest.mark.parametrize("memory", ["sparse", "step"])
def test_state_of_arrays_of_other_shapes_is_refused(memory):
    tx, params = guard(optax.sgd(0.1), memory=memory), jnp.ones((64, 64))
    state = tx.init(jnp.ones((32, 32)))
    with pytest.raises(ValueError, match="of other shapes than those of updates"):
        tx.update(params, state, params)


def test_complex_arrays_are_refused():
    tx, params = guard(optax.sgd(0.1), memory="none"), jnp.ones(3)
    with pytest.raises(ValueError, match="params must be real"):
        tx.init(params.astype(jnp.complex64))
    with pytest.raises(ValueError, match="updates must be real"):
        tx.update(params.astype(jnp.complex64), tx.init(params), params)


@pytest.mark.parametrize("memory", ["sparse", "step"])
def test_a_missing_gradient_is_refused(memory):
    tx, params = guard(optax.sgd(0.1), memory=memory), {"w": jnp.ones(3), "x": jnp.ones(2)}
    with pytest.raises(ValueError, match="updates must have the structure of the params"):
        tx.update({"w": jnp.ones(3), "x": None}, tx.init(params), params)


def test_an_axis_that_is_not_there_is_named():
    tx = guard(optax.sgd(1e-3), axis_name="shards")
    params = jnp.ones(3)
    with pytest.raises(ValueError, match=r"axis_name.*'shards'"):
        tx.update(params, tx.init(params), params, value=1.0)
