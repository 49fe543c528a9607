"""Documents and splits of a corpus, from every kind of file and from the hub."""

import json
import os

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_data import shared_data

from experiments import corpus
from experiments.corpus import TEST, TRAIN, VALIDATION, Documents, read_corpus, wikitext
from experiments.errors import UserError
from experiments.pretrain import TEXTS

WIKITEXT = """ 
 = First article = 
 
 Its text , with 1 
 = 2 = 
 in a formula . 
 
 = = Section = = 
 
 More . 
 
 = Second article = 
 
 Its text . 
"""  # noqa: W291, W293  Trailing blanks are the format.


def documents(path, split=TRAIN):
    return list(read_corpus(path).documents(split))


def test_wikitext_is_divided_at_the_headings_of_its_articles(tmp_path):
    (tmp_path / "train.txt").write_text(WIKITEXT)
    first, second = documents(tmp_path)
    assert first.startswith(" = First article = \n")
    assert " = 2 = " in first
    assert " = = Section = = " in first
    assert second == " = Second article = \n \n Its text . \n"
    assert " \n" + first + second == WIKITEXT


def test_headings_may_end_as_on_windows(tmp_path):
    (tmp_path / "train.txt").write_bytes(WIKITEXT.replace("\n", "\r\n").encode())
    assert len(documents(tmp_path)) == 2


def test_separator_lines_divide_and_are_dropped(tmp_path):
    (tmp_path / "train.txt").write_text("one\nmore\n<|endoftext|>\n\n<|endoftext|>\ntwo\r\n")
    assert documents(tmp_path) == ["one\nmore\n", "two\r\n"]


def test_rows_are_documents_or_the_lines_of_wikitext(tmp_path):
    rows = ["one", "", "two\nlines"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": r}) + "\n" for r in rows))
    lines = ["" if line == " \n" else line for line in WIKITEXT.splitlines(keepends=True)]
    for i, part in enumerate((lines[:5], lines[5:])):  # The cut is inside an article.
        table = datasets.Dataset.from_dict({"text": part})
        table.to_parquet(tmp_path / f"test-0000{i}-of-00002.parquet")
    (tmp_path / "wiki.valid.raw").write_text(WIKITEXT)
    corpus = read_corpus(tmp_path)
    assert list(corpus.documents(TRAIN)) == ["one", "two\nlines"]
    # The hub's rows and the text file are the same corpus, and share a cache.
    assert corpus.documents(TEST).digest == corpus.documents(VALIDATION).digest


def test_rows_may_have_other_keys_and_files_any_name(tmp_path):
    rows = [{"text": "one"}, {"text": "two", "meta": {"a": [1]}}, {"meta": 3, "text": "three"}]
    for name in ("train[1].jsonl", "train::*.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    empty = datasets.Dataset.from_dict({"text": []})
    empty.to_parquet(tmp_path / "train-[0].parquet")
    assert documents(tmp_path) == ["one", "two", "three"] * 2


def test_long_documents_are_cut_between_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_LONGEST", 10)
    (tmp_path / "train.txt").write_text("one\n\ntwo two\nthree\n" + "4" * 30 + "\nfive")
    assert documents(tmp_path) == ["one\n\ntwo two\n", "three\n" + "4" * 30 + "\n", "five"]


@pytest.mark.parametrize(
    "name", ["{}/part.txt", "wiki.{}.tokens", "{}.TXT", "{}.JSONL"], ids=lambda name: name
)
def test_splits_are_told_by_file_and_folder(tmp_path, name):
    for split in ("train", "test"):
        file = tmp_path / name.format(split)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"text": split}) if "JSONL" in name else split)
    corpus = read_corpus(tmp_path)
    assert list(corpus.documents(TRAIN)) == ["train"]
    assert list(corpus.documents(TEST)) == ["test"]


def test_folders_of_code_have_no_splits(tmp_path):
    (tmp_path / "test").mkdir()
    for name in ("test/cases.py", "train.py", "main.py"):
        (tmp_path / name).write_text("pass\n" * 10)
    assert set(read_corpus(tmp_path).splits) == {TRAIN, VALIDATION, TEST}


def test_files_named_after_splits_that_are_none_are_named(tmp_path, capsys):
    for name in ("train.md", "test.md"):
        (tmp_path / name).write_text("Some text of its own.")
    read_corpus(tmp_path)
    assert "test.md, train.md are read as one text: only files" in capsys.readouterr().err


def test_folders_of_code_one_level_down_have_no_splits(tmp_path):
    package = tmp_path / "package"
    (package / "test").mkdir(parents=True)
    (package / "test" / "table.csv").write_text("a,b\n" * 100)
    for name in ("train.py", "test.py"):
        (package / name).write_text("pass\n" * 100)
    assert set(read_corpus(tmp_path).splits) == {TRAIN, VALIDATION, TEST}


def test_text_without_splits_is_cut_at_nine_tenths(tmp_path):
    text = "<|endoftext|>\n".join(f"document {i:03}\n" for i in range(100))
    (tmp_path / "notes").write_text(text)
    (tmp_path / "picture").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "notes"):
        corpus = read_corpus(path)
        parts = [list(corpus.documents(split)) for split in (TRAIN, VALIDATION, TEST)]
        assert "".join("".join(part) for part in parts) == text.replace("<|endoftext|>\n", "")
        assert [len("".join(part)) for part in parts] == [1170, 65, 65]


def test_files_that_are_not_named_after_a_split_are_named(tmp_path, capsys):
    for name in ("train.txt", "test.txt", "chapter1.txt", "picture.png"):
        (tmp_path / name).write_text("a\n" * 100)
    assert read_corpus(tmp_path).splits.keys() == {TRAIN, TEST}
    said = capsys.readouterr().err
    assert said == f"{tmp_path}: 1 of 3 files left out, not named after a split: chapter1.txt\n"


def test_files_that_are_left_out_are_named(tmp_path, capsys):
    for i in range(5):
        (tmp_path / f"notes-{i}.txt").write_bytes(b"caf\xe9\n" * 100 if i else b"cafe\n" * 100)
    read_corpus(tmp_path)
    said = capsys.readouterr().err
    assert said == (
        f"{tmp_path}: 4 of 5 files left out, not UTF-8 text: "
        "notes-1.txt, notes-2.txt, notes-3.txt, ...\n"
    )


@given(
    st.lists(st.text("ab\n", min_size=1), min_size=1).filter(lambda d: any(t.strip() for t in d))
)
def test_digest_tells_where_documents_end(texts):
    digest = Documents("x", lambda: texts).digest
    kept = [text for text in texts if text.strip()]
    assert digest == Documents("x", lambda: kept).digest
    assert (digest.documents, digest.characters) == (len(kept), len("".join(kept)))
    if len(kept) > 1:
        assert digest.sha256 != Documents("x", lambda: ["".join(kept)]).digest.sha256


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.jsonl", b'{"text": 3}\n', "a row without text in a column 'text'"),
        ("train.jsonl", b'{"words": "a"}\n', "a row without text in a column 'text'"),
        ("train.jsonl", b"null\n", "a row without text in a column 'text'"),
        ("train.jsonl", b'{"text": "\\ud800"}\n', r"'\\ud800' is no text"),
        ("train.jsonl", b"hello\n", "not a .jsonl file"),
        ("train.jsonl", b"", "there is no text in it"),
        ("train.parquet", b"hello\n", "not a .parquet file"),
        ("train.txt", b"hello \xff", "not UTF-8 text"),
        ("train.txt", b" \n", "train: there is no text in it"),
        ("test.txt", b"hello", "no train split, only test"),
        ("notes", b"\xff", "none of its 1 files is UTF-8 text"),
        ("train.csv", b"a,b", "train.csv: a split by its name, but its type is none of .txt"),
    ],
)
def test_unusable_files_are_named(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        print(read_corpus(tmp_path).documents(TRAIN).digest)
    assert str(tmp_path) in str(caught.value)


def test_what_would_be_misread_is_refused(tmp_path):
    inner = tmp_path / "wiki"
    inner.mkdir()
    for split in ("train", "test"):
        (inner / f"{split}.txt").write_text("text\n" * 100)
    with pytest.raises(UserError, match="wiki in it has splits; give that folder"):
        read_corpus(tmp_path)
    (tmp_path / "table.csv").write_text("a,b\n" * 100)
    with pytest.raises(UserError, match=r"give text, \.parquet or \.jsonl, not \.csv"):
        read_corpus(tmp_path / "table.csv")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        read_corpus(tmp_path / "pipe")


def test_missing_data_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read_corpus(tmp_path / "absent")


def test_wikitext103_is_read_from_the_hub_by_row(monkeypatch):
    rows = datasets.Dataset.from_dict({"text": WIKITEXT.splitlines(keepends=True)})
    hub = datasets.DatasetDict({split: rows for split in (TRAIN, VALIDATION, TEST)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: hub)
    assert len(list(wikitext(103).documents(VALIDATION))) == 2


def test_unreachable_hub_is_one_clear_line(monkeypatch):
    def unreachable(*_):
        raise ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"WikiText-103 cannot be downloaded .* --data"):
        wikitext(103)
    with pytest.raises(UserError, match=r"WikiText-2 cannot be downloaded .* --pretrain-data"):
        TEXTS["wikitext-2"]()


@pytest.mark.parametrize(
    ("folder", "counts"),
    [
        ("wikitext2", {TRAIN: 600, VALIDATION: 60, TEST: 60}),
        ("wikitext_raw", {VALIDATION: 60, TEST: 60}),
        ("tinystories", {VALIDATION: 3117, TEST: 3118}),
    ],
)
def test_published_numbers_of_documents(folder, counts):
    splits = read_corpus(shared_data(folder)).splits
    assert {split: found.digest.documents for split, found in splits.items()} == counts
