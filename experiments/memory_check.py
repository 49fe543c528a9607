"""A memory plan beside what XLA's compiler says of the real program; nothing is allocated."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from experiments.jobs import Job
from experiments.memory import abstract_run, plan_memory
from experiments.methods import Method
from experiments.models.sharding import make_mesh

SLICE = "v5e:2x4"
"""The TPU slice of eight devices, as the TPU's compiler calls it."""


class MemoryCheck(NamedTuple):
    """Planned and measured bytes on each device.

    Attributes:
      compiler: What it was compiled for.
      planned_arguments: Of the plan for the same dtypes.
      arguments: What the compiled step is given.
      planned_temporaries: Of the same plan.
      temporaries: What the compiler sets aside for all else.
    """

    compiler: str
    planned_arguments: int
    arguments: int
    planned_temporaries: int
    temporaries: int


def check_memory(job: Job, method: Method, devices: Sequence[jax.Device]) -> MemoryCheck:
    """Compiles a chunk of a job's steps, and reads how much memory it takes.

    On the CPU the job computes in float32: there XLA turns bfloat16 into float32 anyway, with
    float32 copies of all weights that no other device has.

    Args:
      job: The job.
      method: Its optimizer.
      devices: What the model is split over, from `compile_devices`.

    Returns:
      Plan and measurement.
    """
    compiler = devices[0].device_kind
    if devices[0].platform == "cpu":
        job = dataclasses.replace(job, dtype="float32")
        compiler = "CPU, float32"
    plan = plan_memory(job, method, len(devices))
    run = abstract_run(job, method, make_mesh(fsdp=len(devices), devices=devices))
    found = run.lower().compile().memory_analysis()
    return MemoryCheck(
        compiler,
        plan.arguments,
        found.argument_size_in_bytes,
        plan.temporaries,
        found.temp_size_in_bytes,
    )


def compile_devices(count: int) -> Sequence[jax.Device]:
    """What a program for so many devices can be compiled for here.

    Args:
      count: One, or the eight of `SLICE`.

    Returns:
      This machine's accelerators if there are enough; else, for eight and where the TPU's compiler
      is installed and free, a slice that need not be there; else CPUs.
    """
    with contextlib.suppress(RuntimeError):  # Too late where jax is at work: tests set it too.
        jax.config.update("jax_num_cpu_devices", 8)
    if jax.default_backend() != "cpu" and jax.device_count() >= count:
        return jax.devices()[:count]
    if count == 8 and importlib.util.find_spec("libtpu"):
        with contextlib.suppress(RuntimeError):  # It serves one process at a time.
            return topologies.get_topology_desc(SLICE, "tpu").devices
    return jax.devices("cpu")[:count]
