"""Problems whose worked solutions have independent parts, and some that have none: for parallel reasoning.

A case holds its solution as a neutral tree: lines, and groups of branches that do not depend on each other. Flat
text is one rendering (``Case.flat``); the texts with tags of Multiverse and ThreadWeaver are others. The page is no
part of the workbook's mix; its split is the workbook's.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stretto.zoo.pages.words import FRUIT, NAMES, TOOLS

__all__ = ["INDEPENDENT", "TASKS", "Branch", "Case", "Group", "Part", "case", "final"]


@dataclass(frozen=True, slots=True)
class Branch:
    """One independent line of work: ``title``: what it works out, as the outline says it."""

    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Branches that do not depend on each other, and the line that needs them all ("" = none)."""

    branches: tuple[Branch, ...]
    conclusion: str


Part = str | Group


@dataclass(frozen=True, slots=True)
class Case:
    task: str
    prompt: str
    answer: str
    parts: tuple[Part, ...]

    @property
    def flat(self) -> str:
        """The sequential solution: a line for each branch, lines of nested groups marked with "- "."""
        return "\n".join(line for part in self.parts for line in _lines(part, ""))


def _lines(part: Part, mark: str) -> list[str]:
    if isinstance(part, str):
        return [mark + part]
    out = []
    for branch in part.branches:
        if all(isinstance(p, str) for p in branch.parts):
            out.append(f"{mark}{branch.title}: {' '.join(map(str, branch.parts))}")
        else:
            out.append(f"{mark}{branch.title}:")
            out += [line for p in branch.parts for line in _lines(p, "- ")]
    return [*out, mark + part.conclusion] if part.conclusion else out


def final(text: str) -> str | None:
    """The number behind the last "Answer:"; None without one."""
    found = re.findall(r"Answer: (-?\d+)", text)
    return found[-1] if found else None


def _chain(numbers: list[int]) -> tuple[str, int]:
    """Adding up, one number after the other."""
    total, steps = numbers[0], []
    for n in numbers[1:]:
        steps.append(f"{total} + {n} = {total + n}.")
        total += n
    return " ".join(steps), total


def _said(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _collect(word: str, values: list[int]) -> tuple[str, int]:
    """The line that needs all branches, and its result."""
    if word == "Total":
        steps, total = _chain(values)
        return f"Total: {steps}", total
    value = max(values) if word == "Largest" else min(values)
    return f"{word}: {value}.", value


def rows(rng: random.Random, parts: int | None = None, width: int | None = None) -> Case:
    """Sums of the rows of a small table; the largest or smallest of them."""
    letters = "abcdef"[: parts or rng.choice([4, 4, 5])]
    width, word = width or rng.choice([4, 5, 6]), rng.choice(["Largest", "Smallest"])
    table = {c: rng.sample(range(2, 20), width) for c in letters}
    sums = {c: _chain(v) for c, v in table.items()}
    end, answer = _collect(word, [s for _, s in sums.values()])
    prompt = "\n".join([*(f"{c}: {_said(v)}" for c, v in table.items()), f"{word} sum of a row?"])
    group = Group(tuple(Branch(c, (steps,)) for c, (steps, _) in sums.items()), end)
    return Case("rows", prompt, str(answer), (group, f"Answer: {answer}"))


def orders(rng: random.Random) -> Case:
    """Several small word problems and their total."""
    names = rng.sample(NAMES, rng.choice([3, 4, 4]))
    said, branches, values = [], [], []
    for name in names:
        first, second = rng.sample(FRUIT + TOOLS, 2)
        n, p, m, q = (rng.randint(2, 6) for _ in range(4))
        bus = rng.randint(2, 19)
        said.append(f"{name} buys {n} {first}s for {p} coins each, {m} {second}s for {q} and pays {bus} for the bus.")
        goods, total = n * p + m * q, n * p + m * q + bus
        steps = f"{n} * {p} = {n * p}. {m} * {q} = {m * q}. {n * p} + {m * q} = {goods}. {goods} + {bus} = {total}."
        branches.append(Branch(name, (steps,)))
        values.append(total)
    word = rng.choice(["Total", "Largest", "Smallest"])
    end, answer = _collect(word, values)
    ask = {"Total": "How many coins in total?", "Largest": "Largest bill?", "Smallest": "Smallest bill?"}[word]
    prompt = "\n".join([*said, ask])
    return Case("orders", prompt, str(answer), (Group(tuple(branches), end), f"Answer: {answer}"))


def tree(rng: random.Random, parts: int | None = None, width: int | None = None, words: str = "all") -> Case:
    """Sum, maximum or product of small numbers by trees of two-operand steps, two to four of them independent."""
    parts = parts or rng.choice([3, 4, 4])
    word = rng.choice(["Sum", "Sum", "Sum", "Max", "Max", "Product"] if words == "all" else words.split())
    width = width or (3 if word == "Product" else rng.choice([5, 6]))
    names = ("left", "right") if parts == 2 else "abcd"[:parts]
    if word == "Product":  # so that the last steps stay within the table of small products
        parts, names = 2, ("left", "right")
    lists = [_numbers(rng, word, width) for _ in names]
    branches, values = [], []
    for name, numbers in zip(names, lists, strict=True):
        steps, value = _tree(word, numbers)
        branches.append(Branch(name, (" ".join(steps),)))
        values.append(value)
    steps, answer = _tree(word, values)
    prompt = "\n".join([*(f"{n}: {_said(v)}" for n, v in zip(names, lists, strict=True)), f"{word} of all?"])
    group = Group(tuple(branches), f"{word}: {' '.join(steps)}")
    return Case("tree", prompt, str(answer), (group, f"Answer: {answer}"))


def _numbers(rng: random.Random, word: str, width: int) -> list[int]:
    if word != "Product":
        return rng.sample(range(2, 20), width)
    while True:
        out = [rng.randint(1, 4) for _ in range(width)]
        if _tree(word, out)[1] <= 9:
            return out


_OPS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "Sum": ("{} + {}", int.__add__), "Product": ("{} * {}", int.__mul__), "Max": ("max {}, {}", max),
}


def _tree(word: str, numbers: list[int]) -> tuple[list[str], int]:
    """Steps of two operands, level by level."""
    form, op = _OPS[word]
    steps = []
    while len(numbers) > 1:
        pairs = list(zip(numbers[::2], numbers[1::2], strict=False))
        steps += [f"{form.format(a, b)} = {op(a, b)}." for a, b in pairs]
        numbers = [op(a, b) for a, b in pairs] + ([numbers[-1]] if len(numbers) % 2 else [])
    return steps, numbers[0]


def nested(rng: random.Random) -> Case:
    """Two regions, each with rows of its own: two levels of independent parts."""
    letters, branches, said, totals = iter("abcdef"), [], [], []
    for region in ("north", "south"):
        said.append(f"{region}:")
        inner, sums = [], []
        for letter in [next(letters) for _ in range(3)]:
            numbers = rng.sample(range(2, 20), 4)
            steps, total = _chain(numbers)
            said.append(f"{letter}: {_said(numbers)}")
            inner.append(Branch(letter, (steps,)))
            sums.append(total)
        end, total = _collect("Total", sums)
        branches.append(Branch(region, (Group(tuple(inner), end),)))
        totals.append(total)
    word = rng.choice(["Largest", "Total"])
    end, answer = _collect(word, totals)
    prompt = "\n".join([*said, f"{word} of the regions?"])
    return Case("nested", prompt, str(answer), (Group(tuple(branches), end), f"Answer: {answer}"))


def serial(rng: random.Random) -> Case:
    """A chain in which every step needs the one before: nothing to do in parallel."""
    total = rng.randint(5, 30)
    said, steps = [f"Start with {total}."], []
    for _ in range(rng.randint(3, 6)):
        n = rng.randint(2, 19)
        if rng.random() < 0.5 and total - n > 0:
            said.append(f"Take {n}.")
            steps.append(f"{total} - {n} = {total - n}.")
            total -= n
        else:
            said.append(f"Add {n}.")
            steps.append(f"{total} + {n} = {total + n}.")
            total += n
    return Case("serial", " ".join([*said, "Result?"]), str(total), (" ".join(steps), f"Answer: {total}"))


TASKS: dict[str, Callable[[random.Random], Case]] = {
    "rows": rows, "orders": orders, "tree": tree, "nested": nested, "serial": serial,
}
INDEPENDENT = ("rows", "orders", "tree", "nested")


def case(rng: random.Random, weights: Mapping[str, float] | None = None) -> Case:
    """One case of a task drawn with ``weights`` (all alike)."""
    names = list(TASKS)
    return TASKS[rng.choices(names, [(weights or {}).get(n, 1.0) for n in names])[0]](rng)
