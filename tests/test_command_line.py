"""The command line as a process: signals, pipes, and what the file system refuses."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.command_line import main

ROOT = pathlib.Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "experiments"]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_a_job_at_once_with_one_line(name, code, tmp_path, monkeypatch):
    """Wherever it is: an exception would be lost in a callback of JAX now and then."""
    monkeypatch.setenv("LBW_OPTAX_CACHE", str(tmp_path / "cache"))
    arguments = ["lr-stress", "--results", str(tmp_path)]
    begun = tmp_path / "lr_stress" / "nano" / "config.json"
    with subprocess.Popen(
        [*COMMAND, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as job:
        while job.poll() is None and not begun.exists():
            time.sleep(0.1)
        time.sleep(1)  # By now it pretrains.
        job.send_signal(getattr(signal, name))
        _, said = job.communicate(timeout=60)
    assert job.returncode == code, said
    assert said.splitlines()[-1].startswith("interrupted: run the same command again")
    assert "Traceback" not in said


def test_a_signal_counts_where_nobody_reads_the_line():
    code = "import os; from experiments.__main__ import _stop; os.close(2); _stop(15, None)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 143


def test_output_that_nobody_reads_ends_without_a_word():
    pipe = subprocess.PIPE
    with subprocess.Popen([*COMMAND, "--help"], cwd=ROOT, stdout=pipe, stderr=pipe) as job:
        job.stdout.close()
        assert job.stderr.read() == b""
    assert job.returncode == 1


@pytest.mark.parametrize("flag", ["--data", "--pretrain-data", "--models"])
def test_a_name_that_no_file_can_have_is_one_line(flag, tmp_path, capsys):
    name = "x" * 300
    assert main(["lr-stress", "--results", str(tmp_path), flag, name]) == 2
    assert capsys.readouterr().err.startswith(f"error: {flag} {name}: ")


def test_a_name_that_is_no_text_is_one_line(tmp_path, capsys):
    assert main(["lr-stress", "--results", str(tmp_path), "--data", "sur\udcff.txt"]) == 2
    said = "error: --data 'sur\\udcff.txt': its name is not UTF-8"
    assert capsys.readouterr().err.strip() == said


def test_what_the_file_system_says_is_one_line(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(5, "Input/output error", "disk")

    monkeypatch.setattr("experiments.lab.Results", refuse)
    assert main(["lr-stress", "--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip() == "error: disk: Input/output error"
