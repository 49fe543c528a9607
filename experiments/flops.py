"""Floating-point operations that a training step needs, counted from the model's shape."""

from __future__ import annotations

from experiments.models.config import DecoderConfig


def matrix_weights(config: DecoderConfig) -> int:
    """Number of weights that every token is multiplied with: all layers' matrices and the head's.

    Args:
      config: Shape of the decoder.

    Returns:
      The number; a head that is the embedding counts, a separate embedding is only looked up.
    """
    d, heads = config.hidden_size, config.num_attention_heads
    attention = d * config.head_dim * (2 * heads + 2 * config.num_key_value_heads)
    layer = attention + 3 * d * config.intermediate_size
    return config.num_hidden_layers * layer + d * config.vocab_size


def step_flops(
    config: DecoderConfig, *, batch_size: int, seq_len: int, corrections: int | None
) -> int:
    r"""Operations that one training step needs, a multiplication and an addition counted as two.

    .. math:: b t (6 W + 12 l n h t), \quad \text{with LoRA} \quad b t (4 W + 6 A + 12 l n h t)

    with :math:`b` = ``batch_size``, :math:`t` = ``seq_len``, :math:`W` the matrix weights,
    :math:`A` = ``corrections``, and :math:`l, n, h` the layers, heads and their width. A weight
    that trains is used three times, forward and for two gradients, a frozen one twice. What is
    computed again, what a causal mask would spare, and all else that is not a matrix product, is
    left out.

    Args:
      config: Shape of the decoder.
      batch_size: Sequences per step.
      seq_len: Predicted tokens per sequence.
      corrections: Number of LoRA weights; None where every parameter trains.

    Returns:
      The number.

    Example:
      >>> from experiments.models.zoo import ZOO
      >>> qwen = ZOO["Qwen/Qwen2.5-0.5B"]
      >>> f"{step_flops(qwen, batch_size=8, seq_len=512, corrections=None):.3g}"
      '1.27e+13'

    References:
      Chowdhery et al., `PaLM <https://arxiv.org/abs/2204.02311>`_, 2022, appendix B
    """
    weights = matrix_weights(config)
    used = 6 * weights if corrections is None else 4 * weights + 6 * corrections
    width = config.num_attention_heads * config.head_dim
    return batch_size * seq_len * (used + 12 * config.num_hidden_layers * width * seq_len)
