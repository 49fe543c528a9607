"""A Qwen2.5 / Llama decoder in Flax NNX.

Axis letters in the names of arrays: b batch, t position, d hidden, n query head, k key-value head,
h head width, v vocabulary. The parameters of the layers are stacked on a leading axis, and a
forward pass scans over it: the compiled program does not grow with the number of layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from experiments.models.config import DecoderConfig
from experiments.models.sharding import BATCH, constrain

REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass finds saved of each layer: all, the products with weights, its input."""


def rope_angles(
    positions_bt: jax.Array, head_dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
    r"""Cosines and sines of the rotary position embedding.

    .. math:: \phi_{t,i} = t \, \theta^{-2i/h}, \quad i = 0, \dots, h/2 - 1

    Args:
      positions_bt: Positions, integers of shape (b, t); (1, t) where all sequences share them.
      head_dim: Width h of a head.
      theta: Base of the frequencies.

    Returns:
      cos and sin of the angles, each float32 of shape (b, t, h / 2), in any model:
      bfloat16 cannot tell neighbouring positions above 256 apart.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles_bth = positions_bt.astype(jnp.float32)[..., None] * theta**-exponents
    return jnp.cos(angles_bth), jnp.sin(angles_bth)


def segment_positions(segments_bt: jax.Array) -> jax.Array:
    """Positions that restart at 0 in each segment.

    Args:
      segments_bt: Segment numbers, integers of shape (b, t); each segment is contiguous.

    Returns:
      Positions, integers of shape (b, t).

    Example:
      >>> segment_positions(jnp.array([[1, 1, 1, 2, 2, 0]]))
      Array([[0, 1, 2, 0, 1, 0]], dtype=int32)
    """
    index_bt = jnp.broadcast_to(jnp.arange(segments_bt.shape[1]), segments_bt.shape)
    starts_bt = jnp.diff(segments_bt, axis=1, prepend=-1) != 0
    return index_bt - jax.lax.cummax(jnp.where(starts_bt, index_bt, 0), axis=1)


def apply_rope(x_btnh: jax.Array, cos_bth: jax.Array, sin_bth: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + h/2) of each head, the half-split layout of Hugging Face.

    Args:
      x_btnh: Queries or keys, shape (b, t, n, h).
      cos_bth: From `rope_angles`, shape (b, t, h / 2).
      sin_bth: From `rope_angles`, shape (b, t, h / 2).

    Returns:
      The rotated array, of the shape and dtype of `x_btnh`.
    """
    first, second = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_bth[:, :, None, :], sin_bth[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_btnh.dtype)


@jax.custom_jvp
def matmul_to_float32(x_btd: jax.Array, kernel_dv: jax.Array) -> jax.Array:
    """Product of two arrays of one dtype, in float32.

    Its gradients are products in the arrays' dtype, of the cotangent rounded to it. By itself jax
    keeps the cotangent in float32, for which a GPU needs a float32 copy of the kernel: 2.2 GB for
    the head of Qwen2.5-7B, made anew for every chunk of the loss.

    Args:
      x_btd: Activations, shape (b, t, d).
      kernel_dv: Weights, shape (d, v).

    Returns:
      The product, float32 of shape (b, t, v).
    """
    return jnp.matmul(x_btd, kernel_dv, preferred_element_type=jnp.float32)


@matmul_to_float32.defjvp
def _matmul_tangent(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    _, tangent_btv = jax.jvp(jnp.matmul, primals, tangents)
    return matmul_to_float32(*primals), tangent_btv.astype(jnp.float32)


class RMSNorm(nnx.Module):
    r"""Root-mean-square normalisation, :math:`w \, x / \sqrt{\mathrm{mean}(x^2) + \epsilon}`.

    The norm is taken in float32 and cast back before the product with the weight, the order of
    the Hugging Face models.
    """

    def __init__(self, size: int, eps: float, *, param_dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones(size, param_dtype))
        self.eps = eps

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        """Normalises the last axis; keeps shape and dtype."""
        x32_btd = x_btd.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32_btd), axis=-1, keepdims=True)
        normed_btd = x32_btd * jax.lax.rsqrt(mean_square + self.eps)
        return self.weight[...].astype(x_btd.dtype) * normed_btd.astype(x_btd.dtype)


def multiply_rows(x: jax.Array, kernel_io: jax.Array, _: Any, **settings: Any) -> jax.Array:
    """`jax.lax.dot_general` of shapes (..., i) and (i, o), as one product of two matrices.

    The kernel's gradient as a product over several axes comes out transposed, which takes a
    training step on the CPU a fifth longer.
    """
    axes = (((1,), (0,)), ((), ()))
    y = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel_io, axes, **settings)
    return y.reshape(*x.shape[:-1], -1)


_linear = functools.partial(nnx.Linear, dot_general=multiply_rows)


class Attention(nnx.Module):
    """Causal grouped-query attention: query heads n share key-value heads k in groups of n / k."""

    def __init__(
        self, config: DecoderConfig, *, dtype, param_dtype, attention="xla", rngs: nnx.Rngs
    ):
        self.head_dim = config.head_dim
        self.attention = attention
        width_q = config.num_attention_heads * config.head_dim
        width_kv = config.num_key_value_heads * config.head_dim
        linear = functools.partial(_linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        bias = config.attention_bias
        self.q_proj = linear(config.hidden_size, width_q, use_bias=bias)
        self.k_proj = linear(config.hidden_size, width_kv, use_bias=bias)
        self.v_proj = linear(config.hidden_size, width_kv, use_bias=bias)
        self.o_proj = linear(width_q, config.hidden_size, use_bias=False)

    def __call__(
        self,
        x_btd: jax.Array,
        cos_bth: jax.Array,
        sin_bth: jax.Array,
        segments_bt: jax.Array | None = None,
    ) -> jax.Array:
        """Attends from each position to itself and all before it in its segment; keeps shape."""
        b, t, _ = x_btd.shape
        h = self.head_dim
        q_btnh = apply_rope(self.q_proj(x_btd).reshape(b, t, -1, h), cos_bth, sin_bth)
        k_btkh = apply_rope(self.k_proj(x_btd).reshape(b, t, -1, h), cos_bth, sin_bth)
        v_btkh = self.v_proj(x_btd).reshape(b, t, -1, h)
        mask = None
        if segments_bt is not None:  # (b, 1, query position, key position)
            mask = segments_bt[:, None, :, None] == segments_bt[:, None, None, :]
        out_btnh = jax.nn.dot_product_attention(
            q_btnh, k_btkh, v_btkh, mask=mask, is_causal=True, implementation=self.attention
        )
        return self.o_proj(out_btnh.reshape(b, t, -1))


class MLP(nnx.Module):
    r"""SwiGLU: :math:`W_{down}(\mathrm{silu}(W_{gate} x) \odot W_{up} x)`."""

    def __init__(self, config: DecoderConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        linear = functools.partial(
            _linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        """Maps each position on its own; shape and dtype are kept."""
        return self.down_proj(nnx.silu(self.gate_proj(x_btd)) * self.up_proj(x_btd))


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(
        self, config: DecoderConfig, *, dtype, param_dtype, attention="xla", rngs: nnx.Rngs
    ):
        types = {"dtype": dtype, "param_dtype": param_dtype}
        norm_args = (config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = RMSNorm(*norm_args, param_dtype=param_dtype)
        self.self_attn = Attention(config, **types, attention=attention, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(*norm_args, param_dtype=param_dtype)
        self.mlp = MLP(config, **types, rngs=rngs)

    def __call__(
        self,
        x_btd: jax.Array,
        cos_bth: jax.Array,
        sin_bth: jax.Array,
        segments_bt: jax.Array | None = None,
    ) -> jax.Array:
        """Runs the layer; shape and dtype are kept."""
        x_btd = x_btd + self.self_attn(self.input_layernorm(x_btd), cos_bth, sin_bth, segments_bt)
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd))


class Decoder(nnx.Module):
    """A causal language model: embedding, decoder layers, final norm, output head.

    Args:
      config: The shape.
      dtype: Compute dtype of the matrix products and the residual stream.
      param_dtype: Dtype of the stored parameters.
      remat: What the backward pass recomputes, from `REMAT_POLICIES`: "none", "dots" (all but the
        products with weights) or "full" (each layer from its input).
      attention: Implementation of `jax.nn.dot_product_attention`: "xla", or "cudnn" (flash
        attention; an NVIDIA GPU and a 16-bit `dtype`).
      rngs: Where the initial values come from: kernels are LeCun normal, embeddings normal with
        the standard deviation 0.02 of GPT-2.

    Example:
      >>> config = DecoderConfig(16, 32, 1, 4, 2, 4, vocab_size=256)
      >>> Decoder(config, rngs=nnx.Rngs(0))(jnp.zeros((2, 8), jnp.int32)).shape
      (2, 8, 256)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        remat: Literal["none", "dots", "full"] = "none",
        attention: Literal["xla", "cudnn"] = "xla",
        rngs: nnx.Rngs,
    ):
        for name, value, allowed in (
            ("remat", remat, tuple(REMAT_POLICIES)),
            ("attention", attention, ("xla", "cudnn")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
        types = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.dtype = dtype
        self.remat = remat
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(0.02),
            **types,
            rngs=rngs,
        )

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap
        def stacked_layers(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, **types, attention=attention, rngs=rngs)

        self.layers = stacked_layers(rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size, config.vocab_size, use_bias=False, **types, rngs=rngs
            )

    def __call__(self, tokens_bt: jax.Array, segments_bt: jax.Array | None = None) -> jax.Array:
        """Logits of the next token at each position.

        Args:
          tokens_bt: Token ids, integers of shape (b, t), t <= max_position_embeddings.
          segments_bt: Documents of a packed batch, integers of shape (b, t): 0 is padding, and
            each document is a run of one other number. Positions restart in each, and attention
            stays within each. None: one document per row.

        Returns:
          Logits, shape (b, t, v), in float32 whatever the compute dtype.
        """
        return self.head()(self.hidden(tokens_bt, segments_bt))

    def hidden(self, tokens_bt: jax.Array, segments_bt: jax.Array | None = None) -> jax.Array:
        """What the output head reads: shape (b, t, d), in the compute dtype; see `__call__`."""
        t = tokens_bt.shape[1]
        if t > self.config.max_position_embeddings:
            raise ValueError(
                f"{t} positions, but max_position_embeddings is "
                f"{self.config.max_position_embeddings}"
            )
        positions_bt = (
            jnp.arange(t)[None] if segments_bt is None else segment_positions(segments_bt)
        )
        angles = rope_angles(positions_bt, self.config.head_dim, self.config.rope_theta)
        graphdef, parameters = nnx.split(self.layers)

        def run_layer(x_btd, parameters):
            x_btd = nnx.merge(graphdef, parameters)(x_btd, *angles, segments_bt)
            return constrain(x_btd, BATCH), None

        if self.remat != "none":
            # A scan keeps the two passes apart as it is: no barriers against merging are needed.
            policy = REMAT_POLICIES[self.remat]
            run_layer = jax.checkpoint(run_layer, policy=policy, prevent_cse=False)
        # Every part of the table looks up its columns for all rows: what travels are the vectors of
        # these tokens, not the table.
        tokens_bt = constrain(tokens_bt, P("data"))
        x_btd = jnp.take(self.embed_tokens.embedding[...], tokens_bt, axis=0).astype(self.dtype)
        x_btd = constrain(constrain(x_btd, P("data", None, "fsdp")), BATCH)
        x_btd, _ = jax.lax.scan(run_layer, x_btd, parameters)
        return self.norm(x_btd)

    def head(self) -> Callable[[jax.Array], jax.Array]:
        """The output head, a function from `hidden` to float32 logits of shape (b, t, v).

        It collects its parameters when it is made, so that a loop may call it again and again.
        """
        tied = self.config.tie_word_embeddings
        head_dv = self.embed_tokens.embedding[...].T if tied else self.lm_head.kernel[...]
        head_dv = constrain(head_dv, P(None, "tensor"))

        def logits(x_btd: jax.Array) -> jax.Array:
            return matmul_to_float32(x_btd, head_dv.astype(x_btd.dtype))

        return logits
