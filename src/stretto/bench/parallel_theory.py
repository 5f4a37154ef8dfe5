"""What parallel decoding can do at best on list operations: exact laws, bounds and success rates.

All valid answers of an operation on n different items are equally likely. A decoder that draws every
position of a step from its exact marginal, given what is decided, succeeds with the probability
computed here; no confidence rule enters. Symbols: 0..n-1 the items in the order given, n the word w.

Source: ParallelBench (2025). Logarithms are natural.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from stretto.errors import OptionError, UnknownNameError

__all__ = ["OPERATIONS", "correlation", "greedy_one_step", "marginals", "outputs", "schedule", "success"]

Answer = tuple[int, ...]
Law = tuple[Answer, ...]  # equally likely answers


def _replace(n: int, at: Sequence[int]) -> Law:
    return tuple(tuple(n if i == j else i for i in range(n)) for j in at)


def _insert(n: int, at: Sequence[int]) -> Law:
    return tuple((*range(j), n, *range(j, n)) for j in at)


def _remove(n: int, at: Sequence[int]) -> Law:
    return tuple(tuple(i for i in range(n) if i != j) for j in at)


OPERATIONS: dict[str, Callable[[int], Law]] = {
    "copy": lambda n: (tuple(range(n)),),
    "reverse": lambda n: (tuple(range(n))[::-1],),
    "sort": lambda n: (tuple(sorted(range(n), key=lambda i: (i * 7 + 3) % 11)),),
    "insert_index": lambda n: _insert(n, [n // 2]),
    "insert_random": lambda n: _insert(n, range(n + 1)),
    "remove_index": lambda n: _remove(n, [n // 2]),
    "remove_random": lambda n: _remove(n, range(n)),
    "replace_index": lambda n: _replace(n, [n // 2]),
    "replace_random": lambda n: _replace(n, range(n)),
    "shuffle": lambda n: tuple(itertools.permutations(range(n))),
    "shuffle_other": lambda n: tuple(itertools.permutations(range(n)))[1:],  # not the order given
}


def outputs(operation: str, n: int) -> Law:
    """All valid answers. Raises UnknownNameError, OptionError for n < 2."""
    if operation not in OPERATIONS:
        raise UnknownNameError("list operation", operation, OPERATIONS)
    if n < 2:
        raise OptionError("n", n, "a whole number from 2")
    return OPERATIONS[operation](n)


def marginals(law: Law) -> list[dict[int, float]]:
    """Per position, the probability of each symbol."""
    return [{v: c / len(law) for v, c in Counter(column).items()} for column in zip(*law, strict=True)]


def schedule(length: int, steps: int | None) -> list[int]:
    """Tokens that each of ``steps`` steps takes of ``length``: as even as possible, the larger first."""
    steps = min(steps or length, length)
    return [length // steps + (t < length % steps) for t in range(steps)]


def success(operation: str, n: int, steps: int | None = 1) -> float:
    """Probability of a valid answer in ``steps`` steps of random positions, every position drawn from its marginal;
    None: one token a step."""
    law = outputs(operation, n)
    ks = schedule(len(law[0]), steps)
    if operation == "shuffle":
        return _shuffle(n, ks)
    if len(ks) == 1:  # the product law's mass on valid answers
        p = marginals(law)
        return math.fsum(math.prod(p[i][v] for i, v in enumerate(answer)) for answer in law)
    return _walk(law, (), tuple(ks))


def _shuffle(n: int, ks: Sequence[int]) -> float:
    """Product over steps of m! / ((m - k)! m^k), m items left."""
    out, left = 1.0, n
    for k in ks:
        out *= math.perm(left, k) / left**k
        left -= k
    return out


@cache
def _walk(law: Law, done: tuple[int, ...], ks: tuple[int, ...]) -> float:
    """Success from a state in which ``done`` positions are decided and ``law`` is what agrees with them."""
    if not ks:
        return 1.0
    p = marginals(law)
    left = [i for i in range(len(p)) if i not in done]
    chosen = list(itertools.combinations(left, ks[0]))
    total = 0.0
    for positions in chosen:
        groups: dict[Answer, list[Answer]] = {}
        for answer in law:
            groups.setdefault(tuple(answer[i] for i in positions), []).append(answer)
        for values, rest in groups.items():
            mass = math.prod(p[i][v] for i, v in zip(positions, values, strict=True))
            total += mass * _walk(tuple(rest), tuple(sorted((*done, *positions))), ks[1:])
    return total / len(chosen)


def correlation(operation: str, n: int, steps: int | None = 1) -> float:
    """The bound on the Kullback-Leibler error in nats: sum over steps of the expected conditional total correlation
    sum H(y_i | state) - H(y | state) of what the step takes; random positions."""
    law = outputs(operation, n)
    return _bound(law, (), tuple(schedule(len(law[0]), steps)))


@cache
def _bound(law: Law, done: tuple[int, ...], ks: tuple[int, ...]) -> float:
    if not ks:
        return 0.0
    p = [_entropy(Counter(column).values()) for column in zip(*law, strict=True)]
    left = [i for i in range(len(p)) if i not in done]
    chosen = list(itertools.combinations(left, ks[0]))
    total = 0.0
    for positions in chosen:
        groups: dict[Answer, list[Answer]] = {}
        for answer in law:
            groups.setdefault(tuple(answer[i] for i in positions), []).append(answer)
        total += sum(p[i] for i in positions) - _entropy([len(g) for g in groups.values()])
        after = tuple(sorted((*done, *positions)))
        total += sum(len(g) / len(law) * _bound(tuple(g), after, ks[1:]) for g in groups.values())
    return total / len(chosen)


def _entropy(counts: Iterable[int]) -> float:
    values = list(counts)
    whole = sum(values)
    return -math.fsum(c / whole * math.log(c / whole) for c in values)


def greedy_one_step(operation: str, n: int) -> bool:
    """Whether the arg-maxima of all marginals together are a valid answer (temperature 0, one step); ties go to the
    lowest symbol."""
    law = outputs(operation, n)
    best = tuple(min(p, key=lambda v, p=p: (-p[v], v)) for p in marginals(law))
    return best in set(law)
