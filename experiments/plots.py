"""Pictures of the suites' results, as PNG files in memory."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from experiments.methods import GUARD, REGIMES

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axis import Axis
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

_OURS = "#2166ac"
_OTHERS = ("#b2182b", "#ef8a62", "#4d9221", "#762a83", "#7f7f7f")
"""Of the first other methods; from ColorBrewer, distinct for colour-blind readers."""
_LEGEND_INSIDE = 6
"""Methods whose names leave room for their lines."""
_MARKERS = ("o", "s", "^", "v", "P")
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


def _line(method: str, methods: Iterable[str]) -> dict[str, Any]:
    """How the line of a method looks; the guard's is blue and thick."""
    if method == GUARD:
        return {"color": _OURS, "marker": "D", "linewidth": 2.5}
    i = [name for name in methods if name != GUARD].index(method)
    colors = (*_OTHERS, *map(plt.get_cmap("tab20"), (10, 12, 16, 18, 3, 5, 7, 9, 11, 13)))
    marker = _MARKERS[i % len(_MARKERS)]
    return {"color": colors[i % len(colors)], "marker": marker, "linewidth": 1.2}


def lr_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    zero_step: float,
    best: float | None,
    title: str,
) -> bytes:
    """Held-out perplexity against the learning rate, one line per method, on log-log axes.

    Args:
      curves: Method -> its (learning rate, perplexity) points; a perplexity above ten times the
        zero-step one, or not finite, is drawn as an arrow at the top.
      zero_step: Perplexity before fine-tuning.
      best: The lowest perplexity of unguarded AdamW, if it is known.
      title: Title of the picture.

    Returns:
      The PNG file.
    """
    top = 10 * zero_step
    lines = []
    with plt.rc_context(_STYLE):
        inside = len(curves) <= _LEGEND_INSIDE
        figure, axes = plt.subplots(figsize=(7 if inside else 9, 4.5), layout="constrained")
        for method, points in curves.items():
            lines += _curve(axes, points, top, label=method, **_line(method, curves))
        levels = [("zero-step", zero_step, 3)]
        if best is not None:
            levels += [("best AdamW", min(best, top), -11)]
        for name, level, offset in levels:
            axes.axhline(level, color="0.35", linestyle="--", linewidth=1, zorder=1)
            note = axes.annotate(
                f"{name} {level:.2f}",
                (1, level),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                xytext=(0, offset),
                ha="right",
                color="0.35",
                fontsize=9,
            )
            note.set_in_layout(False)  # Else the layout makes room for it outside the axes.
        axes.set_title(title, parse_math=False)  # It may name a file with dollar signs.
        axes.set(xscale="log", yscale="log")
        axes.set(xlabel="learning rate", ylabel="held-out perplexity")
        lowest = min(zero_step, *(line.get_ydata().min() for line in lines))
        highest = max(zero_step, *(line.get_ydata().max() for line in lines))
        axes.set_ylim(lowest / 1.2, highest * 1.2)
        axes.set_xticks([rate for rate, _ in next(iter(curves.values()))])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        _plain_log_ticks(axes.yaxis)
        if inside:
            axes.legend(loc="upper left")
        else:
            _legend_outside(figure, axes)
        return _png(figure)


def loss_panels(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], rates: str
) -> bytes:
    """Held-out loss against the learning rate, one panel per task and one line per method.

    Args:
      panels: Task -> method -> its (learning rate, loss) points. A loss that is not finite, or is
        twice the panel's median or more, is drawn as an arrow at the top.
      rates: Label of the learning rates.

    Returns:
      The PNG file.
    """
    with plt.rc_context(_STYLE):
        figure, row = plt.subplots(
            1, len(panels), figsize=(5 * len(panels), 4.5), squeeze=False, layout="constrained"
        )
        for axes, (task, curves) in zip(row[0], panels.items(), strict=True):
            top = 2 * float(np.median([loss for points in curves.values() for _, loss in points]))
            top = top if math.isfinite(top) else 1.0
            for method, points in curves.items():
                _curve(axes, points, top, label=method, **_line(method, curves))
            axes.set(xscale="log", title=task, xlabel=rates)
        row[0][0].set_ylabel("held-out loss (nats)")
        figure.legend(*row[0][0].get_legend_handles_labels(), loc="outside right")
        return _png(figure)


def _curve(axes: Any, points: Sequence[tuple[float, float]], top: float, **style: Any) -> list:
    """Draws a line through points, and an arrow for each that is at `top`, above it or nowhere."""
    rates = np.array([rate for rate, _ in points])
    shown = np.array([min(y, top) if math.isfinite(y) else top for _, y in points])
    for rate in rates[shown >= top]:
        axes.plot(rate, top, "^", color=style["color"], markersize=10)
    return axes.plot(rates, shown, markersize=5, **style)


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
        for (name, rows), color in ((plain, _OTHERS[0]), (guarded, _OURS)):
            losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
            upper.plot(
                [row["step"] for row in rows], losses, color=color, linewidth=1.2, label=name
            )
        upper.axhline(zero_step_loss, color="0.35", linestyle="--", linewidth=1, label="zero-step")
        upper.set(yscale="log", ylabel="training loss (nats)", title=title)
        _plain_log_ticks(upper.yaxis)
        upper.legend(loc="upper right")

        rows = guarded[1]
        steps = np.array([row["step"] for row in rows])
        lower.plot(steps, [row["scale"] for row in rows], color=_OURS, linewidth=1.2)
        lower.set(yscale="log", xlabel="step", ylabel="guard's scale")
        _plain_log_ticks(lower.yaxis)
        regimes = np.array([REGIMES.index(row["regime"]) for row in rows])
        edges = [0, *(np.flatnonzero(np.diff(regimes)) + 1), len(regimes)]
        for start, stop in itertools.pairwise(edges):
            color = _REGIME_COLORS[regimes[start]]
            lower.axvspan(steps[start] - 0.5, steps[stop - 1] + 0.5, color=color, linewidth=0)
        patches = [
            Patch(color=color, label=name.lower())
            for name, color in zip(REGIMES, _REGIME_COLORS, strict=True)
        ]
        above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
        lower.legend(handles=patches, ncols=len(patches), fontsize=9, **above)
        return _png(figure)


def histograms(samples: Mapping[str, Sequence[float | None]], label: str) -> bytes:
    """One histogram per method on a shared log axis, one above the other; the guard's are blue.

    Args:
      samples: Method -> positive values; those that are no number are left out.
      label: Label of the axis.

    Returns:
      The PNG file.
    """
    found = {name: _positive(values) for name, values in samples.items()}
    everything = np.concatenate(list(found.values()))
    edges = np.geomspace(np.nanmin(everything), np.nanmax(everything) * 1.001, 41)
    with plt.rc_context(_STYLE):
        size = (7, 1 + 0.9 * len(found))
        figure, rows = plt.subplots(
            len(found), figsize=size, sharex=True, squeeze=False, layout="constrained"
        )
        for axes, (name, values) in zip(rows[:, 0], found.items(), strict=True):
            axes.hist(values, bins=edges, color=_OURS if name.startswith("guard") else "0.55")
            axes.set(xscale="log", yticks=[])
            axes.set_title(name, loc="left", fontsize=9)
        rows[-1, 0].set_xlabel(label)
        return _png(figure)


def quartiles(values: Sequence[float | None]) -> tuple[float, float, float]:
    """First quartile, median and third quartile of the values that are positive numbers."""
    low, middle, high = np.quantile(_positive(values), [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def _positive(values: Sequence[float | None]) -> np.ndarray:
    return np.array([v for v in values if v is not None and 0 < v < math.inf] or [math.nan])


def over_time(
    curves: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str
) -> bytes:
    """Lines over time, one per method.

    Args:
      curves: Method -> its (time, value) points.
      x_label: Label of the times.
      y_label: Label of the values.

    Returns:
      The PNG file.
    """
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for method, points in curves.items():
            times, values = zip(*points, strict=True) if points else ((), ())
            axes.plot(times, values, markersize=4, label=method, **_line(method, curves))
        axes.set(xlabel=x_label, ylabel=y_label)
        _legend_outside(figure, axes)
        return _png(figure)


def _legend_outside(figure: plt.Figure, axes: Any) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right", fontsize=9)


def _plain_log_ticks(axis: Axis) -> None:
    """Labels 1, 2, 5, 10, ..., or round numbers: less than a decade would else show one of them."""
    low, high = axis.get_view_interval()
    decades, even = LogLocator(subs=(1, 2, 5)), MaxNLocator(5, steps=(1, 2, 5, 10))
    axis.set_major_locator(decades if high > 10 * low else even)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _png(figure: plt.Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()
