"""What a fine-tuning job reads: its corpus as tokens, to train on and to be held out."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments.batches import Batches
from experiments.corpus import TEST, TRAIN, Corpus, corpus_of_text, wikitext
from experiments.data import python_manual, walk
from experiments.errors import UserError
from experiments.jobs import Job
from experiments.models.llama2c import Llama2cTokenizer
from experiments.packing import PackedBatches
from experiments.perplexity import strided_perplexity, strided_windows
from experiments.token_cache import TokenStream, tokenized
from experiments.tokenization import ByteTokenizer, Tokenizer, load_tokenizer

CORPORA: dict[str, Callable[[], Corpus]] = {
    "python-manual": lambda: corpus_of_text(python_manual()),
    "wikitext-103": functools.partial(wikitext, 103),
}
"""Name in `Job.corpus` -> the corpus."""


_BLOCKS, _BLOCK = 64, 2**16  # Per file, and bytes of each: a small file is hashed as a whole.


def checkpoint(job: Job, models: Path | None) -> str:
    """Where the job's checkpoint is: a folder below `models`, or its name on the hub."""
    return job.base.name if models is None else str(models / job.base.name.split("/")[-1])


def fingerprint(folder: Path) -> str:
    """A hash of a checkpoint: of the names and sizes of its files, and of blocks of them.

    The blocks are evenly spread; a training step changes them all, and the whole would take minutes
    to read.
    """
    sha256 = hashlib.sha256()
    for file in walk(folder):
        size = file.stat().st_size
        sha256.update(f"{file.relative_to(folder)} {size} ".encode())
        last = max(size - _BLOCK, 0)
        with file.open("rb") as content:
            for start in sorted({last * i // (_BLOCKS - 1) for i in range(_BLOCKS)}):
                content.seek(start)
                sha256.update(content.read(_BLOCK))
    return sha256.hexdigest()


class Dataset:
    """A job's tokens.

    Args:
      job: The job.
      corpus: The user's own text; None takes the job's.
      models: Folder of checkpoints, which have the tokenizers too; None looks on the hub.
    """

    def __init__(self, job: Job, corpus: Corpus | None, models: Path | None):
        self._job = job
        tokenizer = _tokenizer(job, models)
        self.vocabulary = tokenizer.vocab_size
        """Number of token ids."""
        found = corpus or CORPORA[job.corpus]()
        flag = "--data " if corpus else ""
        self._train = tokenized(found.documents(TRAIN), tokenizer)
        heldout = tokenized(found.documents(TEST), tokenizer)
        least = job.seq_len + 1  # One sequence and its targets; fewer held out would say little.
        for split, stream in ((TRAIN, self._train), (TEST, heldout)):
            if len(stream.tokens) < least:
                raise UserError(
                    f"{flag}{found.name}, {split}: {len(stream.tokens)} tokens, but {least} are "
                    "needed"
                )
        if job.heldout_tokens is not None:
            tokens = heldout.tokens[: job.heldout_tokens]
            heldout = TokenStream(tokens, heldout.starts[heldout.starts < len(tokens)])
        self._windows = strided_windows(
            heldout,
            seq_len=job.seq_len,
            stride=job.stride or job.seq_len,
            batch_size=job.heldout_batch_size,
        )

    def batches(self, seed: int) -> Batches:
        """What a run of a seed is trained on."""
        return PackedBatches(
            self._train,
            jax.random.key(seed),
            batch_size=self._job.batch_size,
            seq_len=self._job.seq_len,
        )

    def heldout_loss(self, score: Callable[[Any, Any], tuple[jax.Array, jax.Array]]) -> float:
        """The held-out loss in nats per token, from a function that scores a batch of windows."""
        return strided_perplexity(score, self._windows).loss


def _tokenizer(job: Job, models: Path | None) -> Tokenizer:
    if job.base.recipe is not None:
        return ByteTokenizer()
    if job.base.llama2c is not None:
        folder = Path(checkpoint(job, models))
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; --models has to name the one that has it")
        return Llama2cTokenizer(folder / job.base.llama2c[1])
    return load_tokenizer(checkpoint(job, models))
