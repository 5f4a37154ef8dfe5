"""Problems of many steps: true lines, slips and corrections that are what they say, chunks that fit, learnt parts."""

import random
import re

import pytest

from stretto.training.step_units import problem_units, problems
from stretto.training.trie import flatten
from stretto.zoo import workbook
from stretto.zoo.pages import steps

FOUND = problems("train", 120, 4)


def true(line: str) -> bool:
    """Whether every equation of a line holds, and a product before it."""
    ops = {"+": int.__add__, "-": int.__sub__}
    sums = re.findall(r"(\d+) ([+-]) (\d+) = (-?\d+)", line)
    product = re.search(r"(\d+) \* (\d+) more, (\d+),", line)
    fits = product is None or int(product[1]) * int(product[2]) == int(product[3])
    return bool(sums) and fits and all(ops[o](int(a), int(b)) == int(c) for a, o, b, c in sums)


def test_lines_follow_from_each_other_and_from_the_prompt():
    for p in FOUND:
        now = int(re.search(r" has (\d+) ", p.prompt)[1])
        told = re.findall(r"^([A-P]: .*)\.$", p.prompt, re.M)
        assert steps.LEAST <= len(p.lines) == len(told) <= steps.MOST
        for line, event in zip(p.lines, told, strict=True):
            assert line.startswith(f"{event}, ") and true(line) and f"{now} " in line
            now = int(re.search(r"= (\d+)\.$", line)[1])
            assert 0 < now <= steps.LARGEST
        assert p.answer == now and steps.score(p.prompt, p.text, p.text)
        assert not steps.score(p.prompt, p.text[:-1] + "x", p.text) and steps.answer_of("A: 3") is None


def test_a_slip_is_wrong_and_its_correction_right():
    rng = random.Random(0)
    for p in FOUND:
        at = rng.randrange(len(p.lines))
        wrong, right = steps.slip(rng, p, at)
        assert wrong != p.lines[at] and right == "No, " + p.lines[at].split("more, " if "more, " in wrong else "away, ", 1)[1]
        assert len(re.findall(r"\d+", wrong)) == len(re.findall(r"\d+", p.lines[at]))


def test_every_line_is_a_chunk_of_at_most_32_tokens():
    t = workbook._tokenizer()
    assert max(len(t.encode(f"{line}\n", add_special_tokens=False).ids) for p in FOUND for line in p.lines) <= 32


def test_splits_are_disjoint_and_the_seed_decides():
    test = problems("test", 60, 4)
    assert not {p.prompt for p in test} & {p.prompt for p in FOUND} and problems("test", 60, 4) == test
    assert {workbook._split(p.prompt) for p in test} == {"test"}


@pytest.mark.parametrize("seed", range(8))
def test_everything_but_the_prompt_and_the_slip_is_learnt_once(seed):
    t, p = workbook._tokenizer(), FOUND[seed]
    units = problem_units(p, random.Random(seed))
    flat = flatten(units)
    assert all(parent == i - 1 for i, parent in enumerate(flat.parent))  # one path
    learnt = t.decode([x for x, w in zip(flat.tokens, flat.weight, strict=True) if w], skip_special_tokens=False)
    assert set(flat.weight) <= {0.0, 1.0} and learnt.endswith(f"Answer: {p.answer}<|im_end|>")
    assert sum(line in learnt for line in p.lines) >= len(p.lines) - 1
    assert ("No, " in learnt) == (sum(line in learnt for line in p.lines) == len(p.lines) - 1)
