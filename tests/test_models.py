"""The decoder: its size, shapes, causality, attention, position embedding and norm."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from model_helpers import PARAMETERS, published_config

from experiments.models.config import DecoderConfig
from experiments.models.decoder import Attention, Decoder, RMSNorm, apply_rope, rope_angles
from experiments.models.loss import next_token_loss, next_token_sums

pytestmark = pytest.mark.usefixtures("cheap_compilation")

TINY = DecoderConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=32,
)

TINYLLAMA = {
    "attention_bias": False,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}

forward = nnx.jit(lambda model, *inputs: model(*inputs))


@nnx.jit(static_argnames=("config", "remat", "dtype"))
def make(config=TINY, **settings):
    return Decoder(config, **settings, rngs=nnx.Rngs(0))


def tokens(seed, shape=(2, 9)):
    return jax.random.randint(jax.random.key(seed), shape, 0, TINY.vocab_size)


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_published_models_have_their_published_size(name, count):
    config = DecoderConfig.from_hf(published_config(name))
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


def test_from_hf_reads_both_places_of_rope_theta():
    after = {name: value for name, value in TINYLLAMA.items() if name != "rope_theta"}
    after["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default"}
    assert DecoderConfig.from_hf(after) == DecoderConfig.from_hf(TINYLLAMA)
    assert DecoderConfig.from_hf(TINYLLAMA).attention_bias is False
    assert DecoderConfig.from_hf(TINYLLAMA | {"model_type": "qwen2"}).attention_bias is True


@pytest.mark.parametrize("config", [TINY, DecoderConfig.from_hf(TINYLLAMA)])
def test_to_hf_is_read_back(config):
    assert DecoderConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("change", [{"num_key_value_heads": 3}, {"head_dim": 5}])
def test_impossible_shape_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_are_float32_of_the_right_shape(tied, dtype):
    config = dataclasses.replace(TINY, tie_word_embeddings=tied)
    logits = forward(make(config, dtype=dtype), tokens(0))
    assert logits.shape == (2, 9, TINY.vocab_size)
    assert logits.dtype == jnp.float32
    assert bool(jnp.isfinite(logits).all())


def test_too_long_a_sequence_is_refused():
    model = Decoder(dataclasses.replace(TINY, max_position_embeddings=8), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(tokens(0))


def test_causal():
    model = make()
    before = tokens(0)
    after = before.at[:, 5].add(1) % TINY.vocab_size
    difference = jnp.abs(forward(model, after) - forward(model, before)).max(axis=(0, 2))
    assert (difference[:5] == 0).all()
    assert (difference[5:] > 0).all()


def test_each_document_of_a_packed_row_is_alone():
    model = make()
    packed = tokens(0, (1, 9))
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]])
    logits = forward(model, packed, segments)
    np.testing.assert_allclose(logits[:, :4], forward(model, packed[:, :4]), atol=1e-6)
    np.testing.assert_allclose(logits[:, 4:7], forward(model, packed[:, 4:7]), atol=1e-6)
    assert bool(jnp.isfinite(logits).all())


def test_remat_changes_no_gradient():
    def grads(remat):
        graphdef, params = nnx.split(make(remat=remat))
        return jax.jit(
            jax.grad(lambda params: next_token_loss(nnx.merge(graphdef, params), tokens(0)))
        )(params)

    expected = grads("none")
    for remat in ("dots", "full"):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-6), grads(remat), expected
        )


def test_one_segment_is_no_segments():
    whole = forward(make(), tokens(0), jnp.full((2, 9), 7))
    np.testing.assert_allclose(whole, forward(make(), tokens(0)), atol=1e-6)


@pytest.mark.parametrize("setting", ["remat", "attention"])
def test_unknown_setting_is_refused(setting):
    with pytest.raises(ValueError, match=f"{setting}='fast'"):
        Decoder(TINY, rngs=nnx.Rngs(0), **{setting: "fast"})


def reference_losses(model, tokens_bt, segments_bt=None):
    segments_bt = None if segments_bt is None else segments_bt[:, :-1]
    logits_btv = forward(model, tokens_bt[:, :-1], segments_bt)
    return optax.softmax_cross_entropy_with_integer_labels(logits_btv, tokens_bt[:, 1:])


@pytest.mark.parametrize("chunk", [3, 4, 100])
def test_loss_in_chunks_is_the_mean_over_all_positions(chunk):
    model = make()
    expected = reference_losses(model, tokens(1)).mean()
    loss = nnx.jit(functools.partial(next_token_loss, chunk=chunk))(model, tokens(1))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_loss_counts_only_what_continues_a_document():
    model = make()
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 2, 2, 2, 2, 3, 3, 3]])
    targets = jnp.array([[1, 1, 1, 0, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0, 1, 1]])
    losses = reference_losses(model, tokens(1), segments)
    sums = nnx.jit(functools.partial(next_token_sums, chunk=4))
    total, count = sums(model, tokens(1), segments)
    assert count == 11
    np.testing.assert_allclose(total, (losses * targets).sum(), rtol=1e-6)
    counted = jnp.arange(8) >= 4
    total, count = sums(model, tokens(1), segments, jnp.tile(counted, (2, 1)))
    assert count == 5
    np.testing.assert_allclose(total, (losses * targets * counted).sum(), rtol=1e-6)
    assert nnx.jit(next_token_loss)(model, tokens(1), jnp.zeros((2, 9), jnp.int32)) == 0


def test_loss_never_holds_all_logits():
    model = Decoder(dataclasses.replace(TINY, vocab_size=1000), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)

    def loss(params):
        return next_token_loss(nnx.merge(graphdef, params), jnp.zeros((2, 65), jnp.int32), chunk=8)

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    assert "2x8x1000xf32" in text
    assert "2x64x1000xf32" not in text
    assert "8x2x8x1000xf32" not in text


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_multiplies_in_the_compute_dtype(tied):
    config = dataclasses.replace(TINY, vocab_size=1000, tie_word_embeddings=tied)
    graphdef, params = nnx.split(Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))

    def loss(params):
        return next_token_loss(nnx.merge(graphdef, params), jnp.zeros((2, 9), jnp.int32))

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    products = re.findall(r"dot_general .*: \((.*), (.*)\) -> (.*)", text)
    products = [product for product in products if any("1000x" in shape for shape in product)]
    assert len(products) == 3  # The logits, and the gradients of both factors.
    assert all("xbf16>" in operand for *operands, _ in products for operand in operands)


def test_grouped_attention_equals_attention_with_repeated_heads():
    grouped = Attention(TINY, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    config = dataclasses.replace(TINY, num_key_value_heads=TINY.num_attention_heads)
    full = Attention(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(1))

    def repeat(x):  # (..., k * h) -> (..., n * h), each head twice in a row
        heads = x.reshape(*x.shape[:-1], TINY.num_key_value_heads, TINY.head_dim)
        return jnp.repeat(heads, 2, axis=-2).reshape(*x.shape[:-1], -1)

    for name in ("q_proj", "o_proj"):
        nnx.update(getattr(full, name), nnx.state(getattr(grouped, name)))
    for name in ("k_proj", "v_proj"):
        state = jax.tree.map(repeat, nnx.state(getattr(grouped, name)))
        nnx.update(getattr(full, name), state)

    x = jax.random.normal(jax.random.key(2), (2, 9, TINY.hidden_size))
    cos, sin = rope_angles(jnp.arange(9)[None], TINY.head_dim, TINY.rope_theta)
    expected = forward(full, x, cos, sin)
    np.testing.assert_allclose(forward(grouped, x, cos, sin), expected, atol=1e-6)


def test_rope_products_depend_on_the_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    @jax.jit
    def product(position_q, position_k):
        cos, sin = rope_angles(jnp.array([[position_q]]), 8, 10_000.0)
        rotated_q = apply_rope(q, cos, sin)
        cos, sin = rope_angles(jnp.array([[position_k]]), 8, 10_000.0)
        return jnp.vdot(rotated_q, apply_rope(k, cos, sin))

    np.testing.assert_allclose(product(7, 3), product(104, 100), rtol=1e-4)
    assert abs(product(7, 3) - product(7, 4)) > 1e-3
    np.testing.assert_allclose(product(5, 5), jnp.vdot(q, k), rtol=1e-5)


def test_rope_angles_stay_exact_far_out():
    cos, _ = rope_angles(jnp.array([[2047]]), 4, 10_000.0)
    assert cos.dtype == jnp.float32
    np.testing.assert_allclose(cos[0, 0], np.cos([2047.0, 20.47]), atol=1e-4)


def test_rms_norm_is_taken_in_float32():
    norm = RMSNorm(4, 1e-6, param_dtype=jnp.float32)
    x = jnp.full((1, 4), 3e4, jnp.float16)  # Its square overflows float16.
    assert norm(x).dtype == jnp.float16
    np.testing.assert_allclose(norm(x), 1, rtol=1e-3)
