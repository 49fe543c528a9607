"""Where the parts of a model live on a mesh with the axes data, fsdp and tensor.

A batch is split over data and fsdp. A kernel is split over fsdp on one side and over tensor on the
other: q, k, v, gate and up by their outputs, o and down by their inputs, so that a layer needs one
sum over tensor after the attention and one after the MLP (Shoeybi et al. 2019, Megatron-LM).
Optimizer states follow their parameters; whatever is not a parameter's shape is replicated.

The compiler inserts the communication. Run under `jax.set_mesh(mesh)`, so that the decoder tells
it that activations stay split like the batch; without a mesh nothing here changes anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
"""Names of the mesh's axes: copies of the model, splits of its storage, splits of its products."""

BATCH = P(("data", "fsdp"))
"""Where the rows of a batch live."""

# Last name of a kernel's layer -> mesh axes of (inputs, outputs).
_COLUMN, _ROW = ("fsdp", "tensor"), ("tensor", "fsdp")
_KERNELS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"), _COLUMN)
_KERNELS |= dict.fromkeys(("o_proj", "down_proj"), _ROW)


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes `AXES`.

    Args:
      data: Number of copies of the model.
      fsdp: Number of parts in which each copy is stored.
      tensor: Number of parts in which each product is computed.
      devices: What it is made of; all there are if None. Their number is the product of the three.

    Returns:
      The mesh.

    Raises:
      ValueError: There are more or fewer devices than that.
    """
    devices = jax.devices() if devices is None else devices
    shape = (data, fsdp, tensor)
    if int(np.prod(shape)) != len(devices):
        raise ValueError(f"data * fsdp * tensor is {shape}, but there are {len(devices)} devices")
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * 3, devices=devices)


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Where what lives on a mesh is computed with; without a mesh, where everything is."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def partition_spec(path: Sequence[str], ndim: int) -> P:
    """Where one array lives.

    Args:
      path: Names that lead to it. Those of a parameter may come after others, as they do in the
        state of an optimizer.
      ndim: Number of its axes; an array that has not those of the parameter is replicated.

    Returns:
      The spec: one entry per axis, the axis of stacked layers never split; or `P()`.

    Example:
      >>> tuple(partition_spec(("layers", "self_attn", "q_proj", "kernel"), 3))
      (None, 'fsdp', 'tensor')
    """
    inputs, outputs = next((_KERNELS[name] for name in path if name in _KERNELS), (None, None))
    spec = {
        "embedding": ("tensor", "fsdp"),
        "kernel": (inputs, outputs),
        "bias": (outputs,),
        "lora_a": (inputs, None),
        "lora_b": (None, outputs),
    }.get(path[-1], ())
    if "layers" in path:
        spec = (None, *spec)
    return P(*spec) if len(spec) == ndim else P()


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of each array of a model's state or of a training state.

    Args:
      tree: Arrays or `jax.ShapeDtypeStruct`s, for instance from `nnx.split` or `jax.eval_shape`.
      mesh: From `make_mesh`.

    Returns:
      The tree with a `NamedSharding` in place of each array: for `jax.device_put`, `jax.jit`'s
      `out_shardings`, or a checkpoint's restore.
    """

    def sharding(path, leaf):
        names = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        spec = partition_spec(names.split("/"), len(leaf.shape))
        # An optimizer may keep a sample of a parameter, too short for as many parts.
        return NamedSharding(mesh, even_spec(spec, leaf.shape, mesh))

    return jax.tree.map_with_path(sharding, tree)


def even_spec(spec: P, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """The spec without the axes that would leave uneven parts, as of a batch of one sequence.

    Args:
      spec: Where an array would live.
      shape: Its shape.
      mesh: The mesh.

    Returns:
      The spec where the array can live.
    """

    def even(entry, size):
        kept, parts = (), 1
        for axis in entry if isinstance(entry, tuple) else (entry,):
            more = parts * mesh.shape.get(axis, 1)
            if axis is not None and size % more == 0:
                kept, parts = (*kept, axis), more
        return kept if len(kept) > 1 else kept[0] if kept else None

    return P(*(even(entry, size) for entry, size in zip(spec, shape, strict=False)))


def shard(tree: Any, mesh: Mesh) -> Any:
    """Moves each array to where `shardings` says."""
    return jax.device_put(tree, shardings(tree, mesh))


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """Says where an intermediate array lives, where a mesh is set; else returns it as it is.

    Left alone, the compiler may rather move the activations to the parts of the parameters.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if "fsdp" not in mesh.axis_names:
        return x
    return jax.lax.with_sharding_constraint(x, even_spec(spec, x.shape, mesh))
