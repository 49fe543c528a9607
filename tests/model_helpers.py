"""What the tests of the models share: two tiny models, and files that are not in the project."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

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

_DATA = Path(__file__).parents[2] / "shared" / "data"


def data_file(name):
    """A real file that tests may use where it is there."""
    if not (_DATA / name).exists():
        pytest.skip(f"needs {name}, which is not part of the project")
    return _DATA / name


def published_config(name):
    """The config.json of a published model."""
    (file,) = data_file("configs").glob(f"{name}*")
    return json.loads(file.read_text())


@nnx.jit(static_argnums=(0, 1))
def decoder(config, param_dtype=jnp.float32):
    """A model whose biases and norms are not the zeros and ones that they start as."""
    model = Decoder(config, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    noise = nnx.Rngs(1)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(noise(), x.shape, x.dtype), params)
    return nnx.merge(graphdef, params)
