"""The documentation is true: its code runs, its examples hold, and no public name is missing."""

import ast
import dataclasses
import doctest
import enum
import importlib
import itertools
import pathlib
import pkgutil
import re

import chex
import jax
import pytest

import lbw_optax

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in [README, *ROOT.glob("docs/**/*.md")]
    if "```python" in page.read_text()
)
MODULES = [f"lbw_optax.{m.name}" for m in pkgutil.iter_modules(lbw_optax.__path__)]

BLOCK = re.compile(
    r"(?P<marker><!-- not run: [^\n]*-->\n)?```python\n(?P<code>.*?)^```$", re.S | re.M
)


@pytest.fixture(autouse=True)
def quick_compiler():
    """Nothing here depends on speed or on the last bit."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def blocks(page):
    """Returns the (line, code) of each python block of a page that is not marked `not run`."""
    text = (ROOT / page).read_text()
    return [
        (text[: found.start("code")].count("\n"), found["code"])
        for found in BLOCK.finditer(text)
        if not found["marker"]
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_python_block_of_a_page_runs(page, capsys):
    """The blocks assert what they promise; none may raise."""
    namespace = {"__name__": "page"}
    # Readers do not run under this suite's ban on broadcasting.
    with jax.numpy_rank_promotion("allow"):
        for line, code in blocks(page):
            # Leading newlines make the line numbers of an error those of the page.
            exec(compile("\n" * line + code, ROOT / page, "exec"), namespace)


def test_change_of_the_readme_leaves_a_healthy_loop_as_it_was(capsys):
    """Both sides of its diff run, end in the same parameters, and the new one prints a report."""
    diff = re.search(r"```diff\n(.*?)^```$", README.read_text(), re.S | re.M)[1].splitlines()
    ends = {}
    for dropped in "+-":
        # Far below the best learning rate, so that the run is healthy.
        code = [line[1:].replace("1e-3", "1e-4") for line in diff if line[:1] != dropped]
        namespace = {
            "params": jax.numpy.linspace(1.0, 2.0, 8),
            "batches": range(5),
            "value_and_grad": lambda p, batch: jax.value_and_grad(lambda p: (p @ p) / 2)(p),
        }
        exec(compile("\n".join(code), README, "exec"), namespace)
        ends[dropped] = namespace["params"]
    chex.assert_trees_all_equal(ends["+"], ends["-"])
    assert "STABLE" in capsys.readouterr().out


def test_only_blocks_with_a_reason_are_not_run():
    skipped = [
        found["marker"]
        for page in PAGES
        for found in BLOCK.finditer((ROOT / page).read_text())
        if found["marker"]
    ]
    reasons = (
        "the quick start has the whole of it",
        "a checkpoint from the hub",
        "the model of the block above",
        "several processes",
    )
    assert skipped == [f"<!-- not run: {reason} -->\n" for reason in reasons]


@pytest.mark.parametrize("name", ["lbw_optax", *MODULES])
def test_examples_in_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_api_page_names_every_public_object():
    text = (ROOT / "docs/api.md").read_text()
    named = re.findall(r"^\.\. auto(?:class|function):: (\w+)", text, re.M)
    assert sorted(named) == sorted(lbw_optax.__all__)


@pytest.mark.parametrize("name", lbw_optax.__all__)
def test_every_public_object_has_a_docstring_of_its_own(name):
    text = getattr(lbw_optax, name).__doc__
    assert text
    assert not text.startswith(f"{name}("), "this is the docstring that dataclass makes"


def described_fields(cls):
    """Returns the names of a class's fields that a string follows."""
    module = ast.parse(pathlib.Path(importlib.import_module(cls.__module__).__file__).read_text())
    (body,) = [
        n.body for n in module.body if isinstance(n, ast.ClassDef) and n.name == cls.__name__
    ]
    names = set()
    for field, text in itertools.pairwise(body):
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            if isinstance(field, ast.AnnAssign):
                names.add(field.target.id)
            elif isinstance(field, ast.Assign):
                names.add(field.targets[0].id)
    return names


def test_every_constant_of_the_law_is_explained():
    assert described_fields(lbw_optax.Law) == {f.name for f in dataclasses.fields(lbw_optax.Law)}


@pytest.mark.parametrize("cls", [lbw_optax.Action, lbw_optax.Cause, lbw_optax.Regime])
def test_every_word_of_the_log_is_explained(cls):
    assert issubclass(cls, enum.IntEnum)
    assert described_fields(cls) >= {member.name for member in cls} - {"NONE"}


@pytest.mark.parametrize("page", ["docs/recipes.md", "docs/loop.md"])
def test_the_tables_name_every_cause(page):
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / page).read_text(), re.M)
    assert {cause.name for cause in lbw_optax.Cause} <= set(rows)


@pytest.mark.parametrize("cls", [lbw_optax.GuardState, lbw_optax.Report, lbw_optax.Event])
def test_every_field_of_a_record_is_explained(cls):
    for field in getattr(cls, "_fields", None) or [f.name for f in dataclasses.fields(cls)]:
        assert re.search(rf"^ +{field}: ", cls.__doc__, re.M), field
