"""Packed documents: every token once per epoch, and segments that are documents."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.errors import UserError
from experiments.packing import PackedBatches
from experiments.token_cache import TokenStream

SIZES = {
    "lengths": st.lists(st.integers(1, 20), min_size=1, max_size=20).filter(lambda n: sum(n) > 1),
    "batch_size": st.integers(1, 7),
    "seq_len": st.integers(1, 12),
}


def stream(lengths):
    """Documents of these lengths, of tokens that all differ."""
    starts = np.cumsum([0, *lengths[:-1]])
    return TokenStream(np.arange(100, 100 + sum(lengths), dtype=np.uint16), starts)


@given(seed=st.integers(0, 99), epoch=st.integers(0, 2), **SIZES)
def test_an_epoch_has_every_token_once(seed, epoch, lengths, batch_size, seq_len):
    documents = stream(lengths)
    batches = PackedBatches(documents, jax.random.key(seed), batch_size=batch_size, seq_len=seq_len)
    first = epoch * batches.rows
    steps = (first + batches.rows) // batch_size + 1
    rows, segments = (
        array.reshape(-1, seq_len + 1)[first : first + batches.rows]
        for array in batches.chunk(0, steps)
    )
    np.testing.assert_array_equal(np.sort(rows[segments > 0]), documents.tokens)
    assert not rows[segments == 0].any()
    assert (segments == 0).sum() < seq_len + 1


@given(**SIZES)
def test_segments_are_documents(lengths, batch_size, seq_len):
    documents = stream(lengths)
    batches = PackedBatches(documents, jax.random.key(0), batch_size=batch_size, seq_len=seq_len)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    chunk = batches.chunk(0, -(-batches.rows // batch_size))
    for row, segments in zip(*(array.reshape(-1, seq_len + 1) for array in chunk), strict=True):
        row, segments = row[segments > 0], segments[segments > 0]
        np.testing.assert_array_equal(np.diff(row), 1)
        assert segments[0] == 1
        np.testing.assert_array_equal(np.diff(segments), np.diff(document_of[row - 100]))


def test_epochs_are_shuffled_differently():
    batches = PackedBatches(stream([100]), jax.random.key(0), batch_size=10, seq_len=9)
    first, second = batches.at(0).tokens, batches.at(1).tokens
    assert (first != second).any()
    np.testing.assert_array_equal(np.sort(first, axis=0), np.sort(second, axis=0))


def test_an_example():
    batches = PackedBatches(stream([3, 4]), jax.random.key(0), batch_size=2, seq_len=4)
    tokens, segments = batches.at(0)
    order = tokens[:, 0].argsort()
    assert tokens[order].tolist() == [[100, 101, 102, 103, 104], [105, 106, 0, 0, 0]]
    assert segments[order].tolist() == [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]]


def test_too_short_a_text_is_refused():
    with pytest.raises(UserError, match="1 tokens of text"):
        PackedBatches(stream([1]), jax.random.key(0), batch_size=2, seq_len=4)
