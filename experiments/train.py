"""Training and evaluation of a next-token model, used for pretraining and for fine-tuning."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.batches import Batch, Batches
from experiments.faults import Fault, rate_factor, spoil_batch, spoil_gradients
from experiments.lora import with_masks_of_step
from experiments.methods import guard_telemetry
from experiments.models import loss as losses
from experiments.models.sharding import BATCH, even_spec, shardings


class TrainState(NamedTuple):
    """All that changes during training.

    Attributes:
      step: Number of steps taken, int32 of shape ().
      params: What trains, an `nnx.State`.
      opt_state: The optimizer's state.
    """

    step: jax.Array
    params: Any
    opt_state: Any


class Metrics(NamedTuple):
    """Telemetry, each an array with one entry per step.

    Attributes:
      loss: Mean cross-entropy of the step's batch before the step, in nats, float32.
      grad_norm: Global norm of the gradient, float32.
      guard: The guard's (scale, regime) after the step; None without a guard.
    """

    loss: jax.Array
    grad_norm: jax.Array
    guard: tuple[jax.Array, jax.Array] | None


def next_token_loss(
    graphdef: nnx.GraphDef,
    params: Any,
    frozen: Any,
    tokens_bt: jax.Array,
    segments_bt: jax.Array | None = None,
) -> jax.Array:
    """`experiments.models.loss.next_token_loss` as a function of what trains.

    Args:
      graphdef: The model's structure.
      params: The part of the model's state that trains.
      frozen: The other part.
      tokens_bt: Token ids, int32 of shape (b, t + 1).
      segments_bt: Documents of a packed batch, int32 of shape (b, t + 1).

    Returns:
      The mean over the tokens in nats, float32 of shape ().
    """
    return losses.next_token_loss(nnx.merge(graphdef, params, frozen), tokens_bt, segments_bt)


class Trainer:
    """Compiled training of one model with one kind of optimizer.

    Learning rate and fault are arguments of the compiled step, so a sweep compiles once.

    Args:
      graphdef: The model's structure.
      make_tx: Function from the learning rate, a scalar or (with a fault) a schedule, to the
        optimizer.
      chunk_steps: Steps per call of the compiled function; it hides the cost of Python.
      vocabulary: Number of token ids, for faults that draw random ones.
      mesh: Devices that share the work, see `experiments.models.sharding`; None: the default one.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        make_tx: Callable[[Any], optax.GradientTransformation],
        *,
        chunk_steps: int,
        vocabulary: int,
        mesh: Mesh | None = None,
    ):
        self.chunk_steps = chunk_steps
        self._mesh = mesh
        self._compiled: dict[bool, Any] = {}
        loss_fn = functools.partial(next_token_loss, graphdef)

        def optimizer(learning_rate, fault):
            rate = learning_rate
            if fault is not None:  # Then a schedule, which has a state of its own.
                rate = lambda step: learning_rate * rate_factor(*fault, step)  # noqa: E731
            return optax.with_extra_args_support(make_tx(rate))

        def placed(state):
            if mesh is None:
                return state
            return jax.lax.with_sharding_constraint(state, shardings(state, mesh))

        @jax.jit
        def init(params, learning_rate, fault):
            # train_chunk donates its state: what is in there must be a copy, and (being made in a
            # compiled function) no two of its leaves share a buffer.
            params = jax.tree.map(jnp.copy, params)
            opt_state = optimizer(learning_rate, fault).init(params)
            return placed(TrainState(jnp.zeros((), jnp.int32), params, opt_state))

        @functools.partial(jax.jit, donate_argnums=0)
        def train_chunk(state, frozen, batches, learning_rate, fault):
            tx = optimizer(learning_rate, fault)

            def train_step(state, batch):
                tokens = batch.tokens
                if fault is not None:
                    tokens = spoil_batch(*fault, state.step, tokens, vocabulary)
                others = with_masks_of_step(frozen, state.step)
                loss, grads = jax.value_and_grad(loss_fn)(
                    state.params, others, tokens, batch.segments
                )
                if fault is not None:
                    loss, grads = spoil_gradients(*fault, state.step, loss, grads)
                updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
                params = optax.apply_updates(state.params, updates)
                metrics = Metrics(loss, optax.tree.norm(grads), guard_telemetry(opt_state))
                return TrainState(state.step + 1, params, opt_state), metrics

            state, metrics = jax.lax.scan(train_step, state, batches)
            return placed(state), metrics

        self._init = init
        self._train_chunk = train_chunk

    def init(
        self,
        params: Any,
        learning_rate: float,
        fault: tuple[Fault, jax.Array] | None = None,
    ) -> TrainState:
        """The state before the first step, with a copy of the parameters; see `fit`."""
        return self._init(params, jnp.asarray(learning_rate, jnp.float32), fault)

    def lower(
        self,
        state: TrainState,
        frozen: Any,
        batches: Batch,
        learning_rate: jax.Array,
        fault: tuple[Fault, jax.Array] | None = None,
    ) -> jax.stages.Lowered:
        """The program of a chunk of steps, for arrays or for their shapes alone."""
        return self._train_chunk.lower(state, frozen, batches, learning_rate, fault)

    def fit(
        self,
        state: TrainState,
        frozen: Any,
        batches: Batches,
        learning_rate: float,
        *,
        steps: int,
        log: Callable[[int, Metrics, float], None],
        save: Callable[[int, TrainState], None],
        save_steps: int,
        fault: tuple[Fault, jax.Array] | None = None,
    ) -> TrainState:
        """Trains to a number of steps, from the state's own step on.

        Args:
          state: Where to start: from `init`, or restored. Its buffers are consumed.
          frozen: The part of the model's state that does not train.
          batches: What is trained on.
          learning_rate: Learning rate for `make_tx`.
          steps: Number of steps at the end, a multiple of `chunk_steps`.
          log: Called with the step before a chunk, the chunk's metrics on the host, and the seconds
            that its steps took, compilation and saving excluded.
          save: Called with a step and the state after it.
          save_steps: How often, a multiple of `chunk_steps`; the last state is saved too.
          fault: What goes wrong, and the random key of when.

        Returns:
          The state after `steps` steps.
        """
        rate = jnp.asarray(learning_rate, jnp.float32)
        pending = started = None

        def flush():
            nonlocal pending, started
            if pending is not None:
                step, metrics = pending
                metrics = jax.tree.map(np.asarray, metrics)  # Waits for the chunk.
                done = time.perf_counter()
                log(step, metrics, done - started)
                pending, started = None, done

        for step in range(int(state.step), steps, self.chunk_steps):
            chunk = batches.chunk(step, self.chunk_steps)
            if self._mesh is not None:
                spec = even_spec(P(None, *BATCH), chunk.tokens.shape, self._mesh)
                chunk = jax.device_put(chunk, NamedSharding(self._mesh, spec))
            arguments = (state, frozen, chunk, rate, fault)
            run = self._program(arguments)
            if started is None:
                started = time.perf_counter()
            state, metrics = run(*arguments)
            # The chunk above runs while the metrics of the one before it are written and the
            # batches of the one after it are made: its time is that between two ends.
            flush()
            pending = (step, metrics)
            done = step + self.chunk_steps
            if done % save_steps == 0 or done == steps:
                # Logs first: a resumed run finds no metrics missing before its checkpoint.
                flush()
                save(done, state)
                started = None
        return state

    def _program(self, arguments: tuple) -> Callable[..., tuple[TrainState, Metrics]]:
        """The compiled chunk, so that no step's time contains its compilation."""
        faulty = arguments[-1] is not None
        if faulty not in self._compiled:
            self._compiled[faulty] = self.lower(*arguments).compile()
        return self._compiled[faulty]
