"""A fine-tuning job at work: its model and text made ready, its runs done one after the other."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.batches import Batch
from experiments.checkpoint import Checkpoints
from experiments.data import Text
from experiments.dataset import Dataset, checkpoint
from experiments.errors import UserError
from experiments.faults import Fault
from experiments.jobs import Job
from experiments.lora import add_lora
from experiments.methods import REGIMES, Method, evaluated, guard_record
from experiments.models.config import DecoderConfig
from experiments.models.decoder import Decoder
from experiments.models.hf import load_pretrained
from experiments.models.llama2c import load_llama2c
from experiments.models.loss import next_token_sums
from experiments.models.sharding import on_mesh, shard
from experiments.models.zoo import ZOO
from experiments.pretrain import pretrained
from experiments.results import Results
from experiments.train import Metrics, Trainer, next_token_loss


class Run(NamedTuple):
    """One fine-tune of a job.

    Attributes:
      name: What the results folder calls it.
      method: Name of its optimizer.
      learning_rate: Its learning rate.
      seed: Seed of the adapters, of the batches and of the fault.
      fault: What goes wrong in it, if anything.
    """

    name: str
    method: str
    learning_rate: float
    seed: int = 0
    fault: Fault | None = None

    def seeded(self, seed: int) -> Run:
        """The same with a seed, which its name then tells."""
        return self._replace(name=f"{self.name}, seed {seed}", seed=seed)


class Start(NamedTuple):
    """A model before the first step.

    Attributes:
      graphdef: Its structure.
      params: What trains, an `nnx.State`.
      frozen: What does not.
    """

    graphdef: nnx.GraphDef
    params: Any
    frozen: Any


def decoder_settings(job: Job) -> dict[str, Any]:
    """How a job stores and computes a checkpoint: the settings of `Decoder`."""
    return {
        "dtype": jnp.dtype(job.dtype),
        # What does not train is stored as it is computed with.
        "param_dtype": jnp.dtype(job.dtype if job.lora else job.param_dtype),
        "remat": job.remat,
        "attention": job.attention,
    }


def start(model: nnx.Module, job: Job, seed: int) -> Start:
    """What a run starts from.

    Args:
      model: The base model; it gets the job's corrections in place.
      job: The job.
      seed: Seed of the corrections.

    Returns:
      The model before the first step.
    """
    kind, lora = trained_kind(job), job.lora
    if lora is not None:
        rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(seed), 0))
        model = add_lora(
            model, lora.rank, lora.alpha, dropout=lora.dropout, targets=lora.targets, rngs=rngs
        )
    graphdef, params, frozen = nnx.split(model, kind, ...)
    params = jax.tree.map(lambda x: x.astype(job.param_dtype), params)
    return Start(graphdef, params, frozen)


def decoder_config(job: Job) -> DecoderConfig:
    """The shape of a job's model, without its weights; the base is made here or one of `ZOO`."""
    return job.base.config or ZOO[job.base.name]


def random_start(job: Job) -> Start:
    """What a run would start from, with random weights, for work that needs no trained ones."""
    return start(Decoder(decoder_config(job), **decoder_settings(job), rngs=nnx.Rngs(0)), job, 0)


def trained_kind(job: Job) -> type[nnx.Variable]:
    """The type of the variables that a job trains."""
    return nnx.Param if job.lora is None else nnx.LoRAParam


class Finetune:
    """A job made ready.

    Args:
      job: The job.
      dataset: What is trained on and held out.
      models: Folder of Hugging Face checkpoints; None looks on the hub.
      mesh: Devices that share the work, where the methods have to be called, see `on_mesh`; None:
        the default one.
      text: What a base model that is made here is pretrained on; None takes its recipe's.
    """

    def __init__(
        self,
        job: Job,
        dataset: Dataset,
        models: Path | None,
        mesh: Mesh | None = None,
        text: Text | None = None,
    ):
        self.job = job
        self._dataset = dataset
        self._mesh = mesh
        # Not on the mesh: what is pretrained here does not depend on it.
        model = _load(job, models, mesh, text)
        if dataset.vocabulary > model.config.vocab_size:
            raise UserError(
                f"{job.base.name}: its tokenizer has {dataset.vocabulary} tokens, more than the "
                f"{model.config.vocab_size} that the model knows"
            )
        graphdef, state = nnx.split(model)
        self._base = graphdef, state if mesh is None else shard(state, mesh)
        self._trainers: dict[Method, Trainer] = {}
        with on_mesh(mesh):
            model = nnx.merge(*self.start(0))
        self._graphdef = nnx.graphdef(model)
        model.eval()  # Without dropout, here and below.
        graphdef = nnx.graphdef(model)

        def loss(params, inputs):
            frozen, batch = inputs
            return next_token_loss(graphdef, params, frozen, batch.tokens, batch.segments)

        @jax.jit
        def score(params, frozen, tokens_bt, weights_bt):
            model = nnx.merge(graphdef, params, frozen)
            return next_token_sums(model, tokens_bt, counted_bt=weights_bt > 0)

        self.loss: Callable[[Any, tuple[Any, Batch]], jax.Array] = loss
        """The loss of (params, (frozen, batch)), in nats."""
        self._score = score

    def start(self, seed: int) -> Start:
        """The model before the first step of a run."""
        graphdef, *parts = start(nnx.merge(*self._base), self.job, seed)
        if self._mesh is not None:
            parts = [shard(part, self._mesh) for part in parts]
        return Start(graphdef, *parts)

    def batch(self, seed: int) -> Batch:
        """The first batch of a run."""
        return self._dataset.batches(seed).at(0)

    def heldout_loss(self, params: Any, frozen: Any) -> float:
        """The loss on the held-out text, in nats per token."""
        return self._dataset.heldout_loss(functools.partial(self._score, params, frozen))

    def path(
        self, method: Method, learning_rate: float, seed: int, stops: Iterable[int]
    ) -> Iterator[Any]:
        """What trains, after some of the steps of a run that is not recorded.

        Args:
          method: The run's optimizer.
          learning_rate: Its learning rate.
          seed: Its seed.
          stops: The steps, ascending multiples of the job's `chunk_steps`.

        Yields:
          The parameters, on the host.
        """
        trainer, start = self._trainer(method), self.start(seed)
        state = trainer.init(start.params, learning_rate)
        for stop in stops:
            state = trainer.fit(
                state,
                start.frozen,
                self._dataset.batches(seed),
                learning_rate,
                steps=stop,
                log=lambda step, metrics, seconds: None,
                save=lambda step, state: None,
                save_steps=stop,
            )
            yield jax.device_get(state.params)

    def do(
        self, run: Run, method: Method, folder: Results, progress: tqdm, eval_steps: int
    ) -> None:
        """Does one run from where it was left, and records it.

        Args:
          run: The run.
          method: Its optimizer.
          folder: Where its metrics, events and record go.
          progress: Counts the steps.
          eval_steps: Steps between measurements of the held-out loss; the last is always measured.
        """
        began = time.perf_counter()
        job, trainer, start = self.job, self._trainer(method), self.start(run.seed)
        checkpoints = Checkpoints(folder.checkpoint_folder(run.name))
        fault = run.fault and (run.fault, jax.random.fold_in(jax.random.key(run.seed), 1))
        state = checkpoints.restore_or(trainer.init(start.params, run.learning_rate, fault))
        done = folder.start(run.name, int(state.step))
        progress.update(int(state.step))
        whole = int(state.step) == 0  # Nobody timed the earlier part of a resumed run.
        evaluations = {row["step"]: row for row in done if "heldout_loss" in row}
        total = sum(row["seconds"] for row in done if "loss" in row)

        def log(step: int, metrics: Metrics, seconds: float) -> None:
            nonlocal total
            total += seconds
            folder.log_metrics(_metric_rows(run, step, metrics, seconds))
            progress.set_postfix(loss=f"{metrics.loss[-1]:.3f}", refresh=False)
            progress.update(len(metrics.loss))

        for stop in [*range(eval_steps, job.steps, eval_steps), job.steps]:
            if stop in evaluations:
                continue
            if stop < int(state.step):  # Measured before the checkpoint was made, and lost.
                raise folder.damaged()
            state = trainer.fit(
                state,
                start.frozen,
                self._dataset.batches(run.seed),
                run.learning_rate,
                steps=stop,
                log=log,
                save=checkpoints.save,
                save_steps=job.checkpoint_steps,
                fault=fault,
            )
            loss = self.heldout_loss(evaluated(state.opt_state, state.params), start.frozen)
            evaluations[stop] = {"step": stop, "heldout_loss": loss, "seconds": total}
            folder.log_metrics([{"run": run.name, **evaluations[stop]}])
        guard, events = guard_record(state.opt_state)
        checkpoints.close()
        record = {
            "method": run.method,
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            "heldout_loss": evaluations[job.steps]["heldout_loss"],
            "seconds": evaluations[job.steps]["seconds"],
            "end_to_end_seconds": time.perf_counter() - began if whole else None,
            "steps": job.steps,
        }
        folder.finish(run.name, record | guard, events)

    def _trainer(self, method: Method) -> Trainer:
        """The method's trainer: another learning rate or seed is no new program."""
        if method not in self._trainers:
            self._trainers[method] = Trainer(
                self._graphdef,
                method,
                chunk_steps=self.job.chunk_steps,
                vocabulary=self._dataset.vocabulary,
                mesh=self._mesh,
            )
        return self._trainers[method]


def _load(job: Job, models: Path | None, mesh: Mesh | None, text: Text | None) -> Decoder:
    """The base model, ready to be computed with as the job says."""
    base, settings = job.base, decoder_settings(job)
    if base.llama2c is not None:
        return load_llama2c(Path(checkpoint(job, models), base.llama2c[0]))
    if base.recipe is None:
        return load_pretrained(checkpoint(job, models), mesh=mesh, **settings)
    made = pretrained(base.config, base.dtype, job.seq_len, base.recipe, text)
    model = nnx.eval_shape(lambda: Decoder(base.config, **settings, rngs=nnx.Rngs(0)))
    cast = jax.tree.map(lambda x, like: x.astype(like.dtype), nnx.state(made), nnx.state(model))
    nnx.update(model, cast)
    return model


def _metric_rows(run: Run, step: int, metrics: Metrics, seconds: float) -> list[dict[str, Any]]:
    count = len(metrics.loss)
    rows = [
        {
            "run": run.name,
            "step": step + i + 1,
            "loss": float(metrics.loss[i]),
            "grad_norm": float(metrics.grad_norm[i]),
            "seconds": seconds / count,
        }
        for i in range(count)
    ]
    if metrics.guard is not None:
        for row, scale, regime in zip(rows, *metrics.guard, strict=True):
            row |= {"scale": float(scale), "regime": REGIMES[regime]}
    return rows
