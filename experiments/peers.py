"""Published stabilisers that the guard is compared with, written from their formulas."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class ZClipState(NamedTuple):
    """State of `zclip`: mean and variance of the gradient norm, and the norms seen so far."""

    norm_mean: jax.Array  # shape=(), dtype=float32
    norm_variance: jax.Array  # shape=(), dtype=float32
    seen: jax.Array  # shape=(), dtype=int32


def zclip(
    decay: float = 0.97,
    threshold: float = 2.5,
    max_norm: float = 1.0,
    warmup: int = 25,
    eps: float = 1e-6,
) -> optax.GradientTransformation:
    r"""Clips gradients whose norm is an outlier among those before it.

    With :math:`z = (\|g\| - \mu) / (\sigma + \epsilon)`, the gradient is clipped to the norm

    .. math::

      \min(\mu + \sigma \, z_0^2 / z, \; c) \text{ if } z > z_0, \quad c \text{ otherwise}

    and :math:`\mu, \sigma^2` follow the clipped norm exponentially. They start as mean and variance
    of the first norms, which are only clipped to :math:`c`.

    Args:
      decay: Decay of mean and variance.
      threshold: :math:`z_0`.
      max_norm: :math:`c`.
      warmup: Number of first norms.
      eps: :math:`\epsilon`.

    Returns:
      The corresponding `optax.GradientTransformation`.

    References:
      Kumar et al., `ZClip: Adaptive Spike Mitigation for LLM Pre-Training
      <https://arxiv.org/abs/2504.02507>`_, 2025. The defaults are those of its authors' code.
    """

    def init_fn(params):
        del params
        return ZClipState(jnp.zeros([]), jnp.zeros([]), jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None):
        del params
        norm = optax.tree.norm(updates).astype(jnp.float32)
        mean, variance, seen = state
        warming = seen < warmup
        deviation = jnp.sqrt(variance)
        z = (norm - mean) / (deviation + eps)
        spike = ~warming & (z > threshold)
        adaptive = mean + deviation * threshold**2 / jnp.where(spike, z, 1)
        target = jnp.where(spike, jnp.minimum(adaptive, max_norm), max_norm)
        factor = jnp.minimum(target / jnp.maximum(norm, eps), 1)

        # Welford's mean and variance while warming up, of the norms as they came.
        share = 1 / (seen + 1)
        observed = jnp.where(warming, norm, factor * norm)
        weight = jnp.where(warming, share, 1 - decay)
        new_mean = mean + weight * (observed - mean)
        residual = jnp.where(warming, observed - mean, observed - new_mean) * (observed - new_mean)
        new_variance = variance + weight * (residual - variance)
        updates = jax.tree.map(lambda g: (factor * g).astype(g.dtype), updates)
        return updates, ZClipState(new_mean, new_variance, seen + 1)

    return optax.GradientTransformation(init_fn, update_fn)


class SkipStepState(NamedTuple):
    """State of `skip_step`: the last losses and gradient norms, and how many were seen."""

    inner_state: Any
    losses: jax.Array  # shape=(window,), dtype=float32
    norms: jax.Array  # shape=(window,), dtype=float32
    seen: jax.Array  # shape=(), dtype=int32


def skip_step(
    inner: optax.GradientTransformation, window: int = 128, sigmas: float = 6.0
) -> optax.GradientTransformationExtraArgs:
    r"""Skips steps whose loss or gradient norm is an outlier among the last ones.

    A step is taken if both the loss and the gradient norm are at most :math:`\mu + 6 \sigma` of the
    last 128, or if fewer than 64 were seen. Those of skipped steps count as seen.

    Args:
      inner: What is skipped.
      window: Length of the window; half of it is the warm-up.
      sigmas: Standard deviations above the mean that are an outlier.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`; its update needs `value`, the loss.

    References:
      The rule is `SkipStepOptimizer` of `OLMo-core <https://github.com/allenai/OLMo-core>`_
      and `SkipStepConfig` of `Levanter <https://github.com/stanford-crfm/levanter>`_.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return SkipStepState(
            inner.init(params), jnp.zeros(window), jnp.zeros(window), jnp.zeros([], jnp.int32)
        )

    def update_fn(updates, state, params=None, *, value, **extra_args):
        norm = optax.tree.norm(updates).astype(jnp.float32)
        known = jnp.arange(window) < state.seen

        def usual(seen, now):
            mean = jnp.mean(seen, where=known)
            return now <= mean + sigmas * jnp.maximum(jnp.std(seen, where=known), 1e-6)

        fine = usual(state.losses, value) & usual(state.norms, norm)
        taken = fine | (state.seen < window // 2)
        steps, inner_state = inner.update(
            updates, state.inner_state, params, value=value, **extra_args
        )
        steps = jax.tree.map(lambda u: jnp.where(taken, u, 0), steps)
        inner_state = jax.tree.map(
            lambda new, old: jnp.where(taken, new, old), inner_state, state.inner_state
        )
        slot = state.seen % window
        return steps, SkipStepState(
            inner_state,
            state.losses.at[slot].set(value),
            state.norms.at[slot].set(norm),
            state.seen + 1,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class StableAdamWState(NamedTuple):
    """State of `stable_adamw`: the moments, and the steps taken."""

    count: jax.Array  # shape=(), dtype=int32
    mu: Any
    nu: Any


def stable_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-6,
    weight_decay: float = 1e-2,
) -> optax.GradientTransformation:
    r"""AdamW whose learning rate falls, per tensor, where the second moment lags behind.

    .. math::

      \eta_t = \eta / \max(1, \mathrm{rms}(g_t / \sqrt{\max(\hat v_t, \epsilon^2)}))

    Args:
      learning_rate: :math:`\eta`.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: :math:`\epsilon`, also Adam's own.
      weight_decay: Decoupled weight decay, in units of the learning rate.

    Returns:
      The corresponding `optax.GradientTransformation`.

    References:
      Wortsman et al., `Stable and low-precision training for large-scale vision-language models
      <https://arxiv.org/abs/2304.13013>`_, 2023. The defaults are those of the package `optimi`.
    """

    def init_fn(params):
        zeros = optax.tree.zeros_like(params)
        return StableAdamWState(jnp.zeros([], jnp.int32), zeros, optax.tree.zeros_like(params))

    def update_fn(updates, state, params):
        count = state.count + 1
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        mu_hat = optax.tree.bias_correction(mu, b1, count)
        nu_hat = optax.tree.bias_correction(nu, b2, count)

        def step(g, m, v, p):
            excess = jnp.sqrt(jnp.mean(g**2 / jnp.maximum(v, eps**2)))
            return -rate / jnp.maximum(1, excess) * (m / (jnp.sqrt(v) + eps) + weight_decay * p)

        steps = jax.tree.map(step, updates, mu_hat, nu_hat, params)
        return steps, StableAdamWState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def keep_dtypes(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Gives a transformation's state the dtypes that it began with, as a scan needs.

    Args:
      inner: The transformation.

    Returns:
      The same, with every new state in the dtypes of the old one.
    """
    inner = optax.with_extra_args_support(inner)

    def update_fn(updates, state, params=None, **extra_args):
        steps, new = inner.update(updates, state, params, **extra_args)
        return steps, jax.tree.map(lambda x, y: jnp.asarray(x, jnp.result_type(y)), new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def per_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Gives a transformation the arrays of each layer on their own.

    The decoder keeps its layers' arrays stacked; a rule for each tensor, or for each unit of a
    matrix, means those of one layer.

    Args:
      inner: The transformation.

    Returns:
      The same for trees whose arrays below `layers` have a first axis of layers.
    """

    def update_fn(updates, state, params=None):
        apart = None if params is None else _layers_apart(params)
        steps, state = inner.update(_layers_apart(updates), state, apart)
        return _stacked_like(updates, steps), state

    return optax.GradientTransformation(lambda params: inner.init(_layers_apart(params)), update_fn)


def _by_layer(path: Any, leaf: jax.Array) -> dict[str, jax.Array]:
    """A leaf's layers, or the leaf itself, by names from which a mesh knows their place."""
    parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    if "layers" not in parts:
        return {"/".join(parts): leaf}
    at = parts.index("layers")
    before, after = parts[:at], parts[at + 1 :]
    return {"/".join((*before, f"layer{i}", *after)): layer for i, layer in enumerate(leaf)}


def _layers_apart(tree: Any) -> dict[str, jax.Array]:
    leaves = jax.tree.leaves_with_path(tree)
    return {name: x for path, leaf in leaves for name, x in _by_layer(path, leaf).items()}


def _stacked_like(tree: Any, apart: dict[str, jax.Array]) -> Any:
    def stacked(path, leaf):
        return jnp.stack([apart[name] for name in _by_layer(path, leaf)]).reshape(leaf.shape)

    return jax.tree.map_with_path(stacked, tree)
