"""Training and evaluation of a next-token model, used for pretraining and for fine-tuning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.checkpoint import Checkpoints
from experiments.data import crop_batch
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
    """Compiled training and evaluation of one model with one kind of optimizer.

    The learning rate is an argument of the compiled step, so a sweep compiles once.

    Args:
      graphdef: The model's structure.
      make_tx: Function from the learning rate to the optimizer.
      batch_size: Sequences per step.
      seq_len: Predicted tokens per sequence.
      chunk_steps: Steps per call of the compiled function; it hides the cost of Python.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        make_tx: Callable[[Any], optax.GradientTransformation],
        *,
        batch_size: int,
        seq_len: int,
        chunk_steps: int,
    ):
        self.chunk_steps = chunk_steps
        loss_fn = functools.partial(next_token_loss, graphdef)

        @jax.jit
        def init(params, learning_rate):
            # train_chunk donates its state: what is in there must be a copy, and (being made in a
            # compiled function) no two of its leaves share a buffer.
            params = jax.tree.map(jnp.copy, params)
            opt_state = make_tx(learning_rate).init(params)
            return TrainState(jnp.zeros((), jnp.int32), params, opt_state)

        @functools.partial(jax.jit, donate_argnums=0)
        def train_chunk(state, frozen, tokens, key, learning_rate):
            tx = optax.with_extra_args_support(make_tx(learning_rate))

            def train_step(state, _):
                step_key = jax.random.fold_in(key, state.step)
                batch = crop_batch(tokens, step_key, batch_size, seq_len)
                loss, grads = jax.value_and_grad(loss_fn)(state.params, frozen, batch)
                updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
                params = optax.apply_updates(state.params, updates)
                metrics = Metrics(loss, optax.tree.norm(grads), guard_telemetry(opt_state))
                return TrainState(state.step + 1, params, opt_state), metrics

            return jax.lax.scan(train_step, state, length=chunk_steps)

        self._init = init
        self._train_chunk = train_chunk

    def init(self, params: Any, learning_rate: float) -> TrainState:
        """The state before the first step, with a copy of the parameters."""
        return self._init(params, jnp.asarray(learning_rate, jnp.float32))

    def fit(
        self,
        state: TrainState,
        frozen: Any,
        tokens: jax.Array,
        key: jax.Array,
        learning_rate: float,
        *,
        steps: int,
        checkpoints: Checkpoints,
        checkpoint_steps: int,
        log: Callable[[int, Metrics], None],
    ) -> TrainState:
        """Trains to a number of steps, from the state's own step on.

        Args:
          state: Where to start: from `init`, or restored. Its buffers are consumed.
          frozen: The part of the model's state that does not train.
          tokens: The text, integers of shape (n,).
          key: Random key of the batches.
          learning_rate: Learning rate for `make_tx`.
          steps: Number of steps at the end, a multiple of `chunk_steps`.
          checkpoints: Where the state is saved.
          checkpoint_steps: How often, a multiple of `chunk_steps`; the last state is saved too.
          log: Called with the step before a chunk, and the chunk's metrics on the host.

        Returns:
          The state after `steps` steps.
        """
        learning_rate = jnp.asarray(learning_rate, jnp.float32)
        pending: list[tuple[int, Metrics]] = []

        def flush():
            while pending:
                step, metrics = pending.pop()
                log(step, jax.tree.map(np.asarray, metrics))

        for step in range(int(state.step), steps, self.chunk_steps):
            state, metrics = self._train_chunk(state, frozen, tokens, key, learning_rate)
            # The chunk above runs while the metrics of the one before it are written.
            flush()
            pending.append((step, metrics))
            done = step + self.chunk_steps
            if done % checkpoint_steps == 0 or done == steps:
                # Logs first: a resumed run finds no metrics missing before its checkpoint.
                flush()
                checkpoints.save(done, state)
        return state


def make_evaluate(graphdef: nnx.GraphDef) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """Compiles the held-out loss.

    Args:
      graphdef: The model's structure.

    Returns:
      A function of (params, frozen, windows), with windows an int32 array of shape (m, b, t + 1),
      that returns the mean loss in nats, float32 of shape ().
    """

    @jax.jit
    def evaluate(params, frozen, windows):
        loss_fn = functools.partial(next_token_loss, graphdef, params, frozen)
        return jax.lax.map(loss_fn, windows).mean()

    return evaluate
