"""Real files that tests read where they are at hand: beside the project, and no part of it."""

import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "shared" / "data"


def shared_data(name: str) -> pathlib.Path:
    """Returns the path of a file or folder of that data, or skips the test."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"needs the real file ../shared/data/{name}")
    return path
