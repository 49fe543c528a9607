"""Hugging Face checkpoints of the Qwen2.5 and Llama families: config.json and safetensors files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from huggingface_hub import snapshot_download, try_to_load_from_cache
from jax.sharding import Mesh

from experiments.errors import UserError, reading
from experiments.models.config import DecoderConfig
from experiments.models.decoder import Decoder
from experiments.models.tensors import open_tensors, read_params, write_params

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROWS = 4096  # Of the embedding, that are on the host at once.


def load_pretrained(
    source: str | Path,
    *,
    dtype: jnp.dtype = jnp.float32,
    param_dtype: jnp.dtype = jnp.float32,
    mesh: Mesh | None = None,
    **settings: Any,
) -> Decoder:
    """Loads a model, for instance Qwen/Qwen2.5-0.5B.

    Args:
      source: A folder with config.json and either model.safetensors or the parts that
        model.safetensors.index.json lists; or the id of such a repository on the hub.
      dtype: Compute dtype.
      param_dtype: Dtype of the parameters, whatever it is in the files.
      mesh: From `sharding.make_mesh`: each parameter goes to its place on it. None: one device.
      **settings: `remat` and `attention` of `Decoder`.

    Returns:
      The model.

    Raises:
      UserError: There is no such folder or repository, or its content is not such a model.
    """
    folder = _folder(source)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: has no {CONFIG}")
    config = DecoderConfig.from_hf(_read_json(folder / CONFIG))
    model = nnx.eval_shape(
        lambda: Decoder(config, dtype=dtype, param_dtype=param_dtype, **settings, rngs=nnx.Rngs(0))
    )

    files = _weights(folder)
    if config.tie_word_embeddings:
        _check_tied_head(files)

    def ignored(name):
        # Some files have the tied head once more, or a table that old versions of Llama kept.
        tied_head = config.tie_word_embeddings and name == _HEAD
        return tied_head or name.endswith("rotary_emb.inv_freq")

    nnx.update(model, read_params(nnx.state(model), files, mesh=mesh, ignored=ignored))
    return model


def revision(source: str) -> str | None:
    """The commit of a hub's repository whose files are kept here; None where none are."""
    found = try_to_load_from_cache(source, CONFIG)
    return Path(found).parent.name if isinstance(found, str) else None


def save_pretrained(model: Decoder, folder: str | Path) -> None:
    """Writes a folder that `load_pretrained` and `transformers` load.

    Args:
      model: The model; adapters must have been merged.
      folder: The folder; it is made where it is missing.

    Raises:
      ValueError: The model has adapters.
    """
    params = nnx.state(model, nnx.Param)
    if nnx.state(model, nnx.LoRAParam):
        raise ValueError(
            "model has adapters: call lora.merge_lora first, or peft_format.save_adapters"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = model.embed_tokens.embedding.dtype
    config = model.config.to_hf() | {"torch_dtype": jnp.dtype(dtype).name}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    write_params(params, folder / WEIGHTS)


def _check_tied_head(files: Sequence[Path]) -> None:
    """Refuses a head that is not the embedding: transformers would not tie it either."""
    tensors = open_tensors(files)
    if not {_HEAD, _EMBEDDING} <= tensors.keys():
        return
    head, embedding = tensors[_HEAD], tensors[_EMBEDDING]
    rows = embedding.get_shape()[0]
    parts = (slice(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS))
    if head.get_shape() != embedding.get_shape() or not all(
        np.array_equal(head[part], embedding[part]) for part in parts
    ):
        raise UserError(
            f"{files[0].parent}: {_HEAD} is not {_EMBEDDING}, but tie_word_embeddings is true"
        )


def _folder(source: str | Path) -> Path:
    """The folder itself, or where the hub's files are kept."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{source}: neither a folder nor a repository that the hub gave us: {reason}"
        ) from error


def _read_json(file: Path) -> Any:
    with reading(file):
        return json.loads(file.read_text())


def _weights(folder: Path) -> list[Path]:
    """The safetensors files of a model."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder}: has neither {WEIGHTS} nor {INDEX}")
    with reading(folder / INDEX, "not an index of weights"):
        parts = set(_read_json(folder / INDEX)["weight_map"].values())
    if not parts:
        raise UserError(f"{folder / INDEX}: lists no weights")
    missing = sorted(part for part in parts if not (folder / part).is_file())
    if missing:
        raise UserError(f"{folder}: lacks {', '.join(missing)}, which {INDEX} lists")
    return [folder / part for part in sorted(parts)]
