"""Memory: what the guard keeps of the last applied step, in three sizes.

| mode | extra memory | what it allows |
|---|---|---|
| `"none"` | none | no overshoot sensed, nothing undone |
| `"sparse"` | 1/16 of the parameters | overshoot sensed on a sample, nothing undone |
| `"step"` | as much as the parameters | overshoot is exact, the last step can be undone |

That is what is kept between steps. Within a step every mode needs room for the inner optimizer's
step and its new state beside the old one, until the guard has decided: for AdamW one to one and a
half copies of the parameters compiled for an H100, five on a CPU (`python -m experiments overhead`,
`memory`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from lbw_optax.sensing import is_inexact

MODES = ("none", "sparse", "step")

STRIDE = 16
"""`"sparse"` keeps every 16th entry along each leaf's second longest axis, or its only one. 1/16 of
the entries gave the same result as all of them, within .03 nats, on the tasks of the study;
leaves too small to be thinned stay whole."""


def _thin(x: jax.Array, axis: int) -> jax.Array:
    return jax.lax.slice_in_dim(x, 0, x.shape[axis], stride=STRIDE, axis=axis)


def _sample(x: jax.Array) -> jax.Array:
    # An axis that the type says is sharded cannot be thinned without moving data.
    spec = tuple(jax.typeof(x).sharding.spec) + (None,) * x.ndim
    axes = [i for i in range(x.ndim) if spec[i] is None and x.shape[i] >= STRIDE]
    if x.size < STRIDE**2 or not axes:
        return x
    # Not the longest: that of an embedding are the tokens, of which a few make most gradients.
    axes.sort(key=lambda i: x.shape[i])
    return _thin(x, axes[-2] if len(axes) > 1 else axes[-1])


def _thinned(kept: Any, whole: Any) -> list[int]:
    """The axes along which an array is longer than what is kept of it: one at most."""
    pairs = zip(jnp.shape(kept), jnp.shape(whole), strict=True)
    return [axis for axis, (k, x) in enumerate(pairs) if k != x]


def _is_sample(kept: Any, whole: Any) -> bool:
    """Returns whether one array can be `_sample` of another, by their shapes."""
    if jnp.ndim(kept) != jnp.ndim(whole):
        return False
    lengths = [(jnp.shape(kept)[i], jnp.shape(whole)[i]) for i in _thinned(kept, whole)]
    return len(lengths) <= 1 and all(k == -(-x // STRIDE) for k, x in lengths)


def allocate(mode: str, params: Any) -> Any:
    """Makes the memory of a run that has not begun.

    Args:
      mode: one of `MODES`.
      params: the parameters, arrays or their shapes.

    Returns:
      A tree of zeros like the parameters, or like a sample of them, with an empty array for each
      that is not floating point; or the empty tuple.
    """
    if mode == "none":
        return ()

    def leaf(x):
        # A dtype that is said: a weakly typed array would become strong with the first step.
        dtype = jnp.result_type(x)
        # Of what no step is ever kept, as frozen integers, nothing is allocated.
        return jnp.zeros_like(x, dtype) if is_inexact(x) else jnp.zeros((0,), dtype)

    zeros = jax.tree.map(leaf, params)
    return jax.tree.map(_sample, zeros) if mode == "sparse" else zeros


def fits(mode: str, kept: Any, step: Any) -> bool:
    """Returns whether `kept` can be what `allocate` made in this mode, for steps like this one."""
    remembered, made = jax.tree.leaves(kept), jax.tree.leaves(step)
    if mode == "none" or not made:
        return not remembered
    if len(remembered) != len(made):
        return bool(remembered)
    pairs = [(k, x) for k, x in zip(remembered, made, strict=True) if is_inexact(k)]
    if mode == "step":
        return all(jnp.shape(k) == jnp.shape(x) for k, x in pairs)
    return all(_is_sample(k, x) for k, x in pairs)


def pick(tree: Any, kept: Any) -> Any:
    """Picks from a tree like the parameters the entries that the memory keeps.

    Args:
      tree: gradients or a step.
      kept: what `allocate` made.

    Returns:
      A tree with the shapes of `kept`.
    """
    if isinstance(kept, tuple) and not kept:
        return ()

    def leaf(x, k):
        if not is_inexact(k):
            return k
        axes = _thinned(k, x)
        return _thin(x, axes[0]) if axes else x

    return jax.tree.map(leaf, tree, kept)
