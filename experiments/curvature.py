"""How curved the loss is around a model's parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


@functools.partial(jax.jit, static_argnums=(0, 4))
def hessian_trace(
    loss: Callable[..., jax.Array], params: Any, inputs: Any, key: jax.Array, probes: int
) -> tuple[jax.Array, jax.Array]:
    r"""Hutchinson's estimate of the trace of the loss's Hessian.

    .. math:: \mathrm{tr}(H) = E_z[z^T H z], \quad z_i = \pm 1 \text{ with equal probability}

    Args:
      loss: Function of `params` and `inputs` to a scalar.
      params: Where, a pytree of floating-point arrays.
      inputs: What else `loss` needs, a pytree of arrays.
      key: Random key of the probes.
      probes: Number of probes :math:`z`, at least 2.

    Returns:
      The mean over the probes and its standard error, float32 of shape ().

    Example:
      >>> mean, error = hessian_trace(
      ...     lambda x, scale: jnp.sum(scale * x**2), jnp.ones(3), 2.0, jax.random.key(0), 4
      ... )
      >>> float(mean), float(error)
      (12.0, 0.0)

    References:
      Hutchinson, `A stochastic estimator of the trace of the influence matrix for Laplacian
      smoothing splines <https://doi.org/10.1080/03610918908812806>`_, 1989.
    """
    gradient = jax.grad(lambda p: loss(p, inputs))

    def probe(key):
        z = optax.tree.random_like(key, params, jax.random.rademacher)
        _, product = jax.jvp(gradient, (params,), (z,))
        return optax.tree.vdot(z, product).astype(jnp.float32)

    values = jax.lax.map(probe, jax.random.split(key, probes))
    return values.mean(), values.std(ddof=1) / jnp.sqrt(probes)
