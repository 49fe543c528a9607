"""Text as one array of bytes: where it comes from, its held-out part, its batches.

A batch is a pure function of (seed, step), so a resumed run needs no iterator state.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import os
import re
import sysconfig
from collections.abc import Collection, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.errors import UserError

BYTE_VOCABULARY = 256
"""Token ids of a text are its bytes."""

HELDOUT_FRACTION = 0.1
"""Share of a text, at its end, that is never trained on."""

# Not code that somebody wrote to be read: installed packages, character tables, and the reference
# manual, which is what is fine-tuned on. The test folders are left out because many systems
# package them apart, and the text should be the same for everyone with the same Python.
_NOT_SOURCE = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
    "test",
    "tests",
    "idle_test",
}


@dataclasses.dataclass(frozen=True)
class Text:
    """A text and what to call it."""

    name: str
    """Where it comes from, for the report."""
    content: bytes
    """The text itself."""

    @property
    def sha256(self) -> str:
        """Hash of the content, in hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()


@functools.cache
def standard_library() -> Text:
    """The Python sources of the running interpreter's standard library, about 10 MB."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in walk(root, skip=_NOT_SOURCE) if path.suffix == ".py"]
    return Text("the Python standard library", b"\n".join(path.read_bytes() for path in files))


@functools.cache
def python_manual() -> Text:
    """The language reference that `help("while")` reads: English prose, about 0.4 MB.

    The topics quote each other, so each paragraph is kept once: otherwise the held-out part
    would have been seen in training.
    """
    from pydoc_data import topics  # A large module, needed by this function only.

    paragraphs = [
        paragraph.strip()
        for name in sorted(topics.topics)
        for paragraph in topics.topics[name].split("\n\n")
    ]
    return Text("the Python reference manual", "\n\n".join(dict.fromkeys(paragraphs)).encode())


def word_tokens(text: Text, vocabulary: int) -> np.ndarray:
    """A text as words: names, numbers and single signs, the rare ones all as one.

    Args:
      text: The text.
      vocabulary: Number of token ids; the last one stands for all words that are too rare.

    Returns:
      A uint16 array of token ids, the most frequent word being 0.
    """
    words = re.findall(r"\w+|[^\w\s]", text.content.decode(errors="replace"))
    frequent = collections.Counter(words).most_common(vocabulary - 1)
    ids = {word: i for i, (word, _) in enumerate(frequent)}
    return np.array([ids.get(word, vocabulary - 1) for word in words], np.uint16)


def split(text: Text, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits a text into what is trained on and what is held out.

    Args:
      text: The text.
      seq_len: Length of a training sequence; each part must hold at least one.

    Returns:
      Two uint8 arrays of bytes, the last one `HELDOUT_FRACTION` of the text.
    """
    tokens = np.frombuffer(text.content, np.uint8)
    shortest = int(np.ceil((seq_len + 1) / HELDOUT_FRACTION))
    if len(tokens) < shortest:
        raise UserError(f"{text.name}: {len(tokens)} bytes of text, but {shortest} are needed")
    return split_tokens(tokens)


def split_tokens(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is trained on, and the last `HELDOUT_FRACTION`, which is held out."""
    cut = len(tokens) - int(len(tokens) * HELDOUT_FRACTION)
    return tokens[:cut], tokens[cut:]


def crop_batch(tokens: jax.Array, key: jax.Array, batch_size: int, seq_len: int) -> jax.Array:
    """Crops sequences at uniformly random places.

    Args:
      tokens: Token ids, shape (n,).
      key: Random key of this step.
      batch_size: Number of sequences b.
      seq_len: Number of predicted tokens t per sequence.

    Returns:
      Token ids, int32 of shape (b, t + 1): inputs are [:, :-1], targets [:, 1:].
    """
    starts = jax.random.randint(key, (batch_size,), 0, tokens.shape[0] - seq_len)
    return tokens[starts[:, None] + jnp.arange(seq_len + 1)].astype(jnp.int32)


def heldout_windows(
    tokens: np.ndarray, seq_len: int, batch_size: int, max_windows: int
) -> np.ndarray:
    """Cuts the held-out part into windows, each of its tokens being predicted at most once.

    Args:
      tokens: The held-out token ids, shape (n,).
      seq_len: Number of predicted tokens t per window.
      batch_size: Number of windows b that the model sees at once.
      max_windows: At most so many windows are used, evenly spread over the part.

    Returns:
      Token ids, int32 of shape (m, b, t + 1). A text with fewer than b windows has a smaller b.
    """
    count = (len(tokens) - 1) // seq_len
    kept = np.linspace(0, count - 1, min(count, max_windows)).astype(int)
    batch_size = min(batch_size, len(kept))
    kept = kept[: len(kept) // batch_size * batch_size]
    windows = tokens[kept[:, None] * seq_len + np.arange(seq_len + 1)]
    return windows.astype(np.int32).reshape(-1, batch_size, seq_len + 1)


def walk(root: Path, skip: Collection[str] = ()) -> Iterator[Path]:
    """The files below a folder in a fixed order, without hidden ones and skipped folders.

    Raises:
      OSError: A folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    for folder, subfolders, files in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(n for n in subfolders if n not in skip and not n.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def is_utf8(content: bytes) -> bool:
    """Whether bytes are text."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
