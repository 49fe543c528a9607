"""Tokenizers: the pretrained models' own ids, bytes, and what cannot be loaded."""

import doctest

import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_helpers import write_tokenizer
from shared_data import shared_data

from experiments import tokenization
from experiments.errors import UserError
from experiments.tokenization import load_tokenizer


@pytest.mark.parametrize(
    ("name", "vectors", "vocab_size", "separator"),
    [("qwen2.5", "qwen2", 151_665, 151_643), ("tinyllama", "llama-spm", 32_000, 1)],
)
def test_reference_vectors(name, vectors, vocab_size, separator):
    folder = shared_data("tokenizers/testvectors")
    # As bytes: among the texts are line ends that must not be translated.
    texts = (folder / "ggml-vocab.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (folder / f"ggml-vocab-{vectors}.out").read_text().split("\n")
    expected = [[int(i) for i in line.split()] for line in lines]
    tokenizer = load_tokenizer(str(shared_data(f"tokenizers/{name}")))
    ids = tokenizer.encode_batch(texts)
    assert len(texts) == 46 + 1  # Both files end with an empty one.
    assert [i.tolist() for i in ids] == expected
    assert (tokenizer.vocab_size, tokenizer.separator) == (vocab_size, separator)


def test_example():
    assert doctest.testmod(tokenization) == (0, 1)


@given(st.text("a\0 é🚀"))
def test_bytes_of_any_text_come_back(text):
    tokenizer = load_tokenizer("bytes")
    (ids,) = tokenizer.encode_batch([text])
    assert bytes(ids.tolist()).decode() == text
    assert tokenizer.vocab_size == 256


def test_identity_is_that_of_the_content(tmp_path):
    sources = []
    for name, words in (("a", "xy"), ("b", "xy"), ("c", "yx")):
        (tmp_path / name).mkdir()
        sources.append(
            write_tokenizer(tmp_path / name, ["<unk>", "</s>", *words], eos_token="</s>")
        )
    a, b, c = (load_tokenizer(source) for source in sources)
    assert a.identity == b.identity != c.identity
    assert a.identity == load_tokenizer(f"{sources[0]}/tokenizer.json").identity
    assert a.separator == 1
    assert a.encode_batch(["x y z"])[0].tolist() == [2, 3, 0]


def test_hub_is_asked_for_what_is_no_folder(tmp_path, monkeypatch):
    source = write_tokenizer(tmp_path, ["<unk>", "</s>"], eos_token="</s>")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: source)
    assert load_tokenizer("Qwen/Qwen2.5-0.5B").vocab_size == 2


def test_unusable_tokenizers_are_named(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("cannot reach the hub\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"tokenizer absent: .*\(cannot reach the hub\)$"):
        load_tokenizer("absent")
    with pytest.raises(UserError, match=r"no tokenizer\.json in it"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="names no eos_token"):
        load_tokenizer(write_tokenizer(tmp_path, ["<unk>"]))
