"""What teaches a model to fill the fields of a call at the same time (SimpleTool): one prompt and its streams, packed.

Every case is one trie: the prompt, behind it the call as JSON (the sequential form, so that one model has both), and
one short stream a field: opener, value, closer. The opener selects the field and stands for the fixed syntax; unused
fields say null. The arguments stand behind the prompt, and once more behind the name (coupling "after_function").
Only values, nulls and closers are learnt. A share of ordinary examples keeps what the base could do.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from stretto.training.recipes import Recipe
from stretto.training.trie import TrieData, Unit
from stretto.zoo import workbook
from stretto.zoo.pages import tools

__all__ = ["SLOTS", "SLOTS_FILE", "case_units", "cases", "tool_data", "write_slots"]

SLOTS_FILE = "tool_slots.json"  # beside the weights: which tokens open, close and leave out a field
SLOTS = {  # field number -> tokens: 0 the name, then the arguments
    "openers": [f"<|slot_{i}|>" for i in range(1 + tools.ARGUMENTS)],
    "closers": [f"<|slot_{8 + i}|>" for i in range(1 + tools.ARGUMENTS)],
    "null": "<|spare_0|>",
}
POOL, NULL_WEIGHT, PLAIN = 512, 0.15, 0.25


def write_slots(folder: Path) -> None:
    (folder / SLOTS_FILE).write_text(json.dumps(SLOTS, indent=1) + "\n")


def cases(split: str, n: int, seed: int, at_hand: tuple[str, ...] = ()) -> list[tools.ToolCase]:
    """``n`` different cases of a split of the workbook, the same for the same seed; ``at_hand``: all of these tools."""
    rng, out = random.Random(f"{split}/tools/{seed}"), {}
    while len(out) < n:
        case = tools.case(rng, at_hand)
        if workbook._split(case.prompt) == split:
            out.setdefault(case.prompt, case)
    return list(out.values())


def case_units(case: tools.ToolCase) -> list[Unit]:
    """The JSON answer and one stream for each field, all behind the same prompt."""
    t = workbook._tokenizer()
    prompt, answer = workbook.encode(workbook.Example("", "", case.prompt, case.answer))
    units = [Unit([*prompt, *answer], len(prompt))]
    null = [t.token_to_id(SLOTS["null"])]
    ids = [null if v is None else t.encode(v, add_special_tokens=False).ids for v in case.fields]
    marks = [(t.token_to_id(a), t.token_to_id(b)) for a, b in zip(SLOTS["openers"], SLOTS["closers"], strict=True)]
    named = [*prompt, marks[0][0], *ids[0], marks[0][1]]
    for i, (value, (opener, closer)) in enumerate(zip(ids, marks, strict=True)):
        used = i <= len(case.arguments)
        for stem in [prompt, named] if i and used else [prompt]:
            units.append(Unit([*stem, opener, *value, closer], len(stem) + 1, 1.0 if used else NULL_WEIGHT))
    return units


def tool_data(recipe: Recipe, *, pad_id: int) -> TrieData:
    """Batches of the training split."""

    def pool(k: int) -> list[list[Unit]]:
        number = recipe.seed * 1_000_003 + k
        plain = workbook.stream("train", number, recipe.weights or None)
        out = [case_units(c) for c in cases("train", POOL, number)]
        for _ in range(int(POOL * PLAIN)):
            prompt, answer = workbook.encode(next(plain))
            out.append([Unit([*prompt, *answer], len(prompt))])
        return out

    return TrieData(pool, rows=recipe.rows, length=recipe.length, pad_id=pad_id, seed=recipe.seed)
