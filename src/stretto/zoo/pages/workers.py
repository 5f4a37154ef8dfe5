"""Problems of several independent items for workers who write side by side, and what they write.

A step is one item with its result. Whoever finds all results written says so, which ends the work. An item's letter
stands directly before its numbers, so that finding what follows a letter is one look back.
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
        return ", ".join(f"{letter}{expression}" for letter, expression, _ in self.items)

    @property
    def task(self) -> str:
        return f"Items: {self.text}. Find all."

    def prompt(self, workers: int) -> str:
        """The task, and who works on it."""
        return f"Team: {', '.join(NAMES[:workers])}. {self.task}"

    def step(self, letter: str) -> str:
        return next(f" {l}{e} = {r}." for l, e, r in self.items if l == letter)


def problem(rng: random.Random, items: int) -> Problem:
    """``items`` different expressions, one a letter."""
    while True:
        found = tuple((letter, *_item(rng)) for letter in LETTERS[:items])
        if len({expression for _, expression, _ in found}) == items:
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
