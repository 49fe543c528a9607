"""A fine-tuning job at work: its model and text made ready, its runs done one after the other."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from experiments.checkpoint import Checkpoints
from experiments.data import standard_library
from experiments.dataset import Dataset, checkpoint
from experiments.faults import Fault
from experiments.jobs import Job
from experiments.lora import add_lora
from experiments.methods import REGIMES, Method, evaluated, guard_record
from experiments.models.hf import load_pretrained
from experiments.models.loss import next_token_sums
from experiments.pretrain import pretrained
from experiments.results import Results
from experiments.train import Metrics, Trainer


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


def decoder_settings(job: Job) -> dict[str, Any]:
    """How a job stores and computes a checkpoint: the settings of `Decoder`."""
    return {
        "dtype": jnp.dtype(job.dtype),
        # What does not train is stored as it is computed with.
        "param_dtype": jnp.dtype(job.dtype if job.lora else job.param_dtype),
        "remat": job.remat,
        "attention": job.attention,
    }


def start(model: nnx.Module, job: Job, seed: int) -> tuple[nnx.GraphDef, Any, Any]:
    """What a run starts from.

    Args:
      model: The base model; it gets the job's corrections in place.
      job: The job.
      seed: Seed of the corrections.

    Returns:
      Structure, trained part and frozen part of the model before the first step.
    """
    kind, lora = trained_kind(job), job.lora
    if lora is not None:
        rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(seed), 0))
        model = add_lora(model, lora.rank, lora.alpha, targets=lora.targets, rngs=rngs)
    graphdef, params, frozen = nnx.split(model, kind, ...)
    return graphdef, jax.tree.map(lambda x: x.astype(job.param_dtype), params), frozen


def trained_kind(job: Job) -> type[nnx.Variable]:
    """The type of the variables that a job trains."""
    return nnx.Param if job.lora is None else nnx.LoRAParam


class Finetune:
    """A job made ready.

    Args:
      job: The job.
      dataset: What is trained on and held out.
      models: Folder of Hugging Face checkpoints; None looks on the hub.
    """

    def __init__(self, job: Job, dataset: Dataset, models: Path | None):
        self.job = job
        self._dataset = dataset
        base = job.base
        if base.recipe is not None:
            model = pretrained(base.config, job.dtype, job.seq_len, base.recipe, standard_library())
        else:
            model = load_pretrained(checkpoint(job, models), **decoder_settings(job))
        self._base = nnx.split(model)
        self._trainers: dict[int, Trainer] = {}

    @functools.cached_property
    def graphdef(self) -> nnx.GraphDef:
        """Structure of the model that trains."""
        return self.start(0)[0]

    def start(self, seed: int) -> tuple[nnx.GraphDef, Any, Any]:
        """Structure, trained part and frozen part of the model before the first step."""
        return start(nnx.merge(*self._base), self.job, seed)

    def heldout_loss(self, params: Any, frozen: Any) -> float:
        """The loss on the held-out text, in nats per token."""
        return self._dataset.heldout_loss(functools.partial(self._score, params, frozen))

    @functools.cached_property
    def _score(self):
        graphdef = self.graphdef

        @jax.jit
        def score(params, frozen, tokens_bt, weights_bt):
            return next_token_sums(
                nnx.merge(graphdef, params, frozen), tokens_bt, counted_bt=weights_bt > 0
            )

        return score

    def do(
        self,
        run: Run,
        method: Method,
        folder: Results,
        progress: tqdm,
        eval_steps: int,
    ) -> None:
        """Does one run from where it was left, and records it.

        Args:
          run: The run.
          method: Its optimizer.
          folder: Where its metrics, events and record go.
          progress: Counts the steps.
          eval_steps: Steps between measurements of the held-out loss; the last is always measured.
        """
        job = self.job
        # Trainers are told apart by their method: a learning rate is no new program.
        trainer = self._trainers.get(id(method))
        if trainer is None:
            trainer = self._trainers[id(method)] = Trainer(
                self.graphdef,
                method,
                chunk_steps=job.chunk_steps,
                vocabulary=self._dataset.vocabulary,
            )
        _, params, frozen = self.start(run.seed)
        checkpoints = Checkpoints(folder.checkpoint_folder(run.name))
        state = checkpoints.restore_or(trainer.init(params, run.learning_rate))
        folder.start(run.name, int(state.step))
        progress.update(int(state.step))
        done = {row["step"]: row for row in folder.evaluations(run.name)}
        seconds = max((row["seconds"] for row in done.values()), default=0.0)

        def log(step: int, metrics: Metrics) -> None:
            folder.log_metrics(_metric_rows(run, step, metrics))
            progress.set_postfix(loss=f"{metrics.loss[-1]:.3f}", refresh=False)
            progress.update(len(metrics.loss))

        stops = [*range(eval_steps, job.steps, eval_steps), job.steps]
        for stop in stops:
            if stop in done or stop < int(state.step):
                continue
            state, more = trainer.fit(
                state,
                frozen,
                self._dataset.batches(run.seed),
                run.learning_rate,
                steps=stop,
                log=log,
                save=checkpoints.save,
                save_steps=job.checkpoint_steps,
                fault=run.fault,
                key=jax.random.fold_in(jax.random.key(run.seed), 1),
            )
            seconds += more
            loss = self.heldout_loss(evaluated(state.opt_state, state.params), frozen)
            done[stop] = {"step": stop, "heldout_loss": loss, "seconds": seconds}
            folder.log_metrics([{"run": run.name, **done[stop]}])
        guard, events = guard_record(state.opt_state)
        checkpoints.close()
        record = {
            "method": run.method,
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            "heldout_loss": done[job.steps]["heldout_loss"],
            "seconds": done[job.steps]["seconds"],
            "steps": job.steps,
        }
        folder.finish(run.name, record | guard, events)


def _metric_rows(run: Run, step: int, metrics: Metrics) -> list[dict[str, Any]]:
    rows = [
        {"run": run.name, "step": step + i + 1, "loss": float(loss), "grad_norm": float(norm)}
        for i, (loss, norm) in enumerate(zip(metrics.loss, metrics.grad_norm, strict=True))
    ]
    if metrics.guard is not None:
        for row, scale, regime in zip(rows, *metrics.guard, strict=True):
            row |= {"scale": float(scale), "regime": REGIMES[regime]}
    return rows
