"""Interpretation: the table of regimes, and what each alarm takes to be raised."""

import jax.numpy as jnp
import pytest
from helpers import signals, telemetry
from hypothesis import given, settings
from hypothesis import strategies as st

from lbw_optax import Law, Regime
from lbw_optax.interpretation import Cause, Diagnosis, diagnose, next_regime

LAW = Law()


def observed(overshoot=0.0, finite=(True, True, True)):
    names = ("gradient_finite", "loss_finite", "step_finite")
    flags = {name: jnp.bool_(x) for name, x in zip(names, finite, strict=True)}
    return telemetry(overshoot=overshoot)._replace(**flags)


def diagnosis(
    pressure=0.1,
    too_long=0,
    overshoot=0.0,
    finite=(True, True, True),
    moved=True,
    can_undo=True,
    **known,
):
    shown = observed(overshoot, finite)
    return judged(signals(**known), pressure, too_long, shown, moved, can_undo)


def judged(run, pressure=0.1, too_long=0, shown=None, moved=True, can_undo=True):
    shown = observed() if shown is None else shown
    steps = jnp.float32(pressure), jnp.int32(too_long), jnp.bool_(moved)
    return diagnose(shown, run, *steps, can_undo, LAW)


def alarm(**known):
    return Cause(int(diagnosis(**known).alarm))


def test_every_alarm_has_its_sign():
    assert alarm() == Cause.NONE
    assert alarm(finite=(False, True, True)) == Cause.NONFINITE_GRADIENT
    assert alarm(finite=(True, False, True)) == Cause.NONFINITE_LOSS
    assert alarm(finite=(True, True, False)) == Cause.NONFINITE_STEP
    assert alarm(overshoot=1.01 * LAW.backtrack_noise) == Cause.OVERSHOOT
    jump = {"innovation": 1.01 * LAW.jump_noise}
    assert alarm(**jump, faded=True) == Cause.COLLAPSE
    assert alarm(**jump, overshoot=1.01 * LAW.jump_overshoot) == Cause.LOSS_JUMP
    assert alarm(spike=1.01) == Cause.GRADIENT_SPIKE
    assert alarm(spike=1.99, spike_allowed=2.0) == Cause.NONE


def test_at_the_edge_of_stability_the_loss_alone_says_what_did_harm():
    overshoot = 100 * LAW.backtrack_noise
    assert alarm(overshoot=overshoot, edge=True) == Cause.NONE
    assert alarm(overshoot=overshoot, scaled_edge=True) == Cause.OVERSHOOT
    jump = {"innovation": 1.01 * LAW.jump_noise, "edge": True}
    assert alarm(**jump, overshoot=overshoot) == Cause.LOSS_JUMP
    assert alarm(**jump, faded=True) == Cause.COLLAPSE


def test_without_a_last_step_there_is_no_harm():
    jump = {"innovation": 1.01 * LAW.jump_noise, "moved": False}
    assert alarm(**jump, faded=True) == Cause.NONE
    assert alarm(**jump, overshoot=1e3 * LAW.backtrack_noise) == Cause.NONE
    assert alarm(**jump, spike=1.01) == Cause.GRADIENT_SPIKE


def test_the_size_is_a_number_whatever_the_noise():
    with_jump = diagnosis(innovation=1e3, noise=2e-38, faded=True)
    assert with_jump.alarm == Cause.COLLAPSE
    assert 1 < with_jump.size < float("inf")
    assert diagnosis(pressure=float("inf")).size < float("inf")


def test_the_size_of_a_spike_is_in_units_of_what_recurring_spikes_let_pass():
    assert diagnosis(spike=6.0, spike_allowed=2.0).size == pytest.approx(3)


def test_a_hard_batch_is_no_alarm():
    """The loss jumps, but the last step is not to blame and the gradients are there."""
    assert alarm(innovation=10 * LAW.jump_noise) == Cause.NONE
    assert alarm(faded=True) == Cause.NONE


def test_a_spike_does_not_blame_the_last_step():
    overshoot = 5 * LAW.backtrack_noise
    assert alarm(overshoot=overshoot, spike=10.0) == Cause.GRADIENT_SPIKE


def test_what_cannot_be_undone_does_not_hide_a_spike():
    jump = {"innovation": 1.01 * LAW.jump_noise, "overshoot": 1e3 * LAW.backtrack_noise}
    assert alarm(**jump, spike=9.0) == Cause.OVERSHOOT
    assert alarm(**jump, spike=9.0, can_undo=False) == Cause.GRADIENT_SPIKE
    assert alarm(**jump, can_undo=False) == Cause.OVERSHOOT


@given(st.booleans(), st.booleans(), st.booleans())
def test_the_first_cause_of_the_table_wins(gradient, loss, step):
    finite = (gradient, loss, step)
    causes = (Cause.NONFINITE_GRADIENT, Cause.NONFINITE_LOSS, Cause.NONFINITE_STEP)
    wrong = [cause for cause, fine in zip(causes, finite, strict=True) if not fine]
    assert alarm(finite=finite, spike=9.0) == (wrong or [Cause.GRADIENT_SPIKE])[0]


def test_suspicion_and_calm():
    assert not diagnosis(pressure=1.01 * LAW.stress_pressure).suspicion
    assert diagnosis(pressure=1.01 * LAW.stress_pressure, too_long=LAW.brief_steps).suspicion
    assert diagnosis(pressure=1.01 * LAW.brief_pressure).suspicion
    found = diagnosis(pressure=0.99 * LAW.calm_ratio)
    assert found.calm
    assert not found.suspicion
    assert not diagnosis(pressure=1.01 * LAW.calm_ratio).calm
    mean = signals(overshoot=1.01 * LAW.stress_noise)
    found = judged(mean)
    assert found.suspicion
    assert not found.calm
    # The edge of stability begins no stress, and ends none.
    found = judged(signals(overshoot=1.01 * LAW.stress_noise, edge=True))
    assert not found.suspicion
    assert not found.calm
    # Between the two, what would overshoot without the guard is not let go.
    mean = signals(overshoot=1.01 * float(signals().bearable))
    found = judged(mean)
    assert not found.suspicion
    assert not found.calm
    # A run that gains may overshoot; what is too long stays too long.
    mean = signals(overshoot=1.01 * LAW.stress_noise, gaining=True)
    for pressure, suspected in ((0.1, False), (1.01 * LAW.brief_pressure, True)):
        found = judged(mean, pressure)
        assert found.suspicion == suspected


@given(st.floats(1, 3.5), st.floats(0.1, 10))
def test_steps_that_do_not_add_up_may_overshoot_by_more(reach, noise):
    """The overshoot is quadratic in the length of a step, and so is what is suspected of it."""
    threshold = LAW.stress_noise * reach**2 * noise
    for share in (0.99, 1.01):
        mean = signals(overshoot=share * threshold, reach=reach, noise=noise)
        found = judged(mean)
        assert found.suspicion == (share > 1)


@given(
    st.sampled_from(Regime),
    st.integers(0, 100),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.5, 1.0]),
)
@settings(max_examples=200)
def test_regimes_move_as_the_table_says(
    regime, dwell, alarmed, suspicion, calm, empty, interrupted, scale
):
    calm = calm and not suspicion
    stressed = regime == Regime.STRESS or (regime == Regime.SPIKE and interrupted)
    shown = Diagnosis(
        alarm=jnp.int32(Cause.OVERSHOOT if alarmed else Cause.NONE),
        size=jnp.float32(0),
        long=jnp.bool_(False),
        suspicion=jnp.bool_(suspicion),
        calm=jnp.bool_(calm),
        empty=jnp.bool_(empty),
    )
    later = dwell + (not empty)
    new, waited, goes_on = next_regime(
        jnp.int32(regime), jnp.int32(dwell), jnp.bool_(stressed), shown, jnp.float32(scale), LAW
    )
    after = {
        Regime.STABLE: Regime.STABLE,
        Regime.STRESS: Regime.RECOVERY if calm and later >= LAW.calm_steps else Regime.STRESS,
        Regime.SPIKE: Regime.STRESS if stressed else Regime.RECOVERY,
        Regime.RECOVERY: Regime.STABLE
        if later >= LAW.recovery_steps and scale == 1
        else Regime.RECOVERY,
    }
    expected = Regime.SPIKE if alarmed else Regime.STRESS if suspicion else after[regime]
    assert Regime(int(new)) == expected
    assert goes_on == (stressed if alarmed else expected == Regime.STRESS)
    if expected != regime or alarmed:
        assert waited == 0
    elif regime == Regime.STRESS:
        assert waited == (later if calm else 0)


@pytest.mark.parametrize("loss", [True, False])
def test_noise_of_zero_raises_no_alarm(loss):
    known = {"innovation": 1.0} if loss else {"overshoot": 1.0}
    assert alarm(noise=0.0, **known) == Cause.NONE


def test_a_mean_overshoot_counts_beyond_its_error():
    mean = {"overshoot": 1.5 * LAW.stress_noise}
    assert judged(signals(**mean)).suspicion
    found = judged(signals(**mean, overshoot_error=1.49 * LAW.stress_noise))
    assert not found.suspicion
    assert found.calm


def test_what_is_suspected_is_not_calm():
    mean = {"overshoot": 1.01 * LAW.stress_noise, "bearable": 2 * LAW.stress_noise}
    assert not judged(signals(**mean)).calm
    assert judged(signals(**mean, gaining=True)).calm


@pytest.mark.parametrize(
    ("cause", "unit", "name", "known"),
    [
        (Cause.OVERSHOOT, LAW.backtrack_noise, "overshoot", {}),
        (Cause.COLLAPSE, LAW.jump_noise, "innovation", {"faded": True}),
        (Cause.LOSS_JUMP, LAW.jump_noise, "innovation", {"overshoot": 2.0}),
    ],
)
def test_the_size_of_an_alarm_is_in_units_of_its_threshold(cause, unit, name, known):
    noise, size = 2.0, 1.5
    shown = known | {"noise": noise, name: size * unit * noise}
    assert alarm(**shown) == cause
    assert float(diagnosis(**shown).size) == pytest.approx(size)


def test_the_size_without_an_alarm_is_the_pressure():
    assert float(diagnosis(pressure=0.7).size) == pytest.approx(0.7)


def test_recovery_ends_after_quiet_steps_that_need_not_be_calm():
    found = diagnosis(pressure=1.01 * LAW.calm_ratio)
    assert not found.calm
    found = found._replace(empty=jnp.bool_(False))
    dwell = jnp.int32(LAW.recovery_steps - 1)
    recovery, unstressed = jnp.int32(Regime.RECOVERY), jnp.bool_(False)
    new, _, _ = next_regime(recovery, dwell, unstressed, found, jnp.float32(1), LAW)
    assert new == Regime.STABLE
