"""Text sources, the held-out split, batches and windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data
from experiments.data import Text
from experiments.errors import UserError


def test_standard_library_is_source_without_tests():
    text = data.standard_library()
    assert len(text.content) > 2**20
    assert b"class OrderedDict" in text.content
    assert b"class TestOrderedDict" not in text.content
    assert text.sha256 == data.standard_library.__wrapped__().sha256


def test_manual_has_no_paragraph_twice():
    paragraphs = data.python_manual().content.split(b"\n\n")
    assert len(paragraphs) == len(set(paragraphs)) > 1000


def test_words_are_numbered_by_frequency_and_the_rare_ones_are_all_one():
    words = data.word_tokens(Text("t", b"if x: x = x1 + if_not\nif x:"), vocabulary=4)
    np.testing.assert_array_equal(words, [1, 0, 2, 0, 3, 3, 3, 3, 1, 0, 2])
    everything = data.word_tokens(data.standard_library(), 4096)
    assert everything.max() == 4095
    assert np.mean(everything == 4095) < 0.2


def test_heldout_part_is_not_trained_on():
    content = bytes(range(100)) * 10
    train, heldout = data.split(Text("t", content), seq_len=16)
    assert len(heldout) == 100
    assert bytes(train) + bytes(heldout) == content


def test_too_short_a_text_says_what_is_needed():
    with pytest.raises(UserError, match="50 bytes of text, but 170 are needed"):
        data.split(Text("t", b"x" * 50), seq_len=16)
    data.split(Text("t", b"x" * 170), seq_len=16)


def test_batch_is_a_pure_function_of_the_key():
    tokens = jnp.asarray(np.arange(200, dtype=np.uint8))
    batch = data.crop_batch(tokens, jax.random.key(0), 64, 16)
    assert batch.shape == (64, 17)
    assert batch.dtype == jnp.int32
    np.testing.assert_array_equal(jnp.diff(batch, axis=1), 1)
    np.testing.assert_array_equal(batch, data.crop_batch(tokens, jax.random.key(0), 64, 16))
    assert (batch != data.crop_batch(tokens, jax.random.key(1), 64, 16)).any()


def test_crops_reach_both_ends():
    tokens = jnp.asarray(np.arange(20, dtype=np.uint8))
    batch = data.crop_batch(tokens, jax.random.key(0), 200, 16)
    assert int(batch.min()) == 0
    assert int(batch.max()) == 19


def test_windows_predict_each_token_at_most_once():
    tokens = np.arange(101, dtype=np.uint8)
    windows = data.heldout_windows(tokens, seq_len=10, batch_size=5, max_windows=100)
    assert windows.shape == (2, 5, 11)
    np.testing.assert_array_equal(windows[..., 1:].ravel(), np.arange(1, 101))


def test_windows_are_capped_and_spread():
    tokens = np.arange(101, dtype=np.uint8)
    windows = data.heldout_windows(tokens, seq_len=10, batch_size=4, max_windows=4)
    np.testing.assert_array_equal(windows[0, :, 0], [0, 30, 60, 90])
    assert data.heldout_windows(tokens[:11], 10, 4, 4).shape == (1, 1, 11)
