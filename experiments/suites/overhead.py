"""The suite `overhead`: what the guard adds to an optimizer's step, in time and in memory."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from experiments.compilers import compile_devices, compile_for, moved_bytes
from experiments.environment import described, made_with
from experiments.errors import preset_of
from experiments.methods import Method
from experiments.report import Table, number, write_report
from experiments.results import Results
from experiments.timing import LEARNING_RATE, contestants, in_turns


@dataclasses.dataclass(frozen=True)
class OverheadConfig:
    """Settings of the suite."""

    width: int
    """Rows and columns of each array."""
    arrays: int
    """Number of arrays, float32."""
    rounds: int = 20
    """How often every optimizer is timed, one after the other in each round."""
    steps: int = 5
    """Steps per timing."""


COMPILED = OverheadConfig(4096, 12)
"""What is compiled for a device that need not be there: as many arrays as a decoder with stacked
layers has, each larger than a GPU's cache."""

MANY = OverheadConfig(64, 392)
"""What shows the time to compile: as many arrays as LoRA has on all projections of 28 layers that
are not stacked."""

PRESETS = {"nano": OverheadConfig(1024, 8), "small": OverheadConfig(4096, 16, steps=20)}
"""Name -> settings: 8 million parameters for a CPU, 268 million for a GPU."""


@dataclasses.dataclass(frozen=True)
class Stepper:
    """An optimizer's compiled step, and all that it steps on."""

    step: Any
    """The compiled function of gradients, state and parameters, which donates the last two."""
    gradients: dict[str, jax.Array]
    """The same in every step."""
    carry: list[Any]
    """State and parameters; they are replaced by every step."""

    def seconds(self, steps: int) -> float:
        """Times some steps; the mean per step."""
        started = time.perf_counter()
        for _ in range(steps):
            self.carry[:] = self.step(self.gradients, *self.carry)
        jax.block_until_ready(self.carry)
        return (time.perf_counter() - started) / steps


def overhead(preset: str = "nano", results: Path = Path("results"), fresh: bool = False) -> None:
    """Times an optimizer's step alone, with and without the guard, and counts its bytes.

    The model is left out: this is the part that the guard changes, at its most visible. Where
    CUDA's plugin for jax or the TPU's compiler (libtpu) is installed, the bytes are counted for a
    GPU or a TPU too, present or not. How long compilers take depends on the number of arrays, so a
    step on many small ones is compiled as well.

    Args:
      preset: Size of the step: nano (two CPU cores) or small (one GPU).
      results: Folder for the results; the suite writes to overhead/PRESET in it.
      fresh: Start over, dropping the results of an earlier job in that folder.
    """
    config = preset_of(PRESETS, preset)
    folder = Results(
        results / "overhead" / preset, described("overhead", preset, config), fresh=fresh
    )
    methods = contestants()
    if methods.keys() - folder.runs.keys():
        _measure(folder, config, methods)
    records = {name: folder.runs[name] for name in methods}
    tables = [_timed_table(config, records)]
    absent = [compile_devices(count)[0] for count in (1, 8)]
    absent = [x for x in absent if x.platform not in ("cpu", jax.default_backend())]
    for device, size in ((jax.devices()[0], MANY), *((x, COMPILED) for x in absent)):
        tables.append(_compiled_table(folder, methods, device, size))
    folder.write_csv("summary.csv", [{"optimizer": n, **row} for n, row in folder.runs.items()])
    write_report(
        folder,
        f"Overhead, {preset}",
        "What does the guard add to an optimizer's step that needs no help?",
        tables,
        {},
        made_with(),
    )


def _measure(folder: Results, config: OverheadConfig, methods: dict[str, Method]) -> None:
    clocks, counted = {}, {}
    for name, method in methods.items():
        stepper, counted[name] = _prepare(config, method)
        clocks[name] = functools.partial(stepper.seconds, config.steps)
    for name, (seconds, ratio) in in_turns(clocks, config.rounds).items():
        folder.finish(name, {"seconds": seconds, "ratio": ratio} | counted[name])


def _prepare(config: OverheadConfig, method: Method) -> tuple[Stepper, dict[str, float]]:
    """An optimizer that has made its first steps, and what its compiled step takes."""
    compiled, counted = _compile(config, method, jax.devices()[0])
    shape, names = (config.width, config.width), [f"w{i}" for i in range(config.arrays)]
    keys = jax.random.split(jax.random.key(0), 2 * config.arrays)
    normal: Callable[..., jax.Array] = functools.partial(jax.random.normal, shape=shape)
    params = {name: 0.02 * normal(key) for name, key in zip(names, keys[::2], strict=True)}
    gradients = {name: 1e-3 * normal(key) for name, key in zip(names, keys[1::2], strict=True)}
    state = jax.jit(method(LEARNING_RATE).init)(params)
    stepper = Stepper(compiled, gradients, [state, params])
    stepper.seconds(config.steps)
    return stepper, counted


def _compile(
    config: OverheadConfig, method: Method, device: jax.Device
) -> tuple[Any, dict[str, float]]:
    """An optimizer's step compiled for a device that need not be there, and what it takes."""
    tx = optax.with_extra_args_support(method(LEARNING_RATE))

    @functools.partial(jax.jit, donate_argnums=(1, 2), in_shardings=SingleDeviceSharding(device))
    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params, value=jnp.float32(1))
        return state, optax.apply_updates(params, updates)

    shape = jax.ShapeDtypeStruct((config.width, config.width), jnp.float32)
    params = {f"w{i}": shape for i in range(config.arrays)}
    state = jax.eval_shape(tx.init, params)
    lowered = step.lower(params, state, params)
    started = time.perf_counter()
    compiled = compile_for(device, lowered)
    seconds = time.perf_counter() - started
    size = config.arrays * config.width**2
    return compiled, {
        "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / size,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes / size,
        "moved_bytes": moved_bytes(compiled) / size,
        "compile_seconds": seconds,
    }


BYTES = ("state_bytes", "temporary_bytes", "moved_bytes")

HEADING = ["state", "temporaries", "moved", "compiled in"]

EXPLAINED = (
    "`state` is what an optimizer keeps between steps, beside the parameters; `temporaries` what "
    "XLA sets aside within a step; `moved` what it counts as read or written: all in bytes per "
    "parameter."
)


def _timed_table(config: OverheadConfig, records: dict[str, dict[str, Any]]) -> Table:
    heading = ["optimizer", "ms per step", "AdamW's times", *HEADING]
    rows = [
        [
            name,
            f"{1000 * record['seconds']:.2f}",
            "{1:.2f} ({0:.2f} to {2:.2f})".format(*record["ratio"]),
            *_shown(record),
        ]
        for name, record in records.items()
    ]
    return Table(
        f"A step on {config.arrays} arrays of {config.width} x {config.width}",
        heading,
        rows,
        "Medians and, of the ratios to AdamW in the same round, quartiles over "
        f"{config.rounds} rounds. {EXPLAINED}",
    )


def _compiled_table(
    folder: Results, methods: dict[str, Method], device: jax.Device, config: OverheadConfig
) -> Table:
    """What steps take that are compiled and not run; what is not in the folder is put there."""
    target, rows = f"Compiled for a {device.device_kind}", []
    for name, method in tqdm(methods.items(), target, unit="optimizer"):
        key = f"{name}, {config.arrays} arrays on {device.device_kind}"
        if key not in folder.runs:
            folder.finish(key, _compile(config, method, device)[1])
        rows.append([name, *_shown(folder.runs[key])])
    return Table(
        f"{target}: {config.arrays} arrays of {config.width} x {config.width}",
        ["optimizer", *HEADING],
        rows,
        f"Compiled and not run. {EXPLAINED}",
    )


def _shown(record: dict[str, Any]) -> list[str]:
    return [*(number(record[kind]) for kind in BYTES), f"{record['compile_seconds']:.1f} s"]
