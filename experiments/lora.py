r"""Low-rank adaptation: each chosen linear layer W becomes W + (alpha / r) A B, A and B trained.

Before, and after `add_lora`::

    q_proj: Linear(kernel)     q_proj: LoRALinear(base: Linear(kernel), lora_a, lora_b)

`merge_lora` goes back, with the product added to the kernel. The adapters are the only variables
of type `nnx.LoRAParam`, so that type is the filter for what trains.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of attention and MLP, the choice of the QLoRA paper (Dettmers et al. 2023)."""

# Bound 1/sqrt(fan_in): kaiming-uniform with a = sqrt(5), as the LoRA authors' code has it.
_init_a = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class LoRALinear(nnx.Module):
    r"""A linear layer plus a low-rank correction, :math:`y = W x + (\alpha/r) B A x`.

    B starts at zero, so the wrapped layer starts as the layer itself.

    Args:
      base: The layer to adapt; its parameters are left alone.
      rank: r, the width of the correction.
      alpha: Scale of the correction, in units of the rank.
      rngs: Where A's initial values come from.
    """

    def __init__(self, base: nnx.Linear, rank: int, alpha: float, *, rngs: nnx.Rngs):
        self.base = base
        self.scaling = alpha / rank
        a = _init_a(rngs.params(), (base.in_features, rank), jnp.float32)
        self.lora_a = nnx.LoRAParam(a)
        self.lora_b = nnx.LoRAParam(jnp.zeros((rank, base.out_features), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., in_features) to (..., out_features) in the base layer's compute dtype."""
        y = self.base(x)
        a, b = self.lora_a[...].astype(y.dtype), self.lora_b[...].astype(y.dtype)
        return y + self.scaling * ((x.astype(y.dtype) @ a) @ b)

    def merged(self) -> nnx.Linear:
        """The base layer with the correction added to its kernel."""
        delta = self.scaling * (self.lora_a[...] @ self.lora_b[...])
        kernel = self.base.kernel[...]
        self.base.kernel[...] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
        return self.base


def add_lora(model: nnx.Module, rank: int, alpha: float, *, rngs: nnx.Rngs) -> nnx.Module:
    """Wraps every layer named in `TARGETS`, in place.

    Args:
      model: A model whose linear layers are named as in `TARGETS`.
      rank: Width of the corrections.
      alpha: Scale of the corrections, in units of the rank.
      rngs: Where the initial values come from.

    Returns:
      The same model.
    """
    for parent, name, layer in _targets(model, nnx.Linear):
        setattr(parent, name, LoRALinear(layer, rank, alpha, rngs=rngs))
    return model


def merge_lora(model: nnx.Module) -> nnx.Module:
    """Folds every adapter into its base layer, in place.

    Args:
      model: A model that went through `add_lora`.

    Returns:
      The same model, with plain linear layers and (up to rounding) the same outputs.
    """
    for parent, name, layer in _targets(model, LoRALinear):
        setattr(parent, name, layer.merged())
    return model


def _targets(model: nnx.Module, kind: type) -> list[tuple[nnx.Module, str, nnx.Module]]:
    """The (parent, name, layer) of each layer of one kind that is named in `TARGETS`."""
    return [
        (parent, name, layer)
        for _, parent in nnx.iter_modules(model)
        for name in TARGETS
        if isinstance(layer := getattr(parent, name, None), kind)
    ]
