"""Policy: what moves latch and earned factor, and how much of a harmful step is left."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import find, normal, signals, telemetry

from lbw_optax import Action, Law, Regime, guard
from lbw_optax.controller import NO_LIMIT, Limits
from lbw_optax.envelope import Envelope
from lbw_optax.interpretation import Cause, Diagnosis, diagnose
from lbw_optax.policy import decide

LAW = Law()
LIMITS = Limits(min_scale=1e-5, relative_step_limit=1.0, max_rejections=20)
STATE = find(guard(optax.sgd(1.0)).init({"w": normal(4)}))
LATCH = 0.1
SHARE = 0.5
SIZE = LAW.share_size / SHARE**4
HEALTHY = jnp.float32(1)
WARMED = {"first_length": 0.0}
"""What the controller remembers after a warm-up."""


def decided(before, regime, diagnosis, shown, run):
    """Command and controller after a step; `before` is what the controller knew."""
    old = STATE.controller
    known = {k: jnp.asarray(x, getattr(old, k).dtype) for k, x in before.items()}
    return decide(
        old._replace(**known),
        jnp.int32(regime),
        diagnosis,
        shown,
        run,
        Envelope(HEALTHY, HEALTHY, jnp.float32(1e3)),
        can_undo=True,
        law=LAW,
        limits=LIMITS,
    )


def steered(length=0.0, regime=Regime.STRESS, before=None, shown=None, **known):
    """The controller after a step without alarm; `length` is in units of the latch's."""
    before = {"step_scale": LATCH, "latch": LATCH, "last_length": 1.0} | (before or {})
    finite = dict.fromkeys(("gradient_finite", "loss_finite", "step_finite"), jnp.bool_(True))
    step = {"step_norm": length * SHARE / LATCH, "size": SIZE} | (shown or {})
    shown = telemetry(**step)._replace(**finite)
    run, pressure = signals(**known), shown.step_norm / HEALTHY
    diagnosis = diagnose(shown, run, pressure, jnp.int32(0), jnp.bool_(True), True, LAW)
    return decided(before, regime, diagnosis, shown, run)[1]


def earned(length=0.0, **known):
    """The earned factor after a step under stress, from 1."""
    return float(steered(length, **known).earned)


COSTLY = {"overshoot": 10.0, "bearable": 0.05}
STRAIGHT = {"overshoot": -10.0, "slope": 1.0}


def test_what_costs_more_than_it_gains_is_annealed():
    assert earned(0.5, **COSTLY) == pytest.approx(1 / LAW.growth)
    assert earned(0.5, **COSTLY | {"bearable": 0.2}) == 1
    assert earned(0.5, **COSTLY, overshoot_error=9.0) == 1


def test_after_a_warm_up_nothing_is_annealed_until_the_loss_has_risen():
    assert earned(0.5, **COSTLY, risen=False) == pytest.approx(1 / LAW.growth)
    assert earned(0.5, **COSTLY, risen=False, before=WARMED) == 1
    assert earned(0.5, **COSTLY, risen=True, before=WARMED) == pytest.approx(1 / LAW.growth)


def test_nothing_is_annealed_while_the_steps_are_productive():
    assert earned(0.5, **COSTLY, productive=True) == 1
    assert earned(0.5, **COSTLY, gaining=True) == pytest.approx(1 / LAW.growth)


def test_nothing_is_annealed_at_the_edge_of_stability_of_the_scale_in_force():
    assert earned(0.5, **COSTLY, scaled_edge=True) == 1
    assert earned(0.5, **COSTLY, edge=True) == pytest.approx(1 / LAW.growth)


def test_steps_that_end_on_a_slope_are_earned_back_up_to_the_latch_alone():
    assert earned(0.5, **STRAIGHT) == pytest.approx(LAW.growth)
    assert earned(0.5, **STRAIGHT, productive=True) == pytest.approx(LAW.growth)
    assert earned(0.5, **STRAIGHT, overshoot_error=6.0) == 1
    assert earned(1.0, **STRAIGHT) == pytest.approx(1, rel=1e-6)


def share_under_stress(before=None, **shown):
    """The share of the healthy length that is left of a step under stress."""
    length = 20.0
    return float(steered(length, before=before, shown=shown).latch) * length * SHARE / LATCH


@pytest.mark.parametrize(
    ("allowance", "share"), [(1.0, SHARE), (1.3, 0.65), (1.6, 0.8), (2.0, 1.0), (4.0, 1.0)]
)
def test_parameters_that_start_at_zero_get_a_larger_share_of_the_healthy_length(allowance, share):
    before = {"allowance": allowance}
    assert share_under_stress(before) == pytest.approx(share)
    # A small network has more than these at first, and a large one less.
    small = 0.5**0.5 + (1 - 0.5**0.5) * min(allowance - 1, 1)
    assert share_under_stress(before, size=SIZE / 4) == pytest.approx(small)
    large = 0.25 + 0.75 * min(allowance - 1, 1)
    assert share_under_stress(before, size=SIZE * 16) == pytest.approx(large)


@pytest.mark.parametrize(
    ("times", "share"),
    [(1e-4, 1), (1, 1), (4, 0.5**0.5), (16, 0.5), (256, 0.25), (1e5, LAW.share_least)],
)
def test_the_larger_a_network_the_smaller_its_share_of_the_healthy_length(times, share):
    assert share_under_stress(size=times * LAW.share_size) == pytest.approx(share)


STEP_NORM = 20 * SHARE / LATCH
FIRST = {"slope": -LAW.share_elasticity * STEP_NORM, "parameter_norm": 600.0, "loss": 600.0}
FIRST |= {"gradient_norm": 1.0, "kurtosis": 4.0}
"""A first step that may have all of the healthy length."""


@pytest.mark.parametrize(
    ("times", "share"),
    [(1e-30, LAW.share_most), (0.3, 0.3**-0.5), (1, 1), (2, 0.5**0.5), (4, SHARE), (1e30, SHARE)],
)
def test_the_less_elastic_the_loss_the_longer_the_steps_under_stress(times, share):
    assert share_under_stress(**FIRST | {"slope": times * FIRST["slope"]}) == pytest.approx(share)


@pytest.mark.parametrize(("times", "share"), [(0.1, 1), (1, 1), (1.6, 1 / 1.6), (9, SHARE)])
def test_after_a_warm_up_even_steps_have_all_of_the_healthy_length(times, share):
    shown = {"kurtosis": times * LAW.share_kurtosis}
    assert share_under_stress(WARMED, **shown) == pytest.approx(share)
    assert share_under_stress(**shown) == pytest.approx(SHARE)


@pytest.mark.parametrize("unit", [1e-20, -1.0, 1e20])
def test_neither_the_unit_nor_the_sign_of_the_loss_matters_to_elasticity(unit):
    shown = {"slope": abs(unit) * FIRST["slope"], "loss": unit * FIRST["loss"]}
    assert share_under_stress(**FIRST | shown) == pytest.approx(1)


@pytest.mark.parametrize(
    "shown",
    [{"loss": 0.0}, {"slope": 0.0}, {"slope": 1.0}, {"parameter_norm": 1e-3}],
    ids=["no loss", "no slope", "uphill", "no size"],
)
def test_without_an_elasticity_the_number_of_parameters_decides(shown):
    assert share_under_stress(**FIRST | shown) == pytest.approx(SHARE)
    after = steered(20.0, shown=FIRST | shown)
    assert np.isfinite(after.elasticity)
    assert after.elasticity > 0


def test_elasticity_is_that_of_the_first_step_that_is_taken():
    first = {"elasticity": LAW.share_elasticity / 4}
    assert share_under_stress(first, **FIRST) == pytest.approx(LAW.share_most)
    shown = {"step_norm": STEP_NORM} | FIRST
    known = pytest.approx(LAW.share_elasticity)
    assert answered(shown=shown)[1].elasticity == known
    for rejected in (Cause.NONFINITE_GRADIENT, Cause.GRADIENT_SPIKE):
        assert answered(rejected, shown=shown)[1].elasticity == 0
    assert answered(shown=shown, found={"empty": True})[1].elasticity == 0
    assert answered(Cause.GRADIENT_SPIKE, shown=shown, **first)[1].elasticity == first["elasticity"]


def test_a_batch_without_any_gradient_is_no_first_one():
    start = {"first_length": NO_LIMIT}
    shown = {"step_norm": STEP_NORM} | FIRST
    assert answered(shown=shown, **start)[1].first_length == pytest.approx(2 * STEP_NORM)
    decayed = answered(shown=shown | {"gradient_norm": 0.0, "slope": 0.0}, **start)[1]
    assert decayed.first_length == start["first_length"]
    assert decayed.elasticity == 0


@pytest.mark.parametrize(("length", "latch"), [(2.0, 0.5), (1.0, 1.0), (0.5, 1.0), (0.1, 2.5)])
def test_the_latch_follows_the_envelope_down_and_rises_once_steps_are_far_below_it(length, latch):
    assert float(steered(length).latch) / LATCH == pytest.approx(latch)
    assert latch == max(min(1, 1 / length), LAW.slack / length)


@pytest.mark.parametrize(
    ("length", "age", "latch"),
    [(0.5, 1, 2.0), (0.5, 10, 1.1), (0.5, 1000, 1.001), (1.0, 1, 1.0), (2.0, 1, 0.5)],
)
def test_after_a_warm_up_the_latch_rises_with_the_age_of_the_run(length, age, latch):
    warmed = {"before": WARMED, "observations": age}
    assert float(steered(length, **warmed).latch) / LATCH == pytest.approx(latch)
    cold = {"before": {"first_length": 1.0}, "observations": age}
    assert float(steered(length, **cold).latch) / LATCH == pytest.approx(min(1, latch))


@pytest.mark.parametrize(
    ("known", "end"), [(COSTLY, LAW.earned_least), (STRAIGHT, LAW.earned_most)], ids=["down", "up"]
)
def test_what_is_earned_has_an_end(known, end):
    assert earned(0.1, **known, before={"earned": end}) == pytest.approx(end)


@pytest.mark.parametrize("before", [0.5, 1.5])
def test_outside_of_stress_latch_and_earned_factor_return_to_one(before):
    known = {"before": {"earned": before}, "regime": Regime.RECOVERY}
    after = steered(0.5, **known, **COSTLY)
    assert float(after.latch) == pytest.approx(LATCH * LAW.release)
    way = LAW.release if before < 1 else 1 / LAW.release
    assert float(after.earned) == pytest.approx(before * way)


BEFORE = {
    "step_scale": 0.5,
    "latch": 0.8,
    "earned": 1.5,
    "trust_radius": 0.3,
    "last_length": 2.0,
    "last_slope": -1.0,
}


def answered(alarm=Cause.NONE, regime=None, shown=None, run=None, found=None, **before):
    """The same after a step with that alarm, from what `BEFORE` says."""
    flags = dict.fromkeys(("long", "suspicion", "calm", "empty"), False) | (found or {})
    diagnosis = Diagnosis(
        alarm=jnp.int32(alarm),
        size=jnp.float32(0),
        **{name: jnp.bool_(flag) for name, flag in flags.items()},
    )
    if regime is None:
        regime = Regime.STRESS if alarm == Cause.NONE else Regime.SPIKE
    shown = telemetry(**{"step_norm": 2.0} | (shown or {}))
    return decided(BEFORE | before, regime, diagnosis, shown, signals(**run or {}))


@pytest.mark.parametrize("cause", [Cause.OVERSHOOT, Cause.COLLAPSE, Cause.LOSS_JUMP])
@pytest.mark.parametrize(
    ("overshoot", "keep"),
    [
        (4.0, (LAW.cut_noise / 2) ** 0.5),
        (0.0, LAW.cut_limit),
        (-9.0, LAW.cut_limit),
        (0.1, LAW.cut),
    ],
)
def test_a_backtrack_leaves_what_would_have_overshot_by_little(cause, overshoot, keep):
    command, after = answered(cause, shown={"overshoot": overshoot}, run={"noise": 2.0})
    assert command.action == Action.BACKTRACK
    assert float(command.factor) == pytest.approx(keep)
    for name in ("step_scale", "latch"):
        assert float(getattr(after, name)) == pytest.approx(keep * BEFORE["step_scale"]), name
    assert after.earned == 1
    for name in ("last_length", "last_slope"):
        assert float(getattr(after, name)) == pytest.approx(keep * BEFORE[name]), name


@pytest.mark.parametrize("cause", [Cause.NONFINITE_GRADIENT, Cause.GRADIENT_SPIKE])
def test_bad_observations_in_a_row_undo_a_part_and_cut_nothing(cause):
    for before in range(8):
        command, after = answered(cause, rejections=before)
        undone = 1 <= before <= LAW.repeat_backtracks
        assert command.action == (Action.BACKTRACK if undone else Action.HOLD)
        share = LAW.cut if undone else 1
        for name in ("last_length", "last_slope"):
            assert float(getattr(after, name)) == pytest.approx(share * BEFORE[name]), name
        for name in ("step_scale", "latch", "earned", "trust_radius"):
            assert float(getattr(after, name)) == pytest.approx(BEFORE[name]), name
        assert after.rejections == before + 1
        assert command.factor == LAW.cut or not undone


def test_without_a_last_step_nothing_is_undone():
    command, _ = answered(Cause.NONFINITE_GRADIENT, rejections=1, last_length=0)
    assert command.action == Action.HOLD


def test_a_run_that_is_exhausted_goes_on_from_the_lowest_scale_and_learns_nothing():
    command, after = answered(Cause.NONFINITE_GRADIENT, rejections=LIMITS.max_rejections)
    assert command.action == Action.PROCEED
    lowest = np.float32(LIMITS.min_scale)
    assert command.factor == after.step_scale == after.latch == lowest
    for name in ("earned", "trust_radius"):
        assert float(getattr(after, name)) == pytest.approx(BEFORE[name]), name


@pytest.mark.parametrize(
    ("regime", "earned", "cause"),
    [
        (Regime.STRESS, 1.0, Cause.ENVELOPE),
        (Regime.STRESS, 1 - 1e-6, Cause.ENVELOPE),
        (Regime.STRESS, 1 / LAW.growth, Cause.BOUNCE),
        (Regime.RECOVERY, 1.0, Cause.RELEASE),
        (Regime.RECOVERY, 0.5, Cause.RELEASE),
    ],
)
def test_every_shortened_step_has_its_cause(regime, earned, cause):
    command, _ = answered(regime=regime, earned=earned)
    assert command.action == Action.SCALE
    assert command.cause == cause


@pytest.mark.parametrize(
    ("regime", "scale", "grows"),
    [(Regime.STRESS, 0.5, True), (Regime.STRESS, 1.0, False), (Regime.RECOVERY, 0.5, False)],
)
def test_the_trust_radius_grows_under_stress_after_a_shortened_step(regime, scale, grows):
    _, after = answered(regime=regime, step_scale=scale, shown={"overshoot": -1.0})
    factor = LAW.trust_growth if grows else 1
    assert float(after.trust_radius) == pytest.approx(factor * BEFORE["trust_radius"])


@pytest.mark.parametrize("long", [True, False])
def test_empty_steps_neither_count_as_long_nor_part_those_that_are(long):
    for empty in (True, False):
        shown = {"step_norm": 0.0 if empty else 2.0}
        _, after = answered(shown=shown, found={"empty": empty, "long": long}, too_long=1)
        assert after.too_long == (1 if empty else 2 * long)


def test_steps_are_too_short_by_a_good_part_of_their_slope_at_the_scale_in_force():
    limit = 10.0 * LATCH / LAW.earn_straight
    assert earned(0.5, overshoot=-10.0, slope=0.99 * limit) == pytest.approx(LAW.growth)
    assert earned(0.5, overshoot=-10.0, slope=1.01 * limit) == 1
