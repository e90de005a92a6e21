"""The generator: deterministic, true to its own annotations, varied, and apart from the held-out set."""

import re
from collections import Counter

import pytest

from fox_edge.nano.families import DRILLS, FAMILIES
from fox_edge.nano.problems import calculate, final_answer, generate, held_out

SAMPLE = 4000


def test_at_least_forty_families_of_one_to_three_steps():
    assert len(FAMILIES) >= 40
    assert len({family.name for family in FAMILIES + DRILLS}) == len(FAMILIES + DRILLS)
    steps = {sum(line.count("[") for line in family.working) for family in FAMILIES}
    assert steps == {1, 2, 3}
    assert all(len(family.questions) >= 2 for family in FAMILIES)


def test_same_seed_same_problems_and_a_longer_draw_begins_with_the_shorter():
    assert generate(5, 300) == generate(5, 300)
    assert generate(5, 900)[:300] == generate(5, 300)
    assert generate(5, 300) != generate(6, 300)


@pytest.mark.parametrize("drills", [False, True])
def test_every_annotation_is_true_and_the_last_is_the_result(drills):
    problems = generate(11, SAMPLE, drills=drills)
    assert len({problem.question for problem in problems}) == SAMPLE
    for problem in problems:
        notes = re.findall(r"<<([^=<>]+)=(-?\d+)>>(-?\d+)", problem.answer)
        assert 1 <= len(notes) <= 3, problem
        for expression, value, shown in notes:
            assert calculate(expression) == int(value) == int(shown), problem
        assert problem.answer.endswith(f"\n#### {problem.result}")
        assert int(notes[-1][1]) == problem.result == int(final_answer(problem.answer))
        assert problem.result > 0
        assert not re.search(r"[{}\[\]|]", problem.question + problem.answer), problem


def test_numbers_in_the_working_come_from_the_question_or_from_an_earlier_step():
    constants = {"2", "4", "7"}  # twice, legs, days of a week
    for problem in generate(12, SAMPLE):
        known = set(re.findall(r"\d+", problem.question)) | constants
        for expression, value in re.findall(r"<<([^=<>]+)=(\d+)>>", problem.answer):
            assert set(re.findall(r"\d+", expression)) <= known, problem
            known.add(value)


def test_every_family_is_drawn_and_evenly():
    counts = Counter(problem.family for problem in generate(13, 20 * len(FAMILIES)))
    assert len(counts) == len(FAMILIES)
    assert min(counts.values()) >= 15


def test_held_out_problems_are_stories_that_training_never_sees():
    problems = held_out()
    assert len(problems) == 200 and problems[:50] == held_out(50)
    drills = {family.name for family in DRILLS}
    assert not any(problem.family in drills for problem in problems)
    assert len({problem.family for problem in problems}) >= 40
    questions = {problem.question for problem in problems}
    for seed in (0, 1, 2, 3, 10_000, 1_000_003):
        assert not questions & {problem.question for problem in generate(seed, SAMPLE, drills=True)}
    with pytest.raises(ValueError, match="201"):
        held_out(201)


def test_calculate_refuses_what_is_not_plain_arithmetic():
    assert calculate("2+3*4-6/2") == 11
    for expression in ("__import__('os')", "2**9", "a+1"):
        with pytest.raises(ValueError, match="not plain arithmetic"):
            calculate(expression)


def test_final_answer_reads_gsm8k():
    assert final_answer("so 1,250.\n#### 1,250") == "1250"
    assert final_answer("no mark") is None
