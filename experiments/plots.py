"""Pictures of the suites' results, as PNG files in memory."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from experiments.methods import REGIMES

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

_COLORS = ("#b2182b", "#ef8a62", "#2166ac", "#4d9221", "#762a83", "#7f7f7f")
"""Of the methods in order; from ColorBrewer, distinct for colour-blind readers."""
_MARKERS = ("o", "s", "D", "^", "v", "P")
_REGIME_COLORS = ("#e8f3e8", "#fde9c9", "#f7c6c1", "#dbe7f6")

_STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def lr_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], zero_step: float, best: float, title: str
) -> bytes:
    """Held-out perplexity against the learning rate, one line per method, on log-log axes.

    Args:
      curves: Method -> its (learning rate, perplexity) points; a perplexity above ten times the
        zero-step one, or not finite, is drawn as an arrow at the top.
      zero_step: Perplexity before fine-tuning.
      best: The lowest perplexity of unguarded AdamW.
      title: Title of the picture.

    Returns:
      The PNG file.
    """
    top = 10 * zero_step
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for (method, points), color, marker in zip(curves.items(), _COLORS, _MARKERS, strict=False):
            rates = np.array([rate for rate, _ in points])
            shown = np.array([min(p, top) if math.isfinite(p) else top for _, p in points])
            axes.plot(rates, shown, color=color, marker=marker, markersize=5, label=method)
            above = shown >= top
            axes.plot(
                rates[above], shown[above], "^", color=color, markersize=10, clip_on=False, zorder=3
            )
        axes.axhline(zero_step, color="0.35", linestyle="--", linewidth=1)
        axes.axhline(best, color="0.35", linestyle=":", linewidth=1)
        right = {"xycoords": ("axes fraction", "data"), "color": "0.35", "fontsize": 9}
        below = {"textcoords": "offset points", "xytext": (0, 3), "ha": "right"}
        axes.annotate(f"zero-step {zero_step:.2f}", (1, zero_step), **right, **below)
        axes.annotate(
            f"best AdamW {best:.2f}", (1, best), **right, **(below | {"xytext": (0, -11)})
        )
        axes.set(xscale="log", yscale="log", title=title)
        lowest = min(best, *(p for points in curves.values() for _, p in points if p == p))
        axes.set_ylim(lowest / 1.15, top)
        axes.set(xlabel="learning rate", ylabel="held-out perplexity")
        axes.set_xticks([rate for rate, _ in next(iter(curves.values()))])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(loc="upper left")
        return _png(figure)


def stressed_run(
    plain: tuple[str, Sequence[Mapping[str, Any]]],
    guarded: tuple[str, Sequence[Mapping[str, Any]]],
    zero_step_loss: float,
    title: str,
) -> bytes:
    """Loss of two runs over time, and the guard's scale and regimes below it.

    Args:
      plain: Name and metrics (rows with `step`, `loss`) of the unguarded run.
      guarded: The same of the guarded run, with `scale` and `regime`.
      zero_step_loss: Held-out loss before fine-tuning, in nats.
      title: Title of the picture.

    Returns:
      The PNG file.
    """
    with plt.rc_context(_STYLE):
        figure, (upper, lower) = plt.subplots(
            2, 1, figsize=(7, 5.5), sharex=True, height_ratios=(3, 2), layout="constrained"
        )
        for (name, rows), color in ((plain, _COLORS[0]), (guarded, _COLORS[2])):
            losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
            upper.plot(
                [row["step"] for row in rows], losses, color=color, linewidth=1.2, label=name
            )
        upper.axhline(zero_step_loss, color="0.35", linestyle="--", linewidth=1, label="zero-step")
        upper.set(yscale="log", ylabel="training loss (nats)", title=title)
        upper.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        upper.yaxis.set_minor_formatter(NullFormatter())
        upper.legend(loc="upper right")

        rows = guarded[1]
        steps = np.array([row["step"] for row in rows])
        lower.plot(steps, [row["scale"] for row in rows], color=_COLORS[2], linewidth=1.2)
        lower.set(yscale="log", xlabel="step", ylabel="guard's scale")
        regimes = np.array([REGIMES.index(row["regime"]) for row in rows])
        for index, (regime, color) in enumerate(zip(REGIMES, _REGIME_COLORS, strict=True)):
            active = regimes == index
            if active.any():
                lower.fill_between(
                    steps,
                    0,
                    1,
                    where=active,
                    step="mid",
                    transform=lower.get_xaxis_transform(),
                    color=color,
                    linewidth=0,
                    label=regime.lower(),
                )
        lower.legend(loc="upper right", ncols=len(REGIMES))
        return _png(figure)


def _png(figure: plt.Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()
