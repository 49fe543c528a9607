"""What came out here stands beside what the paper reports."""

import math

import pytest

from experiments import jobs
from experiments.methods import ADAMW, GUARD
from experiments.paper import PERPLEXITIES, paper_table, perplexity_rows, seconds_rows
from experiments.suites import clipping, lr_stress, reference, seeds, sizes


def records(multiples, methods=(ADAMW, GUARD)):
    """One seed each, AdamW at perplexity 20 and the guard at 10."""
    losses = {ADAMW: math.log(20.0), GUARD: math.log(10.0)}
    return {(m, x): [{"heldout_loss": losses[m]}] for m in methods for x in multiples}


def settings(job, multiples):
    """What the paper is compared with, as the first column calls it."""
    return {row[0].removesuffix(": perplexity") for row in perplexity_rows(job, records(multiples))}


def test_every_number_of_the_paper_has_its_suite():
    stress = lr_stress.PRESETS["paper"]
    clips = clipping.PRESETS["paper"]
    spread = seeds.PRESETS["paper"]
    family = sizes.PRESETS["paper"]
    assert settings(reference.PRESETS["paper"].job, [1]) == {"Qwen/Qwen2.5-7B, reference"}
    assert settings(spread.job, spread.multiples) == {"Qwen/Qwen2.5-3B, reference"}
    assert settings(clips.job, [clips.multiple]) == {"Qwen/Qwen2.5-7B, LR 0.001"}
    assert settings(stress.job, stress.multiples) == {
        "Qwen/Qwen2.5-7B, reference",
        "Qwen/Qwen2.5-7B, LR 0.001",
        "Qwen/Qwen2.5-7B, LR 0.003",
    }
    found = [settings(job, family.multiples) for job in family.sizes.values()]
    assert found == [
        {"Qwen/Qwen2.5-3B, reference"},
        {"Qwen/Qwen2.5-7B, reference", "Qwen/Qwen2.5-7B, LR 0.001"},
        set(),
    ]
    assert len(PERPLEXITIES) == 4


def test_ours_stand_beside_theirs():
    rows = perplexity_rows(jobs.PAPER["7B"], records([1]))
    rows += seconds_rows(jobs.PAPER["7B"], "2.0", "3.0")
    (table,) = paper_table(rows)
    assert table.rows == [
        ["Qwen/Qwen2.5-7B, reference: perplexity", "13.21", "20.00", "10.74", "10.00"],
        ["Qwen/Qwen2.5-7B, reference: seconds, end to end", "392.54", "2.0", "357.02", "3.0"],
    ]


@pytest.mark.parametrize(
    ("job", "methods"),
    [
        (jobs.NANO, (ADAMW, GUARD)),
        (jobs.PAPER["14B"], (ADAMW, GUARD)),
        (jobs.PAPER["7B"], (GUARD,)),
    ],
    ids=["other model", "no number", "nothing to compare"],
)
def test_no_table_without_a_number_of_the_paper(job, methods):
    assert paper_table(perplexity_rows(job, records([1, 5], methods))) == []
