"""Word problems with small numbers and a worked solution, one line a step."""

from __future__ import annotations

import random
import re

from stretto.zoo.pages.words import FRUIT, NAMES, TOOLS


def gains(rng: random.Random) -> tuple[str, str]:
    name, friend = rng.sample(NAMES, 2)
    thing = rng.choice(FRUIT + TOOLS)
    a, b = rng.randint(5, 50), rng.randint(2, 40)
    c = rng.randint(2, a + b - 1) if a + b > 3 else 2
    c = min(c, 60)
    prompt = (
        f"{name} has {a} {thing}s. {friend} brings {b} more. Then {name} gives away {c}. "
        f"How many {thing}s are left?"
    )
    steps = f"{a} + {b} = {a + b}.\n{a + b} - {c} = {a + b - c}.\nAnswer: {a + b - c}"
    return prompt, f"{name} starts with {a} {thing}s.\n{steps}"


def price(rng: random.Random) -> tuple[str, str]:
    name, thing = rng.choice(NAMES), rng.choice(FRUIT + TOOLS)
    n, p = rng.randint(2, 9), rng.randint(2, 9)
    extra = rng.randint(1, 18)
    prompt = (
        f"{name} buys {n} {thing}s for {p} coins each and pays {extra} coins for the bus. "
        "How many coins is that?"
    )
    steps = f"{n} * {p} = {n * p}.\n{n * p} + {extra} = {n * p + extra}.\nAnswer: {n * p + extra}"
    return prompt, f"The {thing}s cost {p} coins each.\n{steps}"


def boxes(rng: random.Random) -> tuple[str, str]:
    thing, other = rng.sample(FRUIT + TOOLS, 2)
    a, b, c = (rng.randint(3, 30) for _ in range(3))
    prompt = f"One box holds {a} {thing}s, {b} {other}s and {c} nails. How many things are in the box?"
    steps = f"{a} + {b} = {a + b}.\n{a + b} + {c} = {a + b + c}.\nAnswer: {a + b + c}"
    return prompt, f"We add the {thing}s, the {other}s and the nails.\n{steps}"


def score(prompt: str, answer: str, reference: str) -> bool:
    """Right if the final line is right and every step written down is true."""
    final = re.search(r"Answer: (-?\d+)\s*$", answer)
    wanted = re.search(r"Answer: (-?\d+)\s*$", reference)
    if not final or not wanted or final.group(1) != wanted.group(1):
        return False
    steps = re.findall(r"(\d+) ([+*-]) (\d+) = (-?\d+)", answer)
    ops = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    return bool(steps) and all(ops[o](int(x), int(y)) == int(z) for x, o, y, z in steps)


TASKS = {
    "math_gains": ("Add, then take away.", gains, score),
    "math_price": ("Multiply one-digit numbers, then add.", price, score),
    "math_boxes": ("Add three numbers.", boxes, score),
}
