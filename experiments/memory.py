"""The memory that a job needs of each device, from shapes alone: nothing is allocated."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.batches import Batch
from experiments.finetune import decoder_config, random_start, trained_kind
from experiments.jobs import Job
from experiments.methods import Method
from experiments.models.decoder import REMAT_POLICIES, Decoder, rope_angles
from experiments.models.loss import CHUNK
from experiments.models.sharding import AXES, BATCH, even_spec, shardings
from experiments.train import Trainer, TrainState, next_token_loss


class MemoryPlan(NamedTuple):
    """Bytes on each device.

    Attributes:
      frozen: Parameters that do not train.
      trained: Parameters that do.
      optimizer: The optimizer's state.
      inputs: Batches of a chunk of steps, learning rate and step.
      initial: The values before the first step, which a suite keeps besides the program's own.
      gradients: Of the trained parameters.
      update: What the optimizer makes beside its old state before it knows what it will keep.
      saved: What the backward pass finds of the forward pass.
      working: The larger of one layer's recomputation and one chunk of logits with its gradient,
        with the weights that are gathered for it; they are not needed at once.
    """

    frozen: int
    trained: int
    optimizer: int
    inputs: int
    initial: int
    gradients: int
    update: int
    saved: int
    working: int

    @property
    def arguments(self) -> int:
        """What the compiled step is given."""
        return self.frozen + self.trained + self.optimizer + self.inputs

    @property
    def temporaries(self) -> int:
        """What it makes and drops."""
        return self.gradients + self.update + self.saved + self.working

    @property
    def total(self) -> int:
        """Arguments, temporaries and initial values."""
        return self.arguments + self.temporaries + self.initial


class AbstractRun(NamedTuple):
    """What the compiled step is given, as shapes with their place on a mesh.

    Attributes:
      trainer: Makes the step.
      graphdef: Structure of the model.
      state: The state that trains.
      frozen: The part of the model that does not.
      batches: Batches of a chunk of steps.
      learning_rate: The learning rate.
    """

    trainer: Trainer
    graphdef: nnx.GraphDef
    state: TrainState
    frozen: Any
    batches: Batch
    learning_rate: jax.ShapeDtypeStruct

    def lower(self) -> jax.stages.Lowered:
        """The program that a run compiles."""
        return self.trainer.lower(self.state, self.frozen, self.batches, self.learning_rate)


def split_mesh(devices: int) -> AbstractMesh:
    """A mesh that stores a model in so many parts, without the devices themselves."""
    return AbstractMesh((1, devices, 1), AXES, (AxisType.Auto,) * 3)


def abstract_run(job: Job, method: Method, mesh: Mesh | AbstractMesh) -> AbstractRun:
    """Shapes of a run of a job.

    Args:
      job: The job; its base is made here or one of `ZOO`.
      method: Its optimizer.
      mesh: Where it lives; see `experiments.models.sharding`.

    Returns:
      The shapes.
    """
    graphdef, params, frozen = jax.eval_shape(functools.partial(random_start, job))
    trainer = Trainer(
        graphdef,
        method,
        chunk_steps=job.chunk_steps,
        vocabulary=decoder_config(job).vocab_size,
    )
    state = jax.eval_shape(functools.partial(trainer.init, learning_rate=0.0), params)
    shape = (job.chunk_steps, job.batch_size, job.seq_len + 1)
    place = NamedSharding(mesh, even_spec(P(None, *BATCH), shape, mesh))
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))
    return AbstractRun(
        trainer, graphdef, _placed(state, mesh), _placed(frozen, mesh), Batch(tokens, tokens), rate
    )


def plan_memory(job: Job, method: Method, devices: int = 1) -> MemoryPlan:
    """The memory that a run of a job needs.

    What is stored is exact. What is computed is the sum of the arrays that the program names: the
    compiler never makes some of them, and keeps others longer.

    Args:
      job: The job; its base is made here or one of `ZOO`.
      method: Its optimizer.
      devices: Number of devices that the model, its optimizer's state and the batch are split over.

    Returns:
      The plan of each device.
    """
    run = abstract_run(job, method, split_mesh(devices))
    trained = device_bytes(run.state.params)
    guard = optax.tree.get(run.state.opt_state, "GuardState")
    model = nnx.merge(run.graphdef, run.state.params, run.frozen)
    tokens = run.batches.tokens
    _, rows, _ = tokens.sharding.shard_shape(tokens.shape)
    return MemoryPlan(
        frozen=device_bytes(run.frozen),
        trained=trained,
        optimizer=device_bytes(run.state.opt_state),
        inputs=device_bytes((run.batches, run.learning_rate, run.state.step)),
        initial=trained,
        gradients=trained,
        # AdamW works in place. The guard needs the whole step's norm before it takes any of it, and
        # the old moments in case it does not.
        update=0 if guard is None else trained + device_bytes(guard.inner_state),
        saved=_saved_bytes(run, rows, job.seq_len),
        working=max(
            _layer_bytes(model, job, rows, gathered=devices > 1),
            _logits_bytes(model, job, rows, gathered=devices > 1),
        ),
    )


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of `jax.ShapeDtypeStruct`s with shardings, on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def residual_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Bytes that a function's backward pass finds saved, beside the function's own arguments.

    Args:
      function: A function that jax can differentiate by its first argument.
      *args: Its arguments, arrays or their shapes.

    Returns:
      The bytes.

    Example:
      >>> residual_bytes(lambda x: jnp.sin(jnp.sin(x)), jnp.zeros(3))  # Two cosines.
      24
    """

    def saved(first, *others):
        _, backward = jax.vjp(lambda first: function(first, *others), first)
        return jax.tree.leaves(backward)

    jaxpr = jax.make_jaxpr(saved)(*args).jaxpr
    arguments = {id(var) for var in (*jaxpr.invars, *jaxpr.constvars)}
    made = {id(var): var.aval for var in jaxpr.outvars if id(var) not in arguments}
    return sum(aval.size * aval.dtype.itemsize for aval in made.values())


def _placed(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The tree of shapes with the sharding of each."""
    return jax.tree.map(lambda x, s: x.update(sharding=s), tree, shardings(tree, mesh))


def _bytes(tree: Any) -> int:
    """Bytes of the whole tree, wherever it lives."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _saved_bytes(run: AbstractRun, rows: int, seq_len: int) -> int:
    tokens = jax.ShapeDtypeStruct((rows, seq_len + 1), jnp.int32)
    loss = functools.partial(next_token_loss, run.graphdef)
    shapes = jax.tree.map(lambda x: x.update(sharding=None), (run.state.params, run.frozen))
    return residual_bytes(loss, *shapes, tokens, tokens)


def _layer_bytes(model: Decoder, job: Job, rows: int, *, gathered: bool) -> int:
    """What the backward pass of one layer computes again, and the layer's own weights."""
    graphdef, *parts = nnx.split(model.layers, trained_kind(job), ...)
    params, frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts)
    width = model.config.hidden_size
    x_btd = jax.ShapeDtypeStruct((rows, job.seq_len, width), jnp.dtype(job.dtype))
    segments_bt = jax.ShapeDtypeStruct((rows, job.seq_len), jnp.int32)

    def layer(trained, frozen, segments_bt):
        params, x_btd = trained
        angles = rope_angles(segments_bt, model.config.head_dim, model.config.rope_theta)
        return nnx.merge(graphdef, params, frozen)(x_btd, *angles, segments_bt)

    args = (params, x_btd), frozen, segments_bt
    saved = jax.checkpoint(layer, policy=REMAT_POLICIES[model.remat])
    again = max(0, residual_bytes(layer, *args) - residual_bytes(saved, *args))
    return again + gathered * _bytes((params, frozen))


def _logits_bytes(model: Decoder, job: Job, rows: int, *, gathered: bool) -> int:
    """One chunk of logits and its gradient, float32, and the head's own weights with theirs."""
    config = model.config
    head = model.embed_tokens if config.tie_word_embeddings else model.lm_head
    logits = rows * min(CHUNK, job.seq_len) * config.vocab_size * 4
    weights = _bytes((nnx.state(head), nnx.state(head, trained_kind(job))))
    return 2 * logits + gathered * weights
