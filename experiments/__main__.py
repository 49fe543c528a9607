"""`python -m experiments SUITE ...`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType

_SAID = b"\ninterrupted: run the same command again, without --fresh, to resume\n"


def _stop(number: int, _: FrameType | None) -> None:
    """Ends the process as soon as Python runs again: what is on the disk is always whole.

    An exception might be raised inside a callback of JAX, and be lost there; and Python's teardown
    under a compilation that goes on would end in a segmentation fault.
    """
    with contextlib.suppress(OSError):  # Nobody may read it any more.
        os.write(2, _SAID)
    os._exit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)

    from experiments.command_line import main  # Takes seconds, in which one may be interrupted.

    sys.exit(main())
