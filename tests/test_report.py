"""Reading a guard: found wherever it sits, plain words, clear errors."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from lbw_optax import Action, Cause, Event, Regime, events, guard, report

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
NAN = jax.tree.map(lambda x: x * jnp.nan, PARAMS)


def inner():
    return guard(optax.adam(1e-3))


PLACES = {
    "alone": inner,
    "chain": lambda: optax.chain(optax.clip(1e3), inner()),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(1e3)), ("guarded", inner())),
    "masked": lambda: optax.masked(inner(), {"w": True, "b": False}),
    "partition": lambda: optax.partition(
        {"a": inner(), "b": optax.set_to_zero()}, {"w": "a", "b": "b"}
    ),
    "nested": lambda: optax.chain(optax.masked(optax.chain(inner()), {"w": True, "b": True})),
    "apply_if_finite": lambda: optax.apply_if_finite(inner(), 3),
}


def one_step(tx, grads=PARAMS, params=PARAMS, **extra):
    tx = optax.with_extra_args_support(tx)
    return tx.update(grads, tx.init(params), params, **extra)[1]


@pytest.mark.parametrize("place", PLACES)
def test_guard_is_found_inside(place):
    grads = PARAMS if place == "apply_if_finite" else NAN
    state = one_step(PLACES[place](), grads, value=jnp.ones([]))
    summary = report(state)
    assert summary.steps == 1
    assert summary.held_steps == (place != "apply_if_finite")
    assert len(events(state)) == summary.events_recorded


def test_guard_is_found_in_an_nnx_optimizer():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, inner(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        value, grads = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
        optimizer.update(model, grads, value=value)

    step(model, optimizer, jnp.ones((4, 2)))
    step(model, optimizer, jnp.full((4, 2), jnp.nan))
    summary = report(optimizer.opt_state)
    assert (summary.steps, summary.held_steps) == (2, 1)
    assert summary.sensors_off == ()
    assert isinstance(str(summary), str)
    assert [e.step for e in events(optimizer.opt_state)] == [1]


class GuardedTrainState(TrainState):
    """The recipe: a train state that hands the loss on."""

    def apply_gradients(self, *, grads, value, **kwargs):
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, value=value)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)


def test_guard_is_found_in_a_train_state():
    state = GuardedTrainState.create(apply_fn=None, params=PARAMS, tx=inner())
    state = state.apply_gradients(grads=NAN, value=jnp.ones([]))
    assert report(state.opt_state).held_steps == 1
    assert report(state).held_steps == 1


@pytest.mark.parametrize("read", [report, events])
def test_no_guard_or_two_guards_is_an_error_that_says_so(read):
    with pytest.raises(ValueError, match="exactly one guard, found 0"):
        read(optax.adam(1e-3).init(PARAMS))
    with pytest.raises(ValueError, match="exactly one guard, found 2"):
        read(optax.chain(inner(), inner()).init(PARAMS))


@pytest.mark.parametrize("read", [report, events])
def test_states_of_several_runs_are_read_one_by_one(read):
    states = jax.vmap(lambda scale: inner().init({"w": scale * jnp.ones(3)}))(jnp.ones(2))
    with pytest.raises(ValueError, match=r"one run, got axes \(2,\)"):
        read(states)
    assert read(jax.tree.map(lambda x: x[1], states)) == read(inner().init({"w": jnp.ones(3)}))


@pytest.mark.parametrize("read", [report, events])
def test_a_guard_inside_a_guard_is_two(read):
    with pytest.raises(ValueError, match="found 2"):
        read(guard(inner()).init(PARAMS))


@pytest.mark.parametrize("read", [report, events])
def test_states_without_numbers_are_refused(read):
    state = inner().init(PARAMS)
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda s: read(s) and 0)(state)
    with pytest.raises(ValueError, match="outside jit"):
        read(jax.eval_shape(inner().init, PARAMS))
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="outside jit"):
        read(nnx.eval_shape(lambda: nnx.Optimizer(model, inner(), wrt=nnx.Param)).opt_state)


def test_fresh_guard_reports_nothing():
    state = inner().init(PARAMS)
    summary = report(state)
    assert (summary.steps, summary.regime, summary.scale) == (0, "STABLE", 1.0)
    assert summary.causes == {}
    assert events(state) == []
    assert "STABLE after 0 steps" in str(summary)


def test_sensors_off_names_what_was_not_given():
    assert report(one_step(inner(), value=jnp.ones([]))).sensors_off == ()
    assert report(one_step(inner())).sensors_off == ("loss",)
    tx = inner()
    _, state = tx.update(PARAMS, tx.init(PARAMS), value=jnp.ones([]))
    assert report(state).sensors_off == ("relative step",)
    blind = guard(optax.adam(1e-3), memory="none")
    _, state = blind.update(PARAMS, blind.init(PARAMS))
    assert report(state).sensors_off == ("loss", "relative step", "overshoot")
    assert "sensors off: loss, relative step, overshoot" in str(report(state))


def test_report_in_words_tells_what_happened():
    tx = guard(optax.adam(1e-3), log_size=1)
    state = tx.init(PARAMS)
    for grads in (PARAMS, NAN, PARAMS, NAN):
        _, state = tx.update(grads, state, PARAMS, value=jnp.ones([]))
    text = str(report(state))
    assert f"{report(state).regime} after 4 steps" in text
    assert "held 2" in text
    assert "non-finite 2" in text
    assert "NONFINITE_GRADIENT 2" in text
    assert f"dropped its {report(state).events_dropped} oldest" in text
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_event_holds_plain_python_values():
    (event,) = events(one_step(inner(), NAN, value=jnp.ones([])))
    assert event == Event(
        step=0,
        cause=Cause.NONFINITE_GRADIENT.name,
        regime_before=Regime.STABLE.name,
        regime_after=Regime.SPIKE.name,
        action=Action.HOLD.name,
        scale=1.0,
        size=event.size,
    )
    assert {type(x) for x in vars(event).values()} == {int, str, float}


def test_counters_stay_at_the_end_of_their_range():
    tx, params = guard(optax.sgd(0.1)), jnp.ones(2)
    state = tx.init(params)
    last = 2**31 - 1
    counted = state.ledger._replace(steps=jnp.int32(last), recorded=jnp.int32(last))
    _, state = tx.update(jnp.full(2, jnp.nan), state._replace(ledger=counted), params)
    assert report(state).steps == report(state).events_recorded == last


def test_two_guards_are_read_one_by_one():
    tx = optax.partition({"a": inner(), "b": inner()}, {"w": "a", "b": "b"})
    state = one_step(tx, {"w": NAN["w"], "b": PARAMS["b"]}, value=jnp.ones([]))
    held = [report(state.inner_states[k]).held_steps for k in ("a", "b")]
    assert held == [1, 0]


def test_non_finite_steps_are_those_that_showed_something_non_finite():
    """Each of several in a row, and neither a spike nor a mere switch of the regime."""
    tx = inner()
    state = tx.init(PARAMS)
    spike = jax.tree.map(lambda x: 1e6 * x, PARAMS)
    for grads in (PARAMS, NAN, NAN, NAN, NAN, PARAMS, spike, PARAMS):
        _, state = tx.update(grads, state, PARAMS, value=jnp.ones([]))
    summary = report(state)
    assert summary.nonfinite_steps == 4
    assert summary.causes["GRADIENT_SPIKE"] == 1
    assert (summary.held_steps, summary.backtracks) == (2, 3)


def test_fresh_guard_has_no_sensor_off():
    assert report(inner().init(PARAMS)).sensors_off == ()


def test_report_in_words_tells_the_share_of_active_steps():
    tx = inner()
    state = tx.init(PARAMS)
    for grads in (PARAMS, NAN, PARAMS, PARAMS):
        _, state = tx.update(grads, state, PARAMS, value=jnp.ones([]))
    assert report(state).control_active_steps == 1
    assert "active in 1 steps (25.0 %)" in str(report(state))
