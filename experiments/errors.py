"""The one error that the command line shows to its user without a traceback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


class UserError(Exception):
    """Something the user can put right: its message is one line that says what and how."""


def preset_of(presets: Mapping[str, Value], name: str) -> Value:
    """The preset of a name, or one clear line."""
    if name not in presets:
        raise UserError(f"--preset {name}: unknown; choose one of {', '.join(presets)}")
    return presets[name]
