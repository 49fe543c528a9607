"""Parameters in safetensors files, under PyTorch's names and in its layout.

There each layer has its own tensors, and a kernel is stored as (outputs, inputs). Reading goes
straight to where each parameter lives: a process holds one parameter on the host at a time, and of
that only what its devices need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from experiments.errors import UserError, reading
from experiments.models.sharding import shardings

# Last name of a parameter whose name is not the same in PyTorch.
_LEAVES = {
    "embedding": "weight",
    "kernel": "weight",
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
}
_TRANSPOSED = ("kernel", "lora_a", "lora_b")


def torch_name(path: Sequence[str]) -> str:
    """The name of a parameter in a Hugging Face or PEFT file.

    Args:
      path: Names that lead to it in the model.

    Returns:
      The name, with `{layer}` where the number of the layer goes.

    Example:
      >>> torch_name(("layers", "self_attn", "q_proj", "kernel"))
      'model.layers.{layer}.self_attn.q_proj.weight'
      >>> torch_name(("layers", "mlp", "up_proj", "lora_a"))
      'base_model.model.model.layers.{layer}.mlp.up_proj.lora_A.weight'
    """
    *modules, leaf = path
    if modules[0] == "layers":
        modules.insert(1, "{layer}")
    if modules[0] != "lm_head":
        modules.insert(0, "model")
    if leaf.startswith("lora_"):
        modules = ["base_model", "model", *modules]
    return ".".join([*modules, _LEAVES.get(leaf, leaf)])


def open_tensors(files: Sequence[Path]) -> dict[str, Any]:
    """The tensors of safetensors files by name, each read where it is sliced."""
    tensors = {}
    for file in files:
        with reading(file):
            opened = safe_open(file, framework="np")
        tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def read_params(
    params: nnx.State,
    files: Sequence[Path],
    *,
    mesh: Mesh | None = None,
    ignored: Callable[[str], bool] = lambda name: False,
) -> nnx.State:
    """Reads parameters from safetensors files.

    Args:
      params: Their shapes and dtypes; `jax.ShapeDtypeStruct`s will do.
      files: The files, at least one.
      mesh: Where the parameters go, each to its part of `sharding.shardings`; if None, all to the
        default device.
      ignored: Whether a tensor of this name may be left over.

    Returns:
      The parameters.

    Raises:
      UserError: Tensors are missing, left over or of another shape; it names them all.
    """
    tensors = open_tensors(files)
    flat = nnx.to_flat_state(params)
    _check_tensors(flat, tensors, files[0].parent, ignored)
    places = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), params)
    if mesh is not None:
        places = shardings(params, mesh)

    def read(path, variable, place):
        def block(index):
            return _read_block(path, variable, index, tensors)

        array = jax.make_array_from_callback(variable.shape, place.get_value(), block)
        progress.update(array.nbytes)
        return path, variable.replace(array)

    with tqdm(
        total=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)),
        desc="reading weights",
        unit="B",
        unit_scale=True,
        delay=1,
    ) as progress:
        return nnx.from_flat_state(
            read(path, variable, place)
            for (path, variable), (_, place) in zip(flat, nnx.to_flat_state(places), strict=True)
        )


def write_params(params: nnx.State, file: Path) -> None:
    """Writes parameters to a safetensors file, by way of a copy on the host.

    Args:
      params: The parameters.
      file: The file; its folder exists.
    """
    tensors = {}
    for path, variable in nnx.to_flat_state(params):
        array = np.asarray(variable[...])
        layers = array if path[0] == "layers" else [array]
        for name, tensor in zip(_names(path, array.shape), layers, strict=True):
            tensor = tensor.T if path[-1] in _TRANSPOSED else tensor
            tensors[name] = np.ascontiguousarray(tensor)
    # The metadata is what tells transformers that the layout is PyTorch's.
    save_file(tensors, file, metadata={"format": "pt"})


def _names(path: Sequence[str], shape: Sequence[int]) -> list[str]:
    """The tensors that one parameter is made of: one per layer of a stack."""
    layers = shape[0] if path[0] == "layers" else 1
    return [torch_name(path).format(layer=layer) for layer in range(layers)]


def _check_tensors(
    flat: Sequence[tuple[Any, Any]],
    tensors: dict[str, Any],
    folder: Path,
    ignored: Callable[[str], bool],
) -> None:
    wanted = {}
    for path, variable in flat:
        shape = variable.shape[1:] if path[0] == "layers" else variable.shape
        shape = shape[::-1] if path[-1] in _TRANSPOSED else shape
        wanted |= dict.fromkeys(_names(path, variable.shape), shape)
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    for name, tensor in tensors.items():
        shape = tuple(tensor.get_shape())
        if name in wanted and shape != wanted[name]:
            problems.append(f"{name} has the shape {shape} instead of {wanted[name]}")
        elif name not in wanted and not ignored(name):
            problems.append(f"{name} has no place in the model")
    if problems:
        raise UserError(f"{folder} does not fit the model: {'; '.join(problems)}")


def _read_block(
    path: Sequence[str], variable: Any, index: tuple[slice, ...], tensors: dict[str, Any]
) -> np.ndarray:
    """One device's part of a parameter, read layer by layer."""
    names = _names(path, variable.shape)
    block = np.empty(
        [len(range(size)[part]) for size, part in zip(variable.shape, index, strict=True)],
        variable.dtype,
    )
    stacked = path[0] == "layers"
    layers, parts = (block, index[1:]) if stacked else (block[None], index)
    names = names[index[0]] if stacked else names
    for layer, name in zip(layers, names, strict=True):
        if path[-1] in _TRANSPOSED:
            layer[...] = tensors[name][parts[::-1]].T
        else:
            layer[...] = tensors[name][parts]
    return block
