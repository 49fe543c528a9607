"""Timing optimizers against AdamW, where the guard has nothing to do."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

from tqdm import tqdm

from experiments.methods import ADAMW, Method, adamw_clip, guards

LEARNING_RATE = 1e-7
"""So low that the guard never acts: the cost of a healthy step."""


def contestants() -> dict[str, Method]:
    """AdamW, AdamW with clipping as the cost that users know, and the guard with each memory."""
    plain, *guarded = guards().items()
    return dict([plain, ("AdamW + clip", adamw_clip), *guarded])


def in_turns(
    clocks: Mapping[str, Callable[[], float]], rounds: int, label: str | None = None
) -> dict[str, tuple[float, list[float]]]:
    """Times all optimizers in turns, so that whatever else the machine does hits all alike.

    Args:
      clocks: Name -> a function that makes some steps and returns the seconds of one.
      rounds: How often each is called, one after the other in each round.
      label: What the progress bar says.

    Returns:
      Name -> the median of the seconds, and the quartiles of their ratio to AdamW's in the same
      round.
    """
    seconds = {name: [] for name in clocks}
    for _ in tqdm(range(rounds), label, unit="round"):
        for name, clock in clocks.items():
            seconds[name].append(clock())
    return {
        name: (
            statistics.median(mine),
            statistics.quantiles((x / y for x, y in zip(mine, seconds[ADAMW], strict=True)), n=4),
        )
        for name, mine in seconds.items()
    }
