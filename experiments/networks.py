"""Small networks of many kinds, each as it is usually trained."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import BYTE_VOCABULARY, crop_batch, standard_library
from experiments.methods import pretraining, warmup_cosine
from experiments.tasks import USUAL_DEVIATION

EVALUATED = 64
"""Batches on which a network is evaluated."""

Sample = Callable[[jax.Array, int, Any], Any]
"""From a random key, the number of examples, and how much of the run is over, to a batch."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A usual way to train one kind of network, see `experiments.sweep.Trainable`."""

    name: str
    """Name in tables."""
    init: Callable[[jax.Array], Any]
    """From a random key to the parameters."""
    loss: Callable[[Any, Any], jax.Array]
    """From the parameters and a batch to the loss."""
    sample: Sample
    """Where batches come from."""
    method: Callable[[float, int], optax.GradientTransformation]
    """From the learning rate and the number of steps to the optimizer."""
    batch_size: int = 32
    """Examples per step."""

    def batch(self, key: jax.Array, over: Any) -> Any:
        """The batch of one step."""
        return self.sample(key, self.batch_size, over)

    def evaluate(self, params: Any) -> jax.Array:
        """The mean loss of batches that come after the run."""
        keys = jax.random.split(jax.random.key(2**31), EVALUATED)
        return jax.lax.map(lambda key: self.loss(params, self.batch(key, 1.0)), keys).mean()


# Optimizers


def _adam(rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(rate)


def _adamw(rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adamw(rate)


def _sgd_cosine(rate: float, steps: int) -> optax.GradientTransformation:
    shape = optax.cosine_decay_schedule(1.0, steps)
    return optax.sgd(lambda step: rate * shape(step), momentum=0.9)


# Parts


def _dense(key: jax.Array, inputs: int, outputs: int) -> tuple[jax.Array, jax.Array]:
    """Weights and bias with the usual scale."""
    return jax.random.normal(key, (inputs, outputs)) / math.sqrt(inputs), jnp.zeros(outputs)


def _mlp(*sizes: int) -> Callable[[jax.Array], Any]:
    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        return [_dense(k, *pair) for k, pair in zip(keys, itertools.pairwise(sizes), strict=True)]

    return init


def _linear(layer: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
    weights, bias = layer
    return x @ weights + bias


def _apply(layers: Any, x: jax.Array, activation: Callable = jax.nn.gelu) -> jax.Array:
    for layer in layers[:-1]:
        x = activation(_linear(layer, x))
    return _linear(layers[-1], x)


def _block(layer: Any, x: jax.Array, heads: int, causal: bool = False) -> jax.Array:
    """One layer of a transformer: attention and perceptron, each behind a norm."""
    before_attention, before_mlp = layer["norms"]
    projected = (jax.nn.standardize(x) * before_attention) @ layer["qkv"]
    q, k, v = jnp.split(projected.reshape(*x.shape[:2], heads, -1), 3, axis=-1)
    seen = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
    x = x + seen.reshape(x.shape) @ layer["out"]
    return x + jax.nn.gelu((jax.nn.standardize(x) * before_mlp) @ layer["up"]) @ layer["down"]


def _squared(predicted: jax.Array, target: jax.Array) -> jax.Array:
    return optax.squared_error(predicted, target).mean()


def _entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# Data


def _blobs(key: jax.Array, n: int) -> jax.Array:
    """Images of 8x8 with two soft spots each, in [0, 1]."""
    centres = jax.random.uniform(key, (n, 2, 2), minval=1.0, maxval=6.0)
    grid = jnp.stack(jnp.meshgrid(jnp.arange(8.0), jnp.arange(8.0)), -1)
    squares = ((grid[None, None] - centres[:, :, None, None]) ** 2).sum(-1)
    return jnp.exp(-squares / 2).max(1)


def _gratings(key: jax.Array, n: int, over: Any) -> tuple[jax.Array, jax.Array]:
    """Noisy images of 8x8 with stripes of one of ten directions, and which."""
    k_label, k_phase, k_noise = jax.random.split(key, 3)
    labels = jax.random.randint(k_label, (n,), 0, 10)
    angle, phase = labels * (jnp.pi / 10), jax.random.uniform(k_phase, (n,), maxval=2 * jnp.pi)
    y, x = jnp.meshgrid(jnp.arange(8.0), jnp.arange(8.0), indexing="ij")
    along = jnp.cos(angle)[:, None, None] * x + jnp.sin(angle)[:, None, None] * y
    images = jnp.sin(1.5 * along + phase[:, None, None])
    return images + 0.7 * jax.random.normal(k_noise, images.shape), labels


# Networks


def _contrastive() -> Network:
    """Two noisy views of each of 64 things, to be recognised as of one thing (InfoNCE)."""
    mixing = jax.random.normal(jax.random.key(1), (8, 32))

    def sample(key, n, over):
        k_thing, k_view = jax.random.split(key)
        things = jnp.tanh(jax.random.normal(k_thing, (n, 8)) @ mixing / math.sqrt(8))
        return things + 0.3 * jax.random.normal(k_view, (2, n, 32))

    def loss(params, views):
        a, b = (_apply(params, view) for view in views)
        a, b = (x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6) for x in (a, b))
        return _entropy(a @ b.T / 0.1, jnp.arange(len(a)))

    return Network(
        "contrastive, AdamW with warmup and cosine",
        _mlp(32, 64, 16),
        loss,
        sample,
        warmup_cosine,
        64,
    )


def _diffusion() -> Network:
    """A network that takes the noise out of points on two half circles."""

    def sample(key, n, over):
        k_angle, k_side, k_noise, k_time = jax.random.split(key, 4)
        angle = jax.random.uniform(k_angle, (n,), maxval=jnp.pi)
        side = jax.random.bernoulli(k_side, shape=(n,))
        x = jnp.where(side, jnp.cos(angle), 1 - jnp.cos(angle))
        y = jnp.where(side, jnp.sin(angle), 0.5 - jnp.sin(angle))
        noise, time = jax.random.normal(k_noise, (n, 2)), jax.random.uniform(k_time, (n, 1))
        turn = time * jnp.pi / 2
        return jnp.cos(turn) * jnp.stack([x, y], 1) + jnp.sin(turn) * noise, time, noise

    def loss(params, batch):
        points, time, noise = batch
        inputs = [points, time, jnp.sin(6 * time), jnp.cos(6 * time)]
        return _squared(_apply(params, jnp.concatenate(inputs, 1), jax.nn.silu), noise)

    return Network("diffusion of points, Adam", _mlp(5, 64, 64, 2), loss, sample, _adam, 128)


def _autoencoder() -> Network:
    """A variational autoencoder of images with two spots; its bound in nats."""

    def init(key):
        k_in, k_out = jax.random.split(key)
        return {"encoder": _mlp(64, 64, 8)(k_in), "decoder": _mlp(4, 64, 64)(k_out)}

    def sample(key, n, over):
        k_image, k_noise = jax.random.split(key)
        return _blobs(k_image, n).reshape(n, 64), jax.random.normal(k_noise, (n, 4))

    def loss(params, batch):
        images, noise = batch
        mean, log_std = jnp.split(_apply(params["encoder"], images), 2, axis=-1)
        logits = _apply(params["decoder"], mean + jnp.exp(log_std) * noise)
        missed = optax.sigmoid_binary_cross_entropy(logits, images).sum(-1)
        divergence = (jnp.exp(2 * log_std) + mean**2 - 1 - 2 * log_std).sum(-1) / 2
        return jnp.mean(missed + divergence)

    return Network("variational autoencoder, Adam", init, loss, sample, _adam)


def _vision_transformer() -> Network:
    """A transformer of two layers over patches of 2x2 that tells the direction of stripes."""
    width = 24

    def init(key):
        k_patch, k_place, k_out, *keys = jax.random.split(key, 11)
        layers = [
            {
                "qkv": _dense(keys[4 * i], width, 3 * width)[0],
                "out": _dense(keys[4 * i + 1], width, width)[0] / 2,
                "up": _dense(keys[4 * i + 2], width, 4 * width)[0],
                "down": _dense(keys[4 * i + 3], 4 * width, width)[0] / 2,
                "norms": jnp.ones((2, width)),
            }
            for i in range(2)
        ]
        return {
            "patch": _dense(k_patch, 4, width),
            "place": 0.02 * jax.random.normal(k_place, (16, width)),
            "layers": layers,
            "head": _dense(k_out, width, 10),
        }

    def loss(params, batch):
        images, labels = batch
        patches = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        x = _linear(params["patch"], patches) + params["place"]
        for layer in params["layers"]:
            x = _block(layer, x, heads=4)
        return _entropy(_linear(params["head"], jax.nn.standardize(x).mean(1)), labels)

    return Network("vision transformer, AdamW", init, loss, _gratings, _adamw, 16)


def _gpt() -> Network:
    """A GPT of three layers without biases over the bytes of Python sources, with the usual start.

    References:
      Radford et al., Language models are unsupervised multitask learners, 2019
    """
    width, depth, length = 48, 3, 32
    shapes = {"qkv": (1, 3), "out": (1, 1), "up": (1, 4), "down": (4, 1)}
    text = jnp.asarray(np.frombuffer(standard_library().content, np.uint8))

    def init(key):
        keys = iter(jax.random.split(key, 2 + depth * len(shapes)))

        def matrix(*shape):
            return USUAL_DEVIATION * jax.random.normal(next(keys), shape)

        layers = [
            {name: matrix(n * width, m * width) for name, (n, m) in shapes.items()}
            | {"norms": jnp.ones((2, width))}
            for _ in range(depth)
        ]
        tokens, place = matrix(BYTE_VOCABULARY, width), matrix(length, width)
        return {"tokens": tokens, "place": place, "layers": layers, "norm": jnp.ones(width)}

    def sample(key, n, over):
        return crop_batch(text, key, n, length)

    def loss(params, batch):
        x = params["tokens"][batch[:, :-1]] + params["place"]
        for layer in params["layers"]:
            x = _block(layer, x, heads=4, causal=True)
        return _entropy(jax.nn.standardize(x) * params["norm"] @ params["tokens"].T, batch[:, 1:])

    return Network("GPT, AdamW with the whole recipe", init, loss, sample, pretraining, 8)


def _batch_norm() -> Network:
    """Convolutions with batch norm that tell the direction of stripes."""

    def init(key):
        k_first, k_second, k_head = jax.random.split(key, 3)
        return {
            "kernels": [
                jax.random.normal(k_first, (3, 3, 1, 8)) / 3,
                jax.random.normal(k_second, (3, 3, 8, 16)) / math.sqrt(9 * 8),
            ],
            "scales": [jnp.stack([jnp.ones(n), jnp.zeros(n)]) for n in (8, 16)],
            "head": _dense(k_head, 16, 10),
        }

    def loss(params, batch):
        images, labels = batch
        x = images[..., None]
        for kernel, (gain, shift) in zip(params["kernels"], params["scales"], strict=True):
            dimensions = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x, kernel, (2, 2), "SAME", dimension_numbers=dimensions
            )
            x = jax.nn.relu(jax.nn.standardize(x, axis=(0, 1, 2)) * gain + shift)
        return _entropy(_linear(params["head"], x.mean((1, 2))), labels)

    return Network(
        "convolutions with batch norm, SGD with momentum and cosine",
        init,
        loss,
        _gratings,
        _sgd_cosine,
    )


def _image_as_function() -> Network:
    """Waves that learn one picture as a function of the place (SIREN)."""

    def init(key):
        layers = _mlp(2, 64, 64, 1)(key)
        scales = (jnp.sqrt(2.0) * 5, jnp.sqrt(2.0), 1.0)
        return [(w * s, b) for (w, b), s in zip(layers, scales, strict=True)]

    def sample(key, n, over):
        places = jax.random.uniform(key, (n, 2), minval=-1.0)
        x, y = places.T
        disc = jax.nn.sigmoid(20 * (0.4 - jnp.hypot(x - 0.3, y)))
        return places, (disc + 0.5 * jnp.sin(9 * x + 4 * y) * jnp.cos(5 * y))[:, None]

    def loss(params, batch):
        places, values = batch
        return _squared(_apply(params, places, jnp.sin), values)

    return Network("image as a function (SIREN), Adam", init, loss, sample, _adam, 256)


def _recurrent() -> Network:
    """A recurrent network, not clipped, that adds two marked numbers of a row of twenty."""

    def init(key):
        k_in, k_state, k_out = jax.random.split(key, 3)
        square = jax.random.orthogonal(k_state, 32)
        return {"in": _dense(k_in, 2, 32), "state": square, "out": _dense(k_out, 32, 1)}

    def sample(key, n, over):
        k_value, k_first, k_second = jax.random.split(key, 3)
        values = jax.random.uniform(k_value, (n, 20))
        first = jax.nn.one_hot(jax.random.randint(k_first, (n,), 0, 10), 20)
        second = jax.nn.one_hot(jax.random.randint(k_second, (n,), 10, 20), 20)
        marks = first + second
        return jnp.stack([values, marks], -1), (values * marks).sum(1, keepdims=True)

    def loss(params, batch):
        rows, sums = batch

        def step(state, x):
            return jnp.tanh(_linear(params["in"], x) + state @ params["state"]), None

        state, _ = jax.lax.scan(step, jnp.zeros((len(rows), 32)), rows.swapaxes(0, 1))
        return _squared(_linear(params["out"], state), sums)

    return Network("recurrent network without clipping, Adam", init, loss, sample, _adam)


def _curve(key: jax.Array, n: int, second: Any) -> tuple[jax.Array, jax.Array]:
    """One of two curves to be learned, with a mark that says which."""
    x = jax.random.uniform(key, (n, 1), minval=-1.0)
    values = jnp.where(second, jnp.abs(jnp.sin(5 * x)) - 0.5, jnp.sin(7 * x))
    return jnp.concatenate([x, jnp.broadcast_to(second, x.shape)], 1), values


def _curve_loss(params: Any, batch: Any) -> jax.Array:
    inputs, values = batch
    return _squared(_apply(params, inputs), values)


def _two_tasks() -> Network:
    """Two curves to learn, one of them per batch, drawn by chance."""

    def sample(key, n, over):
        key, k_which = jax.random.split(key)
        return _curve(key, n, jax.random.bernoulli(k_which).astype(jnp.float32))

    return Network(
        "two tasks drawn by chance, Adam", _mlp(2, 64, 64, 1), _curve_loss, sample, _adam
    )


def _change_of_task() -> Network:
    """One curve in the first half of the run, the other in the second."""
    return dataclasses.replace(
        _two_tasks(),
        name="a task that changes to another halfway, Adam",
        sample=lambda key, n, over: _curve(key, n, jnp.where(over < 0.5, 0.0, 1.0)),
    )


def _physics_informed() -> Network:
    """The solution of -u'' = f on [0, 1], zero at both ends, by its residuals; without noise."""

    def sample(key, n, over):
        return (jnp.arange(n) + 0.5) / n

    def loss(params, places):
        def solution(x):
            return _apply(params, x[None], jnp.tanh)[0]

        def source(x):
            return jnp.pi**2 * (jnp.sin(jnp.pi * x) + 8 * jnp.sin(4 * jnp.pi * x))

        residual = jax.vmap(jax.grad(jax.grad(solution)))(places) + jax.vmap(source)(places)
        ends = jax.vmap(solution)(jnp.array([0.0, 1.0]))
        return jnp.mean(residual**2) / 1000 + jnp.sum(ends**2)

    return Network(
        "physics-informed network, full batch, Adam", _mlp(1, 32, 32, 1), loss, sample, _adam
    )


def _linear_probe() -> Network:
    """A linear classifier of fixed features, from a hundredth of the usual weights."""
    centres = jax.random.normal(jax.random.key(2), (10, 64))

    def init(key):
        return 0.01 * jax.random.normal(key, (64, 10)), jnp.zeros(10)

    def sample(key, n, over):
        k_label, k_noise = jax.random.split(key)
        labels = jax.random.randint(k_label, (n,), 0, 10)
        return centres[labels] + 4 * jax.random.normal(k_noise, (n, 64)), labels

    def loss(params, batch):
        features, labels = batch
        return _entropy(_linear(params, features), labels)

    return Network("linear probe from normal(0.01), AdamW", init, loss, sample, _adamw)


def _recommender() -> Network:
    """Ratings of 100 items by 100 users as products of factors that start at normal(0.01)."""
    true = jax.random.normal(jax.random.key(3), (2, 100, 4))

    def init(key):
        return 0.01 * jax.random.normal(key, (2, 100, 4))

    def sample(key, n, over):
        k_pair, k_noise = jax.random.split(key)
        pairs = jax.random.randint(k_pair, (2, n), 0, 100)
        return pairs, _rating(true, pairs) + 0.3 * jax.random.normal(k_noise, (n,))

    def loss(params, batch):
        pairs, ratings = batch
        return _squared(_rating(params, pairs), ratings)

    return Network("recommender from normal(0.01), Adam", init, loss, sample, _adam, 64)


def _rating(factors: jax.Array, pairs: jax.Array) -> jax.Array:
    return (factors[0, pairs[0]] * factors[1, pairs[1]]).sum(-1)


NETWORKS: tuple[Callable[[], Network], ...] = (
    _contrastive,
    _diffusion,
    _autoencoder,
    _vision_transformer,
    _gpt,
    _batch_norm,
    _image_as_function,
    _recurrent,
    _two_tasks,
    _change_of_task,
    _physics_informed,
    _linear_probe,
    _recommender,
)
"""Makers of the networks."""
