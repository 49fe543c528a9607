"""Tables on the terminal: lines break between words, and no number is cut."""

import io

import pytest
from rich.console import Console

from experiments.report import Table, _print

TABLE = Table("Title", ["method", *(f"rate {i}" for i in range(12))], [["guard"] + ["4.190"] * 12])


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("width", [20, 80, 300])
def test_no_number_is_cut(width, is_terminal):
    out = io.StringIO()
    _print(Console(file=out, width=width, force_terminal=is_terminal, no_color=True), TABLE)
    text = out.getvalue()
    assert text.count("4.190") == 12
    assert "…" not in text
    if not is_terminal:
        assert text.count("rate") == 12
