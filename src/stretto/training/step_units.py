"""Worked problems of many steps as training texts: solutions, some with a slip that the next line puts right.

The slip itself is given, everything else is learnt. So a model learns both to go on and to notice what somebody else (a
draft) wrote wrongly before it. A text is a trie of one path: its units are what stands before the slip and the whole.
"""

from __future__ import annotations

import random

from stretto.training.recipes import Recipe
from stretto.training.trie import TrieData, Unit
from stretto.zoo import workbook
from stretto.zoo.pages import steps

__all__ = ["problem_units", "problems", "step_data"]

POOL, SLIPS = 512, 0.5  # problems of a pool; share of them with a corrected slip


def problems(split: str, n: int, seed: int) -> list[steps.Problem]:
    """``n`` different problems of a split of the workbook, the same for the same seed."""
    rng, out = random.Random(f"{split}/steps/{seed}"), {}
    while len(out) < n:
        made = steps.problem(rng)
        if workbook._split(made.prompt) == split:
            out.setdefault(made.prompt, made)
    return list(out.values())


def problem_units(p: steps.Problem, rng: random.Random) -> list[Unit]:
    """The solution behind its prompt; in some of them a slip, which is not learnt, and its correction, which is."""
    prompt, answer = workbook.encode(workbook.Example("", "", p.prompt, p.text))
    if rng.random() >= SLIPS:
        return [Unit([*prompt, *answer], len(prompt))]
    at = rng.randrange(len(p.lines))
    wrong, right = steps.slip(rng, p, at)
    before, given = "".join(f"{line}\n" for line in p.lines[:at]), f"{wrong}\n"
    after = "\n".join([right, *p.lines[at + 1 :], f"Answer: {p.answer}<|im_end|>"])
    t = workbook._tokenizer()
    known, slipped, rest = (t.encode(x, add_special_tokens=False).ids for x in (before, given, after))
    start = len(prompt) + len(known)
    whole = Unit([*prompt, *known, *slipped, *rest], start + len(slipped))
    return [Unit([*prompt, *known], len(prompt)), whole] if known else [whole]


def step_data(recipe: Recipe, *, pad_id: int) -> TrieData:
    """Batches of the training split."""

    def pool(k: int) -> list[list[Unit]]:
        number = recipe.seed * 1_000_003 + k
        rng = random.Random(f"slips/{number}")
        return [problem_units(p, rng) for p in problems("train", POOL, number)]

    return TrieData(pool, rows=recipe.rows, length=recipe.length, pad_id=pad_id, seed=recipe.seed)
