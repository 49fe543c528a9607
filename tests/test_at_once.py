"""Two processes at once: a results folder takes one of them, the cache lets the other wait."""

import subprocess
import sys

import pytest
from tqdm import tqdm

from experiments.errors import UserError
from experiments.locks import alone_in
from experiments.results import Results

HOLD = """
import sys
from filelock import FileLock

with FileLock(sys.argv[1]):
    print()
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """A process that is at work in the folder until its standard input ends."""
    lock = str(tmp_path / ".folder.lock")
    with subprocess.Popen(
        [sys.executable, "-u", "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        yield process
        process.stdin.close()


def test_results_are_of_one_process(tmp_path, other):
    with pytest.raises(UserError, match="folder: another process is at work in it") as caught:
        Results(tmp_path / "folder", {}, fresh=True)
    assert ".folder.lock" in str(caught.value)
    other.kill()  # However it ends.
    other.wait()
    Results(tmp_path / "folder", {}, fresh=True).finish("a", {})


def test_cache_waits(tmp_path, other, monkeypatch):
    said = []

    def let_go(line):
        said.append(line)
        other.stdin.close()

    monkeypatch.setattr(tqdm, "write", let_go)
    for _ in range(2):
        with alone_in(tmp_path / "folder"):
            other.wait()
    assert said == [f"another process is at work in {tmp_path / 'folder'}: waiting for it"]
