"""What programs are compiled for here, and how their bytes are counted."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from experiments import compilers
from experiments.compilers import compile_devices, compile_for, moved_bytes
from lbw_optax import guard


@pytest.fixture
def topologies(monkeypatch):
    """Platform -> devices that need not be there; others have no compiler here."""
    found = {}

    def describe(name, platform, **kwargs):
        if platform not in found:
            raise RuntimeError(f"no compiler for {platform}")
        return SimpleNamespace(devices=found[platform])

    monkeypatch.setattr(compilers.topologies, "get_topology_desc", describe)
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: name in found)
    return found


def test_without_other_compilers_programs_are_compiled_for_cpus(topologies):
    assert compile_devices(1) == jax.devices()[:1]
    assert compile_devices(8) == jax.devices()


def test_a_gpu_and_tpus_need_not_be_there(topologies):
    topologies |= {"cuda": ["gpu"], "tpu": ["tpu"] * 8, "libtpu": True}
    assert compile_devices(1) == ["gpu"]
    assert compile_devices(8) == ["tpu"] * 8


@pytest.mark.parametrize(
    ("device", "options"),
    [(SimpleNamespace(platform="gpu"), compilers._UNTRIED), (None, None)],
    ids=["absent", "here"],
)
def test_kernels_are_not_timed_on_a_gpu_that_is_absent(device, options):
    lowered = SimpleNamespace(compile=lambda found: found)
    assert compile_for(device or jax.devices()[0], lowered) == options


def test_bytes_are_counted_where_the_compiler_does_not():
    compiled = jax.jit(lambda x: (x + 1).sum()).lower(jnp.zeros((64, 64))).compile()
    silent = SimpleNamespace(
        cost_analysis=lambda: None, runtime_executable=compiled.runtime_executable
    )
    assert moved_bytes(compiled) == moved_bytes(silent) >= 64 * 64 * 4


@pytest.mark.parametrize("memory", ["none", "sparse", "step"])
def test_a_guarded_step_compiles_for_a_gpu(memory):
    (device,) = compile_devices(1)
    if device.platform != "gpu":
        pytest.skip("needs CUDA's plugin for jax; the GPU itself need not be there")
    tx = guard(optax.adamw(1e-3), memory=memory)
    params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}

    def step(grads, state, params, loss):
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(1, 2), in_shardings=SingleDeviceSharding(device))
    loss = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = compile_for(
        device, jitted.lower(params, jax.eval_shape(tx.init, params), params, loss)
    )
    assert "fusion" in compiled.as_text()
    assert moved_bytes(compiled) > 28 * 1024**2  # AdamW's own, with nothing read twice.
