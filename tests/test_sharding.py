"""Sharding: where each array lives; the same losses and decisions on eight devices as on one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from model_helpers import FAMILIES, LLAMA, PARAMETERS, decoder, published_config

import lbw_optax
from experiments.lora import add_lora
from experiments.models.config import DecoderConfig
from experiments.models.decoder import Decoder
from experiments.models.sharding import (
    BATCH,
    even_spec,
    make_mesh,
    partition_spec,
    shard,
    shardings,
)
from experiments.train import next_token_loss

pytestmark = pytest.mark.usefixtures("cheap_compilation")

STEPS, BATCH_SIZE, T = 10, 8, 8
KINDS = pytest.mark.parametrize("kind", [nnx.Param, nnx.LoRAParam], ids=["full", "lora"])
RATE = 0.1  # A hundred times what is usual: the guard has to act at every step.


def split(model, kind):
    """Structure, what trains, what does not."""
    if kind is nnx.LoRAParam:
        add_lora(model, 2, 4.0, rngs=nnx.Rngs(2))
    return nnx.split(model, kind, ...)


@functools.cache
def abstract(config, kind, **settings):
    """Structure and shapes of a model: what trains, what does not."""
    graphdefs = []

    def make():
        graphdef, *state = split(Decoder(config, **settings, rngs=nnx.Rngs(0)), kind)
        graphdefs.append(graphdef)
        return state

    state = jax.eval_shape(make)
    return graphdefs[0], *state


def test_every_matrix_is_split_both_ways():
    for kind in (nnx.Param, nnx.LoRAParam):
        _, *states = abstract(LLAMA, kind)
        for state in states:
            for path, variable in nnx.to_flat_state(state):
                axes = {axis for axis in partition_spec(path, variable.ndim) if axis}
                if path[-1] in ("kernel", "embedding"):
                    assert axes == {"fsdp", "tensor"}, path
                elif path[-1] in ("lora_a", "lora_b"):
                    assert len(axes) == 1, path
                else:
                    assert path[-1] == "weight"
                    assert not axes, path


def test_specs():
    layer = ("layers", "self_attn", "q_proj")
    assert partition_spec((*layer, "kernel"), 3) == P(None, "fsdp", "tensor")
    assert partition_spec((*layer, "bias"), 2) == P(None, "tensor")
    assert partition_spec((*layer, "lora_a"), 3) == P(None, "fsdp", None)
    assert partition_spec((*layer, "lora_b"), 3) == P(None, None, "tensor")
    assert partition_spec(("layers", "mlp", "down_proj", "kernel"), 3) == P(None, "tensor", "fsdp")
    assert partition_spec(("lm_head", "kernel"), 2) == P("fsdp", "tensor")
    # In a LoRA layer, in the state of an optimizer, and as a factor of a factored moment.
    assert partition_spec((*layer, "base", "kernel"), 3) == P(None, "fsdp", "tensor")
    assert partition_spec(("inner_state", "0", "mu", *layer, "kernel"), 3)[1] == "fsdp"
    assert partition_spec(("v_row", *layer, "kernel"), 2) == P()


def test_what_does_not_divide_is_not_split():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    spec = P(None, *BATCH, "tensor")
    assert even_spec(spec, (3, 8, 2), mesh) == spec
    assert even_spec(spec, (3, 1, 2), mesh) == P(None, None, "tensor")
    assert even_spec(spec, (3, 6, 1), mesh) == P(None, "data", None)


def test_mesh_of_another_size_is_refused():
    with pytest.raises(ValueError, match="there are 8 devices"):
        make_mesh(data=3)


def train_step(tx, graphdef, frozen, carry, tokens_bt):
    params, state = carry
    loss, grads = jax.value_and_grad(next_token_loss, argnums=1)(
        graphdef, params, frozen, tokens_bt
    )
    updates, state = tx.update(grads, state, params, value=loss)
    return (optax.apply_updates(params, updates), state), loss


def train(config, kind, mesh):
    """Losses and guard state of a few stressed steps."""
    graphdef, params, frozen = split(decoder(config), kind)
    tx = lbw_optax.guard(optax.adamw(RATE))
    rng = np.random.default_rng(0)
    batches = rng.integers(0, 8, (STEPS, BATCH_SIZE, T + 1), np.int32)
    params, frozen = shard(params, mesh), shard(frozen, mesh)
    batches = jax.device_put(batches, NamedSharding(mesh, P(None, *BATCH)))
    places = shardings(jax.eval_shape(tx.init, params), mesh)
    state = jax.jit(tx.init, out_shardings=places)(params)

    @jax.jit
    def run(params, state, frozen, batches):
        step = functools.partial(train_step, tx, graphdef, frozen)
        return jax.lax.scan(step, (params, state), batches)

    with jax.set_mesh(mesh):
        (params, state), losses = run(params, state, frozen, batches)
    return losses, state, params


@FAMILIES
@KINDS
def test_eight_devices_decide_as_one(config, kind):
    one = make_mesh(devices=jax.devices()[:1])
    expected_losses, expected_state, _ = train(config, kind, one)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    losses, state, params = train(config, kind, mesh)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    events, expected_events = lbw_optax.events(state), lbw_optax.events(expected_state)
    assert len(events) > 0
    for event, expected in zip(events, expected_events, strict=True):
        for name, value in vars(expected).items():
            assert getattr(event, name) == (
                pytest.approx(value, rel=1e-3) if isinstance(value, float) else value
            )
    places = shardings(params, mesh)
    assert jax.tree.all(
        jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), params, places)
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, nnx.Param) for name in PARAMETERS]
    + [("Qwen2.5-0.5B", nnx.LoRAParam), ("TinyLlama-1.1B", nnx.LoRAParam)],
)
def test_published_models_lower_on_a_mesh(name, kind):
    """Nothing is allocated: it is traced, and every shape divides by its parts of the mesh."""
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    config = DecoderConfig.from_hf(published_config(name))
    tx = lbw_optax.guard(optax.adamw(1e-5))

    graphdef, params, frozen = abstract(config, kind, dtype=jnp.bfloat16, remat="full")
    state = jax.eval_shape(tx.init, params)

    def placed(tree):
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            tree,
            shardings(tree, mesh),
        )

    tokens = jax.ShapeDtypeStruct((8, 513), jnp.int32, sharding=NamedSharding(mesh, BATCH))

    def step(params, state, frozen, tokens_bt):
        return train_step(tx, graphdef, frozen, (params, state), tokens_bt)

    with jax.set_mesh(mesh):
        lowered = jax.jit(step).lower(placed(params), placed(state), placed(frozen), tokens)
    assert "sharding" in lowered.as_text()


def test_a_lookup_sends_vectors_and_not_the_table():
    vocabulary = 4096
    config = dataclasses.replace(LLAMA, vocab_size=vocabulary)
    mesh = make_mesh(fsdp=8)
    graphdef, params, frozen = abstract(config, nnx.Param)
    params, frozen = (
        jax.tree.map(lambda x, place: x.update(sharding=place), tree, shardings(tree, mesh))
        for tree in (params, frozen)
    )
    tokens = jax.ShapeDtypeStruct((8, T), jnp.int32, sharding=NamedSharding(mesh, BATCH))

    @jax.jit
    def hidden(params, frozen, tokens_bt):
        return nnx.merge(graphdef, params, frozen).hidden(tokens_bt)

    with jax.set_mesh(mesh):
        program = hidden.lower(params, frozen, tokens).compile().as_text()
    assert "all-to-all" in program
    gathered = [line for line in program.splitlines() if "all-gather" in line]
    assert not any(f"[{vocabulary}," in line for line in gathered)
