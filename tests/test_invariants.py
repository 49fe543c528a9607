"""The invariants of the guard, as properties over arbitrary streams of gradients and losses."""

import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import actions, at, bits, exact_jit, feed, find, is_finite, norm, normal, with_gain
from hypothesis import given

from lbw_optax import Action, Law, events, guard, report
from lbw_optax.sensing import became_nonfinite, count_nonfinite, is_inexact

STEPS = 24
MAX_REJECTIONS = 3
MIN_SCALE = 1e-6
LIMIT = 0.5
LAW = Law()
REJECTED = (Action.HOLD, Action.BACKTRACK)


TREES = {
    "vector": normal(7),
    "nested": {"a": {"w": normal(2, 3), "b": normal(3)}, "none_here": ()},
    "bfloat16": {"w": normal(4, 2, dtype=jnp.bfloat16)},
    "mixed": {
        "w": normal(2, 2),
        "half": normal(3, dtype=jnp.bfloat16),
        "index": jnp.arange(3, dtype=jnp.int32),
        "frozen": None,
        "masked": optax.MaskedNode(),
    },
    "one": jnp.float32(2) * jnp.ones([], jnp.float32),
    "zeros": {"w": jnp.zeros((3, 2)), "no_rows": jnp.zeros((0, 2))},
    "empty": {},
}


def floats_only(inner):
    """Returns `inner` on the floating-point leaves; integer updates pass through."""
    return optax.masked(inner, lambda tree: jax.tree.map(is_inexact, tree))


INNERS = {
    "adam": floats_only(optax.adam(1e-2)),
    "momentum": floats_only(optax.sgd(1e-1, momentum=0.9)),
}
CASES = [
    ("vector", "adam", "step"),
    ("nested", "momentum", "step"),
    ("bfloat16", "adam", "step"),
    ("mixed", "adam", "step"),
    ("one", "momentum", "step"),
    ("zeros", "adam", "step"),
    ("empty", "adam", "step"),
    ("nested", "adam", "none"),
    ("vector", "momentum", "sparse"),
]
every_case = pytest.mark.parametrize(
    ("tree", "inner", "memory"), CASES, ids=["-".join(c) for c in CASES]
)

SPECIAL = (0.0, -0.0, 1e-45, 1e-38, 1e19, 1e38, -1e38, math.nan, math.inf, -math.inf)
MAGNITUDES = (0.0, 1e-38, 1e-19, 1e-3, 1.0, 1.0, 1.0, 1.0, 1e4, 1e8, 1e15, 1e18)
SCALARS = st.one_of(st.sampled_from((0.0, 1.0, -1.0, 1e-30, 1e25, *SPECIAL)), st.floats(width=32))


class Stream(dict):
    """A drawn stream; a failing example names its seed, not its numbers."""

    def __repr__(self):
        return "a stream"


@st.composite
def streams(draw, tree):
    """Draws a stream for `tree`: long calm stretches, level shifts, faults of every kind."""
    params = TREES[tree]
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    magnitude, value, gain = np.ones(STEPS), np.ones(STEPS), np.ones(STEPS)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, STEPS - 1))
        stop = start + draw(st.sampled_from((1, 1, 2, 8, STEPS)))
        what = draw(st.sampled_from(("magnitude", "value", "gain")))
        if what == "magnitude":
            magnitude[start:stop] = draw(st.sampled_from(MAGNITUDES))
        elif what == "value":
            value[start:stop] = draw(SCALARS)
        else:
            gain[start:stop] = draw(st.sampled_from((0.0, 1e-6, 30.0, 1e6, *SPECIAL)))
    bad = draw(st.lists(st.tuples(st.integers(0, STEPS - 1), st.sampled_from(SPECIAL)), max_size=6))
    drift = draw(st.sampled_from((0.0, 1.0)))
    leaves, structure = jax.tree.flatten(params)
    filled = []
    for p in leaves:
        if not is_inexact(p):
            filled.append(np.zeros((STEPS, *p.shape), p.dtype))
            continue
        g = drift + rng.standard_normal((STEPS, *p.shape))
        with np.errstate(all="ignore"):
            g = (g * magnitude.reshape(-1, *[1] * p.ndim)).astype(np.float32)
            for step, entry in bad:
                if p.size:
                    g[step].reshape(-1)[:1] = entry if p.ndim else 0
                    g[step] = entry if not p.ndim else g[step]
            filled.append(g.astype(p.dtype))
    loss = (value * (1 + 0.1 * rng.standard_normal(STEPS))).astype(np.float32)
    grads = jax.tree.unflatten(structure, filled)
    return Stream(grads=grads, value=loss, gain=gain.astype(np.float32))


@functools.cache
def runner(tree, inner, memory):
    tx = guard(
        with_gain(INNERS[inner]),
        memory=memory,
        min_scale=MIN_SCALE,
        relative_step_limit=LIMIT,
        max_rejections=MAX_REJECTIONS,
        log_size=STEPS,
    )
    run = exact_jit(functools.partial(feed, tx))
    return lambda stream: jax.device_get(run(TREES[tree], dict(stream)))


def scales(states):
    return np.asarray(find(states).controller.step_scale, np.float64)


def rejections(taken):
    """Returns the number of held or undone steps in a row, after each step."""
    rows, row = [], 0
    for action in taken:
        row = row + 1 if action in REJECTED else 0
        rows.append(row)
    return rows


@every_case
@given(data=st.data())
def test_1_scale_stays_in_range_and_rises_slowly(tree, inner, memory, data):
    _, _, states = runner(tree, inner, memory)(data.draw(streams(tree)))
    scale = scales(states)
    assert np.all(scale >= np.float32(MIN_SCALE))
    assert np.all(scale <= 1)
    assert np.all(scale[1:] <= LAW.rise_limit * scale[:-1] * (1 + 1e-6))


@every_case
@given(data=st.data())
def test_2_emitted_update_is_finite_whenever_the_parameters_are(tree, inner, memory, data):
    params, updates, _ = runner(tree, inner, memory)(data.draw(streams(tree)))
    for i in range(STEPS):
        if is_finite(at(params, i)):
            assert is_finite(at(updates, i)), i


def test_2_steps_beyond_the_dtype_of_parameters_that_are_not_given_stay_finite():
    tx = guard(optax.scale(-1.0))
    state = tx.init(jnp.ones(3, jnp.float16))
    for _ in range(3):
        updates, state = tx.update(jnp.full(3, 1e6), state)
        assert is_finite(updates)
        assert is_finite(state.last_step)


@every_case
@given(data=st.data())
def test_3_step_is_inside_the_envelope(tree, inner, memory, data):
    params, updates, states = runner(tree, inner, memory)(data.draw(streams(tree)))
    size = sum(p.size for p in jax.tree.leaves(TREES[tree]) if is_inexact(p))
    rounding = 1e-2 if tree in ("bfloat16", "mixed") else 1e-5
    for i, action in enumerate(actions(states)):
        p = at(params, i)
        if not is_finite(p):
            break
        length = norm(at(updates, i))
        if action == Action.BACKTRACK:
            undone = norm(at(find(states).last_step, i - 1))
            assert length <= undone * (1 + rounding), i
        else:
            assert length <= LIMIT * max(norm(p), math.sqrt(size)) * (1 + rounding), i


@every_case
@given(data=st.data())
def test_4_never_more_rejections_in_a_row_than_allowed(tree, inner, memory, data):
    _, _, states = runner(tree, inner, memory)(data.draw(streams(tree)))
    taken = actions(states)
    rows = rejections(taken)
    assert max(rows) <= MAX_REJECTIONS
    for i, action in enumerate(taken):
        if action == Action.PROCEED:
            assert rows[i - 1] == MAX_REJECTIONS
            assert scales(states)[i] == np.float32(MIN_SCALE)
    assert report(at(states, -1)).exhausted_steps == taken.count(Action.PROCEED)


@pytest.mark.parametrize("what", ["grads", "value", "gain"])
def test_4_endless_fault_never_stalls_in_silence(what):
    stream = {"grads": np.ones((STEPS, 7), np.float32), "value": np.ones(STEPS, np.float32)}
    stream["gain"] = np.ones(STEPS, np.float32)
    stream[what] = stream[what] * np.float32(math.nan)
    params, _, states = runner("vector", "momentum", "step")(stream)
    taken = actions(states)
    period = MAX_REJECTIONS + 1
    assert [i for i, a in enumerate(taken) if a == Action.PROCEED] == list(
        range(MAX_REJECTIONS, STEPS, period)
    )
    last = report(at(states, -1))
    assert last.exhausted_steps == STEPS // period
    assert last.causes["EXHAUSTED"] == STEPS // period
    assert is_finite((params, states))


@functools.cache
def inner_alone(tree, inner):
    """Returns the inner optimizer's own answer to every step of a guarded run."""
    tx = with_gain(INNERS[inner])

    def answer(params, state, now):
        extra = {k: v for k, v in now.items() if k != "grads"}
        return tx.update(now["grads"], state, params, **extra)

    run = exact_jit(lambda *stream: jax.lax.map(lambda now: answer(*now), stream))
    start = jax.device_get(tx.init(TREES[tree]))

    def call(params, states, stream):
        before = jax.tree.map(
            lambda a, b: np.concatenate([np.asarray(a)[None], b[:-1]]), start, states
        )
        return before, *jax.device_get(run(params, before, dict(stream)))

    return call


@every_case
@given(data=st.data())
def test_6_inner_state_is_the_old_one_or_as_the_inner_made_it(tree, inner, memory, data):
    stream = data.draw(streams(tree))
    params, updates, states = runner(tree, inner, memory)(stream)
    kept = find(states).inner_state
    before, steps, made = inner_alone(tree, inner)(params, kept, stream)
    for i, action in enumerate(actions(states)):
        old, new, now = at(before, i), at(made, i), at(kept, i)
        if action in REJECTED:
            assert bits(now) == bits(old), i
        elif action == Action.PROCEED:
            jax.tree.map(_check_proceeded, old, new, now)
        else:
            assert bits(now) == bits(new), i
        if action == Action.PASS:
            assert bits(at(updates, i)) == bits(at(steps, i)), i


def _check_proceeded(old, new, now):
    stored = ~np.isfinite(old.astype(np.float64)) | np.isfinite(new.astype(np.float64))
    np.testing.assert_array_equal(now, np.where(stored, new, old))


# Invariance. Gradients are small multiples of 1/8 and lion takes their sign: all sums are exact.
SHAPES = {
    "vector": lambda v: v,
    "leaves": lambda v: [v[:1], v[1:2], v[2:5], v[5:]],
    "nested": lambda v: {"a": {"m": v[:6].reshape(2, 3), "x": v[6]}, "b": [v[7:9], v[9:]]},
}


@st.composite
def dyadic_streams(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    level = np.ones(STEPS)
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, STEPS - 1))
        stop = start + draw(st.integers(1, 6))
        level[start:stop] = draw(st.sampled_from((0.0, 0.125, -1.0, 8.0, 256.0, math.nan)))
    drift = draw(st.sampled_from((-4, 0, 4)))
    grads = (drift + rng.integers(-8, 9, (STEPS, 12))) / 8 * level[:, None]
    jump = draw(st.sampled_from((1.0, 4.0, 64.0, math.nan)))
    loss = 1 + rng.integers(-8, 9, STEPS) / 32
    loss[draw(st.integers(0, STEPS - 1)) :][:3] *= jump
    return Stream(grads=grads.astype(np.float32), value=loss.astype(np.float32))


# The zeros are a leaf of their own in some of the shapes.
START = jnp.asarray(np.r_[np.zeros(4), np.arange(1, 9)] / 4, jnp.float32)
RATES = (2.0**-12, 2.0**-4)


@functools.cache
def invariance_runner(shape, rate, inner="lion"):
    make = {
        "lion": lambda: optax.lion(rate, weight_decay=0.0),
        "adam": lambda: optax.adam(rate, eps=0.0),
    }
    tx = guard(make[inner](), log_size=STEPS, max_rejections=MAX_REJECTIONS)
    reshape = SHAPES[shape]

    def run(stream):
        grads = jax.vmap(reshape)(stream["grads"])
        return feed(tx, reshape(START), {"grads": grads, "value": stream["value"]})

    run = exact_jit(run)
    return lambda stream: jax.device_get(run(dict(stream)))


def decisions(states):
    """Returns what was decided: actions, and cause, regime and scale of every event."""
    log = [
        (e.step, e.cause, e.regime_before, e.regime_after, e.action) for e in events(at(states, -1))
    ]
    return actions(states), log


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("shape", ["leaves", "nested"])
@given(data=st.data())
def test_7_decisions_do_not_depend_on_the_shape_of_the_tree(shape, rate, data):
    stream = data.draw(dyadic_streams())
    _, flat, expected = invariance_runner("vector", rate)(stream)
    _, updates, states = invariance_runner(shape, rate)(stream)
    assert decisions(states) == decisions(expected)
    np.testing.assert_allclose(scales(states), scales(expected), rtol=1e-5)
    got = np.concatenate([u.reshape(STEPS, -1) for u in jax.tree.leaves(updates)], axis=1)
    if shape == "nested":
        np.testing.assert_allclose(got, flat, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("inner", ["lion", "adam"])
@pytest.mark.parametrize("power", [-20, 20])
@given(data=st.data())
def test_7_decisions_do_not_depend_on_the_scale_of_the_loss(power, inner, rate, data):
    stream = data.draw(dyadic_streams())
    stream["grads"] = np.where(stream["grads"] == 0, np.float32(0.0625), stream["grads"])
    run = invariance_runner("vector", rate, inner)
    _, flat, expected = run(stream)
    larger = {k: v * np.float32(2.0**power) for k, v in stream.items()}
    _, updates, states = run(larger)
    assert decisions(states) == decisions(expected)
    assert bits(find(states).controller.step_scale) == bits(find(expected).controller.step_scale)
    assert bits(updates) == bits(flat)


@every_case
@given(data=st.data())
def test_8_statistics_stay_finite(tree, inner, memory, data):
    _, _, states = runner(tree, inner, memory)(data.draw(streams(tree)))
    s = find(states)
    assert is_finite((s.statistics, s.controller, s.last_step))
    assert is_finite((s.ledger.control_energy, s.ledger.min_scale_seen))


@given(
    at_steps=st.lists(st.integers(1, STEPS - 1), min_size=1, max_size=5, unique=True),
    what=st.sampled_from(["grads", "value", "gain"]),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_8_non_finite_observations_leave_no_trace_in_the_statistics(at_steps, what, bad):
    rng = np.random.default_rng(0)
    clean = {
        "grads": {"a": {"w": 1 + 0.1 * rng.standard_normal((STEPS, 2, 3))}},
        "value": 1 + 0.1 * rng.standard_normal(STEPS),
        "gain": np.full(STEPS, 1e-2),
    }
    clean["grads"]["a"]["b"] = 1 + 0.1 * rng.standard_normal((STEPS, 3))
    clean["grads"]["none_here"] = ()
    clean = jax.tree.map(np.float32, clean)
    alone = [i for i in sorted(at_steps) if i - 1 not in at_steps]
    order = np.insert(np.arange(STEPS), alone, 0)[:STEPS]
    faulty = jax.tree.map(lambda x: x[order], clean)
    held = np.asarray(alone) + np.arange(len(alone))
    held = held[held < STEPS]
    faulty[what] = jax.tree.map(lambda x: _with(x, held, bad), faulty[what])
    run = runner("nested", "momentum", "step")
    _, _, expected = run(clean)
    _, _, states = run(faulty)
    assert actions(states).count(Action.HOLD) == len(held)
    last = STEPS - 1 - len(held)
    assert bits(at(find(states).statistics, -1)) == bits(at(find(expected).statistics, last))


def _with(x, steps, value):
    x = x.copy()
    x[steps] = value
    return x


ENTRIES = st.lists(st.one_of(SCALARS, st.sampled_from(SPECIAL)), min_size=6, max_size=6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(old=ENTRIES, new=ENTRIES)
def test_8_an_entry_that_is_not_finite_is_found_and_no_large_one(dtype, old, new):
    old, new = (jnp.asarray(x, dtype).reshape(3, 2) for x in (old, new))
    before, after = (~np.isfinite(np.asarray(x, np.float32)).all(axis=1) for x in (old, new))
    assert count_nonfinite(list(new)) == after.sum()
    assert became_nonfinite(list(old), list(new), scalars=False) == (after & ~before).sum()
    assert became_nonfinite({"count": new[0, 0]}, {"count": jnp.inf}, scalars=False) == 0


@every_case
@given(data=st.data())
def test_9_counters_equal_the_events(tree, inner, memory, data):
    _, _, states = runner(tree, inner, memory)(data.draw(streams(tree)))
    last, taken = at(states, -1), actions(states)
    made, summary = events(last), report(last)
    regimes = [0, *np.asarray(find(states).regime).tolist()]
    switches = [i for i in range(STEPS) if regimes[i] != regimes[i + 1]]
    active = [i for i, a in enumerate(taken) if a != Action.PASS]
    assert [e.step for e in made] == sorted({*switches, *active})
    assert [Action[e.action] for e in made] == [taken[e.step] for e in made]
    assert summary.steps == STEPS
    assert summary.events_recorded == len(made)
    assert summary.events_dropped == 0
    assert summary.regime_switches == len(switches)
    assert summary.control_active_steps == len(active)
    assert summary.actions == {a.name: taken.count(a) for a in Action}
    assert sum(summary.causes.values()) == len(made)
    for cause, number in summary.causes.items():
        assert sum(e.cause == cause for e in made) == number
    scale = scales(states)
    for e in made:
        assert e.scale == scale[e.step]
    np.testing.assert_allclose(summary.control_energy, np.sum(np.log(scale) ** 2), rtol=1e-4)
    assert summary.min_scale_seen == scale.min()


@given(size=st.sampled_from([1, 3]), held=st.sets(st.integers(0, STEPS - 1), max_size=9))
def test_9_a_small_log_keeps_the_latest_events_oldest_first(size, held):
    grads = np.ones((STEPS, 3), np.float32)
    grads[sorted(held)] = math.nan
    stream = {"grads": grads, "value": np.ones(STEPS, np.float32)}
    small, large = (_logged(n)(jnp.ones(3), stream) for n in (size, STEPS))
    everything, kept = events(at(large[2], -1)), events(at(small[2], -1))
    assert kept == everything[-size:]
    summary = report(at(small[2], -1))
    assert summary.events_recorded == len(everything)
    assert summary.events_dropped == max(len(everything) - size, 0)


@functools.cache
def _logged(size):
    return exact_jit(functools.partial(feed, guard(optax.sgd(1e-6), log_size=size)))
