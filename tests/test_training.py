"""Whole runs of small problems: stressed ones end near the tuned one, healthy ones as unguarded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import train

from lbw_optax import guard, report

# A small regression by an MLP: the tuned rate is 1e-2, the stressed ones are far above it.
WIDTH, TUNED = 16, 1e-2


def mlp_params(keys, inputs, width):
    return {
        "w1": jax.random.normal(keys[0], (inputs, width)) / np.sqrt(inputs),
        "b1": jnp.zeros((1, width)),
        "w2": jax.random.normal(keys[1], (width, width)) / np.sqrt(width),
        "b2": jnp.zeros((1, width)),
        "w3": jax.random.normal(keys[2], (width, 1)) / np.sqrt(width),
    }


def mlp_problem(seed=0, steps=400, batch=32):
    keys = jax.random.split(jax.random.key(seed), 5)
    params = mlp_params(keys, 4, WIDTH)
    x = jax.random.normal(keys[3], (steps, batch, 4))
    y = jnp.sin(2 * x[..., :1]) + x[..., 1:2] * x[..., 2:3]
    return params, (x, y + 0.1 * jax.random.normal(keys[4], y.shape))


def mlp_loss(params, batch):
    x, y = batch
    h = jnp.tanh(x @ params["w1"] + params["b1"])
    h = jnp.tanh(h @ params["w2"] + params["b2"])
    return jnp.mean((h @ params["w3"] - y) ** 2)


def final(losses):
    return float(np.mean(np.asarray(losses)[-50:]))


@pytest.fixture(scope="module")
def tuned():
    params, batches = mlp_problem()
    return final(train(optax.adam(TUNED), mlp_loss, params, 400, batches)[2])


@pytest.mark.parametrize("warmup", [0, 40])
@pytest.mark.parametrize("multiple", [10, 100])
def test_learning_rate_far_too_high_ends_near_the_tuned_one(tuned, multiple, warmup):
    params, batches = mlp_problem()
    rate = multiple * TUNED
    rate = optax.linear_schedule(0.0, rate, warmup) if warmup else rate
    plain = final(train(optax.adam(rate), mlp_loss, params, 400, batches)[2])
    _, state, losses = train(guard(optax.adam(rate)), mlp_loss, params, 400, batches)
    untrained = float(losses[0])
    assert tuned < 0.5 * untrained
    gap = (final(losses) - tuned) / (untrained - tuned)
    assert gap < 0.25, (final(losses), tuned, plain, untrained)
    assert final(losses) < plain
    assert report(state).control_active_steps > 0


def test_at_the_tuned_rate_the_guard_costs_next_to_nothing(tuned):
    params, batches = mlp_problem()
    _, _, losses = train(guard(optax.adam(TUNED)), mlp_loss, params, 400, batches)
    assert final(losses) < 1.1 * tuned


def sine_batches(steps, batch=32):
    k_x, k_noise = jax.random.split(jax.random.key(7))
    x = jax.random.uniform(k_x, (steps, batch, 1), minval=-3.0, maxval=3.0)
    return x, jnp.sin(3 * x) + 0.1 * jax.random.normal(k_noise, x.shape)


@pytest.mark.parametrize(
    "inner", [optax.adam(3e-3), optax.sgd(1e-2, momentum=0.9)], ids=["adam", "momentum"]
)
def test_along_the_edge_of_stability_a_run_is_left_alone(inner):
    """With little noise steps go from side to side of a valley, and overshoot by more than it."""
    steps = 1000
    params, batches = mlp_params(jax.random.split(jax.random.key(0), 3), 1, 64), sine_batches(steps)
    plain = train(inner, mlp_loss, params, steps, batches)[2]
    losses = train(guard(inner), mlp_loss, params, steps, batches)[2]
    assert final(losses) < 1.25 * final(plain)


RARE = 0.01


def test_a_rare_class_is_learned():
    """Most batches have no positive; the gradient of one that has is ten times as large or more."""
    keys = jax.random.split(jax.random.key(0), 5)
    label = jax.random.uniform(keys[0], (4000, 8)) < RARE
    x = jax.random.normal(keys[1], (4000, 8, 20))
    x += 0.7 * label[..., None] * jax.random.normal(keys[2], (1, 1, 20))
    start = {
        "w1": jax.random.normal(keys[3], (20, 32)) / np.sqrt(20),
        "b1": jnp.zeros((1, 32)),
        "w2": jax.random.normal(keys[4], (32,)) / np.sqrt(32),
        "b2": jnp.log(RARE),
    }

    def loss(params, batch):
        x, label = batch
        logits = jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, label))

    def end(tx):
        params, _, _ = train(tx, loss, start, 4000, (x, label.astype(jnp.float32)))
        return jnp.mean(jax.lax.map(lambda batch: loss(params, batch), (x, label)))

    prior = -RARE * np.log(RARE) - (1 - RARE) * np.log(1 - RARE)
    plain = end(optax.adam(1e-3))
    assert plain < prior / 2
    assert end(guard(optax.adam(1e-3))) < 1.1 * plain


def parabola(x):
    return jnp.sum((x - jnp.array([1.0, -1.0, 1.0])) ** 2)


def rosenbrock(x):
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def scalar(x):
    return (x - 3) ** 2


def linear_regression(w):
    x = jax.random.normal(jax.random.key(0), (64, 5))
    return jnp.mean((x @ w - x @ jnp.arange(5.0)) ** 2)


def logistic_regression(w):
    x = jax.random.normal(jax.random.key(0), (64, 5))
    label = jnp.sign(x @ jnp.arange(-2.0, 3.0) + 0.5)
    return jnp.mean(jnp.logaddexp(0, -label * (x @ w))) + 1e-2 * jnp.sum(w**2)


CONVEX = {
    "parabola_adam": (parabola, lambda: optax.adam(1e-1), jnp.array([-1.0, 10.0, 1.0]), 1000),
    "parabola_sgd": (parabola, lambda: optax.sgd(1e-2), jnp.array([-1.0, 10.0, 1.0]), 1000),
    "rosenbrock_adam": (rosenbrock, lambda: optax.adam(1e-2), jnp.zeros(2), 8000),
    "scalar_sgd": (scalar, lambda: optax.sgd(1e-1), jnp.zeros([]), 500),
    "scalar_adam": (scalar, lambda: optax.adam(3e-2), jnp.zeros([]), 1000),
    "linear_adam": (linear_regression, lambda: optax.adam(3e-2), jnp.zeros(5), 1500),
    "linear_sgd": (linear_regression, lambda: optax.sgd(1e-1), jnp.zeros(5), 500),
    "logistic_adam": (logistic_regression, lambda: optax.adam(3e-2), jnp.zeros(5), 1000),
    "logistic_sgd": (logistic_regression, lambda: optax.sgd(1.0), jnp.zeros(5), 500),
}


@pytest.mark.parametrize("problem", CONVEX)
def test_small_problems_converge_as_unguarded(problem):
    loss_fn, make, start, steps = CONVEX[problem]
    plain = train(make(), loss_fn, start, steps)[2]
    losses = train(guard(make()), loss_fn, start, steps)[2]
    reached = float(plain[0] - plain[-1])
    assert reached > 0
    assert float(plain[0] - losses[-1]) > 0.99 * reached
