"""What every suite of fine-tunes shares: its options, its results folder, its runs, its report."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import jax
import tyro
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.corpus import TEST, TRAIN, Corpus, read_corpus
from experiments.dataset import Dataset, checkpoint, fingerprint
from experiments.environment import described, made_with
from experiments.errors import UserError, checked_seeds, preset_of
from experiments.finetune import Finetune, Run
from experiments.jobs import Job
from experiments.methods import RATE_FREE, Method
from experiments.models.hf import revision
from experiments.models.sharding import make_mesh, on_mesh
from experiments.pretrain import text_to_train_on
from experiments.report import Table, number, with_spread, write_report
from experiments.results import Results

Config = TypeVar("Config")
Key = TypeVar("Key")
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user chooses."""

    preset: str = "nano"
    """Size of the job: nano (two CPU cores), small (one GPU), paper (the paper's models)
    or, where a suite has it, stories (a really trained Llama of 260,000 parameters)."""
    data: Path | None = None
    """Text to fine-tune on instead of the preset's: a file, or a folder with train and test."""
    pretrain_data: Path | None = None
    """Text to pretrain a preset's own model on instead of the preset's: as `data`."""
    models: Path | None = None
    """Folder of Hugging Face checkpoints, such as Qwen2.5-7B; by default the hub has them."""
    results: Path = Path("results")
    """Folder for the results; a suite writes to SUITE/PRESET in it."""
    seeds: tuple[int, ...] = ()
    """Seeds of adapters, batches and faults; tables show mean and standard deviation over them.
    By default 0, and several in the suite seeds. A base model that is pretrained here is shared."""
    mesh: tuple[int, int, int] = (1, 1, 1)
    """Devices along the axes data (parts of a batch), fsdp (parts of the stored model) and tensor
    (parts of a product)."""
    fresh: bool = False
    """Start over, dropping the results of an earlier job in that folder."""


Arguments = Annotated[Options, tyro.conf.arg(name="")]
"""`Options` as flags without a prefix."""

Methods = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        metavar="METHOD ...",
        help="What is compared, by the names in the tables; `all` is every peer, and by default "
        "the preset chooses.",
    ),
]
"""Names on the command line, see `chosen`."""


class Lab(Generic[Config]):
    """A suite at work.

    Args:
      suite: Name of the suite.
      options: What the user chose.
      presets: Name -> the suite's settings.
    """

    def __init__(self, suite: str, options: Options, presets: Mapping[str, Config]):
        self.config = preset_of(presets, options.preset)
        self.options = options
        self.seeds = checked_seeds(options.seeds or (0,))
        self.mesh = _mesh(options.mesh)
        """Where a `Finetune` is used, see `on_mesh`."""
        self._finetune: Finetune | None = None
        self._measured: set[str] = set()
        # Unlike the path's own it is False for a name that is too long.
        if options.models is not None and not os.path.isdir(options.models):
            raise UserError(f"--models {options.models}: no such folder")
        self._corpus = _read("--data", options.data, (TRAIN, TEST))
        self._pretraining = _read("--pretrain-data", options.pretrain_data, (TRAIN,))
        chosen = {
            "data": self._corpus and _describe(self._corpus),
            "pretrain_data": self._pretraining and _describe(self._pretraining),
            "models": None if options.models is None else str(options.models.resolve()),
            "mesh": options.mesh,
        }
        path = options.results / suite.replace("-", "_") / options.preset
        config = described(suite, options.preset, self.config) | chosen
        self.folder = Results(path, config, fresh=options.fresh)

    def finetune(self, job: Job) -> Finetune:
        """A job made ready; the last one only, since models are large."""
        if self._finetune is None or self._finetune.job != job:
            self._finetune = None  # Before the next one is made: there is no room for two.
            if self._pretraining and job.base.recipe is None:
                raise UserError(f"--pretrain-data: {job.base.name} is trained already")
            if self.options.models:
                if job.base.recipe is not None:
                    raise UserError(
                        f"--models: {job.base.name} is trained here; choose another --preset"
                    )
                source = Path(checkpoint(job, self.options.models))
                if not source.is_dir():  # Its name would be looked for on the hub.
                    raise UserError(f"--models {source.parent}: no folder {source.name} in it")
            text = self._pretraining and text_to_train_on(self._pretraining)
            dataset = Dataset(job, self._corpus, self.options.models)
            self._finetune = Finetune(job, dataset, self.options.models, self.mesh, text=text)
        return self._finetune

    def zero_step(self, job: Job) -> float:
        """Held-out perplexity of a job's model before the first step."""
        name = f"zero-step, {job.base.name}, {'LoRA' if job.lora else 'full'}"
        model = self._fingerprint(job)
        done = self.folder.runs.get(name)
        if done and model and done.get("model") != model["model"]:
            raise self.folder.of_another(job.base.name)
        if not done:
            finetune = self.finetune(job)
            with on_mesh(self.mesh):
                # Corrections start without effect: the seed does not matter.
                start = finetune.start(self.seeds[0])
                loss = finetune.heldout_loss(start.params, start.frozen)
            if not math.isfinite(loss):
                raise UserError(f"{job.base.name}: its held-out loss is {loss} before any training")
            # Asked again: the hub's files may have come in between.
            self.folder.finish(name, {"heldout_loss": loss, **self._fingerprint(job)})
        return perplexity(self.folder.runs[name])

    def _fingerprint(self, job: Job) -> dict[str, str]:
        """What tells a checkpoint that was not made here from another, as a part of a record."""
        if job.base.recipe is not None:
            return {}
        if self.options.models is None:
            commit = revision(job.base.name)
            return {"model": commit} if commit else {}
        folder = Path(checkpoint(job, self.options.models))
        return {"model": fingerprint(folder)} if folder.is_dir() else {}

    def measure(
        self,
        job: Job,
        runs: Mapping[Key, Run],
        methods: Mapping[str, Method],
        eval_steps: int | None = None,
    ) -> dict[Key, list[Record]]:
        """Does the runs that are not done yet, with every seed.

        Args:
          job: What they are runs of.
          runs: What the suite calls them -> the runs, without a seed; their names are unique in the
            suite, and a run that has several names there is done once.
          methods: Name -> optimizer.
          eval_steps: Steps between measurements of the held-out loss; by default only the last.

        Returns:
          What the suite calls them -> their records, in the order of the runs and of the seeds.
        """
        # Seed by seed: a job that is cut short leaves whole tables of the first ones.
        seeded = [run.seeded(seed) for seed in self.seeds for run in dict.fromkeys(runs.values())]
        self._measured |= {run.name for run in seeded}
        todo = [run for run in seeded if run.name not in self.folder.runs]
        if todo:
            total, left = len(seeded) * job.steps, len(todo) * job.steps
            finetune = self.finetune(job)
            with (
                on_mesh(self.mesh),
                tqdm(total=total, initial=total - left, unit="step") as progress,
            ):
                for run in todo:
                    progress.set_description(run.name)
                    finetune.do(
                        run, methods[run.method], self.folder, progress, eval_steps or job.steps
                    )
        return {key: [self.folder.runs[n] for n in self.names(run)] for key, run in runs.items()}

    def names(self, run: Run) -> list[str]:
        """What the results folder calls a run, seed by seed."""
        return [run.seeded(seed).name for seed in self.seeds]

    def publish(
        self,
        title: str,
        question: str,
        tables: Sequence[Table],
        pictures: Mapping[str, bytes],
    ) -> None:
        """Writes summary, pictures and report, and prints the tables."""
        runs = self.folder.runs
        rows = [
            {"run": name, **record, "heldout_perplexity": perplexity(record)}
            for name, record in runs.items()
            if "heldout_loss" in record
        ]
        self.folder.write_csv("summary.csv", rows)
        # The folder may have runs of other seeds and methods.
        seconds = sum(runs[name].get("seconds", 0.0) for name in self._measured)
        made = [
            f"seeds: {', '.join(map(str, self.seeds))}",
            f"training: {seconds:.0f} s in all, compilation and evaluation excluded",
            *made_with(),
        ]
        heading = f"{title}, {self.options.preset}"
        write_report(self.folder, heading, question, tables, pictures, made)


def _mesh(shape: tuple[int, int, int]) -> Mesh | None:
    count, found = math.prod(shape), jax.devices()
    if min(shape) < 1 or count > len(found):
        raise UserError(
            f"--mesh {' '.join(map(str, shape))}: must be positive, with a product of at most "
            f"{len(found)}, the number of devices (JAX_NUM_CPU_DEVICES sets that of a CPU)"
        )
    return make_mesh(*shape, devices=found[:count]) if count > 1 else None


def _read(flag: str, path: Path | None, needed: Iterable[str]) -> Corpus | None:
    """The user's own text, read through once, so that its mistakes are found before the work."""
    if path is None:
        return None
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{flag} {str(path)!a}: its name is not UTF-8") from error
    try:
        corpus = read_corpus(path)
        for split in needed:
            corpus.documents(split)
        _describe(corpus)
    except UserError as error:
        raise UserError(f"{flag} {error}") from error
    except OSError as error:
        where = error.filename or path
        raise UserError(f"{flag} {where}: {error.strerror}") from error
    return corpus


def _describe(corpus: Corpus) -> dict[str, str]:
    """What is in the user's text, wherever it is."""
    return {name: documents.digest.sha256 for name, documents in corpus.splits.items()}


def at_rates(
    job: Job, methods: Iterable[str], multiples: Iterable[float], prefix: str = ""
) -> dict[tuple[str, float], Run]:
    """The runs of a table over learning rates: (method, multiple) -> run.

    A method that sets its own rate has one run for all of them.

    Args:
      job: What they are runs of.
      methods: Names of the methods.
      multiples: Learning rates, in units of the job's reference.
      prefix: What the names of the runs begin with.
    """

    def run(method: str, multiple: float) -> Run:
        if method in RATE_FREE:
            return Run(prefix + method, method, job.reference_lr)
        return Run(f"{prefix}{method} at {multiple:g}x", method, job.rate(multiple))

    return {(method, m): run(method, m) for m in multiples for method in methods}


def perplexity(record: Record) -> float:
    """Held-out perplexity of a record; infinite where the loss is no number."""
    return of_loss(record.get("heldout_loss"))


def of_loss(loss: float | None) -> float:
    """Perplexity of a loss in nats; infinite where it is no number."""
    # exp(700) is near the largest float; null is a loss that is not finite.
    return math.exp(loss) if loss is not None and loss < 700 else math.inf


def mean_perplexity(records: Sequence[Record]) -> float:
    """Mean of held-out perplexities over seeds; infinite if one of them is."""
    return statistics.fmean(map(perplexity, records))


def perplexities(records: Sequence[Record]) -> str:
    """Mean and standard deviation of held-out perplexities over seeds, for a reader."""
    return with_spread(list(map(perplexity, records)), number)
