"""The contract matrix: every kind of optimizer in every way that JAX and Optax use one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import at, bits, exact_jit, feed, find, is_finite, types
from jax.sharding import AxisType, NamedSharding
from optax import contrib

from lbw_optax import guard, report

STEPS, NAN_STEP, SPIKE_STEP = 6, 2, 4
LABELS = {"w": "first", "b": "second"}


def multi_steps(tx):
    """Returns `MultiSteps` as a transformation that still takes the loss."""
    steps = optax.MultiSteps(tx, 2)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


INNERS = {
    "adamw": optax.adamw,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "lion": optax.lion,
    "adafactor": lambda rate: optax.adafactor(rate, min_dim_size_to_factor=4),
    "muon": contrib.muon,
    "clip": lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate)),
    "schedule": lambda rate: optax.adam(optax.cosine_decay_schedule(rate, 100)),
    "inject": lambda rate: optax.inject_hyperparams(optax.adam)(learning_rate=rate),
    "masked": lambda rate: optax.chain(
        optax.masked(optax.trace(0.9), {"w": True, "b": False}), optax.scale(-rate)
    ),
    "partition": lambda rate: optax.partition(
        {"first": optax.adam(rate), "second": optax.sgd(rate)}, LABELS
    ),
    "multi_steps_inside": lambda rate: multi_steps(optax.adamw(rate)),
    "multi_steps_outside": optax.adamw,
    "schedule_free": contrib.schedule_free_adamw,
    "apply_if_finite": lambda rate: optax.apply_if_finite(optax.adam(rate), 3),
}
every_inner = pytest.mark.parametrize("name", INNERS)
STRESSED, IDLE = 0.1, 1e-6


@functools.cache
def bare(name, rate=STRESSED):
    tx = INNERS[name](rate)
    tx = multi_steps(tx) if name == "multi_steps_outside" else tx
    return optax.with_extra_args_support(tx)


@functools.cache
def guarded(name, rate=STRESSED, **kwargs):
    tx = guard(INNERS[name](rate), **kwargs)
    return multi_steps(tx) if name == "multi_steps_outside" else tx


def params(dtype="float32"):
    """Returns fresh parameters, so that they may be donated."""
    first, second = {"mixed": ("float32", "bfloat16")}.get(dtype, (dtype, dtype))
    rng = np.random.default_rng(0)
    return {
        "w": jnp.array(rng.standard_normal((8, 16)), first),
        "b": jnp.array(rng.standard_normal(8), second),
    }


def stream(faults=True, dtype="float32", seed=1):
    """Returns gradients and losses with, unless told otherwise, a NaN and a spike among them."""
    rng = np.random.default_rng(seed)
    factor = np.ones(STEPS)
    if faults:
        factor[[NAN_STEP, SPIKE_STEP]] = np.nan, 1e6
    grads = jax.tree.map(
        lambda p: np.asarray(
            (1 + rng.standard_normal((STEPS, *p.shape))) * factor.reshape(-1, *[1] * p.ndim),
            p.dtype,
        ),
        params(dtype),
    )
    return {"grads": grads, "value": np.float32(1 + 0.1 * rng.standard_normal(STEPS))}


def take_step(tx, p, state, now):
    updates, state = tx.update(now["grads"], state, p, value=now["value"])
    return optax.apply_updates(p, updates), state


@functools.cache
def compiled(name):
    return exact_jit(functools.partial(take_step, guarded(name)), donate_argnums=(0, 1))


def run(name, data, steps=STEPS):
    """Returns parameters and state after each step, all of it from one compiled step."""
    p = params()
    state, history = guarded(name).init(p), []
    for i in range(steps):
        p, state = compiled(name)(p, state, at(data, i))
        history.append(jax.tree.map(np.array, (p, state)))
    return history


def assert_close(got, expected, rtol=1e-4):
    """Compares two trees up to the rounding of differently compiled programs."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5)


def assert_same_decisions(got, expected):
    got, expected = report(got), report(expected)
    assert got.actions == expected.actions
    assert got.causes == expected.causes
    assert got.regime == expected.regime
    np.testing.assert_allclose(got.scale, expected.scale, rtol=1e-4)


def described(tree):
    """Returns shape, dtype, sharding and weak type of every leaf, without the mesh's name."""
    return jax.tree.map(lambda x: f"{jax.typeof(x)} {jax.typeof(x).weak_type}", tree)


def stable_types(tx, p, data):
    """Returns whether one step leaves the state's types as they were; traces, runs nothing."""
    seen = []

    def first_step(p, now):
        state = tx.init(p)
        _, after = take_step(tx, p, state, now)
        seen.append((described(state), described(after)))

    jax.jit(first_step).trace(p, at(data, 0))
    ((before, after),) = seen
    return before == after


@every_inner
def test_one_compilation_with_donated_arguments_and_constant_types(name):
    p = params()
    state = guarded(name).init(p)
    before = types(state)
    old = jax.tree.leaves((p, state))
    data = stream()
    compiled(name).clear_cache()
    for i in range(3):
        p, state = compiled(name)(p, state, at(data, i))
        assert types(state) == before
    assert compiled(name)._cache_size() == 1
    assert all(x.is_deleted() for x in old if x.size > 1)
    assert is_finite((p, find(state)))


@every_inner
def test_eager_agrees_with_jit(name):
    data = jax.tree.map(lambda x: x[NAN_STEP - 1 : NAN_STEP + 1], stream())
    expected, p = run(name, data, steps=2)[-1], params()
    state = guarded(name).init(p)
    for i in range(2):
        p, state = take_step(guarded(name), p, state, at(data, i))
    assert_close((p, state), expected)
    assert_same_decisions(state, expected[1])


@every_inner
def test_scan_under_vmap_agrees_with_a_loop(name):
    """Two runs at once, of which one has faults: neither disturbs the other."""
    streams = [stream(), stream(faults=False, seed=2)]
    both = jax.tree.map(lambda *x: jnp.stack(x), *streams)
    start = jax.tree.map(lambda x: jnp.stack([x, x]), params())
    _, _, states = exact_jit(jax.vmap(functools.partial(feed, guarded(name))))(start, both)
    for i, data in enumerate(streams):
        expected = run(name, data)[-1][1]
        state = jax.tree.map(lambda x, i=i: x[i, -1], states)
        assert_close(state, expected)
        assert_same_decisions(state, expected)


@every_inner
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
def test_types_are_constant_and_as_the_inner_makes_them(name, dtype):
    data = stream(dtype=dtype)
    if not stable_types(bare(name), params(dtype), data):
        pytest.skip("Optax: the types of the inner state change at its first step")
    assert stable_types(guarded(name), params(dtype), data)

    def update(tx, p, now):
        return tx.update(now["grads"], tx.init(p), p, value=now["value"])[0]

    args = params(dtype), at(data, 0)
    emitted, expected = (
        jax.eval_shape(functools.partial(update, f(name)), *args) for f in (guarded, bare)
    )
    assert types(emitted) == types(expected)


@every_inner
@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
def test_faults_are_survived_in_every_dtype(name, dtype):
    data = stream(dtype=dtype)
    if not stable_types(bare(name), params(dtype), data):
        pytest.skip("Optax: the types of the inner state change at its first step")
    trail, updates, states = exact_jit(functools.partial(feed, guarded(name)))(params(dtype), data)
    found = report(at(states, -1))
    assert is_finite((trail, updates, find(states)))
    assert found.nonfinite_steps >= 1
    assert found.held_steps + found.backtracks >= found.nonfinite_steps


@every_inner
def test_extra_arguments_pass_and_loss_is_another_word_for_value(name):
    p, now = params(), at(stream(), 0)
    state = guarded(name).init(p)

    def program(**extra):
        update = functools.partial(guarded(name).update, now["grads"], **extra)
        return str(jax.make_jaxpr(update)(state, p))

    expected = program(value=now["value"])
    assert program(loss=now["value"]) == expected
    assert program(value=now["value"], nobody_knows_this=1) == expected
    assert program() != expected


def test_inner_receives_the_loss_and_all_extra_arguments():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: (), update)
    tx, p = guard(inner), params()
    tx.update(p, tx.init(p), p, loss=1.5, epoch=3)
    assert seen == {"value": 1.5, "loss": 1.5, "epoch": 3}


@every_inner
def test_optax_tree_finds_and_changes_what_it_finds_without_a_guard(name):
    p = params()
    state, plain = guarded(name).init(p), bare(name).init(p)
    for key in ("count", "mu", "nu", "trace", "learning_rate", "hyperparams"):
        assert len(optax.tree.get_all_with_path(state, key)) == len(
            optax.tree.get_all_with_path(plain, key)
        ), key
    assert optax.tree.get(state, "GuardState") is not None
    changed = optax.tree.set(state, step_scale=jnp.float32(0.5))
    assert report(changed).scale == 0.5
    doubled = optax.tree.map_params(guarded(name), lambda x: x + 1, state)
    assert types(doubled) == types(state)
    assert_close(find(doubled).last_step, jax.tree.map(jnp.ones_like, p))
    assert bits(find(doubled).ledger) == bits(find(state).ledger)


@every_inner
def test_idle_is_identical_to_the_inner_alone_with_mixed_dtypes(name):
    data = stream(faults=False, dtype="mixed")
    if not stable_types(bare(name, IDLE), params("mixed"), data):
        pytest.skip("Optax: the types of the inner state change at its first step")
    ends = [
        jax.device_get(exact_jit(functools.partial(feed, f(name, IDLE)))(params("mixed"), data))
        for f in (guarded, bare)
    ]
    (got, steps, states), (expected, plain_steps, plain_states) = ends
    assert report(at(states, -1)).control_active_steps == 0
    assert bits(got) == bits(expected)
    if name == "multi_steps_outside":
        # MultiSteps multiplies the steps between two whole ones with 0: only the sign is left
        # of what the transformation inside it made of a half-filled accumulator.
        steps, plain_steps = (jax.tree.map(lambda x: x + 0, s) for s in (steps, plain_steps))
    assert bits(steps) == bits(plain_steps)
    inner = states.inner_opt_state if name == "multi_steps_outside" else states
    plain = plain_states.inner_opt_state if name == "multi_steps_outside" else plain_states
    assert bits(inner.inner_state) == bits(plain)


@every_inner
def test_init_from_shapes(name):
    p = params()
    shapes = jax.eval_shape(lambda: params())
    assert types(jax.eval_shape(guarded(name).init, shapes)) == types(guarded(name).init(p))
    try:
        bare(name).init(shapes)
    except (AttributeError, TypeError):
        pytest.skip("Optax: the inner optimizer cannot be initialised from shapes")
    assert types(guarded(name).init(shapes)) == types(guarded(name).init(p))


@pytest.mark.parametrize("memory", ["none", "sparse"])
def test_init_from_shapes_in_every_memory_mode(memory):
    tx = guard(optax.adamw(1e-3), memory=memory)
    big = {"w": jnp.ones((64, 32)), "b": jnp.ones(3)}
    assert types(tx.init(jax.eval_shape(lambda: big))) == types(tx.init(big))


@every_inner
def test_checkpoint_in_the_middle_of_an_intervention(name, tmp_path):
    data, after = stream(), NAN_STEP + 1
    history = run(name, data)
    target = jax.tree.map(jnp.array, history[after - 1])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", target)
        checkpointer.wait_until_finished()
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        p, state = checkpointer.restore(tmp_path / "checkpoint", shapes)
    assert report(state).regime != "STABLE"
    for i in range(after, STEPS):
        p, state = compiled(name)(p, state, at(data, i))
    assert bits((p, state)) == bits(history[-1])


SPECS = {"w": jax.P("x", None), "b": jax.P("x")}


def on_mesh(kind):
    return jax.make_mesh((8,), ("x",), axis_types=(kind,))


def put(tree, mesh, lead=()):
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, jax.P(*lead, *spec))), tree, SPECS
    )


def on_one_mesh(kind):
    """Returns parameters, and gradients and losses, on a mesh of eight devices."""
    mesh, data = on_mesh(kind), stream()
    return mesh, put(params(), mesh), data | {"grads": put(data["grads"], mesh, lead=(None,))}


@every_inner
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_same_decisions_on_a_mesh_of_eight_devices(name, kind):
    mesh, p, data = on_one_mesh(kind)
    with jax.set_mesh(mesh):
        if kind == AxisType.Explicit:
            try:
                stable = stable_types(bare(name), p, data)
            except Exception as error:
                pytest.skip(f"Optax: the inner optimizer fails alone: {type(error).__name__}")
            if not stable:
                pytest.skip("Optax: the types of the inner state change at its first step")
        state = guarded(name).init(p)
        before = types(state)
        step = exact_jit(functools.partial(take_step, guarded(name)))
        for i in range(STEPS):
            p, state = step(p, state, at(data, i))
        if kind == AxisType.Explicit:
            assert types(exact_jit(guarded(name).init)(p)) == before == types(state)
            assert step._cache_size() == 1
    assert_same_decisions(jax.device_get(state), run(name, stream())[-1][1])


@pytest.mark.parametrize("memory", ["none", "sparse", "step"])
@pytest.mark.parametrize("spec", [jax.P("x", None), jax.P(None, "x")], ids=str)
def test_every_memory_mode_on_an_explicit_mesh_jitted_and_eager(memory, spec):
    mesh = on_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        p = jax.device_put(jnp.ones((16, 32)), NamedSharding(mesh, spec))
        tx = guard(optax.adamw(1e-3), memory=memory)
        state = tx.init(p)
        for update in (tx.update, jax.jit(tx.update)):
            _, after = update(p, state, p, value=jnp.ones([]))
            assert types(after) == types(state)


# These need whole arrays or the whole tree, and take no axis name.
LOCAL = [name for name in INNERS if name not in ("adafactor", "muon", "clip")]


@pytest.mark.parametrize("name", LOCAL)
def test_same_decisions_inside_shard_map(name):
    mesh, tx = on_mesh(AxisType.Auto), guarded(name, axis_name="x")

    def local(p, data):
        trail, _, states = feed(tx, p, data)
        return at(trail, -1), find(states).ledger.action_counts, find(states).controller.step_scale

    lead = jax.tree.map(lambda spec: jax.P(None, *spec), SPECS)
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(SPECS, {"grads": lead, "value": jax.P()}),
        out_specs=(SPECS, jax.P(), jax.P()),
        check_vma=False,
    )
    p, counts, scale = exact_jit(mapped)(params(), stream())
    history = run(name, stream())
    for i, (_, state) in enumerate(history):
        assert np.array_equal(counts[i], find(state).ledger.action_counts)
        np.testing.assert_allclose(scale[i], find(state).controller.step_scale, rtol=1e-4)
    assert_close(p, history[-2][0])


def test_shard_map_with_checked_replication():
    """The decisions are the same on every device, and JAX can prove it."""
    mesh = on_mesh(AxisType.Auto)
    tx = guard(optax.adamw(STRESSED), axis_name="x")
    specs = jax.tree.map(
        lambda x: jax.P("x") if x.ndim else jax.P(), jax.eval_shape(tx.init, params())
    )
    replicated = jax.tree.map(lambda x: jax.P(), specs.ledger)
    specs = specs._replace(ledger=replicated)

    def local(p, state, now):
        return take_step(tx, p, state, now)

    step = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(SPECS, specs, {"grads": SPECS, "value": jax.P()}),
            out_specs=(SPECS, specs),
        )
    )
    p, data = params(), stream()
    state = tx.init(p)
    for i in range(STEPS):
        p, state = step(p, state, at(data, i))
    assert_same_decisions(jax.device_get(state), run("adamw", stream())[-1][1])


@pytest.mark.parametrize("small", [0.0, 0.01])
def test_what_starts_small_is_counted_over_all_devices(small):
    """The last shard of a padded embedding is all zeros: still one controller everywhere."""
    mesh = on_mesh(AxisType.Auto)
    tx = guard(optax.sgd(1e-3), axis_name="x")
    p = jnp.asarray(np.r_[np.ones((5, 2)), np.full((9, 2), small), np.zeros((2, 2))], jnp.float32)
    inside = jax.shard_map(
        lambda p: tx.init(p).controller.allowance[None],
        mesh=mesh,
        in_specs=jax.P("x"),
        out_specs=jax.P("x"),
        check_vma=False,
    )
    expected = guard(optax.sgd(1e-3)).init(p).controller.allowance
    np.testing.assert_allclose(inside(p), expected)
    assert tx.init(p).controller.allowance == expected


def test_hyperparameters_are_injected_through_the_guard():
    @functools.partial(optax.inject_hyperparams, static_args=("min_scale",))
    def make(learning_rate, min_scale):
        return guard(optax.adam(learning_rate), min_scale=min_scale)

    tx, p = make(1e-3, min_scale=1e-3), params()
    state = tx.init(p)
    state.hyperparams["learning_rate"] = jnp.float32(2e-3)
    step = functools.partial(tx.update, at(stream(), 0)["grads"], value=jnp.float32(1))
    updates, _ = step(state, p)
    expected, _ = guard(optax.adam(2e-3)).update(
        at(stream(), 0)["grads"], guard(optax.adam(2e-3)).init(p), p, value=jnp.float32(1)
    )
    assert_close(updates, expected)
    with pytest.raises(ValueError, match="static_args"):
        optax.inject_hyperparams(guard)(optax.sgd(1.0), min_scale=1e-3).init(p)


@pytest.mark.parametrize("memory", ["none", "sparse", "step"])
def test_integers_and_flags_keep_their_type_and_take_no_memory(memory):
    p = {"w": jnp.ones((4, 4)), "table": jnp.ones((64, 64), jnp.int8), "flag": jnp.asarray(True)}
    tx = guard(optax.set_to_zero(), memory=memory)
    tx.init({"w": jnp.ones(3), "n": 3})
    updates = jax.tree.map(jnp.ones_like, p) | {"table": jnp.ones((64, 64))}
    tx.update(updates, tx.init(p), p, value=jnp.ones([]))
    state = tx.init(p)
    updates, state = tx.update(p, state, p, value=jnp.ones([]))
    assert types(updates) == types(p)
    assert sum(x.nbytes for x in jax.tree.leaves(state.last_step)) <= p["w"].nbytes


def test_random_keys_in_the_inner_state():
    """noisy_sgd keeps a key: a held step keeps it too."""
    tx = guard(optax.noisy_sgd(1e-4, eta=1e-8, key=jax.random.key(0)))
    p, data = params(), stream()
    state = tx.init(p)
    _, held = tx.update(at(data, NAN_STEP)["grads"], state, p)
    _, taken = tx.update(at(data, 0)["grads"], state, p)
    keys = [optax.tree.get(s, "rng_key") for s in (state, held, taken)]
    same = [np.array_equal(*map(jax.random.key_data, (keys[0], k))) for k in keys[1:]]
    assert same == [True, False]


@pytest.mark.parametrize("memory", ["none", "sparse", "step"])
def test_integer_parameters_without_a_gradient(memory):
    """jax.grad gives float0 for integers when allowed to: such leaves stay out of everything."""
    p = {"w": jnp.ones(3), "index": jnp.arange(3)}
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(p)
    tx = guard(optax.masked(optax.adam(1e-3), {"w": True, "index": False}), memory=memory)
    updates, state = tx.update(grads, tx.init(p), p, value=jnp.ones([]))
    assert updates["index"].dtype == jax.dtypes.float0
    assert is_finite((updates["w"], state.statistics))
