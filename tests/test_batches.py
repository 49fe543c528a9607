"""Batches by step: what every kind of them promises, and random crops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.batches import CroppedBatches
from experiments.data import crop_batch
from experiments.packing import PackedBatches
from experiments.token_cache import TokenStream

TOKENS = np.arange(200, dtype=np.uint16)
BATCHES = {
    "cropped": lambda key: CroppedBatches(TOKENS, key, batch_size=3, seq_len=8),
    "packed": lambda key: PackedBatches(
        TokenStream(TOKENS, np.array([0, 5, 90])), key, batch_size=3, seq_len=8
    ),
}


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
def test_batch_is_a_pure_function_of_key_and_step(make):
    batches, others = make(jax.random.key(0)), make(jax.random.key(1))
    chunk = batches.chunk(5, 20)
    assert chunk.tokens.shape == chunk.segments.shape == (20, 3, 9)
    assert chunk.tokens.dtype == chunk.segments.dtype == np.int32
    assert isinstance(chunk.tokens, np.ndarray)
    for step in (24, 5, 12):  # In any order, also as the first one that a new run asks for.
        for again in (batches.at(step), make(jax.random.key(0)).at(step)):
            np.testing.assert_array_equal(again.tokens, chunk.tokens[step - 5])
            np.testing.assert_array_equal(again.segments, chunk.segments[step - 5])
    assert (others.chunk(5, 20).tokens != chunk.tokens).any()
    assert (batches.at(6).tokens != batches.at(5).tokens).any()


def test_crops_are_those_of_the_compiled_step():
    key = jax.random.key(3)
    batches = CroppedBatches(TOKENS, key, batch_size=3, seq_len=8)
    expected = crop_batch(jnp.asarray(TOKENS), jax.random.fold_in(key, 7), 3, 8)
    np.testing.assert_array_equal(batches.at(7).tokens, expected)
    np.testing.assert_array_equal(batches.at(7).segments, 1)
