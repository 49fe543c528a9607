"""Checkpoints: everything that touches Orbax."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import jax
import orbax.checkpoint as ocp

from experiments.errors import UserError, reading

T = TypeVar("T")


def cache_folder() -> Path:
    """Where pretrained models are kept: $LBW_OPTAX_CACHE, or ~/.cache/lbw_optax."""
    return Path(os.environ.get("LBW_OPTAX_CACHE") or Path.home() / ".cache" / "lbw_optax")


class Checkpoints:
    """The latest state of one run, in one folder.

    A save that is interrupted leaves the one before it in place.

    Args:
      folder: Where to keep it; made if it is missing.
    """

    def __init__(self, folder: Path):
        # Synchronous: the states are small, and a returned save() is then a finished one.
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        try:
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {folder}: {error.strerror}") from error

    def save(self, step: int, state: T) -> None:
        """Saves a pytree of arrays as the state after `step` steps."""
        try:
            self._manager.save(step, args=ocp.args.StandardSave(state))
        except ValueError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            folder = self._manager.directory
            raise UserError(f"{folder}: no space left for a checkpoint") from error

    def restore_or(self, initial: T) -> T:
        """The saved state, or the initial one where none is saved.

        Args:
          initial: A pytree of the structure, shapes, dtypes and shardings of the saved one.

        Returns:
          A pytree like `initial`.
        """
        step = self._manager.latest_step()
        if step is None:
            return initial
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, initial)
        folder = self._manager.directory
        with reading(folder, "this checkpoint cannot be restored; delete the folder to start over"):
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def close(self) -> None:
        """Releases what the manager holds."""
        self._manager.close()
