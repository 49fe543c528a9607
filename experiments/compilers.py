"""Compilers: for this machine's devices, and for accelerators that need not be there."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence

import jax
from jax.experimental import topologies
from jaxlib import xla_client

SLICE = "v5e:2x4"
"""A TPU slice of eight devices, as the TPU's compiler calls it."""

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3350000000000
  device_memory_size: 80000000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""A GPU, as XLA describes one; the numbers are those of its vendor's data sheet."""

# The fastest of a GPU's kernels is found by running them; Triton's have no tiles for some shapes.
_UNTRIED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def compile_devices(count: int) -> Sequence[jax.Device]:
    """What a program for so many devices can be compiled for here.

    Args:
      count: One, or the eight of `SLICE`.

    Returns:
      This machine's accelerators if there are enough; else, where its compiler is installed and
      free, what need not be there: one GPU as `H100` describes it, or eight TPUs; else CPUs.
    """
    with contextlib.suppress(RuntimeError):  # Too late where jax is at work: tests set it too.
        jax.config.update("jax_num_cpu_devices", 8)
    if jax.default_backend() != "cpu" and jax.device_count() >= count:
        return jax.devices()[:count]
    with contextlib.suppress(RuntimeError):  # Not installed, or at work: a TPU's serves one job.
        if count == 8 and importlib.util.find_spec("libtpu"):
            return topologies.get_topology_desc(SLICE, "tpu").devices
        if count == 1:
            described = {"target_config": H100, "topology": "1x1x1"}
            return topologies.get_topology_desc("", "cuda", **described).devices
    return jax.devices("cpu")[:count]


def compile_for(device: jax.Device, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a program for what `compile_devices` has found.

    Args:
      device: Where the program would run.
      lowered: The program.

    Returns:
      The compiled program.
    """
    absent = device.platform == "gpu" and device not in jax.devices()
    return lowered.compile(_UNTRIED if absent else None)


def moved_bytes(compiled: jax.stages.Compiled) -> float:
    """How many bytes a program reads and writes, by XLA's count."""
    found = compiled.cost_analysis()
    if found is None:  # A GPU's compiler does not count without the GPU.
        (module,) = compiled.runtime_executable().hlo_modules()
        cpu = jax.devices("cpu")[0].client
        found = xla_client._xla.hlo_module_cost_analysis(cpu, module)
    return found["bytes accessed"]
