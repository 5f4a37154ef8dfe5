"""List operations: copy, reverse, sort, doubling, joining two lists by turns."""

from __future__ import annotations

import random

from stretto.zoo.pages.words import ANIMALS, CITIES, COLOURS, FRUIT, NAMES, TOOLS

POOLS = (ANIMALS, CITIES, COLOURS, FRUIT, NAMES, TOOLS)


def _items(rng: random.Random, low: int, high: int) -> list[str]:
    n = rng.randint(low, high)
    if rng.random() < 0.5:
        return [str(rng.randint(0, 99)) for _ in range(n)]
    pool = rng.choice(POOLS)
    return rng.sample(pool, n)


def copy(rng: random.Random) -> tuple[str, str]:
    items = _items(rng, 4, 9)
    return f"Copy this list: {', '.join(items)}", ", ".join(items)


def reverse(rng: random.Random) -> tuple[str, str]:
    items = _items(rng, 4, 8)
    return f"Reverse this list: {', '.join(items)}", ", ".join(items[::-1])


def sort(rng: random.Random) -> tuple[str, str]:
    items = rng.sample(range(10, 100), rng.randint(4, 6))
    return (
        f"Sort from small to large: {', '.join(map(str, items))}",
        ", ".join(str(i) for i in sorted(items)),
    )


def double(rng: random.Random) -> tuple[str, str]:
    items = _items(rng, 3, 6)
    return f"Write every item twice: {', '.join(items)}", ", ".join(i for x in items for i in (x, x))


def turns(rng: random.Random) -> tuple[str, str]:
    n = rng.randint(3, 5)
    a, b = rng.sample(rng.choice(POOLS), n), [str(rng.randint(10, 99)) for _ in range(n)]
    answer = ", ".join(f"{x} {y}" for x, y in zip(a, b, strict=True))
    return f"Pair the lists: {', '.join(a)} and {', '.join(b)}", answer


TASKS = {
    "list_copy": ("Copy a list of words or numbers.", copy, None),
    "list_reverse": ("Reverse a list of words or numbers.", reverse, None),
    "list_sort": ("Sort 4 to 6 two-digit numbers.", sort, None),
    "list_double": ("Write every item of a list twice.", double, None),
    "list_pairs": ("Pair two lists item by item.", turns, None),
}
