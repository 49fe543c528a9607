"""Small networks of many kinds at their best learning rate, below it and above it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from experiments.bench import Bar, Bench, Findings, Row, best_rate, losses, mean, ratio
from experiments.methods import behind_guard, warmup_cosine
from experiments.networks import NETWORKS, Network
from experiments.presets import half_decades
from experiments.report import Table, with_spread
from experiments.sweep import sweep

MOST = 1.25
"""Error at the end that the guard may have, in units of the plain optimizer's."""

RATES = half_decades(-4, 8)
"""Learning rates: the best is among all but the first and the last two."""

BELOW, ABOVE = -1, 2
"""A third of the best learning rate and ten times it, in half decades from it."""

DIGITS = "{:.3g}".format
"""How a loss is written: some fall to 1e-5."""


def networks(bench: Bench) -> Findings:
    """Trains each network as it usually is, plainly at all its rates, and guarded at three."""
    return _compare(bench, "networks", "Networks", (make() for make in NETWORKS))


def warmups(bench: Bench) -> Findings:
    """Does the same with AdamW, warmup and cosine in the place of each network's own optimizer."""
    alike = (
        dataclasses.replace(network, name=network.name.rpartition(",")[0], method=warmup_cosine)
        for network in (make() for make in NETWORKS)
    )
    return _compare(bench, "warmups", "Networks with warmup and cosine", alike)


def _compare(bench: Bench, section: str, title: str, measured: Iterable[Network]) -> Findings:
    found, lines = Findings([], [], []), []
    for network in measured:
        plain = bench.cell(
            f"{section}/{network.name}",
            lambda network=network: _measure(bench, section, network, False, RATES),
        )
        place = RATES.index(best_rate(plain, RATES[-BELOW:-ABOVE]))
        low, best, high = (RATES[place + shift] for shift in (BELOW, 0, ABOVE))
        guarded = bench.cell(
            f"{section}/guard({network.name})",
            lambda network=network, rates=(low, best, high): _measure(
                bench, section, network, True, rates
            ),
        )
        found.rows.extend([*plain, *guarded])
        alone = [losses(plain, rate=rate) for rate in (low, best, high)]
        cells = [with_spread(values, DIGITS) for values in alone]
        # Above its best rate the plain optimizer is no measure.
        rivals = (alone[0], alone[1], alone[1])
        for multiple, rate, rival in zip(
            ("1/3x", "1x", "10x"), (low, best, high), rivals, strict=True
        ):
            ours = losses(guarded, rate=rate)
            name = f"{network.name}, {multiple}: guard / plain"
            bar = Bar(name, mean(ours) / mean(rival), MOST)
            found.bars.append(bar)
            cells.append(f"{with_spread(ours, DIGITS)}, {ratio(bar.value, MOST)}")
        lines.append([network.name, f"{best:g}", *cells])
    heading = ["network", "best LR", "plain 1/3x", "plain 1x", "plain 10x"]
    heading += ["guard 1/3x, ratio", "guard 1x, ratio", "guard 10x, ratio"]
    note = (
        "Loss on batches after the run; the ratio is to the plain optimizer's at the same rate, "
        "for 10x at its best."
    )
    found.tables.append(Table(title, heading, lines, note))
    return found


def _measure(
    bench: Bench, section: str, network: Network, guarded: bool, rates: tuple[float, ...]
) -> Iterator[Row]:
    steps = bench.preset.network_steps
    method = lambda learning_rate: network.method(learning_rate, steps)  # noqa: E731
    method = behind_guard(method) if guarded else method
    for row in sweep(network, method, steps, rates, bench.preset.seeds):
        yield {**row, "section": section, "guarded": guarded}
