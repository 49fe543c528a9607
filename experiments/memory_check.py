"""A memory plan beside what XLA's compiler says of the real program; nothing is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax

from experiments.compilers import compile_for
from experiments.jobs import Job
from experiments.memory import abstract_run, plan_memory
from experiments.methods import Method
from experiments.models.sharding import make_mesh, on_mesh


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
    mesh = make_mesh(fsdp=len(devices), devices=devices)
    run = abstract_run(job, method, mesh)
    with on_mesh(mesh):  # As a suite runs it: the decoder says where its activations live.
        lowered = run.lower()
    found = compile_for(devices[0], lowered).memory_analysis()
    return MemoryCheck(
        compiler,
        plan.arguments,
        found.argument_size_in_bytes,
        plan.temporaries,
        found.temp_size_in_bytes,
    )
