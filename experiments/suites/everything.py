"""The suite `all`: every suite of the paper, and one page that leads to their reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from experiments.lab import Arguments, Options
from experiments.results import replace_file
from experiments.suites.clipping import clipping
from experiments.suites.failures import failures
from experiments.suites.lr_stress import lr_stress
from experiments.suites.neutrality import neutrality
from experiments.suites.reference import reference
from experiments.suites.seeds import seeds
from experiments.suites.sizes import sizes
from experiments.suites.tinyllama import tinyllama

PAPER_SUITES: dict[str, Callable[[Options], None]] = {
    "reference": reference,
    "sizes": sizes,
    "lr-stress": lr_stress,
    "clipping": clipping,
    "tinyllama": tinyllama,
    "seeds": seeds,
    "failures": failures,
    "neutrality": neutrality,
}
"""Name on the command line -> the suite."""


def everything(options: Arguments) -> None:
    """Runs every suite of the paper, one after the other, and writes an index of their reports.

    Args:
      options: What every suite asks.
    """
    lines = [f"# All suites, {options.preset}", ""]
    for name, suite in PAPER_SUITES.items():
        suite(options)
        report = Path(name.replace("-", "_"), options.preset, "report.md")
        title, _, question = (options.results / report).read_text().split("\n")[:3]
        lines.append(f"- [{title.removeprefix('# ')}]({report.as_posix()}): {question}")
        replace_file(options.results / f"{options.preset}.md", "\n".join(lines) + "\n")
    print(f"index: {options.results / f'{options.preset}.md'}")
