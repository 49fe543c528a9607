"""The one error that the command line shows to its user without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")


class UserError(Exception):
    """Something the user can put right: its message is one line that says what and how."""


@contextlib.contextmanager
def reading(file: str | Path, verdict: str = "cannot be read") -> Iterator[None]:
    """Makes one clear line of whatever a library says of a damaged file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Each format has errors of its own.
        raise UserError(f"{file}: {verdict} ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    """What a library says of an error, without the details."""
    return (str(error) or type(error).__name__).splitlines()[0]


def preset_of(presets: Mapping[str, Value], name: str) -> Value:
    """The preset of a name, or one clear line."""
    if name not in presets:
        raise UserError(f"--preset {name}: unknown; choose one of {', '.join(presets)}")
    return presets[name]


def check_names(flag: str, names: Sequence[str], known: Collection[str]) -> None:
    """Checks that there are names and that they are known, or one clear line."""
    if not names:
        raise UserError(f"{flag}: name one or more of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise UserError(f"{flag} {name}: unknown; choose from {', '.join(known)}")


def checked_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    """The seeds themselves, or one clear line."""
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise UserError(f"--seeds {seed}: must be in 0 ... 2**32 - 1")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: must differ from each other")
    return seeds
