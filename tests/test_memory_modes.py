"""The three memories: their size, and what each can and cannot do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import actions, at, bits, exact_jit, feed, is_finite, norm

from lbw_optax import Action, guard, report, sensing
from lbw_optax import memory as memories

BIG = {"w": jnp.ones((64, 96)), "wide": jnp.ones((3, 2048)), "b": jnp.ones(96)}
SMALL = {"w": jnp.linspace(0.5, 1.5, 12).reshape(4, 3), "b": jnp.ones(3)}
MODES = ("none", "sparse", "step")
every_mode = pytest.mark.parametrize("memory", MODES)
STEPS, FAULT = 30, 20


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@every_mode
def test_size(memory, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), BIG)
    state = guard(optax.sgd(0.1), memory=memory).init(params)
    kept, whole = nbytes(state.last_step), nbytes(params)
    assert {
        "none": kept == 0,
        "sparse": 0 < kept <= whole / 8,
        "step": kept == whole,
    }[memory]
    assert nbytes(state) - kept < 8192


def test_rest_of_the_state_does_not_grow_with_the_parameters():
    sizes = [nbytes(guard(optax.sgd(0.1), memory="none").init(p)) for p in (SMALL, BIG, {})]
    assert len(set(sizes)) == 1


def stream(fault=None):
    rng = np.random.default_rng(0)
    grads = jax.tree.map(
        lambda p: np.float32(1 + 0.1 * rng.standard_normal((STEPS, *p.shape))), SMALL
    )
    value = np.float32(1e-6 * (1 + 0.1 * rng.standard_normal(STEPS)))
    factor = {"nan": np.nan, "spike": 1e6, "harm": -5.0}.get(fault, 1.0)
    for g in jax.tree.leaves(grads):
        g[FAULT] *= factor
    if fault == "nan_loss":
        value[FAULT] = np.nan
    if fault == "harm":
        value[FAULT] = 1.0
    return {"grads": grads, "value": value}


def run(memory, data, rate=1e-4, params=SMALL):
    tx = guard(optax.adam(rate), memory=memory)
    return jax.device_get(exact_jit(lambda p, s: feed(tx, p, s))(params, data))


@every_mode
@pytest.mark.parametrize("fault", ["nan", "spike", "nan_loss"])
def test_bad_observation_is_held_in_every_mode(memory, fault):
    _, updates, states = run(memory, stream(fault))
    assert actions(states)[FAULT] == Action.HOLD
    assert norm(at(updates, FAULT)) == 0
    assert is_finite(states)


@every_mode
def test_too_long_steps_are_shortened_in_every_mode(memory):
    params, updates, states = run(memory, stream(), rate=1.0)
    assert Action.SCALE in actions(states)
    assert norm(at(updates, 0)) < 0.5 * norm(at(params, 0))
    assert report(at(states, -1)).min_scale_seen < 1


@every_mode
def test_only_the_whole_step_can_be_undone(memory):
    _, updates, states = run(memory, stream("harm"))
    made = actions(states)
    assert (Action.BACKTRACK in made) == (memory == "step")
    if memory != "step":
        assert norm(at(updates, FAULT)) > 0
    if memory == "sparse":
        last = report(at(states, -1))
        assert last.causes["OVERSHOOT"] >= 1
        assert last.min_scale_seen < 1


@every_mode
@pytest.mark.parametrize("factor", [1e4, -1e4])
def test_a_spike_is_held_even_if_it_looks_like_harm(memory, factor):
    """Without the last step to undo, it went into Adam's second moment once."""
    data = stream("harm")
    for g in jax.tree.leaves(data["grads"]):
        g[FAULT] *= factor / -5
    _, updates, states = run(memory, data)
    assert actions(states)[FAULT] in (Action.HOLD, Action.BACKTRACK)
    before, after = (at(states.inner_state, i) for i in (FAULT - 1, FAULT))
    assert bits(before) == bits(after)
    if memory != "step":
        assert norm(at(updates, FAULT)) == 0


@every_mode
def test_non_finite_values_in_a_row_never_backtrack_without_the_step(memory):
    data = stream("nan")
    data["value"][FAULT + 1 : FAULT + 4] = np.nan
    made = actions(run(memory, data)[2])[FAULT : FAULT + 4]
    if memory == "step":
        assert made == [Action.HOLD] + 3 * [Action.BACKTRACK]
    else:
        assert made == 4 * [Action.HOLD]


@pytest.mark.parametrize("memory", ["sparse", "step"])
@pytest.mark.parametrize("bad", [20, 21])
def test_harm_that_a_micro_batch_shows_shortens_the_next_step(memory, bad):
    """Also where there is no step in it, and nothing to undo the last one with."""
    rng = np.random.default_rng(0)
    data = {
        "grads": np.float32(1 + 0.1 * rng.standard_normal((40, 8))),
        "value": np.float32(1e-6 * (1 + 0.1 * rng.standard_normal(40))),
    }
    data["grads"][bad] *= -5
    data["value"][bad] *= 1e4
    inner = optax.MultiSteps(optax.adam(1e-4), 2).gradient_transformation()
    states = feed(guard(inner, memory=memory), jnp.ones(8), data)[2]
    scale = states.controller.step_scale
    assert scale[bad - 1] == 1
    assert max(scale[bad : bad + 3]) < 1


def test_a_step_that_cannot_be_undone_is_blamed_once():
    """Each micro-batch after it shows the same harm; the scale was cut for every one of them."""
    rng = np.random.default_rng(0)
    grads = np.float32(1 + 0.1 * rng.standard_normal((80, 8)))
    value = np.float32(1e-6 * (1 + 0.1 * rng.standard_normal(80)))
    whole = slice(40, 48)
    grads[whole] *= -5
    value[whole] *= 1e4
    inner = optax.MultiSteps(optax.adam(1e-4), 8).gradient_transformation()
    data = {"grads": grads, "value": value}
    states = feed(guard(inner, memory="sparse"), jnp.ones(8), data)[2]
    scale = np.array(states.controller.step_scale)
    assert scale[39] == 1
    assert 0.05 < scale[40] < 1
    np.testing.assert_array_equal(scale[40:47], scale[40])
    assert np.abs(states.statistics.overshoot_mean).max() < 1


@every_mode
def test_weak_types_of_the_params_are_not_kept(memory):
    state = guard(optax.sgd(0.1), memory=memory).init({"a": jnp.asarray(2.0), "b": 1.0})
    assert not any(x.weak_type for x in jax.tree.leaves(state.last_step))


@every_mode
def test_report_says_which_mode_senses_no_overshoot(memory):
    state = run(memory, stream())[2]
    assert (report(at(state, -1)).sensors_off == ("overshoot",)) == (memory == "none")


def test_sample_estimates_the_overshoot_of_the_whole():
    """Gradients equal in every entry: 1/16 of the entries tell as much as all of them."""
    rng = np.random.default_rng(0)
    shared = 1 + 0.1 * rng.standard_normal(STEPS)
    grads = jax.tree.map(lambda p: np.float32(np.multiply.outer(shared, np.ones(p.shape))), BIG)
    data = {"grads": grads, "value": np.ones(STEPS, np.float32)}
    means = [
        run(memory, data, params=BIG)[2].statistics.overshoot_mean[-1]
        for memory in ("sparse", "step")
    ]
    np.testing.assert_allclose(means[0], means[1], rtol=1e-3)


def test_sample_has_every_token_of_an_embedding():
    params = {"in": jnp.ones((512, 64)), "out": jnp.ones((64, 512)), "stack": jnp.ones((2, 64, 96))}
    kept = jax.tree.map(jnp.shape, memories.allocate("sparse", params))
    assert kept == {"in": (512, 4), "out": (4, 512), "stack": (2, 4, 96)}


def test_leaves_that_are_kept_whole_count_for_no_more_than_they_are():
    levels = {"w": 1.0, "wide": -2.0, "b": 100.0}
    grads = {name: level * BIG[name] for name, level in levels.items()}
    kept = memories.pick(BIG, memories.allocate("sparse", BIG))
    found = sensing.estimated_product(memories.pick(grads, kept), kept, grads)
    np.testing.assert_allclose(found, sensing.inner_product(grads, BIG), rtol=1e-6)


def test_small_leaves_are_kept_whole():
    params = {"b": jnp.ones(255), "w": jnp.ones((3, 64)), "long": jnp.ones(256)}
    kept = jax.tree.map(jnp.shape, memories.allocate("sparse", params))
    assert kept == {"b": (255,), "w": (3, 64), "long": (16,)}
