"""Shapes of published models: what their `config.json` says, for work that needs no weights."""

from __future__ import annotations

import functools

from experiments.models.config import DecoderConfig

TINYLLAMA = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
"""The base model after all its three trillion tokens; TinyLlama_v1.1 has no safetensors files."""

_qwen = functools.partial(DecoderConfig, head_dim=128, rope_theta=1e6)

ZOO = {
    "Qwen/Qwen2.5-0.5B": _qwen(896, 4864, 24, 14, 2, head_dim=64, vocab_size=151_936),
    "Qwen/Qwen2.5-1.5B": _qwen(
        1536, 8960, 28, 12, 2, vocab_size=151_936, max_position_embeddings=131_072
    ),
    "Qwen/Qwen2.5-3B": _qwen(2048, 11_008, 36, 16, 2, vocab_size=151_936),
    "Qwen/Qwen2.5-7B": _qwen(
        3584,
        18_944,
        28,
        28,
        4,
        vocab_size=152_064,
        tie_word_embeddings=False,
        max_position_embeddings=131_072,
    ),
    "Qwen/Qwen2.5-14B": _qwen(
        5120,
        13_824,
        48,
        40,
        8,
        vocab_size=152_064,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        max_position_embeddings=131_072,
    ),
    TINYLLAMA: DecoderConfig(
        2048,
        5632,
        22,
        32,
        4,
        64,
        vocab_size=32_000,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attention_bias=False,
        max_position_embeddings=2048,
    ),
}
"""Name on the hub -> shape."""
