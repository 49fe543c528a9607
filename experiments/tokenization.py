"""Tokenizers: bytes, and those of the pretrained models.

Documents are joined with a separator in front of each, so that its first token can be predicted
from something.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from experiments.data import BYTE_VOCABULARY
from experiments.errors import UserError, reading

BYTES = "bytes"
"""Name of the tokenizer whose tokens are the bytes of a text."""

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class Tokenizer(Protocol):
    """What turns text into token ids.

    Attributes:
      identity: Equal for tokenizers that do the same to every text.
      vocab_size: One more than the largest token id.
      separator: Id of the token in front of every document.
    """

    identity: str
    vocab_size: int
    separator: int

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 of shape (n,), without separator."""
        ...


class ByteTokenizer:
    """Token ids of a text are its bytes in UTF-8; the separator is the byte 0.

    Example:
      >>> ByteTokenizer().encode_batch(["no", "é"])
      [array([110, 111], dtype=int32), array([195, 169], dtype=int32)]
    """

    identity = BYTES
    vocab_size = BYTE_VOCABULARY
    separator = 0

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 of shape (n,), without separator."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]


class PretrainedTokenizer:
    """The tokenizer of a pretrained model.

    The separator is the token that the tokenizer itself puts in front of a text, such as Llama's
    `<s>`, or else its end-of-text token, such as Qwen's `<|endoftext|>`.

    Args:
      folder: A folder with `tokenizer.json` and `tokenizer_config.json`.
    """

    def __init__(self, folder: Path):
        # Not AutoTokenizer: it rebuilds Llama's tokenizer from its class instead of reading
        # tokenizer.json, and then drops the blank at the start of a text.
        from transformers import PreTrainedTokenizerFast  # A large package, needed here only.

        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"tokenizer {folder}: there is no tokenizer.json in it")
        with reading(folder / "tokenizer.json"):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        leading = tokenizer("")["input_ids"]
        separator = leading[0] if leading else tokenizer.eos_token_id
        if separator is None:
            raise UserError(
                f"tokenizer {folder}: its tokenizer_config.json names no eos_token, "
                "which is needed between documents"
            )
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.separator = separator
        self._backend = tokenizer.backend_tokenizer
        content = f"{separator} {self._backend.to_str()}".encode()
        self.identity = hashlib.sha256(content).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 of shape (n,), without separator."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]


def load_tokenizer(source: str) -> Tokenizer:
    """The tokenizer of a name.

    Args:
      source: `bytes`; a folder with `tokenizer.json`, or that file; or the name of a model on the
        hub, such as `Qwen/Qwen2.5-0.5B`, whose tokenizer is downloaded once.

    Returns:
      The tokenizer.
    """
    if source == BYTES:
        return ByteTokenizer()
    path = Path(source)
    if path.exists():
        return PretrainedTokenizer(path if path.is_dir() else path.parent)

    import huggingface_hub  # See PretrainedTokenizer.

    try:
        folder = huggingface_hub.snapshot_download(source, allow_patterns=list(_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"tokenizer {source}: not {BYTES!r}, no folder, and no model that the hub gives "
            f"({reason})"
        ) from error
    return PretrainedTokenizer(Path(folder))
