"""Memory: what the guard keeps of the last applied step, in three sizes.

| mode | extra memory | what it allows |
|---|---|---|
| `"none"` | none | no overshoot sensed, nothing undone |
| `"sparse"` | at most 1/8 of the parameters | overshoot sensed on a sample, nothing undone |
| `"step"` | as much as the parameters | overshoot is exact, the last step can be undone |
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

MODES = ("none", "sparse", "step")

STRIDE = 16
"""`"sparse"` keeps every 16th entry along each leaf's longest axis. 1/16 of the entries gave the
same result as all of them on the tasks of the study; leaves too small to be thinned stay whole."""


def _thin(x: jax.Array) -> jax.Array:
    if x.size < STRIDE**2:
        return x
    axis = max(range(x.ndim), key=lambda i: x.shape[i])
    return jax.lax.slice_in_dim(x, 0, x.shape[axis], stride=STRIDE, axis=axis)


def selector(mode: str) -> Callable[[Any], Any]:
    """Returns the function that picks, from a tree like the parameters, the entries to keep.

    Args:
      mode: one of `MODES`.

    Returns:
      A function from trees to trees; for `"none"` its result is the empty tuple.
    """
    if mode == "none":
        return lambda tree: ()
    if mode == "sparse":
        return lambda tree: jax.tree.map(lambda x: _thin(jnp.asarray(x)), tree)
    return lambda tree: tree
