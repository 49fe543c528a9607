"""The command line: `python -m experiments SUITE ...`."""

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

_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
"""What a file system says no with: permissions, a full disk, one that is read-only."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs a suite.

    Args:
      args: The command line's arguments; those of the process by default.

    Returns:
      The exit code: 0, 2 for an error of the user's, 130 for an interruption.
    """
    try:
        tyro.extras.subcommand_cli_from_dict(SUITES, prog="python -m experiments", args=args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        print(f"error: {error.filename or 'results'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted: run the same command again, without --fresh, to resume", file=sys.stderr
        )
        return 130
    return 0


if __name__ == "__main__":
    code = main()
    if code == 130:
        # Python's teardown under a compilation that goes on would end in a segmentation fault.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
