"""The tasks of ParallelBench: ten list operations, two puzzles, five writing tasks; generated, with their scorers.

A task makes a question and a *label*: what a scorer needs to know. Two ways to ask: ``plain`` is the workbook's (one
line, items separated by commas; the only one that models of the zoo can read), ``story`` is the paper's waiting line
(quoted names in brackets). Scorers are loose (the paper's); ``strict`` also wants the exact form.

The paper judges sentences with a grammar checker in Java and BERTScore; here a few written rules and chrF stand in
for them, so figures of the writing tasks do not compare with the paper's.
"""

from __future__ import annotations

import itertools
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stretto.bench.parallel_text import (
    fact_sentence,
    grammatical,
    news,
    paraphrase_score,
    summary_score,
    word_set,
)
from stretto.zoo.pages.words import ANIMALS, CITIES, COLOURS, FRUIT, NAMES, TOOLS

__all__ = ["PARALLEL_TASKS", "ParallelTask", "parse_list"]

FIRST = tuple(NAMES)
LAST = (
    "Adams Baker Brown Clark Cooper Davis Evans Foster Green Harris Hill Jones King Lewis Martin Moore Parker Reed "
    "Scott Stone Taylor Turner Ward White Young"
).split()
POOLS = (ANIMALS, CITIES, COLOURS, FRUIT, TOOLS)
SYMBOLS = string.ascii_uppercase + string.digits
STORY = "You manage a waiting line at a service desk. {events}\nThe line: {context}\nProvide only the final list."
Label = Mapping[str, Any]
Make = Callable[[random.Random, int, str], tuple[str, Label]]


@dataclass(frozen=True, slots=True)
class ParallelTask:
    """``make(rng, n, style)`` -> (question, label); ``score(label, text, strict)`` in 0..1; ``example(label)``: one
    right answer, None where none can be written by rule. ``sizes``: lengths n, equally often; ``max_tokens``."""

    name: str
    family: str
    purpose: str
    make: Make
    score: Callable[[Label, str, bool], float]
    example: Callable[[Label], str | None]
    sizes: tuple[int, ...]
    count: int
    max_tokens: int


def written(items: list[str], style: str) -> str:
    return ", ".join(items) if style == "plain" else "[" + ", ".join(f'"{i}"' for i in items) + "]"


def parse_list(text: str) -> list[str]:
    """The items after the last "[" and before the next "]" (the first line where there is none), without quotes."""
    inside = text.rpartition("[")[2].partition("]")[0] if "[" in text else text.strip().partition("\n")[0]
    items = [i.strip().strip("\"'").strip() for i in inside.split(",")]
    return [] if items == [""] else items


def exact_form(text: str, items: list[str], style: str) -> bool:
    return text.strip() == written(items, style)


def _items(rng: random.Random, n: int, style: str) -> list[str]:
    if style == "plain":
        pool = rng.choice(POOLS) if n <= 12 else list(dict.fromkeys(itertools.chain(*POOLS)))
        return rng.sample(pool, n)
    return [f"{rng.choice(FIRST)} {last}" for last in rng.sample(LAST, n)]


def _list_task(operation: str) -> Make:
    """The maker of one list operation; its label: input, operation, word, index, and the answer where only one is
    right."""
    plain, events, solve = _OPERATIONS[operation]

    def make(rng: random.Random, n: int, style: str) -> tuple[str, Label]:
        if operation == "sort" and style == "plain":
            items = [str(i) for i in rng.sample(range(10, 100), n)]
        else:
            items = _items(rng, n + 1, style)
        word = items.pop() if operation != "sort" or style != "plain" else ""
        index = rng.randint(0, n) if operation == "insert_index" else rng.randrange(n)
        label = {"op": operation, "items": items, "word": word, "index": index, "style": style}
        label["answer"] = solve(items, word, index)
        text = plain if style == "plain" else STORY.replace("{events}", events)
        context = written(items, style)
        return text.format(word=word, index=index, context=context), label

    return make


_OPERATIONS: dict[str, tuple[str, str, Callable[[list[str], str, int], list[str] | None]]] = {
    "copy": ("Copy this list: {context}", "Nobody comes or goes.", lambda x, w, i: list(x)),
    "sort": (
        "Sort from small to large: {context}", "Everybody is put in alphabetical order.", lambda x, w, i: sorted(x),
    ),
    "reverse": ("Reverse this list: {context}", "The line is served from its end.", lambda x, w, i: x[::-1]),
    "shuffle": (
        "Shuffle this list: {context}", "The line is put in any other random order.", lambda x, w, i: None,
    ),
    "insert_index": (
        "Insert {word} at place {index} of this list: {context}",
        "{word} joins at position {index} (0 is the front).", lambda x, w, i: [*x[:i], w, *x[i:]],
    ),
    "insert_random": (
        "Insert {word} anywhere into this list: {context}", "{word} joins at any random position.",
        lambda x, w, i: None,
    ),
    "remove_index": (
        "Remove place {index} of this list: {context}", "The person at position {index} leaves (0 is the front).",
        lambda x, w, i: [*x[:i], *x[i + 1 :]],
    ),
    "remove_random": (
        "Remove any item of this list: {context}", "Any one random person leaves.", lambda x, w, i: None,
    ),
    "replace_index": (
        "Put {word} at place {index} of this list: {context}",
        "{word} takes the place of the person at position {index} (0 is the front).",
        lambda x, w, i: [*x[:i], w, *x[i + 1 :]],
    ),
    "replace_random": (
        "Put {word} in any place of this list: {context}", "{word} takes the place of any one random person.",
        lambda x, w, i: None,
    ),
}


def score_list(label: Label, text: str, strict: bool = False) -> float:
    """Whether the list is a valid result of the operation."""
    got, items, word = parse_list(text), list(label["items"]), label["word"]
    if strict and not exact_form(text, got, label["style"]):
        return 0.0
    op = label["op"]
    if label["answer"] is not None:
        return float(got == label["answer"])
    if op == "shuffle":
        return float(Counter(got) == Counter(items) and got != items)
    if op == "insert_random":
        return float(got.count(word) == 1 and [i for i in got if i != word] == items)
    if op == "remove_random":
        return float(any(got == [*items[:i], *items[i + 1 :]] for i in range(len(items))))
    return float(any(got == [*items[:i], word, *items[i + 1 :]] for i in range(len(items))))


def example_list(label: Label) -> str:
    """One valid result, in the form asked for; the choice is fixed by the label's index."""
    x, w, i, op = list(label["items"]), label["word"], label["index"], label["op"]
    found = label["answer"]
    if found is None:
        cut = i % (len(x) - 1) + 1
        found = {
            "shuffle": [*x[cut:], *x[:cut]], "insert_random": [*x[:i], w, *x[i:]],
            "remove_random": [*x[:i], *x[i + 1 :]], "replace_random": [*x[:i], w, *x[i + 1 :]],
        }[op]
    return written(found, label["style"])


def make_latin(rng: random.Random, n: int, style: str) -> tuple[str, Label]:
    symbols = rng.sample(SYMBOLS, n)
    question = (
        f"Write a Latin square of size {n} with the symbols {', '.join(symbols)}: every symbol once in each row and in "
        "each column. One row a line, separated by commas, nothing else."
    )
    return question, {"symbols": symbols}


def score_latin(label: Label, text: str, strict: bool = False) -> float:
    symbols = label["symbols"]
    n, wanted = len(symbols), set(symbols)
    lines = [line.strip() for line in text.strip().splitlines()]
    if strict and (len(lines) != n or any(re.search(r"[^A-Z0-9,]", line) for line in lines)):
        return 0.0
    rows = [[c.strip() for c in line.split(",")] for line in lines]
    rows = [r for r in rows if set(r) == wanted][:n]
    square = len(rows) == n and all(len(r) == n for r in rows)
    return float(square and all(set(column) == wanted for column in zip(*rows, strict=True)))


def example_latin(label: Label) -> str:
    s = label["symbols"]
    return "\n".join(",".join(s[(i + j) % len(s)] for j in range(len(s))) for i in range(len(s)))


def _grids() -> list[tuple[tuple[int, ...], ...]]:
    """All 288 filled 4 x 4 sudokus."""
    rows = list(itertools.permutations(range(1, 5)))
    out = []
    for a, b, c, d in itertools.product(rows, repeat=4):
        if {*a[:2], *b[:2]} != {1, 2, 3, 4} or {*c[:2], *d[:2]} != {1, 2, 3, 4}:
            continue
        if all(len({a[i], b[i], c[i], d[i]}) == 4 for i in range(4)):
            out.append((a, b, c, d))
    return out


def make_sudoku(rng: random.Random, n: int, style: str) -> tuple[str, Label]:
    """``n`` givens; blanks are 0; drawn until exactly one grid agrees with them."""
    grids = _GRIDS or _GRIDS.extend(_grids()) or _GRIDS
    while True:
        grid = rng.choice(grids)
        blank = set(rng.sample(range(16), 16 - n))
        given = [[0 if 4 * r + c in blank else grid[r][c] for c in range(4)] for r in range(4)]
        fits = sum(all(g in (0, v) for gr, vr in zip(given, x, strict=True) for g, v in zip(gr, vr, strict=True))
                   for x in grids)
        if fits == 1:
            break
    shown = "\n".join("".join(map(str, r)) for r in given)
    question = (
        "Fill the blanks (0) of this sudoku with 1 to 4: every digit once in each row, column and 2 x 2 box. Write the "
        f"four rows only.\n{shown}"
    )
    return question, {"answer": ["".join(map(str, r)) for r in grid]}


_GRIDS: list[tuple[tuple[int, ...], ...]] = []


def score_sudoku(label: Label, text: str, strict: bool = False) -> float:
    if strict:
        return float(text.strip() == "\n".join(label["answer"]))
    rows = [re.sub(r"\D", "", line) for line in text.splitlines()]
    return float([r for r in rows if r] == label["answer"])


def make_words(level: str) -> Make:
    def make(rng: random.Random, n: int, style: str) -> tuple[str, Label]:
        words = word_set(rng, level, n)
        return f"Write one sentence with all of these words: {', '.join(words)}", {"words": words}

    return make


def score_words(label: Label, text: str, strict: bool = False) -> float:
    present = all(re.search(rf"\b{re.escape(w)}(s|es|ed|ing)?\b", text, re.I) for w in label["words"])
    return float(present and grammatical(text) and (not strict or len(text.strip().splitlines()) == 1))


def make_paraphrase(rng: random.Random, n: int, style: str) -> tuple[str, Label]:
    sentence = fact_sentence(rng)
    return f"Say this in other words: {sentence}", {"text": sentence}


def make_summary(rng: random.Random, n: int, style: str) -> tuple[str, Label]:
    text, gist = news(rng)
    return f"Summarise in one sentence: {text}", {"text": text, "answer": gist}


def _all() -> dict[str, ParallelTask]:
    out = [
        ParallelTask(
            f"line_{op}", "waiting_line", _PURPOSES[op], _list_task(op), score_list, example_list, (3, 4, 5, 6), 100, 32
        )
        for op in _OPERATIONS
    ]
    out += [
        ParallelTask("latin_square_n4", "puzzle", "Any 4 x 4 Latin square.", make_latin, score_latin, example_latin,
                     (4,), 100, 64),
        ParallelTask("sudoku_n4_12", "puzzle", "A 4 x 4 sudoku with 12 givens.", make_sudoku, score_sudoku,
                     lambda label: "\n".join(label["answer"]), (12,), 108, 64),
    ]
    out += [
        ParallelTask(f"words_{level}", "writing", f"A sentence with four given words ({level}).", make_words(level),
                     score_words, lambda label: None, (4,), 100, 64)
        for level in ("easy", "medium", "hard")
    ]
    out += [
        ParallelTask("paraphrase", "writing", "The same in other words.", make_paraphrase,
                     lambda label, text, strict: paraphrase_score(label["text"], text), lambda label: None, (1,),
                     100, 64),
        ParallelTask("summary", "writing", "One sentence for four.", make_summary,
                     lambda label, text, strict: summary_score(label["answer"], text), lambda label: label["answer"],
                     (1,), 100, 64),
    ]
    return {t.name: t for t in out}


_PURPOSES = {
    "copy": "The list as it is.", "sort": "The list in order.", "reverse": "The list backwards.",
    "shuffle": "Any other order.", "insert_index": "A word at a place.", "insert_random": "A word anywhere.",
    "remove_index": "One place less.", "remove_random": "Any one less.",
    "replace_index": "A word instead of a place.", "replace_random": "A word instead of any one.",
}
PARALLEL_TASKS = _all()
