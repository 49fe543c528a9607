"""What a result depends on besides its settings: device, versions of the code, Python's texts."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import types
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax

import experiments
import lbw_optax
from experiments.data import python_manual, standard_library

_SHOWING = ("plots.py", "report.py")
"""Modules of the experiments that no number depends on."""


def _digest(package: types.ModuleType, skip: Collection[str] = ()) -> str:
    """A hash of a package's sources."""
    folder = Path(package.__path__[0])
    sources = sorted(
        path for path in folder.rglob("*.py") if str(path.relative_to(folder)) not in skip
    )
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]


@functools.cache  # The code that was imported counts, not what becomes of its files later.
def versions() -> dict[str, str]:
    """Package -> version; those of `lbw_optax` and of the experiments are hashes of their sources.

    The hash tells apart the states of a package under development, whose version stays the same.
    """
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    found = {name: importlib.metadata.version(name) for name in packages}
    found["lbw_optax"] = f"{lbw_optax.__version__}+{_digest(lbw_optax)}"
    return found | {"experiments": _digest(experiments, _SHOWING)}


def described(suite: str, preset: str, settings: Any) -> dict[str, Any]:
    """All that the numbers of a suite depend on, but for the user's own text and models.

    Args:
      suite: Name of the suite.
      preset: Name of its settings.
      settings: The settings, a dataclass.

    Returns:
      JSON types, for `config.json`. The texts come with the interpreter and change with it.
    """
    return {
        "suite": suite,
        "preset": preset,
        "settings": dataclasses.asdict(settings),
        "texts": {text.name: text.sha256 for text in (python_manual(), standard_library())},
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }


def made_with() -> list[str]:
    """Device and versions, as points of a report."""
    return [
        f"device: {jax.devices()[0].device_kind}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()),
    ]
