"""Tokenised documents, made once and then read from a memory-mapped file.

A folder per content and tokenizer, in the cache folder:

- `tokens.bin`: the token ids of all documents, one after the other.
- `bounds.npy`: where each document starts, and where the last ends.
- `tokens.crc32`: the checksum of both, one after the other, decimal.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.checkpoint import cache_folder
from experiments.corpus import Documents
from experiments.errors import UserError
from experiments.tokenization import Tokenizer

_TOKENS, _BOUNDS, _CHECKSUM = "tokens.bin", "bounds.npy", "tokens.crc32"

_BATCH_CHARACTERS = 2**20
"""Text that the tokenizer gets at once: enough for all cores, little memory."""


class TokenStream(NamedTuple):
    """Documents one after the other, each with the separator in front.

    Attributes:
      tokens: Token ids, uint16 or uint32 of shape (n,), on disk.
      starts: Index of each document's separator, int64 of shape (d,).
    """

    tokens: np.ndarray
    starts: np.ndarray


def tokenized(documents: Documents, tokenizer: Tokenizer) -> TokenStream:
    """The tokens of a split, from the cache, or tokenised with a progress bar.

    Args:
      documents: The documents.
      tokenizer: What turns them into tokens.

    Returns:
      Their tokens.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    key = f"{documents.digest.sha256} {tokenizer.identity}"
    folder = cache_folder() / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    found = _read(folder, dtype)
    if found is None:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            _write(documents, tokenizer, dtype, folder)
        except OSError as error:
            raise UserError(
                f"cannot write tokens to {folder}: {error.strerror or error}"
            ) from error
        found = _read(folder, dtype)
    if found is None:
        raise UserError(f"{folder}: the tokens just written cannot be read")
    return found


def _read(folder: Path, dtype: type) -> TokenStream | None:
    """The tokens of a cache if it is there and whole: crashes, full disks and copies harm it."""
    try:
        tokens = np.memmap(folder / _TOKENS, dtype, "r")
        bounds = (folder / _BOUNDS).read_bytes()
        checksum = int((folder / _CHECKSUM).read_text())
    except (OSError, ValueError):  # A file is missing, or it has no whole number of tokens.
        return None
    if zlib.crc32(bounds, zlib.crc32(tokens)) != checksum:
        return None
    return TokenStream(tokens, np.load(io.BytesIO(bounds))[:-1])


def _write(documents: Documents, tokenizer: Tokenizer, dtype: type, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    lengths, checksum = [], 0
    # Made elsewhere and moved when finished: an interruption leaves nothing behind.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
        made = Path(unfinished, folder.name)
        made.mkdir()
        with (
            open(made / _TOKENS, "wb") as file,
            tqdm(
                total=documents.digest.characters,
                desc=f"tokenising {documents.name}",
                unit="char",
                unit_scale=True,
                delay=1,  # A short text is done before a bar can be read.
            ) as progress,
        ):
            for texts in _batches(documents):
                for ids in tokenizer.encode_batch(texts):
                    tokens = np.concatenate([[tokenizer.separator], ids]).astype(dtype)
                    tokens.tofile(file)
                    checksum = zlib.crc32(tokens, checksum)
                    lengths.append(len(ids) + 1)
                progress.update(sum(map(len, texts)))
        np.save(made / _BOUNDS, np.cumsum([0, *lengths]))
        checksum = zlib.crc32((made / _BOUNDS).read_bytes(), checksum)
        (made / _CHECKSUM).write_text(f"{checksum}\n")
        try:
            os.replace(made, folder)
        except OSError:
            if not folder.exists():  # Another process was faster, with the same tokens.
                raise


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Groups documents to at least so many characters."""
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
