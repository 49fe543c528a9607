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

from experiments.batches import Batch, Batches
from experiments.faults import Fault, rate_factor, spoil_batch, spoil_gradients
from experiments.methods import guard_telemetry
from experiments.models import loss as losses


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
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        make_tx: Callable[[Any], optax.GradientTransformation],
        *,
        chunk_steps: int,
        vocabulary: int,
    ):
        self.chunk_steps = chunk_steps
        self._compiled: dict[bool, Any] = {}
        loss_fn = functools.partial(next_token_loss, graphdef)

        @jax.jit
        def init(params, learning_rate):
            # train_chunk donates its state: what is in there must be a copy, and (being made in a
            # compiled function) no two of its leaves share a buffer.
            params = jax.tree.map(jnp.copy, params)
            opt_state = make_tx(learning_rate).init(params)
            return TrainState(jnp.zeros((), jnp.int32), params, opt_state)

        @functools.partial(jax.jit, donate_argnums=0)
        def train_chunk(state, frozen, batches, learning_rate, fault, key):
            rate = learning_rate
            if fault is not None:
                rate = lambda step: learning_rate * rate_factor(fault, key, step)  # noqa: E731
            tx = optax.with_extra_args_support(make_tx(rate))

            def train_step(state, batch):
                tokens = batch.tokens
                if fault is not None:
                    tokens = spoil_batch(fault, key, state.step, tokens, vocabulary)
                loss, grads = jax.value_and_grad(loss_fn)(
                    state.params, frozen, tokens, batch.segments
                )
                if fault is not None:
                    loss, grads = spoil_gradients(fault, key, state.step, loss, grads)
                updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
                params = optax.apply_updates(state.params, updates)
                metrics = Metrics(loss, optax.tree.norm(grads), guard_telemetry(opt_state))
                return TrainState(state.step + 1, params, opt_state), metrics

            return jax.lax.scan(train_step, state, batches)

        self._init = init
        self._train_chunk = train_chunk

    def init(self, params: Any, learning_rate: float) -> TrainState:
        """The state before the first step, with a copy of the parameters."""
        return self._init(params, jnp.asarray(learning_rate, jnp.float32))

    def lower(
        self,
        state: TrainState,
        frozen: Any,
        batches: Batch,
        learning_rate: jax.Array,
        fault: Fault | None = None,
        key: jax.Array | None = None,
    ) -> jax.stages.Lowered:
        """The program of a chunk of steps, for arrays or for their shapes alone."""
        return self._train_chunk.lower(state, frozen, batches, learning_rate, fault, key)

    def fit(
        self,
        state: TrainState,
        frozen: Any,
        batches: Batches,
        learning_rate: float,
        *,
        steps: int,
        log: Callable[[int, Metrics], None],
        save: Callable[[int, TrainState], None],
        save_steps: int,
        fault: Fault | None = None,
        key: jax.Array | None = None,
    ) -> tuple[TrainState, float]:
        """Trains to a number of steps, from the state's own step on.

        Args:
          state: Where to start: from `init`, or restored. Its buffers are consumed.
          frozen: The part of the model's state that does not train.
          batches: What is trained on.
          learning_rate: Learning rate for `make_tx`.
          steps: Number of steps at the end, a multiple of `chunk_steps`.
          log: Called with the step before a chunk, and the chunk's metrics on the host.
          save: Called with a step and the state after it.
          save_steps: How often, a multiple of `chunk_steps`; the last state is saved too.
          fault: What goes wrong.
          key: Random key of the fault.

        Returns:
          The state after `steps` steps, and the seconds that the steps took, compilation and
          saving excluded.
        """
        rate = jnp.asarray(learning_rate, jnp.float32)
        seconds, pending = 0.0, None

        def flush():
            nonlocal pending
            if pending is not None:
                log(pending[0], jax.tree.map(np.asarray, pending[1]))
                pending = None

        for step in range(int(state.step), steps, self.chunk_steps):
            arguments = (state, frozen, batches.chunk(step, self.chunk_steps), rate, fault, key)
            run = self._program(arguments)
            started = time.perf_counter()
            state, metrics = run(*arguments)
            # The chunk above runs while the metrics of the one before it are written.
            flush()
            pending = (step, metrics)
            done = step + self.chunk_steps
            jax.block_until_ready(metrics)
            seconds += time.perf_counter() - started
            if done % save_steps == 0 or done == steps:
                # Logs first: a resumed run finds no metrics missing before its checkpoint.
                flush()
                save(done, state)
        return state, seconds

    def _program(self, arguments: tuple) -> Callable[..., tuple[TrainState, Metrics]]:
        """The compiled chunk, so that no step's time contains its compilation."""
        faulty = arguments[-2] is not None
        if faulty not in self._compiled:
            self._compiled[faulty] = self.lower(*arguments).compile()
        return self._compiled[faulty]
