"""Actuation: a command carried out on a step, by selection."""

import jax.numpy as jnp
import numpy as np

from lbw_optax import Action
from lbw_optax.actuation import emit
from lbw_optax.policy import Command


def test_integers_that_are_updated_move_with_the_step():
    """As a counter among the parameters: held with a held step, else as the inner made it."""
    moves = {Action.PASS: 3, Action.SCALE: 3, Action.PROCEED: 3, Action.HOLD: 0}
    for action, expected in (moves | {Action.BACKTRACK: 0}).items():
        half = jnp.float32(0.5)
        command = Command(jnp.int32(action), jnp.int32(0), half, half)
        step = {"count": jnp.full(2, 3, jnp.int32)}
        assert set(np.asarray(emit(command, step, None)["count"])) == {expected}


def test_a_backtrack_takes_back_all_but_what_stays():
    command = Command(*map(jnp.asarray, (Action.BACKTRACK, 0, 1.0, 0.25)))
    undone = emit(command, {"w": jnp.ones(2)}, {"w": jnp.full(2, 8.0)})
    assert set(np.asarray(undone["w"])) == {-6}
