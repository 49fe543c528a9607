"""The running statistics follow a new level and keep what one observation may do bounded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import actions, at, bits, exact_jit, feed, rejected, signals, telemetry, with_gain

from lbw_optax import Action, Law, guard, report
from lbw_optax.statistics import compare, init_statistics, learn_loss, learn_spike, observe

LONG = 1500


@functools.cache
def long_runner(memory):
    tx = guard(optax.sgd(1e-13), memory=memory, log_size=LONG)

    def run(stream):
        states = feed(tx, jnp.ones(6), stream)[2]
        counts = states.ledger.action_counts
        return at(states, -1), jnp.argmax(jnp.diff(counts, axis=0, prepend=0), axis=1)

    return exact_jit(run)


SHIFTS = [
    (50, 1),
    (1e-3, 1),
    (1e4, 1),
    (1, 100),
    (1, 1e-2),
    (30, 30),
    (0.1, 100),
    (100, 1e-2),
    (1, 1e6),
]


@pytest.mark.parametrize("memory", ["none", "step"])
@pytest.mark.parametrize("with_loss", [True, False])
@pytest.mark.parametrize(("gradient", "loss"), SHIFTS)
def test_8_level_shift_is_learned(memory, with_loss, gradient, loss):
    """After it the run goes on as before: nothing but PASS in the last fifth, at scale 1."""
    rng = np.random.default_rng(0)
    grads = 1 + rng.standard_normal((LONG, 6))
    value = 1 + 0.1 * rng.standard_normal(LONG)
    grads[LONG // 10 :] *= gradient
    value[LONG // 10 :] *= loss
    stream = {"grads": grads.astype(np.float32)}
    if with_loss:
        stream["value"] = value.astype(np.float32)
    state, taken = jax.device_get(long_runner(memory)(stream))
    assert set(taken[-LONG // 5 :]) == {Action.PASS}
    assert float(state.controller.step_scale) == 1
    assert report(state).regime == "STABLE"


@pytest.mark.parametrize("loss", [1e2, 1e6, 1e30, -1e6])
def test_8_one_loss_of_any_size_blinds_for_a_while_only(loss):
    rng = np.random.default_rng(0)
    stream = {
        "grads": np.float32(1 + 0.1 * rng.standard_normal((LONG // 5, 6))),
        "value": np.float32(1 + 0.1 * rng.standard_normal(LONG // 5)),
    }
    usual = jax.device_get(long_runner("step")(stream)[0]).statistics
    stream["value"][LONG // 15] = loss
    state, taken = jax.device_get(long_runner("step")(stream))
    assert set(taken) == {Action.PASS}
    assert state.statistics.loss_variance < 4 * usual.loss_variance
    assert abs(state.statistics.loss_mean - 1) < 0.2


def learn(statistics, has_loss, **known):
    """Returns the signals before one more accepted step, and the statistics after it."""
    shown = telemetry(**{"gradient_norm": 1.0, "step_norm": 1.0} | known)
    one, moved, stressed = jnp.float32(1), jnp.bool_(True), jnp.bool_(True)
    signals = compare(statistics, shown, one, has_loss, Law())
    return signals, observe(statistics, shown, signals, one, moved, stressed, has_loss, Law())


@pytest.mark.parametrize("before", [0.0, 1e-12, 1e12, -1e12])
def test_8_two_losses_in_a_row_are_a_new_level(before):
    statistics, trail = init_statistics(), []
    for loss in [before] * 20 + [1.0] * 60:
        _, statistics = learn(statistics, True, loss=loss)
        trail.append(float(statistics.loss_mean))
    # At most the first of them is clipped; from the second on the mean follows as fast as it can.
    distance = np.abs(np.array(trail[21:]) - 1)
    assert (distance <= 1.1 * abs(before - 1) * 0.9 ** np.arange(59) + 1e-3).all()


def test_8_empty_steps_do_not_count_in_the_mean_slope():
    statistics = init_statistics()
    for slope in [0.0] * 20 + [-0.5] * 4:
        signals, statistics = learn(statistics, False, slope=slope, step_norm=-slope)
    assert float(signals.slope) == pytest.approx(0.5)


def spiking(size, every):
    """Returns the actions where every so many gradients of a quiet run is `size` times as large."""
    rng = np.random.default_rng(0)
    grads = 1 + 0.1 * rng.standard_normal((LONG, 6))
    grads[every::every] *= size
    stream = {"grads": np.float32(grads), "value": np.ones(LONG, np.float32)}
    return np.asarray(long_runner("step")(stream)[1])[every::every]


@pytest.mark.parametrize("every", [15, 100])
@pytest.mark.parametrize("size", [20, 100, 500])
def test_spikes_that_recur_are_data(size, every):
    """The first are held, each widens its own test, and a few more pay for what it forgets."""
    law = Law()
    taken = spiking(size, every)
    held = np.log(size / law.spike_ratio) / law.spike_rise
    assert (taken[: int(held / 2)] == Action.HOLD).all()
    assert (taken == Action.HOLD).sum() <= held + 1 + LONG * law.spike_share
    assert set(taken) <= {Action.HOLD, Action.PASS}


def test_spikes_beyond_any_data_are_faults_however_often_they_recur():
    assert set(spiking(1e5, 15)) == {Action.HOLD}


def test_what_spikes_widened_is_forgotten():
    statistics, law = init_statistics(), Law()
    for _ in range(3):
        statistics = learn_spike(statistics, jnp.float32(1), jnp.bool_(True), law)
    assert float(statistics.spike_tolerance) == pytest.approx(3 * law.spike_rise)
    for _ in range(round(1 / law.spike_share)):
        _, statistics = learn(statistics, False)
    assert float(statistics.spike_tolerance) == pytest.approx(2 * law.spike_rise, rel=1e-2)


def test_spikes_in_a_row_are_one():
    """A burst of wild gradients is rejected to its end."""
    burst = slice(LONG // 2, LONG // 2 + 12)
    grads = np.ones((LONG, 6), np.float32)
    grads[burst] *= 100
    taken = np.asarray(long_runner("step")({"grads": grads, "value": np.ones(LONG, np.float32)})[1])
    assert taken[burst].tolist() == rejected(12)
    assert set(np.delete(taken, burst)) == {Action.PASS}


def over(losses, scale=1.0, every=1, slope=0.0, alignment=1.0):
    """Returns the signals before each loss of a run with a step of length 1 `every` few losses."""
    scale = jnp.float32(scale)

    def step(run, shown):
        index, loss = shown
        length = jnp.float32(index % every == every - 1)
        shown = telemetry(loss=loss, slope=slope * length, step_norm=length, alignment=alignment)
        signals, yes = compare(run, shown, scale, True, Law()), jnp.bool_(True)
        return observe(run, shown, signals, scale, yes, yes, True, Law()), signals

    return jax.lax.scan(step, init_statistics(), (jnp.arange(len(losses)), jnp.float32(losses)))[1]


@pytest.mark.parametrize(("fall", "share"), [(0.0, (0.0, 0.05)), (0.02, (0.7, 1.0))])
def test_a_run_gains_where_its_loss_falls_for_certain(fall, share):
    """Of noise alone about one step in forty looks like progress, as twice the error says."""
    rng = np.random.default_rng(0)
    gains = over(100 + rng.standard_normal(5000) - fall * np.arange(5000)).gaining[200:]
    assert share[0] <= jnp.mean(gains) <= share[1]


@pytest.mark.parametrize(("alignment", "reach"), [(0.85, 1.0), (0.0, 12.33**0.5)])
@pytest.mark.parametrize(("scale", "every"), [(1.0, 1), (0.1, 1), (1.0, 4)])
@pytest.mark.parametrize(("kept", "productive"), [(0.04, False), (0.06, True)])
def test_steps_are_productive_where_a_twentieth_of_their_promise_is_kept(
    kept, productive, scale, every, alignment, reach
):
    """Whatever scale and micro-batches; where they do not add up, less by the squared reach."""
    promise = 0.5
    fall = kept * promise * scale / every / reach**2
    run = over(-fall * np.arange(1000), scale, every, slope=-promise, alignment=alignment)
    assert run.gaining[100:].all()
    assert (run.productive[800:] == productive).all()


@pytest.mark.parametrize("steps", [200, 500, 2000])
def test_what_is_bearable_is_what_the_last_quarter_gained_whatever_the_length(steps):
    law, fall = Law(), 0.01
    fast_age = law.loss_decay / (1 - law.loss_decay)
    gained = fall * (law.past_age * steps - fast_age)
    bearable = over(100 - fall * np.arange(steps)).bearable[-1]
    assert float(bearable) == pytest.approx(gained / law.mixing_steps, rel=0.02)


def test_a_run_that_gains_nothing_bears_the_least():
    rng = np.random.default_rng(0)
    run = over(2 + 0.1 * rng.standard_normal(5000) + np.linspace(0, 1, 5000))
    assert float(run.bearable[-1]) == pytest.approx(Law().bearable_least * float(run.noise[-1]))


def test_one_hard_batch_is_no_change_of_task():
    """It enters the mean over the past by its own share alone."""
    law, rng, where, size = Law(), np.random.default_rng(0), 500, 0.5
    losses = 1 + 0.01 * rng.standard_normal(1000)
    losses[where] += size
    share = size * (1 / law.past_age - 1) / where
    assert jnp.median(over(losses).bearable[where + 100 :]) < share / law.mixing_steps


def test_what_a_run_gained_is_not_lost_in_the_rounding_of_a_long_one():
    """After millions of steps their mean moves by less than float32 resolves beside the loss."""
    law, begun, steps, gain = Law(), 2_000_000, 100_000, 0.016
    run = init_statistics()._replace(
        losses=jnp.int32(begun), loss_mean=jnp.float32(2.5), loss_gain=jnp.float32(gain)
    )
    quiet = signals(noise=1.0, innovation=0.0)

    def step(_, run):
        return learn_loss(run, jnp.float32(2.5), quiet, law)

    left = float(jax.jit(jax.lax.fori_loop, static_argnums=2)(0, steps, step, run).loss_gain)
    power = 1 / law.past_age - 1
    assert left == pytest.approx(gain * (begun / (begun + steps)) ** power, rel=1e-2)


LATER = jnp.int32(10_000)
"""So many observations that no mean is corrected for their number."""


@pytest.mark.parametrize("mean", [2.0, -2.0])
def test_the_least_noise_of_the_loss_is_larger_at_first(mean):
    law = Law()
    for losses, share in ((9, law.noise_floor_start), (10, law.noise_floor)):
        assert law.noise_warmup == 10
        run = init_statistics()._replace(losses=jnp.int32(losses), loss_mean=jnp.float32(mean))
        noise = compare(run, telemetry(loss=mean), jnp.float32(1), True, law).noise
        assert float(noise) == pytest.approx(share * abs(mean))


@pytest.mark.parametrize(("persistence", "factor"), [(0.85, 1.0), (0.0, 12.33)])
def test_without_a_loss_the_promise_of_the_steps_is_the_yardstick(persistence, factor):
    law, scale, slope = Law(), 0.25, 0.5
    run = init_statistics()._replace(
        slopes=LATER, slope_mean=jnp.float32(slope), persistence=jnp.float32(persistence)
    )
    found = compare(run, telemetry(), jnp.float32(scale), False, law)
    assert float(found.noise) == pytest.approx(law.blind_noise * scale * slope)
    bearable = factor * law.bearable_blind * float(found.noise)
    assert float(found.bearable) == pytest.approx(bearable, rel=1e-3)


def test_the_error_of_the_mean_overshoot_is_that_of_an_exponential_mean():
    law, mean, square = Law(), 0.5, 0.75
    run = init_statistics()._replace(
        overshoots=LATER, overshoot_mean=jnp.float32(mean), overshoot_square=jnp.float32(square)
    )
    b = law.overshoot_decay
    error = compare(run, telemetry(), jnp.float32(1), True, law).overshoot_error
    assert float(error) == pytest.approx(np.sqrt((square - mean**2) * (1 - b) / (1 + b)))


@pytest.mark.parametrize(("observations", "wider"), [(1, 5.0), (2, 2.5), (5, 1.0), (100, 1.0)])
def test_the_tests_of_the_gradient_norm_are_wider_at_first(observations, wider):
    law = Law()
    run = init_statistics()._replace(
        observations=jnp.int32(observations), gradient_mean=jnp.float32(1)
    )

    def seen(norm):
        return compare(run, telemetry(gradient_norm=norm), jnp.float32(1), True, law)

    assert float(seen(law.spike_ratio * wider).spike) == pytest.approx(1)
    assert seen(0.99 / (law.collapse_ratio * wider)).faded
    assert not seen(1.01 / (law.collapse_ratio * wider)).faded


def test_a_shift_of_the_gradient_norm_is_rejected_as_long_as_the_law_says():
    grads = np.ones((LONG, 6), np.float32)
    grads[LONG // 2 :] *= 50
    taken = np.asarray(long_runner("step")({"grads": grads, "value": np.ones(LONG, np.float32)})[1])
    assert taken[LONG // 2 :][:14].tolist() == rejected(14)
    assert set(taken[: LONG // 2]) | set(taken[LONG // 2 + 14 :]) == {Action.PASS}


@pytest.mark.parametrize("memory", ["none", "step"])
def test_batches_without_a_gradient_are_not_learned(memory):
    """As of padding alone: their loss is 0, too, and would wear its noise away."""
    rng = np.random.default_rng(0)
    grads = np.float32(1 + 0.1 * rng.standard_normal((LONG, 6)))
    value = np.float32(1 + 0.1 * rng.standard_normal(LONG))
    gap = slice(LONG // 5, 4 * LONG // 5)
    grads[gap], value[gap] = 0, 0
    states = feed(
        guard(optax.adam(1e-6), memory=memory), jnp.ones(6), {"grads": grads, "value": value}
    )[2]
    before, after = (at(states.statistics, i) for i in (gap.start - 1, gap.stop - 1))
    assert bits(before) == bits(after)
    assert set(actions(states)) == {Action.PASS}


def test_the_overshoot_is_learned_per_squared_scale_where_there_is_a_last_step():
    statistics, law = init_statistics(), Law()
    shown = telemetry(gradient_norm=1, step_norm=1, overshoot=0.5, alignment=0)
    for moved, scale in ((False, 1.0), (True, 0.5)):
        signals = compare(statistics, shown, jnp.float32(scale), False, law)
        statistics = observe(
            statistics,
            shown,
            signals,
            jnp.float32(scale),
            jnp.bool_(moved),
            jnp.bool_(True),
            False,
            law,
        )
        assert int(statistics.overshoots) == moved
        assert (float(statistics.persistence) < 1) == moved
    b = law.overshoot_decay
    assert float(statistics.overshoot_mean) == pytest.approx(2 * (1 - b))
    assert float(statistics.overshoot_square) == pytest.approx(4 * (1 - b))


def test_steps_that_lead_up_count_in_the_mean_slope_as_those_that_lead_down():
    statistics = init_statistics()
    for slope in (0.5, -0.5, 0.5):
        signals, statistics = learn(statistics, False, slope=slope)
    assert float(signals.slope) == pytest.approx(0.5)


def test_steps_that_promise_little_are_productive_only_where_the_loss_falls_for_certain():
    law = Law()
    for share in (0.99, 1.01):
        run = init_statistics()._replace(
            losses=LATER,
            loss_variance=jnp.float32(1),
            loss_trend=jnp.float32(share * law.gain_noise),
        )
        found = compare(run, telemetry(), jnp.float32(1), True, law)
        assert found.gaining == found.productive == (share > 1)


@pytest.mark.parametrize(("share", "risen"), [(0.99, False), (1.01, True)])
def test_the_loss_has_risen_where_it_is_certainly_above_the_lowest_that_it_was(share, risen):
    law, statistics = Law(), init_statistics()
    for loss in (3.0, 1.0, 2.0):
        _, statistics = learn(statistics, True, loss=loss)
    assert float(statistics.loss_trend) == pytest.approx(2)
    assert float(statistics.loss_lowest) == pytest.approx(2)  # Of the mean, not of one batch.
    _, statistics = learn(statistics, True, loss=6.0)
    assert float(statistics.loss_trend) == pytest.approx(3)
    assert float(statistics.loss_lowest) == pytest.approx(2)
    above = jnp.float32(2 + share * law.gain_noise)
    later = statistics._replace(losses=LATER, loss_variance=jnp.float32(1), loss_trend=above)
    assert compare(later, telemetry(), jnp.float32(1), True, law).risen == risen
    assert compare(later, telemetry(), jnp.float32(1), False, law).risen  # It may have.


@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize(
    ("share", "noise", "edge"),
    [(1.01, 0.99, True), (0.99, 0.99, False), (1.01, 1.01, False)],
)
def test_the_edge_is_where_overshoots_are_the_curvatures_and_not_beyond_the_noise(
    scale, share, noise, edge
):
    """Large beside the slope and small beside the noise, each of steps at the scale in force."""
    law = Law()
    overshoot = noise * law.edge_noise / scale**2  # The noise is 1.
    run = init_statistics()._replace(
        losses=LATER,
        overshoots=LATER,
        slopes=LATER,
        loss_variance=jnp.float32(1),
        overshoot_mean=jnp.float32(overshoot),
        overshoot_square=jnp.float32(overshoot**2),
        slope_mean=jnp.float32(overshoot * scale / (share * law.edge_share)),
    )
    found = compare(run, telemetry(), jnp.float32(scale), True, law)
    assert found.scaled_edge == edge
    assert found.edge == (edge and scale == 1)
    blind = compare(run, telemetry(), jnp.float32(scale), False, law)
    assert not blind.edge
    assert not blind.scaled_edge


def test_an_overshoot_counts_at_the_scale_of_the_step_that_made_it():
    tx = guard(with_gain(optax.sgd(1.0)))
    stream = {"grads": jnp.full((2, 4), 1e-3), "value": jnp.ones(2), "gain": jnp.array([1.0, 1e3])}
    state = at(exact_jit(feed, static_argnums=0)(tx, jnp.ones(4), stream)[2], -1)
    assert state.controller.step_scale < 0.1
    expected = -4e-6 * (1 - Law().overshoot_decay)
    assert float(state.statistics.overshoot_mean) == pytest.approx(expected, rel=1e-3)
