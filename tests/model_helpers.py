"""What the tests of the models share: two tiny models, and a tokenizer."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
import tokenizers
from flax import nnx
from shared_data import shared_data

from experiments.models.config import DecoderConfig
from experiments.models.decoder import Decoder

QWEN = DecoderConfig(16, 24, 2, 4, 2, 4, vocab_size=32)
LLAMA = dataclasses.replace(
    QWEN, attention_bias=False, tie_word_embeddings=False, rope_theta=500.0, rms_norm_eps=1e-5
)
FAMILIES = pytest.mark.parametrize("config", [QWEN, LLAMA], ids=["qwen", "llama"])

PARAMETERS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "TinyLlama-1.1B": 1_100_048_384,
}
"""Published model -> its number of parameters."""


def published_config(name):
    """The config.json of a published model."""
    (file,) = shared_data("configs").glob(f"{name}*")
    return json.loads(file.read_text())


@nnx.jit(static_argnums=(0, 1))
def decoder(config, param_dtype=jnp.float32):
    """A model whose biases and norms are not the zeros and ones that they start as."""
    model = Decoder(config, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    noise = nnx.Rngs(1)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(noise(), x.shape, x.dtype), params)
    return nnx.merge(graphdef, params)


def write_tokenizer(folder, vocabulary, **config):
    """Writes a tokenizer that knows a few words, in the form of the hub."""
    words = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)
