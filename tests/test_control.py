"""Behaviour on tiny problems: faults are survived, harm is undone, healthy runs stay."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    actions,
    at,
    bits,
    exact_jit,
    feed,
    find,
    is_finite,
    norm,
    rejected,
    train,
    with_gain,
)

from lbw_optax import Action, Law, Regime, events, guard, report

STEPS = 40
FAULT = 20
START = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.linspace(1.0, 2.0, 3)}
REJECTED = (Action.HOLD, Action.BACKTRACK)


def healthy_stream(steps=STEPS):
    """Returns gradients and losses of a quiet run: small noise around a constant."""
    rng = np.random.default_rng(0)
    grads = jax.tree.map(
        lambda p: jnp.asarray(1 + 0.1 * rng.standard_normal((steps, *p.shape)), jnp.float32), START
    )
    return {"grads": grads, "value": jnp.asarray(1 + 0.1 * rng.standard_normal(steps), jnp.float32)}


def faulty(stream, at_steps, grads=None, value=None):
    """Returns `stream` with `grads` applied to the gradients and `value` put in the loss there."""
    steps = jnp.asarray(at_steps)
    if grads is not None:
        stream = stream | {
            "grads": jax.tree.map(lambda g: g.at[steps].set(grads(g[steps])), stream["grads"])
        }
    if value is not None:
        stream = stream | {"value": stream["value"].at[steps].set(value)}
    return stream


FAULTS = {
    "nan_gradient": ({"grads": lambda g: g * jnp.nan}, "NONFINITE_GRADIENT"),
    "inf_entry": ({"grads": lambda g: g.at[:, 0].set(jnp.inf)}, "NONFINITE_GRADIENT"),
    "spike_1e6": ({"grads": lambda g: g * 1e6}, "GRADIENT_SPIKE"),
    "spike_1e25": ({"grads": lambda g: g * 1e25}, "NONFINITE_GRADIENT"),
    "nan_loss": ({"value": jnp.nan}, "NONFINITE_LOSS"),
    "inf_loss": ({"value": jnp.inf}, "NONFINITE_LOSS"),
}

run = exact_jit(feed, static_argnums=0)
TX = guard(optax.adam(1e-4))
LAW = Law()


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_held_and_the_run_goes_on(fault):
    kwargs, cause = FAULTS[fault]
    params, updates, states = run(TX, START, faulty(healthy_stream(), [FAULT], **kwargs))
    assert actions(states)[FAULT] == Action.HOLD
    assert set(actions(states)[:FAULT] + actions(states)[FAULT + 1 :]) == {Action.PASS}
    assert norm(at(updates, FAULT)) == 0
    before, after = (at(states.inner_state, i) for i in (FAULT - 1, FAULT))
    assert bits(before) == bits(after)
    assert is_finite((params, updates, states))
    last = at(states, -1)
    assert report(last).causes[cause] == 1
    assert events(last)[0].step == FAULT


@pytest.mark.parametrize("fault", FAULTS)
def test_held_fault_leaves_no_trace_in_the_run(fault):
    kwargs, _ = FAULTS[fault]
    params, _, states = run(TX, START, faulty(healthy_stream(), [FAULT], **kwargs))
    clean = jax.tree.map(lambda x: np.delete(np.asarray(x), FAULT, axis=0), healthy_stream())
    clean = jax.tree.map(lambda x: jnp.concatenate([x, x[-1:]]), clean)
    expected, _, bare = run(optax.with_extra_args_support(optax.adam(1e-4)), START, clean)
    assert bits(at(params, -1)) == bits(at(expected, -2))
    assert bits(at(states.inner_state, -1)) == bits(at(bare, -2))


def test_second_moment_never_sees_a_huge_gradient():
    _, _, states = run(TX, START, faulty(healthy_stream(), [FAULT], grads=lambda g: g * 1e25))
    largest = [norm(x) for x in optax.tree.get_all_with_path(states, "nu")[0][1].values()]
    assert max(largest) < 100


@pytest.mark.parametrize("fault", ["nan_gradient", "inf_entry", "spike_1e6", "spike_1e25"])
def test_unguarded_adam_is_ruined_by_the_same_gradients(fault):
    """Its state is not finite any more, or its second moment so large that it all but stops."""
    bare = optax.with_extra_args_support(optax.adam(1e-4))
    clean, broken = (
        run(bare, START, stream)
        for stream in (healthy_stream(), faulty(healthy_stream(), [FAULT], **FAULTS[fault][0]))
    )
    moved, expected = (norm(at(updates, -1)) for _, updates, _ in (broken, clean))
    assert not is_finite(broken) or moved < expected / 10


def test_fault_on_the_very_first_step_is_held():
    _, updates, states = run(TX, START, faulty(healthy_stream(), [0], grads=lambda g: g * jnp.nan))
    assert actions(states)[0] == Action.HOLD
    assert set(actions(states)[1:]) == {Action.PASS}
    assert is_finite((updates, states))


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_a_row_also_shorten_the_last_step(fault):
    stream = faulty(healthy_stream(), [FAULT, FAULT + 1], **FAULTS[fault][0])
    _, updates, states = run(TX, START, stream)
    assert actions(states)[FAULT : FAULT + 2] == [Action.HOLD, Action.BACKTRACK]
    last, undone = at(updates, FAULT - 1), at(updates, FAULT + 1)
    share = norm(undone) / norm(last)
    assert 0 < share <= 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -share * b, rtol=1e-3), undone, last)


def test_a_run_that_proceeded_comes_back_with_the_overshoot_it_had():
    """Per squared scale one observation at the lowest scale would weigh as 1e12 others."""
    faults = range(FAULT, FAULT + 21)
    stream = faulty(healthy_stream(400), faults, grads=lambda g: g * jnp.nan)
    states = run(guard(optax.sgd(1e-4)), START, stream)[2]
    assert actions(states)[faults[-1]] == Action.PROCEED
    recovering = np.flatnonzero(np.asarray(states.controller.step_scale) < LAW.cut_limit)
    assert set(recovering) > set(range(faults[-1], faults[-1] + 200))
    means = np.asarray(states.statistics.overshoot_mean)
    assert set(means[recovering]) == {means[FAULT - 1]}
    assert report(at(states, -1)).regime == "STABLE"


@pytest.mark.parametrize("memory", ["none", "sparse", "step"])
def test_inner_optimizer_that_emits_nan_is_held(memory):
    """The inner divides by the gradient: 0 / 0 wherever a gradient is zero."""
    inner = optax.chain(
        optax.stateless(lambda g, p: jax.tree.map(lambda x: x / x, g)),
        optax.trace(0.9),
        optax.scale(-1e-4),
    )
    stream = faulty(healthy_stream(), [FAULT], grads=lambda g: g.at[:, 0].set(0.0))
    _, updates, states = run(guard(inner, memory=memory), START, stream)
    assert actions(states)[FAULT] == Action.HOLD
    assert actions(states)[FAULT + 1] == Action.PASS
    assert report(at(states, -1)).causes["NONFINITE_STEP"] == 1
    assert is_finite((updates, states))


def test_inner_state_alone_turning_nan_is_held():
    """The step stays finite while what the inner optimizer stores does not."""

    def update(updates, state, params=None):
        stored = jax.tree.map(lambda s, g: s + jnp.sqrt(g), state, updates)
        return jax.tree.map(lambda g: -1e-4 * g, updates), stored

    inner = optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), update)
    stream = faulty(healthy_stream(), [FAULT], grads=lambda g: -g)
    _, _, states = run(guard(inner), START, stream)
    assert actions(states)[FAULT] == Action.HOLD
    assert is_finite(states)


def quartic(params):
    return jnp.sum(params["x"] ** 4) / 4 + jnp.sum(params["x"] ** 2) / 2


def test_blow_up_step_is_undone():
    """With an open envelope one step shoots through the minimum: most of it is taken back."""
    rate = optax.piecewise_constant_schedule(1e-3, {15: 3e3, 16: 1 / 3e3})
    open_law = Law(relative_step=100.0, relative_step_start=100.0)
    tx = guard(optax.sgd(rate), law=open_law, relative_step_limit=100.0)
    start = {"x": jnp.full(4, 10.0)}
    plain = train(optax.sgd(rate), quartic, start, 60)[2]
    params, state, losses = train(tx, quartic, start, 60)
    assert not is_finite(plain)
    assert report(state).backtracks >= 1
    assert report(state).causes["OVERSHOOT"] >= 1
    assert float(losses[-1]) <= float(losses[0])
    assert is_finite((params, state))


def test_backtrack_takes_back_a_part_of_the_last_step():
    """Loss and overshoot jump right after a step: at least half of just that step is undone."""
    stream = healthy_stream()
    bad = jax.tree.map(lambda g: -5 * g, at(stream["grads"], FAULT))
    stream["grads"] = jax.tree.map(lambda g, x: g.at[FAULT].set(x), stream["grads"], bad)
    stream = faulty(stream, [FAULT], value=1e4)
    stream["value"] = stream["value"] * 1e-6
    params, _, states = run(TX, START, stream)
    assert actions(states)[FAULT] == Action.BACKTRACK
    before, after = (
        norm(jax.tree.map(lambda a, b: a - b, at(params, FAULT - 1), at(params, i)))
        for i in (FAULT, FAULT + 1)
    )
    assert LAW.cut_limit * before * 0.99 < after < LAW.cut * before * 1.01
    assert bits(at(states.inner_state, FAULT)) == bits(at(states.inner_state, FAULT - 1))


@pytest.mark.parametrize(("fall", "blamed"), [(2.5, False), (4.0, True), (1e3, True)])
def test_gradients_that_die_away_under_a_high_loss_blame_the_last_step(fall, blamed):
    """The second side of the test: no spike is there to be seen, and no overshoot."""
    stream = faulty(healthy_stream(), [FAULT], grads=lambda g: g / fall, value=5.0)
    _, _, states = run(TX, START, stream)
    assert actions(states)[FAULT] == (Action.BACKTRACK if blamed else Action.PASS)
    assert report(at(states, -1)).causes.get("COLLAPSE", 0) == blamed
    quiet = faulty(healthy_stream(), [FAULT], grads=lambda g: g / fall)
    assert set(actions(run(TX, START, quiet)[2])) == {Action.PASS}


def test_hard_batch_is_not_blamed_on_the_last_step():
    """The loss jumps, but the gradients say nothing against the last step: it stays."""
    _, _, states = run(TX, START, faulty(healthy_stream(), [FAULT], value=5.0))
    assert set(actions(states)) == {Action.PASS}


def test_a_batch_without_data_is_no_collapse():
    """Its loss is 0, which is a jump where losses are negative, and so is its gradient."""
    stream = healthy_stream()
    stream["value"] -= 10
    empty = faulty(stream, [FAULT], grads=jnp.zeros_like, value=0.0)
    _, _, states = run(TX, START, empty)
    assert set(actions(states)) == {Action.PASS}


def test_a_looser_law_switches_a_sensor_off():
    stream = faulty(healthy_stream(), [FAULT], grads=lambda g: g * 1e6)
    off = Law(spike_ratio=float("inf"), backtrack_noise=float("inf"))
    _, _, states = run(guard(optax.adam(1e-4), law=off), START, stream)
    assert actions(states)[FAULT] not in REJECTED


def test_one_long_step_is_no_stress_but_three_or_a_far_too_long_one_are():
    tx = guard(with_gain(optax.sgd(1.0)), memory="none")
    grads = jax.tree.map(lambda p: jnp.broadcast_to(0.001 * p, (12, *p.shape)), START)
    long = 25.0  # 2.5 % of the norm: pressure 1.3 at these steps; six times that is above 2.

    def regimes(gains):
        stream = {"grads": grads, "value": jnp.ones(12), "gain": jnp.asarray(gains)}
        return [Regime(int(r)).name for r in find(run(tx, START, stream)[2]).regime]

    quiet = [long] + [1.0] * 11  # Steps as long as the first may be longer at the start.
    once = [*quiet[:8], long, *quiet[9:]]
    assert set(regimes(once)) == {"STABLE"}
    thrice = quiet[:8] + [long] * 3 + quiet[11:]
    assert regimes(thrice)[8:11] == ["STABLE", "STABLE", "STRESS"]
    borderline = quiet[:8] + [0.8 * long] * 4  # Pressure 1.0 to 1.1.
    assert set(regimes(borderline)) == {"STABLE"}
    far = [*quiet[:8], 6 * long, *quiet[9:]]
    assert regimes(far)[8] == "STRESS"
    first = [2 * long, *quiet[1:]]
    assert regimes(first)[0] == "STRESS"
    risen = [1.0, *once[1:]]  # Pressure 2.5.
    assert regimes(risen)[8] == "STRESS"


def mean_square(p, batch):
    x, y, fault = batch
    return jnp.mean((x @ p - y) ** 2) * fault


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_many_bad_batches_do_not_wear_the_scale_down(share):
    """A non-finite batch says nothing about the steps to come, whatever it costs itself."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (600, 16, 4))
    y = x @ jnp.arange(1.0, 5.0)
    bad = jax.random.uniform(keys[1], (600,)) < share
    batches = x, y, jnp.where(bad, jnp.nan, 1.0)
    start, end = jnp.full(4, 0.5), jnp.arange(1.0, 5.0)
    found, state, _ = train(guard(optax.adam(3e-2)), mean_square, start, 600, batches)
    assert norm(found - end) <= 0.1 * norm(start - end)
    assert report(state).min_scale_seen > 0.1


def test_bad_batches_teach_the_controller_nothing():
    stream = faulty(healthy_stream(), [FAULT, FAULT + 1], grads=lambda g: g * jnp.nan)
    _, _, states = run(guard(optax.adam(1.0)), START, stream)
    before, after = (find(at(states, i)).controller for i in (FAULT - 1, FAULT + 1))
    assert before.latch < 1
    for name in ("step_scale", "latch", "earned", "trust_radius"):
        assert getattr(before, name) == getattr(after, name), name


def test_a_step_that_the_hard_limit_shortens_is_in_the_log():
    tx = guard(optax.sgd(1.0), relative_step_limit=0.005)
    stream = {"grads": jnp.full((10, 4), 0.0055), "value": jnp.ones(10)}
    _, updates, states = run(tx, jnp.ones(4), stream)
    np.testing.assert_allclose(norm(at(updates, 0)), 0.01, rtol=1e-4)
    shortened = [e for e in events(at(states, -1)) if e.action == "SCALE"]
    assert shortened
    for event in shortened:
        assert event.cause == "ENVELOPE"
        assert event.scale == pytest.approx(norm(at(updates, event.step)) / 0.011, rel=1e-3)
    assert report(at(states, -1)).min_scale_seen < 1


def test_a_step_that_no_limit_can_shorten_leaves_no_trace():
    tx = guard(optax.sgd(1e30), max_rejections=2)
    stream = {"grads": jnp.ones((12, 3)), "value": jnp.ones(12)}
    _, updates, states = run(tx, jnp.ones(3), stream)
    assert is_finite((updates, states))


def test_a_huge_first_gradient_does_not_hide_the_next_spike():
    stream = healthy_stream(120)
    for step, factor in ((0, 1e2), (40, 1e2)):
        stream = faulty(stream, [step], grads=lambda g, factor=factor: g * factor)
    _, _, states = run(TX, START, stream)
    assert actions(states)[40] == Action.HOLD


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_parameters_that_are_not_finite_leave_no_trace_in_the_scale(bad):
    """One that no gradient sees: a mask kept as a parameter, or one that is repaired later."""
    tx = guard(optax.adam(1.0))
    params = {"w": jnp.ones(8), "unused": jnp.ones(8)}
    state, expected = tx.init(params), tx.init(params)
    broken = params | {"unused": jnp.ones(8).at[0].set(bad)}
    grads = {"w": jnp.ones(8), "unused": jnp.zeros(8)}
    for i in range(3):
        shown = broken if i == 1 else params
        _, state = tx.update(grads, state, shown, value=1.0)
        _, expected = tx.update(grads, expected, params, value=1.0)
        assert 0 < float(state.controller.step_scale) < 1
    assert float(state.controller.step_scale) == pytest.approx(
        float(expected.controller.step_scale), 0.2
    )


def test_accumulated_micro_batches_neither_act_nor_wait():
    """The steps between two whole ones are empty: passed, and no reason to stay in STRESS."""
    rate = optax.piecewise_constant_schedule(0.5, {10: 1e-3})
    tx = guard(optax.MultiSteps(optax.adam(rate), 4))
    noise = np.random.default_rng(0).standard_normal((480, 6))
    stream = {"grads": jnp.asarray(1 + 0.1 * noise, jnp.float32), "value": jnp.ones(480)}
    _, updates, states = run(tx, jnp.ones(6), stream)
    empty = ~np.asarray(updates).any(axis=1)
    assert empty.sum() == 360
    assert {a for a, e in zip(actions(states), empty, strict=True) if e} == {Action.PASS}
    assert Regime.STRESS in np.asarray(states.regime)
    assert report(at(states, -1)).regime == "STABLE"


def test_accumulation_is_given_the_loss():
    plateau = optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau())
    tx = guard(optax.MultiSteps(plateau, 1))
    state = tx.update(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones(3), value=3.0)[1]
    assert float(optax.tree.get(state.inner_state, "best_value")) == 3.0


@pytest.mark.parametrize("fault", ["nan_gradient", "nan_loss", "spike_1e6"])
def test_backtracks_in_a_row_go_on_along_the_last_step(fault):
    """Each leaves a half of what the one before left: never past its start."""
    bad = range(FAULT, FAULT + LAW.repeat_backtracks + 2)
    stream = faulty(healthy_stream(), list(bad), **FAULTS[fault][0])
    _, updates, states = run(TX, START, stream)
    assert actions(states)[FAULT : bad[-1] + 1] == rejected(len(bad))
    last = at(updates, FAULT - 1)
    for i, step in enumerate(bad[1:-1], 1):
        for a, b in zip(*map(jax.tree.leaves, (at(updates, step), last)), strict=True):
            np.testing.assert_allclose(a, -(LAW.cut**i) * b, rtol=1e-3)


def test_a_spike_amid_stress_is_followed_by_stress():
    """An alarm does not end stress: the law goes on, although nothing is suspected now."""
    tx = guard(with_gain(optax.sgd(1.0)))
    grads = jnp.full((6, 4), 1e-3).at[4].set(jnp.nan)
    gains = jnp.array([1.0, 1.0, 1e3, 1e3, 1.0, 1.0])
    stream = {"grads": grads, "value": jnp.ones(6), "gain": gains}
    regimes = run(tx, jnp.ones(4), stream)[2].regime
    assert [Regime(int(r)).name for r in regimes[2:]] == ["STRESS", "STRESS", "SPIKE", "STRESS"]


def test_one_harmful_step_is_followed_by_recovery():
    """Nothing else is suspected: the scale returns to 1, and stays there."""
    tx = guard(optax.sgd(1.0))
    grads = jnp.full((120, 4), 0.5).at[20].set(-4.0)
    states = run(tx, jnp.full(4, 100.0), {"grads": grads, "value": jnp.ones(120)})[2]
    assert actions(states)[20] == Action.BACKTRACK
    regimes = [Regime(int(r)).name for r in states.regime]
    assert regimes[19:23] == ["STABLE", "SPIKE", "RECOVERY", "RECOVERY"]
    assert "STRESS" not in regimes
    assert report(at(states, -1)).regime == "STABLE"
    assert report(at(states, -1)).scale == 1
