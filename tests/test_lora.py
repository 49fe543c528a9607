"""LoRA: starts as the base model, trains only its adapters, merges back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.lora import TARGETS, LoRALinear, add_lora, merge_lora, with_masks_of_step
from experiments.models.config import DecoderConfig
from experiments.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("cheap_compilation")

RANK, ALPHA = 3, 6.0
TOKENS = jnp.arange(14).reshape(2, 7)


forward = nnx.jit(lambda model: model(TOKENS))


@pytest.fixture
def model():
    config = DecoderConfig(16, 24, 2, 4, 2, 4, vocab_size=32)
    return nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()


def set_b(model):
    """Gives every B a value, as training would."""
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, LoRALinear):
            layer.lora_b[...] = jax.random.normal(jax.random.key(1), layer.lora_b.shape)


def test_starts_as_the_base_model(model):
    before = forward(model)
    add_lora(model, RANK, ALPHA, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(forward(model), before)


def test_every_linear_layer_of_the_layers_is_adapted(model):
    add_lora(model, RANK, ALPHA, rngs=nnx.Rngs(1))
    adapted = [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, LoRALinear)]
    assert len(adapted) == len(TARGETS)  # Each is a stack of two.
    adapters = nnx.state(model, nnx.LoRAParam)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    widths = sum(layer.base.in_features + layer.base.out_features for layer in adapted)
    assert sizes == 2 * RANK * widths


def test_layer_is_base_plus_scaled_product():
    base = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
    layer = LoRALinear(base, RANK, ALPHA, rngs=nnx.Rngs(1))
    layer.lora_b[...] = jnp.ones((RANK, 4))
    x = jax.random.normal(jax.random.key(0), (2, 5))
    expected = base(x) + ALPHA / RANK * x @ layer.lora_a[...] @ jnp.ones((RANK, 4))
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


def test_a_is_within_the_kaiming_uniform_bound():
    layer = LoRALinear(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), 32, ALPHA, rngs=nnx.Rngs(1))
    largest = float(jnp.abs(layer.lora_a[...]).max())
    assert 0.95 / 8 < largest <= 1 / 8


def test_only_adapters_have_gradients(model):
    add_lora(model, RANK, ALPHA, rngs=nnx.Rngs(1))
    graphdef, adapters, frozen = nnx.split(model, nnx.LoRAParam, ...)
    loss = jax.jit(lambda adapters: nnx.merge(graphdef, adapters, frozen)(TOKENS).var())
    grads = jax.grad(loss)(adapters)
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)
    by_name = {path[-1]: value for path, value in nnx.to_flat_state(grads)}
    assert set(by_name) == {"lora_a", "lora_b"}
    # B = 0 stops the gradient of A at the first step, not that of B.
    assert float(jnp.abs(by_name["lora_a"][...]).max()) == 0
    assert float(jnp.abs(by_name["lora_b"][...]).max()) > 0


def test_targets_choose_the_layers(model):
    add_lora(model, RANK, ALPHA, targets=("q_proj", "v_proj"), rngs=nnx.Rngs(1))
    names = {path[-2] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))}
    assert names == {"q_proj", "v_proj"}


@pytest.mark.parametrize("change", [{"rank": 0}, {"dropout": 1.0}, {"targets": ("q", "v_proj")}])
def test_impossible_adapters_are_refused(model, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        add_lora(model, **{"rank": RANK, "alpha": ALPHA, "rngs": nnx.Rngs(1)} | change)


def test_each_layer_of_the_stack_starts_on_its_own(model):
    add_lora(model, RANK, ALPHA, rngs=nnx.Rngs(1))
    a = model.layers.self_attn.q_proj.lora_a[...]
    assert a.shape == (2, 16, RANK)
    assert not jnp.array_equal(a[0], a[1])
    assert 0.7 / 4 < float(jnp.abs(a).max()) <= 1 / 4


def test_dropout(model):
    add_lora(model, RANK, ALPHA, dropout=0.5, rngs=nnx.Rngs(1))
    set_b(model)

    @nnx.jit
    def at_step(model, step):
        graphdef, state = nnx.split(model)
        return nnx.merge(graphdef, with_masks_of_step(state, step))(TOKENS)

    first, same = (at_step(model, 2) for _ in range(2))
    np.testing.assert_array_equal(first, same)
    assert not jnp.array_equal(first, at_step(model, 3))
    keys = model.layers.self_attn.q_proj.dropout.rngs.key[...]
    assert len({tuple(key) for key in jax.random.key_data(keys).tolist()}) == 2
    model.eval()
    without = at_step(model, 2)
    assert not jnp.array_equal(first, without)
    np.testing.assert_array_equal(without, at_step(model, 3))
    merge_lora(model)
    np.testing.assert_allclose(forward(model), without, atol=1e-4)


def test_merge_keeps_the_outputs(model):
    add_lora(model, RANK, ALPHA, rngs=nnx.Rngs(1))
    set_b(model)
    before = forward(model)
    merge_lora(model)
    assert not jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    np.testing.assert_allclose(forward(model), before, atol=1e-4)
