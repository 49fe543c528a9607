"""How long a step may be, and how the trust radius learns."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    actions,
    at,
    exact_jit,
    feed,
    find,
    norm,
    normal,
    signals,
    telemetry,
    train,
)

from lbw_optax import Action, Law, Regime, guard, statistics
from lbw_optax.controller import NO_LIMIT, Limits, had_warm_up
from lbw_optax.envelope import next_first_length, next_trust_radius, step_bounds

LIMITS = Limits(min_scale=1e-5, relative_step_limit=1.0, max_rejections=20)
PARAMS = {"w": normal(32, 32)}
STEPS = 60
HALF = Law(share_size=32 * 32 / 16)
"""Under stress 1,024 parameters get half of the healthy length."""
RADIUS = 0.5
TAKEN = (Action.PASS, Action.SCALE)
LAST, NEXT = slice(None, -1), slice(1, None)
run = exact_jit(feed, static_argnums=0)


def bounds(controller, shown, observations=9, reach=1.0):
    known = signals(observations=jnp.int32(observations), reach=jnp.float32(reach))
    return step_bounds(controller, shown, known, True, Law(), LIMITS)


@jax.jit
@jax.vmap
def healthy_length(before, params, update):
    """The healthy length that a step was judged by, from the state before it."""
    sizes = {"parameter_norm": params, "step_norm": update}
    shown = telemetry(size=32 * 32, **jax.tree.map(jnp.linalg.norm, sizes))
    signals = statistics.compare(
        before.statistics, shown, before.controller.step_scale, True, Law()
    )
    found = bounds(before.controller, shown, before.statistics.observations, signals.reach)
    return found.healthy


@pytest.mark.parametrize(
    "tx",
    [guard(make(0.1), law=HALF) for make in (optax.lion, optax.adam, optax.sgd)],
    ids=["lion", "adam", "sgd"],
)
@hypothesis.given(seed=st.integers(0, 2**16), signal=st.floats(0, 3))
@hypothesis.settings(max_examples=15)
def test_no_step_under_stress_is_longer_than_the_latch_alone_may_make_it(tx, seed, signal):
    rng = np.random.default_rng(seed)
    grads = signal + rng.standard_normal((STEPS, 32, 32))
    stream = {
        "grads": {"w": jnp.asarray(grads, jnp.float32)},
        "value": jnp.asarray(1 + 0.1 * rng.standard_normal(STEPS), jnp.float32),
    }
    params, updates, states = run(tx, PARAMS, stream)
    before, after = find(at(states, LAST)), find(at(states, NEXT))
    lengths = np.linalg.norm(np.asarray(updates["w"]), axis=(1, 2))[NEXT]
    judged = (np.asarray(after.regime) == Regime.STRESS) & np.isin(actions(states)[NEXT], TAKEN)
    healthy = np.asarray(healthy_length(before, params["w"][NEXT], updates["w"][NEXT]))
    assert np.all(lengths[judged] <= 0.5 * healthy[judged] * (1 + 1e-4))


def test_the_envelope_is_wider_where_steps_do_not_add_up():
    start = find(guard(optax.sgd(1.0)).init(PARAMS))
    shown = telemetry(parameter_norm=10, step_norm=1, size=1024)
    once, thrice = (bounds(start.controller, shown, reach=reach) for reach in (1, 3))
    np.testing.assert_allclose(thrice.healthy, 3 * once.healthy, rtol=1e-6)
    assert thrice.hard == once.hard


@pytest.mark.parametrize(
    ("first", "allowance", "share"),
    [
        (NO_LIMIT, 1.0, 0.03 * 2**-0.2),  # No step yet.
        (1.0, 1.0, 0.03 * 2**-0.2),
        (0.2, 1.0, 0.02),
        (0.01, 1.0, 0.01),
        (0.0, 1.0, 0.01),
        (0.0, 1.5, 0.015 * 2**-0.2),
        (0.0, 2.0, 0.03 * 2**-0.2),
    ],
)
def test_steps_are_long_at_the_start_where_the_first_was(first, allowance, share):
    known = {"first_length": jnp.float32(first), "allowance": jnp.float32(allowance)}
    controller = find(guard(optax.sgd(1.0)).init(PARAMS)).controller._replace(**known)
    shown = telemetry(parameter_norm=10, step_norm=1, size=1024)
    found = bounds(controller, shown, observations=1)
    np.testing.assert_allclose(found.healthy, share * 10 * allowance, rtol=1e-6)


def first_lengths(*steps):
    """What is remembered of the first step after each of these, given by length and kurtosis."""
    start = find(guard(optax.sgd(1.0)).init(PARAMS)).controller
    seen = []
    for length, kurtosis in steps:
        shown = telemetry(step_norm=length, kurtosis=kurtosis)
        first = next_first_length(start, shown, Law())
        start = start._replace(first_length=first)
        seen.append(float(first))
    return seen


def test_the_first_length_is_forgotten_once_a_later_step_is_certainly_longer():
    steps = [(2.0, 1.0), (0.5, 9.0), (2.3, 9.0), (2.5, 9.0), (0.1, 9.0)]
    assert first_lengths(*steps) == [2.0, 2.0, 2.0, 0.0, 0.0]


def test_a_first_step_counts_as_if_it_had_moved_all_entries():
    assert first_lengths((1.0, 4.0), (2.3, 1.0), (2.5, 1.0)) == [2.0, 2.0, 0.0]
    # So does the first of which float32 can tell how many it moves.
    assert first_lengths((1e-30, np.inf), (1.0, 4.0)) == [NO_LIMIT, 2.0]


@pytest.mark.parametrize(
    ("rate", "warmed"),
    [(1e-2, False), (optax.linear_schedule(0.0, 1e-2, 10), True)],
    ids=["constant", "warm-up"],
)
def test_a_last_layer_that_starts_at_zero_is_no_warm_up(rate, warmed):
    """All below it get their first gradient in the second step."""
    grads = np.random.default_rng(0).standard_normal((50, 1024)).astype(np.float32)
    grads[0, 32:] = 0
    data = {"grads": grads, "value": np.ones(50, np.float32)}
    state = at(feed(guard(optax.adam(rate)), jnp.ones(1024), data)[2], -1)
    assert bool(had_warm_up(state.controller)) == warmed


def next_radius(way, bound=True):
    """The trust radius after a step that went `way` of the way to the minimum of its parabola."""
    controller = find(guard(optax.sgd(1.0)).init(PARAMS)).controller._replace(
        trust_radius=jnp.float32(RADIUS), last_length=jnp.float32(1), last_slope=jnp.float32(-1)
    )
    shown = telemetry(parameter_norm=10, step_norm=1, size=1024, overshoot=way - 1)
    found = next_trust_radius(
        controller, shown, bounds(controller, shown), jnp.bool_(bound), jnp.bool_(False), Law()
    )
    return float(found) / RADIUS


def test_the_trust_radius_follows_the_parabola_within_its_rate():
    law = Law()
    assert next_radius(law.trust_way) == pytest.approx(1, rel=1e-5)
    assert next_radius(law.trust_way / 1.5) == pytest.approx(1.5, rel=1e-5)
    assert next_radius(1.5 * law.trust_way) == pytest.approx(1 / 1.5, rel=1e-5)
    assert next_radius(0.0) == next_radius(-1.0) == law.trust_growth
    assert next_radius(2.0) == pytest.approx(1 / law.trust_growth)


def test_the_trust_radius_grows_after_bound_steps_only():
    assert next_radius(0.0, bound=False) == 1
    assert next_radius(2.0, bound=False) < 1


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_the_trust_radius_learns_nothing_from_a_broken_observation(broken):
    assert next_radius(broken) == 1


def scalar(x):
    return jnp.sum((x - 1) ** 2)


def test_a_scalar_gets_there_about_as_fast_as_unguarded():
    def steps(tx):
        losses = train(tx, scalar, jnp.float32(5), 500)[2]
        return int(np.flatnonzero(losses > 0.06**2)[-1]) + 1

    inner = optax.sgd(1e-2, momentum=0.9)
    assert steps(guard(inner)) <= 1.25 * steps(inner)


def test_a_step_without_the_parameters_teaches_no_length():
    """It has no limit; what is allowed later must not follow from how long it was."""
    tx = guard(optax.sgd(1.0))
    state = tx.init(PARAMS)
    grads = jax.tree.map(lambda x: 10 * x, PARAMS)
    for value, params in ((1.0, None), (0.9, PARAMS)):
        updates, state = tx.update(grads, state, params, value=value)
        if params is None:
            assert float(state.controller.trust_radius) == 0
    assert norm(updates) < 0.1 * norm(PARAMS)


FRESH = find(guard(optax.sgd(1.0)).init(PARAMS)).controller


def test_the_healthy_length_falls_with_the_step_to_its_floor():
    law, norm_ = Law(), 10.0
    shown = telemetry(parameter_norm=norm_, step_norm=1, size=1024)
    for step, share in ((0, 0.03), (31, 0.015), (10**6, 0.01)):
        found = bounds(FRESH, shown, step)
        assert float(found.relative) == pytest.approx(share * norm_, rel=1e-5)
        assert found.healthy == found.relative
    twice = FRESH._replace(allowance=jnp.float32(2))
    assert float(bounds(twice, shown, 0).healthy) == pytest.approx(
        2 * law.relative_step_start * norm_
    )


@pytest.mark.parametrize(("norm_", "hard"), [(0.1, 32), (100, 100)])
def test_the_hard_limit_holds_whatever_has_proved_safe(norm_, hard):
    shown = telemetry(parameter_norm=norm_, step_norm=1, size=1024)
    found = bounds(FRESH._replace(trust_radius=jnp.float32(1e6)), shown)
    assert float(found.hard) == float(found.healthy) == pytest.approx(hard)


def radius_after(before, parameter_norm, harm=False, step_norm=1.0, overshoot=0.0):
    """The trust radius after a step of length 8 and slope -1."""
    controller = FRESH._replace(
        trust_radius=jnp.float32(before), last_length=jnp.float32(8), last_slope=jnp.float32(-1)
    )
    shown = telemetry(
        parameter_norm=parameter_norm, step_norm=step_norm, size=1024, overshoot=overshoot
    )
    found = bounds(controller, shown)
    harm = jnp.bool_(harm)
    return float(next_trust_radius(controller, shown, found, jnp.bool_(True), harm, Law()))


def test_the_radius_is_open_for_parameters_without_a_size():
    """It closes after harm, or once the relative rule allows the step."""
    law = Law()
    unset = law.unset_size * 32
    assert radius_after(0, unset) == radius_after(0, 0) == NO_LIMIT
    assert radius_after(0, unset, harm=True) == 8 / law.trust_growth
    assert radius_after(NO_LIMIT, 10) == NO_LIMIT
    assert radius_after(NO_LIMIT, 1000) == 1


def test_the_radius_of_parameters_with_a_size_starts_at_the_relative_step():
    law = Law()
    straight = radius_after(0, 10, overshoot=-1)
    assert straight == pytest.approx(law.relative_step * 10 * law.trust_growth)


def test_the_radius_has_a_least():
    law = Law()
    least = law.relative_step * law.unset_size * 32
    assert radius_after(least, 10, overshoot=9) == pytest.approx(least)
