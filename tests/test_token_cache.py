"""Tokens on disk: made once per content and tokenizer, whole or not at all."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_data import shared_data

from experiments import token_cache
from experiments.corpus import VALIDATION, Documents, read_corpus
from experiments.errors import UserError
from experiments.token_cache import tokenized
from experiments.tokenization import ByteTokenizer, load_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LBW_OPTAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@dataclasses.dataclass
class Recorder(ByteTokenizer):
    """Bytes, counting the texts; fails at the text `!`."""

    texts: int = 0

    def encode_batch(self, texts):
        self.texts += len(texts)
        if "!" in texts:
            raise KeyboardInterrupt
        return super().encode_batch(texts)


def from_list(texts):
    return Documents("texts", lambda: texts)


@given(st.lists(st.text("abc", min_size=1), min_size=1), st.integers(1, 5))
def test_stream_is_all_documents_with_separators(texts, batch_characters):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "_BATCH_CHARACTERS", batch_characters)
        stream = tokenized(from_list(texts), ByteTokenizer())
    assert bytes(stream.tokens.tolist()).decode() == "".join("\0" + text for text in texts)
    np.testing.assert_array_equal(stream.starts, np.flatnonzero(stream.tokens == 0))
    assert stream.tokens.dtype == np.uint16


def test_tokenises_once_per_content_and_tokenizer(cache):
    tokenizer = Recorder()
    for _ in range(2):
        tokenized(from_list(["one", "two"]), tokenizer)
    assert tokenizer.texts == 2
    tokenized(from_list(["one", "more"]), tokenizer)
    assert tokenizer.texts == 4
    tokenizer.identity = "another"
    tokenized(from_list(["one", "two"]), tokenizer)
    assert tokenizer.texts == 6
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: b""])
@pytest.mark.parametrize("file", ["tokens.bin", "bounds.npy", "tokens.crc32"])
def test_a_cache_that_was_cut_is_made_again(cache, file, damage):
    whole = tokenized(from_list(["one", "two"]), ByteTokenizer()).tokens.tolist()
    (folder,) = cache.iterdir()
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(damage(content))
    assert tokenized(from_list(["one", "two"]), ByteTokenizer()).tokens.tolist() == whole


@pytest.mark.parametrize("file", ["tokens.bin", "bounds.npy"])
def test_a_cache_with_other_bytes_is_made_again(cache, file):
    whole = tokenized(from_list(["one", "two"]), ByteTokenizer()).tokens.tolist()
    (folder,) = cache.iterdir()
    size = (folder / file).stat().st_size
    (folder / file).write_bytes(bytes(size))
    assert tokenized(from_list(["one", "two"]), ByteTokenizer()).tokens.tolist() == whole


def test_interruption_leaves_nothing_behind(cache, monkeypatch):
    monkeypatch.setattr(token_cache, "_BATCH_CHARACTERS", 1)
    with pytest.raises(KeyboardInterrupt):
        tokenized(from_list(["one", "!"]), Recorder())
    assert not list(cache.iterdir())


def test_two_processes_may_make_the_same_tokens(cache):
    class Slow(ByteTokenizer):
        def encode_batch(self, texts):
            tokenized(from_list(texts), ByteTokenizer())  # The other process is done meanwhile.
            return super().encode_batch(texts)

    assert tokenized(from_list(["one"]), Slow()).tokens.tolist() == [0, *b"one"]
    assert len(list(cache.iterdir())) == 1


def test_large_vocabularies_need_four_bytes():
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = 2**16 + 1
    assert tokenized(from_list(["one"]), tokenizer).tokens.dtype == np.uint32


def test_unusable_cache_is_named(cache):
    cache.write_text("a file")
    with pytest.raises(UserError, match=r"cannot write tokens to .*cache"):
        tokenized(from_list(["one"]), ByteTokenizer())


def test_wikitext_with_a_pretrained_tokenizer():
    documents = read_corpus(shared_data("wikitext_raw")).documents(VALIDATION)
    tokenizer = load_tokenizer(str(shared_data("tokenizers/tinyllama")))
    stream = tokenized(documents, tokenizer)
    assert len(stream.starts) == 60
    (first,) = tokenizer.encode_batch([next(iter(documents))])
    np.testing.assert_array_equal(stream.tokens[1 : len(first) + 1], first)
    np.testing.assert_array_equal(stream.starts[:2], [0, len(first) + 1])
