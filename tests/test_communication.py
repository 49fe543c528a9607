"""On a mesh the guard sends scalars alone, however the parameters are split."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lbw_optax import guard

COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\("
)


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("x", "y"), P(("x", "y"))], ids=str)
@pytest.mark.parametrize("memory", ["none", "sparse", "step"])
def test_only_scalars_travel(memory, spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), (AxisType.Auto,) * 2)
    kernel = jax.ShapeDtypeStruct((128, 256), jnp.float32, sharding=NamedSharding(mesh, spec))
    bias = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=NamedSharding(mesh, P()))
    params = {"kernel": kernel, "bias": bias}
    tx = guard(optax.adamw(1e-3), memory=memory)
    state = jax.tree.map(
        lambda leaf: leaf.update(sharding=NamedSharding(mesh, spec if leaf.ndim == 2 else P())),
        jax.eval_shape(tx.init, params),
    )

    @jax.jit
    def step(grads, state, params, loss):
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    loss = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))
    program = step.lower(params, state, params, loss).compile().as_text()
    sent = [(kind, shape) for shape, kind, _ in COLLECTIVE.findall(program)]
    assert sent, "the sums over the mesh are missing"
    assert {kind for kind, _ in sent} == {"all-reduce"}
    assert not [shape for _, shape in sent if re.search(r"\[\d", shape)]
