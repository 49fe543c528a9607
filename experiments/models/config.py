"""The shape of a decoder, in the field names of the Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a Qwen2.5 / Llama style decoder."""

    hidden_size: int
    """Width of the residual stream (d)."""
    intermediate_size: int
    """Width of the SwiGLU hidden layer (f)."""
    num_hidden_layers: int
    """Number of decoder layers."""
    num_attention_heads: int
    """Number of query heads (n)."""
    num_key_value_heads: int
    """Number of key and value heads (k); a divisor of `num_attention_heads`."""
    head_dim: int
    """Width of one head (h), even because RoPE rotates pairs."""
    vocab_size: int
    """Number of token ids (v)."""
    rope_theta: float = 10_000.0
    """Base of the RoPE frequencies; 10,000 is the RoFormer paper's value, Qwen2.5 has 1,000,000."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm; Qwen2.5's value, TinyLlama has 1e-5."""
    tie_word_embeddings: bool = True
    """Whether the output head is the transposed embedding."""
    attention_bias: bool = True
    """Whether q, k and v have a bias (Qwen2.5: yes, Llama: no). The output projection has none."""
    max_position_embeddings: int = 32_768
    """Longest sequence the model accepts."""

    def __post_init__(self) -> None:
        """Checks the two divisibility conditions that the layers rely on."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even for RoPE")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Reads the parsed `config.json` of a Qwen2.5 or Llama checkpoint.

        Args:
          config: The mapping; files written before and after transformers 5 differ in where they
            keep `rope_theta`, and both are read.

        Returns:
          The shape, with `head_dim` and `attention_bias` filled in where the file leaves them out.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        shape = {name: config[name] for name in names & config.keys()}
        shape.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        # Qwen2's file does not say that its q, k and v have a bias: the model class does.
        shape.setdefault("attention_bias", config.get("model_type") == "qwen2")
        # Hugging Face writes no key for a value that equals its class default, which is untied.
        shape.setdefault("tie_word_embeddings", False)
        if "rope_parameters" in config:
            shape["rope_theta"] = config["rope_parameters"]["rope_theta"]
        return cls(**shape)
