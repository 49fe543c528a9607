"""Models and tokenizers in the files of llama2.c: small Llamas really trained on TinyStories.

A model file is seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; a
negative vocab_size means an untied head), then the parameters in float32. A tokenizer file is an
int32, then for each token its score, a float32, the length of its bytes, an int32, and its bytes.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.errors import UserError, reading
from experiments.models.config import DecoderConfig
from experiments.models.decoder import Decoder

BOS = 1
"""The token before each story."""

_BYTES = 3  # The token of byte 0; the other 255 follow it.


def load_llama2c(file: str | Path, *, dtype: jnp.dtype = jnp.float32) -> Decoder:
    """Loads a llama2.c model.

    Args:
      file: The model file, in the first version of the format.
      dtype: Compute dtype; the parameters are float32.

    Returns:
      The model.

    Raises:
      UserError: The file is of another format, or its size does not fit its header.
    """
    content = _read(file)
    with reading(file, "is no llama2.c model"):
        d, f, layers, n, k, v, seq_len = np.frombuffer(content[:28], "<i4").tolist()
        h = d // n
        config = DecoderConfig(
            hidden_size=d,
            intermediate_size=f,
            num_hidden_layers=layers,
            num_attention_heads=n,
            num_key_value_heads=k,
            head_dim=h,
            vocab_size=abs(v),
            rms_norm_eps=1e-5,
            tie_word_embeddings=v > 0,
            attention_bias=False,
            max_position_embeddings=seq_len,
        )
    # Shapes in the order of the file, kernels as (outputs, inputs).
    shapes = {
        "embed_tokens.embedding": (abs(v), d),
        "layers.input_layernorm.weight": (layers, d),
        "layers.self_attn.q_proj.kernel": (layers, n * h, d),
        "layers.self_attn.k_proj.kernel": (layers, k * h, d),
        "layers.self_attn.v_proj.kernel": (layers, k * h, d),
        "layers.self_attn.o_proj.kernel": (layers, d, n * h),
        "layers.post_attention_layernorm.weight": (layers, d),
        "layers.mlp.gate_proj.kernel": (layers, f, d),
        "layers.mlp.down_proj.kernel": (layers, d, f),
        "layers.mlp.up_proj.kernel": (layers, f, d),
        "norm.weight": (d,),
        "(tables of RoPE)": (seq_len, h),
    }
    if v < 0:
        shapes["lm_head.kernel"] = (-v, d)
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    if len(content) != 28 + 4 * sum(sizes):
        raise UserError(f"{file}: {len(content)} bytes, its header says {28 + 4 * sum(sizes)}")
    parts = np.split(np.frombuffer(content, "<f4", offset=28), np.cumsum(sizes)[:-1])
    arrays = {
        name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
    for name in ("q_proj", "k_proj"):
        name = f"layers.self_attn.{name}.kernel"
        arrays[name] = _half_split(arrays[name], h)

    model = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))

    def load(path: tuple[str, ...], variable: Any) -> Any:
        array = arrays[".".join(path)]
        return variable.replace(jnp.asarray(array.mT if path[-1] == "kernel" else array))

    flat = nnx.to_flat_state(nnx.state(model))
    nnx.update(model, nnx.from_flat_state((path, load(path, old)) for path, old in flat))
    return model


def _read(file: str | Path) -> bytes:
    with reading(file):
        return Path(file).read_bytes()


def _half_split(kernel_loi: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the outputs of each head: llama2.c rotates neighbours, we rotate (i, i + h/2)."""
    layers, outputs, inputs = kernel_loi.shape
    pairs = kernel_loi.reshape(layers, outputs // head_dim, head_dim // 2, 2, inputs)
    return pairs.swapaxes(2, 3).reshape(layers, outputs, inputs)


class Llama2cTokenizer:
    """Byte-pair encoding as sentencepiece does it: the pair with the best score merges first.

    Args:
      file: The tokenizer file.
    """

    separator = BOS

    def __init__(self, file: str | Path):
        content = _read(file)
        self.identity = hashlib.sha256(content).hexdigest()
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        offset = 4  # After the length of the longest piece.
        with reading(file):
            while offset < len(content):
                score, length = struct.unpack_from("<fi", content, offset)
                offset += 8
                self.pieces.append(content[offset : offset + length])
                self.scores.append(score)
                offset += length
            if offset != len(content):
                raise ValueError("it ends within a piece")
        self.vocab_size = len(self.pieces)
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        self._encode_word = functools.cache(self._merge)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, `BOS` first.

        Args:
          text: The text.

        Returns:
          The tokens.
        """
        # A space goes before the first word too, and no piece goes on behind a space.
        words = re.findall(" ?[^ ]+| ", f" {text}")
        return [BOS, *(token for word in words for token in self._encode_word(word))]

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """The tokens of each text, int32 of shape (n,), without `BOS`."""
        return [np.asarray(self.encode(text)[1:], np.int32) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of a story's tokens, without the space that `encode` puts first."""
        content = b"".join(self._bytes(token) for token in tokens)
        return content.decode(errors="replace").removeprefix(" ")

    def _merge(self, word: str) -> list[int]:
        tokens = []
        for character in word:
            piece = character.encode()
            known = self.ids.get(piece)
            tokens += [byte + _BYTES for byte in piece] if known is None else [known]
        while True:
            merged = [
                self.ids.get(self.pieces[left] + self.pieces[right])
                for left, right in itertools.pairwise(tokens)
            ]
            known = [i for i, token in enumerate(merged) if token is not None]
            if not known:
                return tokens
            best = max(known, key=lambda i: self.scores[merged[i]])
            tokens[best : best + 2] = [merged[best]]

    def _bytes(self, token: int) -> bytes:
        if token < _BYTES:  # Unknown, beginning and end: marks, not text.
            return b""
        if token < _BYTES + 256:
            return bytes([token - _BYTES])
        return self.pieces[token]
