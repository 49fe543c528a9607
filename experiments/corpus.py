"""A corpus: named documents for training, validation and test, read one at a time.

Sources are WikiText from the Hugging Face hub, and the user's own files.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.data import HELDOUT_FRACTION, Text, is_utf8, walk
from experiments.errors import UserError, first_line, reading

TRAIN, VALIDATION, TEST = "train", "validation", "test"

DOCUMENT_SEPARATOR = "<|endoftext|>"
"""A line of its own between the documents of a text file."""

_SPLIT_WORDS = {
    "train": TRAIN,
    "valid": VALIDATION,
    "validation": VALIDATION,
    "test": TEST,
}
_TEXT_FILES = (".txt", ".raw", ".tokens")
# What holds data too, and would else be taken for text.
_OTHER_FILES = (".arrow", ".csv", ".gz", ".json", ".tsv", ".zip", ".zst")
_TEXT_COLUMN = "text"

_LONGEST = 2**22
"""Characters of a document after which the next line begins another: a tokenizer takes a hundred
bytes of memory for each."""

# The heading of a WikiText article. Sections have more signs: " = = History = = ".
_TITLE = re.compile(r" = [^=].* = \r?\n")


class Digest(NamedTuple):
    """What one pass over a split finds.

    Attributes:
      sha256: Hash of the documents and of where they end, in hexadecimal.
      documents: How many there are.
      characters: Their length in all.
    """

    sha256: str
    documents: int
    characters: int


class Documents:
    """The documents of one split, read anew from their source by every loop over them.

    Args:
      name: What messages call them.
      read: Function that starts reading; blank documents are left out, and long ones divided.
    """

    def __init__(self, name: str, read: Callable[[], Iterable[str]]):
        self.name = name
        self._read = read

    def __iter__(self) -> Iterator[str]:
        pieces = itertools.chain.from_iterable(map(_pieces, self._read()))
        return (piece for piece in pieces if piece.strip())

    @functools.cached_property
    def digest(self) -> Digest:
        """Hash and size of the documents."""
        sha256, documents, characters = hashlib.sha256(), 0, 0
        for document in self:
            try:
                content = document.encode()
            except UnicodeEncodeError as error:  # JSON can escape half a character.
                raise UserError(f"{self.name}: {error.object[error.start]!r} is no text") from error
            # With its length in front, so that documents divided elsewhere hash differently.
            sha256.update(len(content).to_bytes(8, "little") + content)
            documents += 1
            characters += len(document)
        if not documents:
            raise UserError(f"{self.name}: there is no text in it")
        return Digest(sha256.hexdigest(), documents, characters)


def _pieces(document: str) -> Iterator[str]:
    """A document itself, or one of more than `_LONGEST` characters in parts of whole lines."""
    start = 0
    while len(document) - start > _LONGEST:
        stop = document.find("\n", start + _LONGEST - 1) + 1 or len(document)
        yield document[start:stop]
        start = stop
    yield document[start:]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents by split, and what to call them all."""

    name: str
    """Where they come from, for messages and reports."""
    splits: Mapping[str, Documents]
    """Some of `TRAIN`, `VALIDATION` and `TEST`."""

    def documents(self, split: str) -> Documents:
        """The documents of a split, or one clear line."""
        if split not in self.splits:
            raise UserError(f"{self.name}: no {split} split, only {', '.join(self.splits)}")
        return self.splits[split]


def wikitext(size: int, flag: str = "--data") -> Corpus:
    """WikiText in raw form, downloaded once: Wikipedia articles.

    Args:
      size: 103 has 28,475 articles to train on, 550 MB; 2 has 600 of them, 11 MB. Their 60
        articles for validation and 60 for test are the same.
      flag: What the command line calls the text that can stand in for it.

    Returns:
      The corpus.

    References:
      Merity et al., `Pointer Sentinel Mixture Models <https://arxiv.org/abs/1609.07843>`_, 2016
    """
    import datasets  # A large package, needed by this function only.

    name = f"WikiText-{size}"
    try:
        splits = datasets.load_dataset("Salesforce/wikitext", f"wikitext-{size}-raw-v1")
    except (OSError, ValueError) as error:  # ValueError: offline, with another part in the cache.
        raise UserError(
            f"{name} cannot be downloaded ({first_line(error)}): "
            f"connect to the hub once, or give a text of your own with {flag}"
        ) from error

    def read(split: str) -> Iterator[str]:
        # In batches: a thousand times fewer calls for the 1.8 million rows.
        batches = splits[split].iter(batch_size=1000)
        return _of_rows(itertools.chain.from_iterable(batch[_TEXT_COLUMN] for batch in batches))

    return _corpus(
        name, {split: functools.partial(read, split) for split in (TRAIN, VALIDATION, TEST)}
    )


def corpus_of_text(text: Text) -> Corpus:
    """One text as a corpus: nine tenths to train on, and the rest half validation, half test."""
    documents = Documents(text.name, lambda: [text.content.decode()])
    return _divided(text.name, documents)


def read_corpus(path: Path) -> Corpus:
    """The user's own documents.

    Text (.txt, .raw or any other UTF-8 file) is divided at WikiText's article headings and at lines
    that read `<|endoftext|>`; without either a file is one document. Tables (.parquet, .jsonl) have
    a document per row in their column `text`, or WikiText's lines. What is longer than four million
    characters is divided between lines.

    Args:
      path: A folder with files whose names have the word train, valid, validation or test, such as
        `train.txt` or `test-00000-of-00001.parquet`, or with folders of these names: these are the
        splits. Otherwise a file, or a folder of files: of its characters nine tenths are trained
        on, and the rest is half validation and half test.

    Returns:
      The corpus, named after the path.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if files := _split_files(path):
        return _corpus(
            str(path), {split: functools.partial(_read_files, files[split]) for split in files}
        )
    files = _whole_files(path)
    return _divided(str(path), Documents(str(path), functools.partial(_read_files, files)))


def _whole_files(path: Path) -> list[Path]:
    """The files of a text without splits."""
    if path.is_dir():
        if divided := next(filter(_has_splits, sorted(path.iterdir())), None):
            raise UserError(f"{path}: {divided.name} in it has splits; give that folder")
        found = list(walk(path))
        files = [file for file in found if _is_readable(file)]
        if found and not files:
            raise UserError(f"{path}: none of its {len(found)} files is UTF-8 text")
        _tell_left_out(path, set(found) - set(files), len(found), "not UTF-8 text")
        named = [file for file in files if file.parent == path and _split_of(file)]
        if len({_split_of(file) for file in named}) > 1:
            print(
                f"{path}: {_names(named)} are read as one text: only files of the types "
                f"{', '.join((*_TEXT_FILES, *_ROW_FILES))} are splits",
                file=sys.stderr,
            )
        return files
    if not path.is_file():  # It is read more than once, which a pipe cannot be.
        raise UserError(f"{path}: neither a file nor a folder")
    if _type(path) in _OTHER_FILES:
        raise UserError(f"{path}: give text, {' or '.join(_ROW_FILES)}, not {_type(path)}")
    return [path]


def _tell_left_out(path: Path, left: Collection[Path], found: int, why: str) -> None:
    """Names files of a folder that are not read, if there are any."""
    if left:
        said = f"{path}: {len(left)} of {found} files left out, {why}: {_names(left)}"
        print(said, file=sys.stderr)


def _names(files: Collection[Path]) -> str:
    """What a message calls some files."""
    return ", ".join(file.name for file in sorted(files)[:3]) + ", ..." * (len(files) > 3)


def _has_splits(path: Path) -> bool:
    """Whether a folder has files of data that are named after different splits."""
    entries = path.iterdir() if path.is_dir() else ()
    data = (file for file in entries if _type(file) in (*_TEXT_FILES, *_ROW_FILES))
    return len({_split_of(file) for file in data} - {None}) > 1


def _divided(name: str, everything: Documents) -> Corpus:
    size = everything.digest.characters
    heldout = int(size * HELDOUT_FRACTION)
    if heldout < 2:  # One character for each of the two parts.
        raise UserError(
            f"{name}: {size} characters of text, but {math.ceil(2 / HELDOUT_FRACTION)} are needed"
        )
    train = size - heldout
    validation = train + (size - train) // 2
    parts = {TRAIN: (0, train), VALIDATION: (train, validation), TEST: (validation, size)}
    return _corpus(
        name,
        {split: functools.partial(_part, everything, *bounds) for split, bounds in parts.items()},
    )


def _corpus(name: str, readers: Mapping[str, Callable[[], Iterable[str]]]) -> Corpus:
    splits = {split: Documents(f"{name}, {split}", read) for split, read in readers.items()}
    return Corpus(name, splits)


def _split_files(path: Path) -> dict[str, list[Path]]:
    """The files of a folder that are named after a split, by split and in order."""
    found, left = {}, []
    known = (*_TEXT_FILES, *_ROW_FILES)
    for entry in sorted(path.iterdir()) if path.is_dir() else []:
        split = _split_of(entry)
        if split is None:
            if entry.is_file() and _type(entry) in known:
                left.append(entry)
            continue
        for file in walk(entry) if entry.is_dir() else [entry]:
            if _type(file) in known:
                found.setdefault(split, []).append(file)
            elif _type(file) in _OTHER_FILES:
                raise UserError(
                    f"{file}: a split by its name, but its type is none of {', '.join(known)}"
                )
    if found:
        count = len(left) + sum(map(len, found.values()))
        _tell_left_out(path, left, count, "not named after a split")
    return {split: found[split] for split in (TRAIN, VALIDATION, TEST) if split in found}


def _split_of(entry: Path) -> str | None:
    """The split that a file or folder is named after."""
    name = entry.name.lower()
    # Of a folder the whole name counts: `test` may have a split, `test_data` anything.
    words = [name] if entry.is_dir() else re.split("[^a-z]+", name)
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _type(file: Path) -> str:
    return file.suffix.lower()


def _is_readable(file: Path) -> bool:
    return _type(file) in _ROW_FILES or is_utf8(file.read_bytes())


def _part(documents: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """The documents between two places in their characters, cut there."""
    place = 0
    for document in documents:
        yield document[max(start - place, 0) : max(stop - place, 0)]
        place += len(document)


# Reading files


def _read_files(files: Iterable[Path]) -> Iterator[str]:
    tables = [file for file in files if _type(file) in _ROW_FILES]
    for file in files:
        if file not in tables:
            yield from _of_text(file)
    # Tables are read as one: an article of WikiText may go on in the next.
    yield from _of_rows(itertools.chain.from_iterable(map(_rows, tables)))


def _of_text(file: Path) -> Iterator[str]:
    try:
        # Only \n ends a line, and nothing is translated: what is tokenised is what is in the file.
        with file.open(encoding="utf-8", newline="\n") as lines:
            yield from _of_lines(lines)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error


def _rows(file: Path) -> Iterator[str]:
    read = _ROW_FILES[_type(file)]
    with reading(file, f"not a {file.suffix} file"):
        for number, row in enumerate(read(file), 1):
            text = row.get(_TEXT_COLUMN) if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise UserError(
                    f"{file}, row {number}: a row without text in a column {_TEXT_COLUMN!r}"
                )
            yield text


def _json_rows(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                with reading(f"{file}, line {number}", "not a .jsonl file"):
                    row = json.loads(line)
                yield row


def _parquet_rows(file: Path) -> Iterator[Any]:
    import pyarrow.parquet  # A large package, needed by these files only.

    with pyarrow.parquet.ParquetFile(file) as table:
        columns = [name for name in table.schema_arrow.names if name == _TEXT_COLUMN]
        for batch in table.iter_batches(columns=columns) if table.metadata.num_rows else ():
            yield from batch.to_pylist()


_ROW_FILES = {".parquet": _parquet_rows, ".jsonl": _json_rows}


def _of_rows(rows: Iterable[str]) -> Iterator[str]:
    """Documents as rows, or the lines of WikiText as rows, which then give the text file's."""
    rows = iter(rows)
    head = []
    for row in rows:
        head.append(row)
        if row.strip():
            break
    rows = itertools.chain(head, rows)
    if head and _TITLE.fullmatch(head[-1]):
        # The hub drops the blanks of a blank line; the text file has them.
        return _of_lines(row or " \n" for row in rows)
    return rows


def _of_lines(lines: Iterable[str]) -> Iterator[str]:
    document = []
    before = ""
    for line, after in itertools.pairwise(itertools.chain(lines, [""])):
        # A heading stands alone; formulas and footnotes of the same form do not.
        is_title = not before.strip() and not after.strip() and _TITLE.fullmatch(line)
        is_separator = line.strip() == DOCUMENT_SEPARATOR
        if is_title or is_separator:
            yield "".join(document)
            document = []
        if not is_separator:
            document.append(line)
        before = line
    yield "".join(document)
