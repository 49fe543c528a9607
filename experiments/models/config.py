"""The shape of a decoder, in the field names of the Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.errors import UserError

# Settings of the two families that would change the outputs -> the one value the decoder has.
_FIXED = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "quantization_config": None,
    "rope_scaling": None,
    "use_sliding_window": False,
}


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
        if min(self.num_attention_heads, self.num_key_value_heads) < 1:
            raise ValueError("num_attention_heads and num_key_value_heads must be at least 1")
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
          The shape, with `head_dim` and `attention_bias` filled in, which Qwen2's files leave out.

        Raises:
          UserError: The file describes a model that the decoder would not reproduce.
        """
        if not isinstance(config, Mapping):
            raise UserError("config.json: is no mapping")
        family = config.get("model_type")
        rope = config.get("rope_parameters") or config
        if not isinstance(rope, dict):
            raise UserError(f"config.json: rope_parameters={rope!r}: must be a mapping")
        if family not in ("qwen2", "llama"):
            raise UserError(f"config.json: model_type={family!r}: must be 'qwen2' or 'llama'")
        fixed = _FIXED | ({"attention_bias": False} if family == "llama" else {})
        # Only in the mapping of its own `type` is the older name for the same.
        older = "default" if rope is config else rope.get("type", "default")
        found = {"rope_type": rope.get("rope_type", older), **config}
        for name, value in {"rope_type": "default", **fixed}.items():
            if found.get(name, value) != value:
                raise UserError(f"config.json: {name}={found[name]!r}: only {value!r} is supported")

        fields = dataclasses.fields(cls)
        missing = [
            field.name
            for field in fields
            if field.default is dataclasses.MISSING and field.name not in {"head_dim", *config}
        ]
        if missing:
            raise UserError(f"config.json: lacks {', '.join(missing)}")
        names = {field.name for field in fields}
        shape = {name: config[name] for name in names & config.keys()}
        if "rope_theta" in rope:
            shape["rope_theta"] = rope["rope_theta"]
        if shape.get("head_dim", 0) is None:
            del shape["head_dim"]
        integers = {field.name for field in fields if field.type == "int"}
        for name, value in shape.items():
            if name in integers and not (isinstance(value, int) and value > 0):
                raise UserError(f"config.json: {name}={value!r}: must be a positive integer")
            if not isinstance(value, int | float):
                raise UserError(f"config.json: {name}={value!r}: must be a number")
        if "head_dim" not in shape:
            shape["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        # Qwen2's file does not say that its q, k and v have a bias: the model class does.
        shape["attention_bias"] = family == "qwen2"
        # Hugging Face writes no key for a value that equals its class default, which is untied.
        shape.setdefault("tie_word_embeddings", False)
        try:
            return cls(**shape)
        except ValueError as error:  # Numbers that do not fit together.
            raise UserError(f"config.json: {error}") from error

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` that `from_hf` and `transformers` read.

        A decoder with bias becomes a Qwen2, one without a Llama.
        """
        shape = dataclasses.asdict(self)
        bias = shape.pop("attention_bias")
        family = ("qwen2", "Qwen2ForCausalLM") if bias else ("llama", "LlamaForCausalLM")
        model_type, architecture = family
        return {
            "architectures": [architecture],
            "hidden_act": "silu",
            "model_type": model_type,
            **shape,
        }
