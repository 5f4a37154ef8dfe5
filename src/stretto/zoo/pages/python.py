"""Small Python functions from a sentence."""

from __future__ import annotations

import ast
import random

from stretto.zoo.pages.words import FRUIT, VERBS

NOUNS = FRUIT + "price size name value score level weight total amount item".split()
ORDER = {"above": ">", "below": "<", "equal to": "=="}
OPS = {"plus": "+", "minus": "-", "times": "*"}


def _names(rng: random.Random) -> tuple[str, str, str]:
    a, b = rng.sample(NOUNS, 2)
    return f"{rng.choice(VERBS)}_{a}", a, b


def select(rng: random.Random) -> tuple[str, str]:
    name, a, b = _names(rng)
    word, k = rng.choice(list(ORDER)), rng.randint(0, 99)
    prompt = f"Write {name}({a}s) that returns the {b}s of all {a}s whose {b} is {word} {k}."
    body = (
        f"def {name}({a}s):\n    result = []\n    for {a} in {a}s:\n        if {a}.{b} {ORDER[word]} {k}:\n"
        f"            result.append({a}.{b})\n    return result"
    )
    return prompt, body


def formula(rng: random.Random) -> tuple[str, str]:
    name, a, b = _names(rng)
    (w1, o1), (w2, o2) = rng.choice(list(OPS.items())), rng.choice(list(OPS.items()))
    k = rng.randint(1, 99)
    prompt = f"Write {name}({a}, {b}) that returns {a} {w1} {b}, {w2} {k}."
    body = f"def {name}({a}, {b}):\n    {b} = {a} {o1} {b}\n    return {b} {o2} {k}"
    return prompt, body


def total(rng: random.Random) -> tuple[str, str]:
    name, a, b = _names(rng)
    word, op = rng.choice(list(OPS.items()))
    k, start = rng.randint(1, 99), rng.randint(0, 9)
    prompt = f"Write {name}({a}s) that starts at {start} and adds {b} {word} {k} for each of the {a}s."
    body = (
        f"def {name}({a}s):\n    total = {start}\n    for {a} in {a}s:\n"
        f"        total += {a}.{b} {op} {k}\n    return total"
    )
    return prompt, body


def guard(rng: random.Random) -> tuple[str, str]:
    name, a, b = _names(rng)
    word, k = rng.choice(list(ORDER)), rng.randint(0, 99)
    prompt = f"Write {name}({a}, {b}) that returns {b} if {a} is {word} {k}, else {a}."
    body = f"def {name}({a}, {b}):\n    if {a} {ORDER[word]} {k}:\n        return {b}\n    return {a}"
    return prompt, body


def score(prompt: str, answer: str, reference: str) -> bool:
    try:
        return ast.dump(ast.parse(answer.strip())) == ast.dump(ast.parse(reference))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: endless "not not not"
        return False


TASKS = {
    "python_select": ("A loop that filters.", select, score),
    "python_formula": ("Two operations on two arguments.", formula, score),
    "python_total": ("A loop that sums.", total, score),
    "python_guard": ("A condition.", guard, score),
}
