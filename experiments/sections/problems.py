"""Small problems that are no networks: how long a plain optimizer needs, and how long guarded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import lbw_optax
from experiments.bench import Bar, Bench, Findings, Row, mean, ratio
from experiments.report import Table
from experiments.sweep import guard_counters

MOST = 1.25
"""Steps to convergence that the guard may need, in units of those of the plain optimizer."""


class Problem(NamedTuple):
    """Something small to minimise."""

    init: jax.Array
    """The parameters at the start."""
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    """From the parameters and the step's random key to the loss."""
    progress: Callable[[jax.Array], jax.Array]
    """From the parameters to a number that falls to 0."""
    tolerance: float
    """How low it has to get."""
    optimizers: dict[str, optax.GradientTransformation]
    """Name -> optimizer that gets it there."""


def problems(bench: Bench) -> Findings:
    """Counts the steps that each problem takes, plain and guarded."""
    rows, lines, bars = [], [], []
    for name, make in PROBLEMS.items():
        problem = make()
        for optimizer, tx in problem.optimizers.items():
            cell = bench.cell(
                f"problems/{name}/{optimizer}",
                lambda name=name, problem=problem, optimizer=optimizer, tx=tx: _measure(
                    bench, name, problem, optimizer, tx
                ),
            )
            rows.extend(cell)
            plain, guarded = (
                mean([row["steps"] for row in cell if row["guarded"] == flag])
                for flag in (False, True)
            )
            active = mean([row["active"] for row in cell if row["guarded"]])
            bar = Bar(f"{name}, {optimizer}: steps, guarded / plain", guarded / plain, MOST)
            bars.append(bar)
            shown = [f"{plain:.0f}", f"{guarded:.0f}", ratio(bar.value, MOST), f"{active:.0f}"]
            lines.append([name, optimizer, *shown])
    heading = ["problem", "optimizer", "plain", "guarded", "ratio", "control-active steps"]
    note = (
        f"Steps until the criterion holds for good, mean over seeds; {bench.preset.problem_steps} "
        "where it never does."
    )
    return Findings(rows, [Table("Small problems", heading, lines, note)], bars)


def _measure(
    bench: Bench, name: str, problem: Problem, optimizer: str, tx: optax.GradientTransformation
) -> Iterator[Row]:
    steps, seeds = bench.preset.problem_steps, bench.preset.seeds
    for guarded in (False, True):
        used = lbw_optax.guard(tx) if guarded else optax.with_extra_args_support(tx)
        last, counters = jax.jit(
            jax.vmap(lambda seed, used=used: _last_bad_step(problem, used, steps, seed))
        )(jnp.asarray(seeds, jnp.uint32))
        for i, seed in enumerate(seeds):
            yield {
                "section": "problems",
                "problem": name,
                "optimizer": optimizer,
                "guarded": guarded,
                "seed": seed,
                "steps": float(last[i]),
                **{key: float(values[i]) for key, values in counters.items()},
            }


def _last_bad_step(problem: Problem, tx: Any, steps: int, seed: jax.Array):
    """The number of steps after which the criterion holds for good."""
    key = jax.random.key(seed)

    def body(carry, step):
        params, state, last = carry
        step_key = jax.random.fold_in(key, step)
        loss, grads = jax.value_and_grad(problem.loss)(params, step_key)
        updates, state = tx.update(grads, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        bad = ~(problem.progress(params) <= problem.tolerance)
        return (params, state, jnp.where(bad, step + 1, last)), None

    start = (problem.init, tx.init(problem.init), jnp.int32(0))
    (_, state, last), _ = jax.lax.scan(body, start, jnp.arange(steps))
    return last, guard_counters(state)


# The problems


def _usual(adam: float, sgd: float) -> dict[str, optax.GradientTransformation]:
    return {
        f"adam {adam:g}": optax.adam(adam),
        f"adamw {adam:g}": optax.adamw(adam),
        f"sgd {sgd:g} + momentum": optax.sgd(sgd, momentum=0.9),
    }


def _exact(init: Any, minimum: Any, objective: Callable, optimizers: dict) -> Problem:
    """A problem of optax's own tests: near the minimum in every entry, `atol = rtol = 0.03`."""
    init, minimum = jnp.asarray(init, jnp.float32), jnp.asarray(minimum, jnp.float32)

    def progress(x):
        return jnp.max(jnp.abs(x - minimum) / (0.03 + 0.03 * jnp.abs(minimum)))

    return Problem(init, lambda x, key: objective(x), progress, 1.0, optimizers)


def _parabola() -> Problem:
    target = jnp.array([1.0, -1.0, 1.0])
    return _exact(
        [-1.0, 10.0, 1.0], target, lambda x: jnp.sum((x - target) ** 2), _of_optax_tests()
    )


def _rosenbrock() -> Problem:
    return _exact(
        [0.0, 0.0],
        [1.0, 1.0],
        lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2,
        _of_optax_tests(),
    )


def _of_optax_tests() -> dict[str, optax.GradientTransformation]:
    """Optimizers that optax 0.2.8 tests on these two problems, with the arguments it tests them."""
    return {
        "adam 0.1": optax.adam(1e-1),
        "adamw 0.1": optax.adamw(1e-1),
        "sgd 0.001 + momentum": optax.sgd(1e-3, momentum=0.9),
        "lion 0.01": optax.lion(1e-2, weight_decay=1e-4),
        "rmsprop 0.005": optax.rmsprop(5e-3),
        "adafactor 0.005": optax.adafactor(5e-3),
        "ademamix 0.001": contrib.ademamix(1e-3),
        "adopt 0.01": contrib.adopt(1e-2),
        "cocob": contrib.cocob(),
        "dadapt_adamw 0.1": contrib.dadapt_adamw(1e-1),
        "dog 1": contrib.dog(1.0),
        "madgrad 0.01": contrib.madgrad(1e-2),
        "momo_adam 0.1": contrib.momo_adam(1e-1),
        "prodigy 0.1": contrib.prodigy(1e-1),
    }


def _scalar(start: float, target: float) -> Problem:
    return _exact([start], [target], lambda x: jnp.sum((x - target) ** 2), _usual(1e-2, 1e-2))


def _regression(logistic: bool, tolerance: float, density: float = 1.0) -> Problem:
    """A linear model from zero, on 512 examples of 64 features, 32 of them per step."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(512, 64)) * (rng.random((512, 64)) < density)
    scores = features @ rng.normal(size=64) / np.sqrt(64 * density) * (3 if logistic else 1)
    noise = rng.logistic(size=512) if logistic else 0.1 * rng.normal(size=512)
    labels = (scores + noise > 0).astype(np.float32) if logistic else scores + noise
    x, y = jnp.asarray(features, jnp.float32), jnp.asarray(labels, jnp.float32)

    def mean_loss(weights, x, y):
        predicted = x @ weights
        if logistic:
            return jnp.mean(optax.sigmoid_binary_cross_entropy(predicted, y))
        return jnp.mean((predicted - y) ** 2) / 2

    def loss(weights, key):
        chosen = jax.random.randint(key, (32,), 0, len(y))
        return mean_loss(weights, x[chosen], y[chosen])

    zero = jnp.zeros(64)
    least = _least_loss(lambda weights: mean_loss(weights, x, y), zero)
    start = mean_loss(zero, x, y)

    def progress(weights):
        return (mean_loss(weights, x, y) - least) / (start - least)

    return Problem(zero, loss, progress, tolerance, _usual(1e-2, 1e-2))


def _least_loss(objective: Callable, weights: jax.Array) -> jax.Array:
    """The minimum of a convex function, by Newton's method."""

    @jax.jit
    def newton(weights):
        curvature = jax.hessian(objective)(weights) + 1e-6 * jnp.eye(len(weights))
        return weights - jnp.linalg.solve(curvature, jax.grad(objective)(weights))

    for _ in range(20):
        weights = newton(weights)
    return objective(weights)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "linear regression from 0": lambda: _regression(logistic=False, tolerance=0.02),
    "logistic regression from 0": lambda: _regression(logistic=True, tolerance=0.1),
    "sparse logistic regression from 0": lambda: _regression(
        logistic=True, tolerance=0.1, density=0.02
    ),
    "scalar from 5 to 1": lambda: _scalar(5.0, 1.0),
    "scalar from 0 to 1": lambda: _scalar(0.0, 1.0),
    "parabola": _parabola,
    "Rosenbrock": _rosenbrock,
}
"""Name -> maker of the problem."""
