"""Locks: one process at a time in a folder, let go by its end, however it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from experiments.errors import UserError


def claim(folder: Path) -> FileLock:
    """Takes a folder for this process, as long as what it returns is kept; or one clear line."""
    lock = _lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"{folder}: another process is at work in it ({lock.lock_file}): wait for it, or "
            "choose another --results"
        ) from error
    return lock


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process is at work in a folder, and then lets the others wait."""
    lock = _lock(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            tqdm.write(f"another process is at work in {folder}: waiting for it")
            lock.acquire()
    except OSError as error:
        raise UserError(f"cannot write checkpoints to {folder}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def _lock(folder: Path) -> FileLock:
    # Beside the folder, which may be cleared. In one process the same folder has the same lock.
    return FileLock(folder.with_name(f".{folder.name}.lock"), is_singleton=True)
