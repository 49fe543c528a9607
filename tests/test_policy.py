"""Policy: what moves latch and earned factor, and how much of a harmful step is left."""

import jax.numpy as jnp
import optax
import pytest
from helpers import find, normal, signals, telemetry

from lbw_optax import Action, Law, Regime, guard
from lbw_optax.controller import Limits
from lbw_optax.envelope import Envelope
from lbw_optax.interpretation import diagnose
from lbw_optax.policy import decide

LAW = Law()
LIMITS = Limits(min_scale=1e-5, relative_step_limit=1.0, max_rejections=20)
STATE = find(guard(optax.sgd(1.0)).init({"w": normal(4)}))
LATCH = 0.1


def decided(length=0.0, last_overshoot=0.0, regime=Regime.STRESS, before=None, **known):
    """Command and controller after a step; `length` is in units of the latch's."""
    known_before = {"step_scale": LATCH, "latch": LATCH, "last_length": 1.0} | (before or {})
    controller = STATE.controller._replace(**{k: jnp.float32(x) for k, x in known_before.items()})
    healthy = jnp.float32(1)
    finite = dict.fromkeys(("gradient_finite", "loss_finite", "step_finite"), jnp.bool_(True))
    shown = telemetry(step_norm=length * LAW.share / LATCH, overshoot=last_overshoot)
    shown, run = shown._replace(**finite), signals(**known)
    pressure = shown.step_norm / healthy
    diagnosis = diagnose(shown, run, pressure, jnp.int32(0), jnp.bool_(True), True, LAW)
    bounds = Envelope(healthy, healthy, jnp.float32(1e3))
    return decide(
        controller,
        jnp.int32(regime),
        diagnosis,
        shown,
        run,
        bounds,
        can_undo=True,
        law=LAW,
        limits=LIMITS,
    )


def steered(length=0.0, **known):
    """The controller after a step under stress."""
    return decided(length, **known)[1]


def earned(length=0.0, **known):
    """The earned factor after a step under stress, from 1."""
    return float(steered(length, **known).earned)


COSTLY = {"overshoot": 10.0, "bearable": 0.05}
STRAIGHT = {"overshoot": -10.0, "slope": 1.0}


def test_what_costs_more_than_it_gains_is_annealed():
    assert earned(0.5, **COSTLY) == pytest.approx(1 / LAW.growth)
    assert earned(0.5, **COSTLY | {"bearable": 0.2}) == 1
    assert earned(0.5, **COSTLY, overshoot_error=9.0) == 1


def test_nothing_is_annealed_while_the_steps_are_productive():
    assert earned(0.5, **COSTLY, productive=True) == 1
    assert earned(0.5, **COSTLY, gaining=True) == pytest.approx(1 / LAW.growth)


def test_steps_that_end_on_a_slope_are_earned_back_up_to_the_latch_alone():
    assert earned(0.5, **STRAIGHT) == pytest.approx(LAW.growth)
    assert earned(0.5, **STRAIGHT, productive=True) == pytest.approx(LAW.growth)
    assert earned(0.5, **STRAIGHT, overshoot_error=6.0) == 1
    assert earned(1.0, **STRAIGHT) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    ("allowance", "share"), [(1.0, LAW.share), (1.3, LAW.share), (1.6, 0.8), (2.0, 1.0), (4.0, 1.0)]
)
def test_parameters_that_start_at_zero_get_a_larger_share_of_the_healthy_length(allowance, share):
    length = 20.0
    latch = steered(length, before={"allowance": allowance}).latch
    assert float(latch) * length * LAW.share / LATCH == pytest.approx(share)


@pytest.mark.parametrize(("length", "latch"), [(2.0, 0.5), (1.0, 1.0), (0.5, 1.0), (0.1, 2.5)])
def test_the_latch_follows_the_envelope_down_and_rises_once_steps_are_far_below_it(length, latch):
    assert float(steered(length).latch) / LATCH == pytest.approx(latch)
    assert latch == max(min(1, 1 / length), LAW.slack / length)


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


@pytest.mark.parametrize("last_overshoot", [3.1, 6.0, 9.9, 100.0])
def test_what_is_left_of_a_harmful_step_would_have_overshot_by_little(last_overshoot):
    command, after = decided(0.5, last_overshoot, regime=Regime.SPIKE, before={"earned": 1.5})
    kept = float(command.factor)
    assert command.action == Action.BACKTRACK
    assert kept**2 * last_overshoot == pytest.approx(LAW.cut_noise) or kept == pytest.approx(
        LAW.cut_limit
    )
    assert LAW.cut_limit <= kept <= LAW.cut
    assert float(after.last_length) == pytest.approx(kept)
    assert float(after.latch) == float(after.step_scale) == pytest.approx(LATCH * kept)
    assert float(after.earned) == 1
