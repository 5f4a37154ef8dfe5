"""Problems of several independent items for workers who write side by side, and what they write.

A step is one item with its result. Whoever finds all results written gives the answer: the item with the largest.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["LETTERS", "NAMES", "Problem", "problem"]

NAMES = ("Ada", "Ben", "Cleo", "Dan")
LETTERS = ("a", "b", "c", "d", "f", "g", "h", "k")  # one token each behind a blank


@dataclass(frozen=True, slots=True)
class Problem:
    """``items``: (letter, expression, result) in order."""

    items: tuple[tuple[str, str, int], ...]

    @property
    def text(self) -> str:
        """The items; it decides the split."""
        return ", ".join(f"{letter}: {expression}" for letter, expression, _ in self.items)

    def prompt(self, workers: int) -> str:
        return f"Team: {', '.join(NAMES[:workers])}. Items: {self.text}. Which is the largest?"

    @property
    def answer(self) -> str:
        """The letter of the largest result."""
        return max(self.items, key=lambda item: item[2])[0]

    def step(self, letter: str) -> str:
        return next(f" {l}: {e} = {r}." for l, e, r in self.items if l == letter)


def problem(rng: random.Random, items: int) -> Problem:
    """``items`` different results, the largest ahead by its tens."""
    while True:
        found = tuple((letter, *_item(rng)) for letter in LETTERS[:items])
        tens = sorted(result // 10 for _, _, result in found)
        if len({r for _, _, r in found}) == items and tens[-1] > tens[-2]:
            return Problem(found)


def _item(rng: random.Random) -> tuple[str, int]:
    kind = rng.choice("+-*")
    if kind == "*":
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        return f"{a} * {b}", a * b
    a, b = rng.randint(3, 60), rng.randint(2, 38)
    if kind == "+":
        return f"{a} + {b}", a + b
    a, b = max(a, b) + 2, min(a, b)
    return f"{a} - {b}", a - b
