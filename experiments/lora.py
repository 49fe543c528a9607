r"""Low-rank adaptation: each chosen linear layer W becomes W + (alpha / r) A B, A and B trained.

Before, and after `add_lora`, each with the layers' axis in front::

    q_proj: Linear(kernel)     q_proj: LoRALinear(base: Linear(kernel), lora_a, lora_b)

`merge_lora` goes back, with the product added to the kernel. The adapters are the only variables
of type `nnx.LoRAParam`, so that type is the filter for what trains.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of attention and MLP, the choice of the QLoRA paper (Dettmers et al. 2023)."""


class LoRALinear(nnx.Module):
    r"""A linear layer plus a low-rank correction, :math:`y = W x + (\alpha/r) B A x`.

    B starts at zero, so the wrapped layer starts as the layer itself. Dropout, if any, acts on the
    x of the correction alone.

    Args:
      base: The layer to adapt, or a stack of layers; its parameters are left alone.
      rank: r, the width of the correction.
      alpha: Scale of the correction, in units of the rank.
      dropout: Probability that an entry of the correction's input is dropped.
      rngs: Where A's initial values come from, and the first masks of dropout.
    """

    def __init__(
        self, base: nnx.Linear, rank: int, alpha: float, dropout: float = 0.0, *, rngs: nnx.Rngs
    ):
        *stack, in_features, out_features = base.kernel.shape
        self.base = base
        self.scaling = alpha / rank
        # Bound 1/sqrt(fan_in): kaiming-uniform with a = sqrt(5), as the LoRA authors' code has it.
        init_a = nnx.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", batch_axis=tuple(range(len(stack)))
        )
        a = init_a(rngs.params(), (*stack, in_features, rank), jnp.float32)
        self.lora_a = nnx.LoRAParam(a)
        self.lora_b = nnx.LoRAParam(jnp.zeros((*stack, rank, out_features), jnp.float32))
        # No random state where there is no dropout: it would be part of what is saved.
        self.dropout = nnx.Dropout(dropout, rngs=nnx.Rngs(dropout=rngs()) if dropout else None)
        if dropout and stack:
            nnx.split_rngs(self.dropout, splits=tuple(stack))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., in_features) to (..., out_features) in the base layer's compute dtype."""
        y = self.base(x)
        a, b = self.lora_a[...].astype(y.dtype), self.lora_b[...].astype(y.dtype)
        # As matrices: gradients of products over several axes come out transposed, which takes a
        # step on the CPU a fifth longer.
        rows = self.dropout(x).astype(y.dtype).reshape(-1, x.shape[-1])
        return y + self.scaling * (rows @ a @ b).reshape(y.shape)

    def merged(self) -> nnx.Linear:
        """The base layer with the correction added to its kernel."""
        delta = self.scaling * (self.lora_a[...] @ self.lora_b[...])
        kernel = self.base.kernel[...]
        self.base.kernel[...] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
        return self.base


def add_lora(
    model: nnx.Module,
    rank: int,
    alpha: float,
    *,
    dropout: float = 0.0,
    targets: Sequence[str] = TARGETS,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Wraps every layer of the given names, in place.

    Dropout draws new masks at each call of the model in `model.train()`, the state it starts in,
    and none in `model.eval()`. A compiled training step forgets the state of the random streams:
    see `with_masks_of_step`.

    Args:
      model: A model whose linear layers are named as in `TARGETS`.
      rank: Width of the corrections, at least 1.
      alpha: Scale of the corrections, in units of the rank.
      dropout: Probability that an entry of a correction's input is dropped, in [0, 1).
      targets: Which layers, from `TARGETS`.
      rngs: Where the initial values come from.

    Returns:
      The same model.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: must be at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be in [0, 1)")
    if not targets or set(targets) - set(TARGETS):
        raise ValueError(f"targets={targets}: must be one or more of {', '.join(TARGETS)}")
    for parent, name, layer in find_layers(model, nnx.Linear, targets):
        setattr(parent, name, LoRALinear(layer, rank, alpha, dropout, rngs=rngs))
    return model


def merge_lora(model: nnx.Module) -> nnx.Module:
    """Folds every adapter into its base layer, in place.

    Args:
      model: A model that went through `add_lora`.

    Returns:
      The same model, with plain linear layers and (up to rounding) the same outputs.
    """
    for parent, name, layer in find_layers(model, LoRALinear):
        setattr(parent, name, layer.merged())
    return model


def with_masks_of_step(state: nnx.State, step: jax.Array) -> nnx.State:
    """Makes the masks of dropout a function of the step, and of the state's own random keys.

    An interrupted run then goes on with the masks that it would have had.

    Args:
      state: State of a model that went through `add_lora`, or a part of it.
      step: The step, an integer of shape ().

    Returns:
      The state with other keys, where it has any.
    """

    def folded(keys):
        each = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys.reshape(-1))
        return each.reshape(keys.shape)

    keys, others = nnx.split_state(state, nnx.RngKey, ...)
    return nnx.merge_state(others, jax.tree.map(folded, keys))


def find_layers(
    model: nnx.Module, kind: type, names: Sequence[str] = TARGETS
) -> list[tuple[nnx.Module, str, nnx.Module]]:
    """The (parent, name, layer) of each layer of one kind that has one of the names."""
    return [
        (parent, name, layer)
        for _, parent in nnx.iter_modules(model)
        for name in names
        if isinstance(layer := getattr(parent, name, None), kind)
    ]
