"""What a result depends on besides its settings: the versions of the code."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from pathlib import Path

import lbw_optax


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
