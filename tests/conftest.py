"""Settings of every test: eight CPU devices, small repeatable examples, cheap compilation.

Tests of the core also run without silent broadcasting between ranks; the experiments use it.
`XLA_FLAGS= pytest` compiles as JAX does by default, which takes nearly twice as long.
"""

import os

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

# Threads of XLA's CPU client. By default there is one per device: operations that are not jitted
# take those that a sum over all devices waits for, and after 40 seconds XLA aborts the process.
os.environ.setdefault("NPROC", "32")
# Most of the suite's time is compilation, of programs that run for milliseconds.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

EXPERIMENTS = (
    "test_batches",
    "test_corpus",
    "test_data",
    "test_hf",
    "test_hub",
    "test_llama2c",
    "test_lora",
    "test_lr_stress",
    "test_memory_plan",
    "test_models",
    "test_packing",
    "test_parity",
    "test_peft",
    "test_perplexity",
    "test_quality",
    "test_sharding",
    "test_suites",
    "test_throughput",
    "test_token_cache",
    "test_tokenization",
)

hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    max_examples=12,
    suppress_health_check=list(hypothesis.HealthCheck),
    database=None,
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="module")
def rank_promotion(request):
    """Refuses silent broadcasting in the tests of the core."""
    allowed = request.module.__name__.rsplit(".")[-1] in EXPERIMENTS
    with jax.numpy_rank_promotion("allow" if allowed else "raise"):
        yield


@pytest.fixture(autouse=True, scope="session")
def compiled_programs(tmp_path_factory):
    """Keeps what is compiled: equal programs of different tests are then compiled only once."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()  # Else jax goes by the folder of the process' first compilation.


@pytest.fixture(scope="module")
def cheap_compilation():
    """Compiles a module's programs with few optimizations, where that takes most of the time."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def cache(cheap_compilation, tmp_path_factory):
    """Where pretrained models are kept; most of a tiny job is compilation."""
    return tmp_path_factory.mktemp("cache")
