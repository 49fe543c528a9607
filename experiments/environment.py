"""What a result depends on besides its settings: device, versions of the code, Python's texts."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import jax

import lbw_optax
from experiments.data import python_manual, standard_library


@functools.cache  # The code that was imported counts, not what becomes of its files later.
def versions() -> dict[str, str]:
    """Package -> version; that of `lbw_optax` ends in a hash of its sources.

    The hash tells apart the states of a package under development, whose version stays the same.
    """
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    found = {name: importlib.metadata.version(name) for name in packages}
    sources = sorted(Path(lbw_optax.__file__).parent.rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]
    return found | {"lbw_optax": f"{importlib.metadata.version('lbw_optax')}+{digest}"}


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
