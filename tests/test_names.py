"""Names of the state: none that Optax looks for in its own."""

import jax.numpy as jnp
import optax
from optax import contrib

from lbw_optax import guard


def fields_of_optax():
    """Names of the fields of every state that Optax has."""
    modules = [optax, contrib]
    states = [c for m in modules for n, c in vars(m).items() if n.endswith("State")]
    return {name for state in states for name in getattr(state, "_fields", ())}


def test_no_field_has_a_name_of_optax():
    def names(state):
        if not hasattr(state, "_fields"):
            return set()
        return set(state._fields).union(*map(names, state))

    theirs = fields_of_optax()
    assert {"count", "mu", "nu", "scale"} <= theirs
    # Optax's own wrappers share the name of what they wrap.
    assert names(guard(optax.identity()).init(jnp.ones(3))) & theirs == {"inner_state"}
