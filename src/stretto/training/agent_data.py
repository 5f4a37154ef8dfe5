"""What agents are taught: calls that orchestrations of generated tasks make, in any topology (``zoo/pages/orchestra``).

A task belongs to the test split by its text, so no call of a test task occurs in training.
"""

from __future__ import annotations

import random

from stretto.training.data import Document, PackedBatch, PackedData, pack
from stretto.training.recipes import Recipe
from stretto.zoo import workbook
from stretto.zoo.pages import orchestra

__all__ = ["agent_data", "agent_tests", "cases"]

POOL = 1024
SHARE = {"wide": 0.2, "deep": 0.1, "layered": 0.25, "dense": 0.45}  # whether a colour was seen is learnt last


def cases(split: str, kind: str, n: int, seed: int) -> list[orchestra.TaskCase]:
    """``n`` different tasks of one kind, the same for the same seed."""
    rng, out = random.Random(f"{split}/{kind}/{seed}"), {}
    while len(out) < n:
        case = orchestra.case(rng, kind)
        if workbook._split(case.text) == split:
            out.setdefault(case.text, case)
    return list(out.values())


def _document(rng: random.Random, case: orchestra.TaskCase, length: int) -> Document:
    """A call of ``case`` that fits in a row."""
    while True:
        prompt, answer = workbook.encode(workbook.Example("", "", *orchestra.example(rng, case)))
        if len(prompt) + len(answer) <= length:
            return Document([*prompt, *answer], len(prompt))


def agent_data(recipe: Recipe, *, pad_id: int) -> PackedData:
    """Batches of the training split, the kinds by ``SHARE``."""

    def pool(k: int) -> list[Document]:
        number = recipe.seed * 1_000_003 + k
        rng = random.Random(f"agents/{number}")
        every = [c for kind, share in SHARE.items() for c in cases("train", kind, round(POOL * share), number)]
        return [_document(rng, c, recipe.length) for c in every]

    return PackedData(pool, rows=recipe.rows, length=recipe.length, pad_id=pad_id, seed=recipe.seed)


def agent_tests(recipe: Recipe, n: int, *, pad_id: int) -> dict[str, PackedBatch]:
    """``n`` calls on test tasks of every kind, packed; only for watching the training."""
    out = {}
    for kind in orchestra.KINDS:
        rng = random.Random(kind)
        out[kind] = pack([_document(rng, c, recipe.length) for c in cases("test", kind, n, 10_007)], recipe.length,
                         pad_id=pad_id)
    return out
