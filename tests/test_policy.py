"""Policy: what moves latch and earned factor under stress."""

import jax.numpy as jnp
import optax
import pytest
from helpers import find, normal, signals, telemetry

from lbw_optax import Law, Regime, guard
from lbw_optax.controller import Limits
from lbw_optax.envelope import Envelope
from lbw_optax.interpretation import diagnose
from lbw_optax.policy import decide

LAW = Law()
LIMITS = Limits(min_scale=1e-5, relative_step_limit=1.0, max_rejections=20)
STATE = find(guard(optax.sgd(1.0)).init({"w": normal(4)}))
LATCH = 0.1


def steered(length=0.0, allowance=1.0, **known):
    """The controller after a step under stress; `length` is in units of the latch's."""
    controller = STATE.controller._replace(
        step_scale=jnp.float32(LATCH),
        latch=jnp.float32(LATCH),
        earned=jnp.float32(1),
        allowance=jnp.float32(allowance),
    )
    healthy = jnp.float32(1)
    finite = dict.fromkeys(("gradient_finite", "loss_finite", "step_finite"), jnp.bool_(True))
    shown = telemetry(step_norm=length * LAW.share / LATCH)._replace(**finite)
    run = signals(**known)
    pressure = shown.step_norm / healthy
    diagnosis = diagnose(shown, run, pressure, jnp.int32(0), jnp.bool_(True), True, LAW)
    stress, bounds = jnp.int32(Regime.STRESS), Envelope(healthy, healthy, jnp.float32(1e3))
    _, after = decide(
        controller, stress, diagnosis, shown, run, bounds, can_undo=True, law=LAW, limits=LIMITS
    )
    return after


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
    latch = steered(length, allowance).latch
    assert float(latch) * length * LAW.share / LATCH == pytest.approx(share)
