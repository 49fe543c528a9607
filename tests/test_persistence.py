"""How much successive steps add up, and what that makes of a bearable overshoot."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import exact_jit, feed, find, normal, telemetry

from lbw_optax import Law, guard, statistics

PARAMS = {"w": 100 * normal(64, 64), "b": 100 * normal(8)}
STEPS = 200


def noise():
    """Gradients without any signal."""
    return {"w": normal(STEPS, 64, 64, seed=1), "b": normal(STEPS, 8, seed=2)}


def persistence(inner, grads, memory="step", params=PARAMS):
    tx = guard(inner, memory=memory)

    @exact_jit
    def run(params, grads):
        _, _, states = feed(tx, params, {"grads": grads})
        return find(states).statistics.persistence

    return np.asarray(run(params, grads))


def bearable(mean_cosine):
    """What is bearable in a run of that persistence, all else being equal."""
    run = statistics.init_statistics()._replace(
        observations=jnp.int32(100),
        loss_mean=jnp.float32(1),
        loss_variance=jnp.float32(0.1),
        persistence=jnp.float32(mean_cosine),
    )
    return float(statistics.compare(run, telemetry(), jnp.float32(1), True, Law()).bearable)


@pytest.mark.parametrize("memory", ["step", "sparse"])
@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (optax.sgd(1e-3), 0.0),
        (optax.sgd(1e-3, momentum=0.5), 0.5),
        (optax.sgd(1e-3, momentum=0.9), 0.9),
        (optax.adam(1e-3), 0.9),
    ],
    ids=["none", "0.5", "0.9", "adam"],
)
def test_noise_persists_as_long_as_the_momentum(inner, expected, memory):
    assert persistence(inner, noise(), memory)[-1] == pytest.approx(expected, abs=0.05)


def test_steps_that_swing_to_and_fro():
    sign = (-1.0) ** jnp.arange(STEPS)[:, None]
    found = persistence(optax.sgd(1e-3), {"w": sign * jnp.ones((1, 4))}, params={"w": jnp.ones(4)})
    assert found[-1] == pytest.approx(-1, abs=1e-3)


def test_without_memory_steps_count_as_persistent():
    assert np.all(persistence(optax.sgd(1e-3), noise(), "none") == 1)


def test_empty_steps_show_nothing():
    inner = optax.MultiSteps(optax.sgd(1e-3, momentum=0.9), every_k_schedule=4)
    found = persistence(inner.gradient_transformation(), noise())
    assert found[-1] == pytest.approx(0.9, abs=0.05)


def test_momentum_as_usual_changes_nothing():
    usual = Law().persistence
    assert bearable(usual) == bearable(0.95) == bearable(1.0) == bearable(-1.0)


@hypothesis.given(st.floats(-1, 1), st.floats(-1, 1))
def test_less_persistence_makes_more_bearable(a, b):
    usual = Law().persistence
    at_a, at_b = bearable(a), bearable(b)
    assert (at_a >= at_b) or abs(a) > abs(b) or np.isclose(at_a, at_b, rtol=1e-5)
    most = (1 + usual) / (1 - usual) * bearable(1.0)
    assert bearable(1.0) <= at_a <= most * (1 + 1e-5)
