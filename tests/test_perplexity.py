"""Strided perplexity: every token once, with its context, and the sum that a model gives."""

import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_data import shared_data

from experiments import perplexity
from experiments.corpus import TEST, read_corpus
from experiments.errors import UserError
from experiments.perplexity import strided_perplexity, strided_windows
from experiments.token_cache import TokenStream, tokenized
from experiments.tokenization import ByteTokenizer


def stream(lengths):
    """Documents of these lengths and a separator each, of tokens that are their places plus 1."""
    ends = np.cumsum([length + 1 for length in lengths])
    return TokenStream(np.arange(1, ends[-1] + 1, dtype=np.uint16), np.array([0, *ends[:-1]]))


def test_example():
    assert doctest.testmod(perplexity) == (0, 4)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    st.integers(1, 5),
)
def test_every_token_is_scored_once_with_its_context(lengths, sizes, batch_size):
    seq_len, stride = sizes
    split = stream(lengths)
    windows = strided_windows(split, seq_len=seq_len, stride=stride, batch_size=batch_size)
    assert windows.tokens.shape == (*windows.weights.shape[:2], seq_len + 1)
    assert windows.weights.shape[1:] == (batch_size, seq_len)

    targets = windows.tokens[..., 1:]
    is_scored = windows.weights > 0
    text = np.setdiff1d(split.tokens, split.tokens[split.starts])
    np.testing.assert_array_equal(np.sort(targets[is_scored]), text)
    # Rows are pieces of the text, so a token's context is all that is left of it.
    rows = windows.tokens.reshape(-1, seq_len + 1)
    for row in rows[rows[:, 0] > 0]:
        np.testing.assert_array_equal(np.diff(row[row > 0]), 1)
    context = np.broadcast_to(np.arange(1, seq_len + 1), targets.shape)[is_scored]
    possible = np.minimum(targets[is_scored] - 1, seq_len - stride + 1)
    assert (context >= possible).all()


def test_without_overlap_each_token_is_read_as_target_once():
    windows = strided_windows(stream([99]), seq_len=9, stride=9, batch_size=11)
    assert windows.tokens.shape == (1, 11, 10)
    assert windows.weights.all()


def test_short_text_is_one_padded_window():
    windows = strided_windows(stream([2]), seq_len=4, stride=2, batch_size=2)
    assert windows.tokens.tolist() == [[[1, 2, 3, 0, 0], [0, 0, 0, 0, 0]]]
    assert windows.weights.tolist() == [[[1, 1, 0, 0], [0, 0, 0, 0]]]


@pytest.mark.parametrize("stride", [0, 9])
def test_stride_must_leave_no_gap(stride):
    with pytest.raises(UserError, match=rf"stride {stride}: must be in 1 \.\.\. 8"):
        strided_windows(stream([99]), seq_len=8, stride=stride, batch_size=2)


def test_perplexity_of_a_known_model(tmp_path, monkeypatch):
    """A model of byte frequencies has the entropy of the text as its loss, whatever the windows."""
    monkeypatch.setenv("LBW_OPTAX_CACHE", str(tmp_path))
    documents = read_corpus(shared_data("wikitext_raw")).documents(TEST)
    split = tokenized(documents, ByteTokenizer())
    counts = np.bincount(split.tokens, minlength=256)
    counts[0] = 0  # Separators.
    frequencies = counts / counts.sum()
    losses = -np.log(np.where(counts, frequencies, 1))

    @jax.jit
    def score(tokens_bt, weights_bt):
        losses_bt = jnp.asarray(losses, jnp.float32)[tokens_bt[:, 1:]]
        return (losses_bt * weights_bt).sum(), weights_bt.sum()

    for stride in (256, 100):
        windows = strided_windows(split, seq_len=256, stride=stride, batch_size=512)
        found = strided_perplexity(score, windows)
        assert found.tokens == 1_290_590 - 2  # The file's bytes, less a blank line at its start.
        assert found.loss == pytest.approx(frequencies @ losses, rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(found.loss))


@pytest.mark.parametrize("loss", [math.inf, math.nan, 1e4])
def test_destroyed_model_has_infinite_perplexity(loss):
    windows = strided_windows(stream([9]), seq_len=9, stride=9, batch_size=1)
    found = strided_perplexity(lambda tokens, weights: (9 * loss, weights.sum()), windows)
    assert found.perplexity == math.inf
