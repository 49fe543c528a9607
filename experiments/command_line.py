"""The command line: the suites by their names, and errors of the user's as one line each."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import tyro

from experiments.errors import UserError
from experiments.suites.everything import PAPER_SUITES, everything
from experiments.suites.memory import memory
from experiments.suites.overhead import overhead
from experiments.suites.quality import quality
from experiments.suites.study import study
from experiments.suites.throughput import throughput

SUITES = {
    **PAPER_SUITES,
    "all": everything,
    "memory": memory,
    "overhead": overhead,
    "quality": quality,
    "study": study,
    "throughput": throughput,
}
"""Name on the command line -> the suite; its arguments and their help come from its signature."""

_REFUSED = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
"""What a file system says no with: permissions, a full or broken disk, a name that cannot be."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs a suite.

    Args:
      args: The command line's arguments; those of the process by default.

    Returns:
      The exit code: 0, 2 for an error of the user's or of the file system, 1 where nobody reads
      the output any more.
    """
    try:
        tyro.extras.subcommand_cli_from_dict(SUITES, prog="python -m experiments", args=args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # As of `| head`: what is left of the output has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        where = error.filename or "results or output"
        print(f"error: {where}: {error.strerror}", file=sys.stderr)
        return 2
    return 0
