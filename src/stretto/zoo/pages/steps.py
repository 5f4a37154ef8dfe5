"""Word problems of 8 to 10 lettered events, solved in one line an event: long chains in which every line can go wrong.

A line may be followed by its correction ("No, 29 - 8 = 21."), after which the next event goes on from the corrected
number. This page is no task of the workbook; problems are told apart into training and test by the same hash.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from stretto.zoo.pages.words import FRUIT, NAMES, TOOLS

__all__ = ["Problem", "answer_of", "problem", "score", "slip"]

LEAST, MOST, LARGEST = 8, 10, 99  # events of a problem; the largest number that occurs


@dataclass(frozen=True, slots=True)
class Problem:
    """``lines``: the worked steps, one an event; ``answer``: the number that is left."""

    prompt: str
    lines: tuple[str, ...]
    answer: int

    @property
    def text(self) -> str:
        """The worked solution."""
        return "\n".join([*self.lines, f"Answer: {self.answer}"])


def problem(rng: random.Random, *, least: int = LEAST, most: int = MOST) -> Problem:
    """One problem of ``least`` to ``most`` events."""
    name, thing = rng.choice(NAMES), rng.choice(FRUIT + TOOLS)
    now = rng.randint(5, 60)
    told, lines = [f"{name} has {now} {thing}s."], []
    for letter in "ABCDEFGHIJKLMNOP"[: rng.randint(least, most)]:
        event, work, now = _event(rng, now)
        told.append(f"{letter}: {event}.")
        lines.append(f"{letter}: {event}, {work}.")
    told.append(f"How many {thing}s are left?")
    return Problem("\n".join(told), tuple(lines), now)


def _event(rng: random.Random, now: int) -> tuple[str, str, int]:
    """(what happens, the step, the new number)"""
    while True:
        kind = rng.choice(("more", "away", "boxes"))
        n, p, q = rng.randint(2, 60), rng.randint(2, 9), rng.randint(2, 9)
        if kind == "more" and now + n <= LARGEST:
            return f"{n} more", f"{now} + {n} = {now + n}", now + n
        if kind == "away" and now - n >= 2:
            return f"{n} away", f"{now} - {n} = {now - n}", now - n
        if kind == "boxes" and now + p * q <= LARGEST:
            return f"{p} * {q} more", f"{p * q}, {now} + {p * q} = {now + p * q}", now + p * q


def slip(rng: random.Random, p: Problem, at: int) -> tuple[str, str]:
    """(line ``at`` with a slip in one of the numbers behind the event, its correction)"""
    line = p.lines[at]
    start = re.search(r"(more|away), ", line).end()  # type: ignore[union-attr]
    places = list(re.finditer(r"\d+", line[start:]))
    chosen = places[-1] if rng.random() < 0.6 else rng.choice(places)
    number = wrong = int(chosen.group())
    while wrong == number:
        near = [number + d for d in (-10, -2, -1, 1, 2, 10)]
        others = [int(n) for n in re.findall(r"\d+", p.prompt)]
        wrong = max(1, rng.choice(near if rng.random() < 0.7 else others))
    return line[: start + chosen.start()] + str(wrong) + line[start + chosen.end() :], "No, " + line[start:]


def answer_of(text: str) -> str | None:
    """The number that a solution ends with; None while it has none."""
    found = re.findall(r"Answer: (-?\d+)", text)
    return found[-1] if found else None


def score(prompt: str, answer: str, reference: str) -> bool:
    """Right if the final number is."""
    return answer_of(answer) is not None and answer_of(answer) == answer_of(reference)
