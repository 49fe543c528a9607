"""The hub: a model, its tokenizer and WikiText-103 come over HTTP, once."""

import os
import subprocess
import sys

import datasets
import pytest
from hub import COMMIT, serving
from model_helpers import QWEN, decoder, write_tokenizer

from experiments.models.hf import save_pretrained

PROGRAM = """
from experiments.corpus import wikitext
from experiments.errors import UserError
from experiments.models.hf import load_pretrained, revision
from experiments.tokenization import load_tokenizer

print(load_pretrained("someone/tiny").config.hidden_size)
print(revision("someone/tiny"), revision("someone/absent"))
print(load_tokenizer("someone/tiny").encode_batch(["a b"])[0].tolist())
corpus = wikitext(103)
print({split: list(corpus.documents(split)) for split in corpus.splits})
try:
    load_pretrained("someone/absent")
except UserError as error:
    print(error)
"""

ARTICLE = ["", " = Title = \n", "", "Some text.\n"]
SPLITS = ("train", "validation", "test")


@pytest.fixture
def root(tmp_path):
    """The hub's repositories."""
    model = tmp_path / "models" / "someone" / "tiny"
    save_pretrained(decoder(QWEN), model)
    write_tokenizer(model, ["<unk>", "</s>", "a", "b"], eos_token="</s>")
    wikitext = tmp_path / "datasets" / "Salesforce" / "wikitext"
    name = "wikitext-103-raw-v1"
    (wikitext / name).mkdir(parents=True)
    card = ["---", "configs:", f"- config_name: {name}", "  data_files:"]
    for split in SPLITS:
        table = datasets.Dataset.from_dict({"text": ARTICLE})
        table.to_parquet(wikitext / name / f"{split}-00000-of-00001.parquet")
        card += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (wikitext / "README.md").write_text("\n".join([*card, "---", ""]))
    return tmp_path


def load_all(address, home):
    """What a new process prints that knows this hub and keeps its files in `home`."""
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | settings | {"NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_everything_is_downloaded_once(root, tmp_path):
    with serving(root) as address:
        *found, absent = load_all(address, tmp_path / "home")
    documents = {split: [" = Title = \n \nSome text.\n"] for split in SPLITS}
    assert found == [str(QWEN.hidden_size), f"{COMMIT} None", "[2, 3]", str(documents)]
    assert absent.startswith("someone/absent: neither a folder nor a repository that the hub gave")
    # The hub is gone, and its files are here.
    *again, _ = load_all(address, tmp_path / "home")
    assert again == found
