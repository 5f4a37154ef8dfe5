"""Tables: from comma-separated rows to a Markdown table, a row by its key, rows by a value.

The question stands before the table, so that a causal model can look for the answer while it reads.
"""

from __future__ import annotations

import random

from stretto.zoo.pages.words import CITIES, COLOURS, FRUIT, TOOLS

COLUMNS = ("price", "stock", "weight", "size")


def _rows(rng: random.Random, n: int) -> tuple[list[str], list[list[str]]]:
    keys = rng.sample(rng.choice((FRUIT, TOOLS, CITIES)), n)
    number = rng.choice(COLUMNS)
    rows = [[k, rng.choice(COLOURS), str(rng.randint(1, 99))] for k in keys]
    return ["name", "color", number], rows


def _csv(rows: list[list[str]]) -> str:
    return "\n".join(",".join(r) for r in rows)


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(r)} |" for r in rows)


def markdown(rng: random.Random) -> tuple[str, str]:
    head, rows = _rows(rng, rng.randint(2, 3))
    answer = _markdown([head, ["---"] * 3, *rows]).replace(" --- ", "---")
    return f"Make a Markdown table:\n{_csv([head, *rows])}", answer


def lookup(rng: random.Random) -> tuple[str, str]:
    head, rows = _rows(rng, rng.randint(3, 5))
    row = rng.choice(rows)
    return f"What is known of {row[0]}?\n{_markdown([head, *rows])}", _markdown([row])


def where(rng: random.Random) -> tuple[str, str]:
    head, rows = _rows(rng, rng.randint(4, 5))
    a, b = rng.sample(COLOURS, 2)
    for row in rows:
        row[1] = rng.choice((a, b))
    rows[rng.randrange(len(rows))][1] = a
    head, *rows = ([color, name, number] for name, color, number in [head, *rows])
    return f"Copy the {a} rows:\n{_markdown([head, *rows])}", _markdown([r for r in rows if r[0] == a])


TASKS = {
    "table_markdown": ("Comma-separated rows to Markdown.", markdown, None),
    "table_lookup": ("Copy the row of a name.", lookup, None),
    "table_where": ("Copy the rows of a colour.", where, None),
}
