"""What teaches a model to write parallel blocks (Multiverse): curated solutions, a curriculum from flat to parallel.

The user's turn says which way is wanted: step by step, in parallel, or nothing (the model decides). Flat solutions of
the reasoning page go through the Curator; what it rejects stays flat. Source: arXiv 2506.09991, section 5.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch

from stretto.models.transformer import Transformer
from stretto.outline import Grammar
from stretto.tags import MULTIVERSE, Tags, write_tags
from stretto.training.curator import Curator, render
from stretto.training.data import Document, PackedBatch, pack
from stretto.training.recipes import Recipe
from stretto.training.spans import SpanDocument, checked, pack_spans
from stretto.training.trie import TrieData
from stretto.zoo import workbook
from stretto.zoo.pages import reasoning

__all__ = [
    "CURRICULUM", "MODES", "cases", "flat_tests", "grammar_of", "initialise_tags", "pair_of", "parallel_data",
    "write_parallel",
]

MODES = {"sequential": "\nStep by step.", "parallel": "\nIn parallel.", "auto": ""}  # end of the user's turn
CURRICULUM = (0.0, 0.0, 0.1, 0.5, 0.5, 0.9, 0.9, 0.9)  # share of parallel examples in each eighth of the budget
POOL = 192
_SHARD = 1_000_000  # pool number = shard * _SHARD + a running number
WEIGHTS = {"rows": 1.0, "orders": 1.0, "tree": 1.2, "nested": 1.0, "serial": 0.5}


@lru_cache(maxsize=4)
def grammar_of(tags: Tags = MULTIVERSE) -> Grammar:
    """``tags`` in the zoo's tokenizer."""
    return Grammar(tags, workbook._tokenizer())


def cases(split: str, n: int, seed: int, weights: Mapping[str, float] | None = None) -> list[reasoning.Case]:
    """``n`` different cases of a split of the workbook, the same for the same seed; ``weights`` by task."""
    rng, out = random.Random(f"{split}/reasoning/{seed}"), {}
    while len(out) < n:
        case = reasoning.case(rng, weights)
        if workbook._split(case.prompt) == split:
            out.setdefault(case.prompt, case)
    return list(out.values())


def pair_of(case: reasoning.Case, mode: str, grammar: Grammar) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids) of a case: flat where "sequential" is asked for or the Curator rejects it."""
    example = workbook.Example("", "", case.prompt + MODES[mode], case.flat)
    prompt, answer = workbook.encode(example)
    if mode == "sequential":
        return prompt, answer
    parts = Curator().curate(case.prompt, case.flat, grammar).parts
    return prompt, answer if parts is None else [*render(parts, grammar), answer[-1]]


def parallel_data(recipe: Recipe, progress: Callable[[], float], *, pad_id: int) -> TrieData:
    """Batches of the training split. ``progress()``: share of the budget that is used up, 0 to 1.

    The shard is a part of a pool's number, so a resumed run reads what the uninterrupted one read.
    """
    grammar, last = grammar_of(), len(CURRICULUM) - 1

    def pool(k: int) -> list[SpanDocument]:
        number, share = recipe.seed * 1_000_003 + k, CURRICULUM[k // _SHARD]
        rng = random.Random(f"modes/{number}")
        pairs = []
        for case in cases("train", POOL, number, recipe.weights or WEIGHTS):
            mode = rng.choice(["parallel", "auto"]) if rng.random() < share else "sequential"
            pairs.append(pair_of(case, mode, grammar))
        return checked(grammar, pairs)

    def after(k: int) -> int:
        shard = max(k // _SHARD, min(last, int(progress() * len(CURRICULUM))))
        return shard * _SHARD + k % _SHARD + 1

    return TrieData(
        pool, rows=recipe.rows, length=recipe.length, pad_id=pad_id, seed=recipe.seed, pack=pack_spans, after=after
    )


def flat_tests(n: int, length: int, *, pad_id: int) -> dict[str, PackedBatch]:
    """``n`` flat test examples of every task, packed; only for watching the training."""
    out = {}
    for task in reasoning.TASKS:
        pairs = [pair_of(c, "sequential", grammar_of()) for c in cases("test", n, 10_007, {task: 1.0, **_others(task)})]
        out[task] = pack([Document([*p, *a], len(p)) for p, a in pairs], length, pad_id=pad_id)
    return out


def _others(task: str) -> dict[str, float]:
    return {t: 0.0 for t in reasoning.TASKS if t != task}


@torch.no_grad()
def initialise_tags(model: Transformer, grammar: Grammar, known: Mapping[str, int] | None = None) -> None:
    """Start the embedding of every tag at the mean of its word's ordinary tokens (outputs are tied), or as the tag that
    the model already knows in its role (``known``: role -> id)."""
    weight = model.model.embed_tokens.weight
    rows = {i: grammar.encode(grammar.tags.names[role].strip("<>|")) for role, i in grammar.ids.items()}
    rows |= {i: [known[role]] for role, i in grammar.ids.items() if known and role in known}
    means = {i: weight[ids].mean(0) for i, ids in rows.items()}
    for i, mean in means.items():
        weight[i] = mean


def write_parallel(folder: Path) -> None:
    """Tags and the words that ask for a mode, beside the weights."""
    write_tags(folder, MULTIVERSE, modes=MODES)
