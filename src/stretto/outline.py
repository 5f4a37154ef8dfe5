"""One grammar of parallel blocks in a linear text, for Multiverse and ThreadWeaver, for training and serving.

    block := open goal_open (outline_open n ":" title outline_close)+ goal_close
             (path_open n ":" text path_close)+ [conclusion_open text conclusion_close] close

with one path for each outline, in the same order, and n = 1, 2, ... or 1.1, 1.2, ... inside path 1. A text may hold
blocks; so may a path and a conclusion. What the tags are called is data (``Tags``). ``Grammar`` reads token ids: the
tree, its positions and who sees whom (one function for training and serving), what the engine forces, and the account
of total length and critical path. Source: Multiverse (arXiv 2506.09991), ThreadWeaver (arXiv 2512.07843).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stretto.errors import InputError
from stretto.tags import Tags

__all__ = ["Block", "Grammar", "Layout", "Lengths", "Path", "Segment", "StructureError"]

NUMBER = re.compile(r"\s*(\d+(?:\.\d+)*)\s*:")


class StructureError(InputError):
    """Tags that do not fit together; ``index``: of the token at which that shows."""

    def __init__(self, index: int, reason: str):
        self.index, self.reason = index, reason
        super().__init__(f"token {index}: {reason}")


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens [start, stop) and the blocks that stand directly in it."""

    start: int
    stop: int
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True, slots=True)
class Path(Segment):
    """From its ``path_open`` to behind its ``path_close``; ``body``: where the tokens behind the header begin."""

    number: str = ""
    body: int = 0


@dataclass(frozen=True, slots=True)
class Block:
    """From ``open`` to behind ``close``. ``goal``: index of ``goal_close``; ``conclusion`` with its tags."""

    start: int
    stop: int
    goal: int
    numbers: tuple[str, ...]
    titles: tuple[str, ...]
    paths: tuple[Path, ...]
    conclusion: Segment | None = None

    def inside(self) -> Iterator[Block]:
        """This block and all blocks in its paths and its conclusion."""
        yield self
        for part in (*self.paths, *([self.conclusion] if self.conclusion else [])):
            for block in part.blocks:
                yield from block.inside()


@dataclass(frozen=True, slots=True)
class Layout:
    """``positions`` int64 [n]. ``gaps`` int64 [n, depth, 2]: token j is hidden from the tokens of each gap [a, b): the
    siblings behind its path; everything else at or behind j sees it. ``forced`` bool [n]: written by the engine."""

    positions: np.ndarray
    gaps: np.ndarray
    forced: np.ndarray

    def mask(self) -> np.ndarray:
        """bool [n, n]: token i sees token j."""
        n = len(self.positions)
        i = np.arange(n)[:, None, None]
        hidden = ((i >= self.gaps[None, :, :, 0]) & (i < self.gaps[None, :, :, 1])).any(-1)
        return np.tri(n, dtype=bool) & ~hidden


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a text, and of its longest dependent chain."""

    total: int
    longest: int

    @property
    def parallelism(self) -> float:
        """Degree of parallelism."""
        return self.total / self.longest if self.longest else 1.0


@dataclass(slots=True)
class _Frame:
    """A block that ``Grammar.lengths`` is in."""

    outside: int = 0
    best: int = 0
    path: int | None = None


@dataclass(eq=False)
class Grammar:
    """``Tags`` as token ids of a tokenizer (of the library ``tokenizers``). Raises InputError for a tag that is not one
    token."""

    tags: Tags
    tokenizer: Any
    ids: dict[str, int] = field(init=False)  # role -> id
    roles: dict[int, str] = field(init=False)

    def __post_init__(self) -> None:
        self.ids = {}
        for role, tag in self.tags.names.items():
            ids = self.encode(tag)
            if len(ids) != 1:
                raise InputError(
                    f"the tag {tag!r} ({role}) is {len(ids)} tokens of this tokenizer: add it as a special token, and "
                    "train the model with it"
                )
            self.ids[role] = ids[0]
        self.roles = {i: role for role, i in self.ids.items()}
        if len(self.roles) < len(self.ids):
            raise InputError(f"two tags have the same name: {sorted(self.tags.names.values())}")

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([int(t) for t in ids], skip_special_tokens=False)

    # --- writing

    def header(self, number: str) -> list[int]:
        """What opens path ``number``."""
        return [self.ids["path_open"], *self.encode(self.tags.header.format(number=number))]

    def goal(self, outlines: Sequence[tuple[str, str]]) -> list[int]:
        """``open`` up to ``goal_close`` for (number, title) pairs."""
        lines = [
            [self.ids["outline_open"], *self.encode(f"{number}: {title}"), self.ids["outline_close"]]
            for number, title in outlines
        ]
        return [self.ids["open"], self.ids["goal_open"], *(t for x in lines for t in x), self.ids["goal_close"]]

    # --- reading

    def parse(self, ids: Sequence[int], *, start: int = 0) -> Segment:
        """The tree of a whole text from ``start`` on. Raises StructureError."""
        return _Reader(self, [int(t) for t in ids]).text(start)

    def outlines(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The numbers of the goal that ``ids`` ends with (its ``goal_close`` is the last token). Raises StructureError
        for a goal without numbers, with a number twice, or outside a block."""
        ids = [int(t) for t in ids]
        first = max((i for i, t in enumerate(ids) if t == self.ids["goal_open"]), default=-1)
        if first < 0 or not self._opened(ids, first):
            raise StructureError(len(ids) - 1, f"{self.tags.goal_close} outside a block")
        return _Reader(self, ids).goal(first)[1]

    def _opened(self, ids: Sequence[int], goal: int) -> bool:
        before = [t for t in ids[:goal] if t in self.roles] if self.tags.loose else ids[:goal]
        return bool(before) and before[-1] == self.ids["open"]

    # --- training and serving

    def layout(self, ids: Sequence[int], *, start: int = 0) -> Layout:
        """Positions, visibility and forced tokens of a text whose tokens before ``start`` are plain (a prompt).

        Every path goes on behind ``goal_close``, the conclusion behind the furthest path. Raises StructureError.
        """
        tree = self.parse(ids, start=start)
        n, blocks = len(ids), [b for block in tree.blocks for b in block.inside()]
        steps, forced = np.ones(n, np.int64), np.zeros(n, bool)
        gaps: list[list[tuple[int, int]]] = [[] for _ in range(n)]
        for block in blocks:
            for path in block.paths:
                forced[path.start : path.body] = True
                for j in range(path.start, path.stop):
                    gaps[j].append((path.stop, block.paths[-1].stop))
            if block.conclusion:
                forced[block.conclusion.start] = True
        _restart(tree.blocks, steps)
        depth = max(1, max(map(len, gaps), default=1))
        table = np.zeros((n, depth, 2), np.int64)
        for j, found in enumerate(gaps):
            table[j, : len(found)] = np.array(found, np.int64).reshape(-1, 2)
        return Layout(np.cumsum(steps) - 1, table, forced)

    def lengths(self, ids: Sequence[int], *, tags_serial: bool = False) -> Lengths:
        """Total and longest chain of any text, malformed ones too: a block that is open at the end is closed there.

        ``tags_serial``: the tags of every path count, not those of the longest alone (the reward of P-GRPO).
        """
        stack, out = [_Frame()], 0
        for token in ids:
            role, top = self.roles.get(int(token)), stack[-1]
            inside = len(stack) > 1
            if role == "open" and (self.tags.nested or top.path is None):
                stack.append(_Frame(1))
            elif inside and role == "path_open" and (top.path is None or self.tags.nested):
                if top.path is not None:  # the path before was cut
                    top.best = max(top.best, top.path)
                top.path = 0 if tags_serial else 1
                top.outside += tags_serial
            elif inside and role == "path_close" and top.path is not None:
                _leave(top, tags_serial)
            elif inside and role == "close" and top.path is None:
                top.outside += 1
                _pop(stack)
            elif top.path is None:
                top.outside += 1
            else:
                top.path += 1
        while len(stack) > 1:
            if stack[-1].path is not None:
                stack[-1].best = max(stack[-1].best, stack[-1].path)
            _pop(stack)
        out = stack[0].outside
        return Lengths(len(ids), out)


def _leave(frame: _Frame, tags_serial: bool) -> None:
    assert frame.path is not None
    frame.best = max(frame.best, frame.path + (not tags_serial))
    frame.outside += tags_serial
    frame.path = None


def _pop(stack: list[_Frame]) -> None:
    done = stack.pop()
    if stack[-1].path is not None:
        stack[-1].path += done.outside + done.best
    else:
        stack[-1].outside += done.outside + done.best


def _restart(blocks: Sequence[Block], steps: np.ndarray) -> None:
    """Set how far each token stands behind the one before it in the text (1 everywhere else)."""
    for block in blocks:
        for part in (*block.paths, *([block.conclusion] if block.conclusion else [])):
            _restart(part.blocks, steps)
        ends = [int(steps[p.start : p.stop].sum()) for p in block.paths]
        for path, before in zip(block.paths[1:], ends, strict=False):
            steps[path.start] = 1 - before
        behind = block.paths[-1].stop
        steps[behind] = 1 + max(ends) - ends[-1]


class _Reader:
    """Recursive descent over token ids."""

    def __init__(self, grammar: Grammar, ids: list[int]):
        self.g, self.ids, self.tags = grammar, ids, grammar.tags

    def role(self, i: int) -> str | None:
        return self.g.roles.get(self.ids[i]) if i < len(self.ids) else "end"

    def text(self, at: int) -> Segment:
        start = at
        at, blocks = self.run(at, "", {"end"})
        return Segment(start, at, blocks)

    def run(self, at: int, number: str, ends: set[str]) -> tuple[int, tuple[Block, ...]]:
        """Plain tokens and blocks from ``at`` up to a tag of ``ends``."""
        blocks: list[Block] = []
        plain = bool(number) and not self.tags.nested
        while True:
            role = self.role(at)
            if role in ends:
                return at, tuple(blocks)
            if role == "open" and not plain:
                block = self.block(at, number)
                blocks.append(block)
                at = block.stop
            elif role == "end":
                raise StructureError(at, f"the text ends before {' or '.join(self.name(e) for e in sorted(ends))}")
            elif role is not None and not plain:
                raise StructureError(at, f"{self.name(role)} outside {_OUTSIDE[role]}")
            else:
                at += 1

    def name(self, role: str) -> str:
        return self.tags.names.get(role, role)

    def expect(self, at: int, *roles: str) -> int:
        """The index of the tag that must come now, behind plain tokens where these may stand."""
        while self.tags.loose and self.role(at) is None:
            at += 1
        if self.role(at) not in roles:
            found = "the end" if at >= len(self.ids) else repr(self.g.decode([self.ids[at]]))
            raise StructureError(at, f"{' or '.join(self.name(r) for r in roles)} must come here, not {found}")
        return at

    def block(self, at: int, number: str) -> Block:
        start = at
        goal, numbers, titles = self.goal(self.expect(at + 1, "goal_open"))
        for n in numbers:
            if number and not n.startswith(number + "."):
                raise StructureError(goal, f"outline {n} inside path {number}: it must begin with {number}.")
        paths, at = [], goal + 1
        for n in numbers:
            path = self.path(self.expect(at, "path_open"), n)
            paths.append(path)
            at = path.stop
        conclusion = None
        if self.tags.conclusion_open is not None:
            first = self.expect(at, "conclusion_open")
            last, inner = self.run(first + 1, "", {"conclusion_close"})
            conclusion, at = Segment(first, last + 1, inner), last + 1
        at = self.expect(at, "close")
        return Block(start, at + 1, goal, numbers, titles, tuple(paths), conclusion)

    def goal(self, at: int) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
        """(index of goal_close, numbers, titles) of the goal at ``at``."""
        numbers, titles = [], []
        at = self.expect(at + 1, "outline_open", "goal_close")
        while self.role(at) == "outline_open":
            last, _ = self.run(at + 1, "", {"outline_close"})
            text = self.g.decode(self.ids[at + 1 : last])
            found = NUMBER.match(text)
            if not found:
                raise StructureError(at, f"the outline {text!r} has no number: it must begin with 'n:'")
            if found[1] in numbers:
                raise StructureError(at, f"two outlines have the number {found[1]}")
            numbers.append(found[1])
            titles.append(text[found.end() :].strip())
            at = self.expect(last + 1, "outline_open", "goal_close")
        if not numbers:
            raise StructureError(at, f"{self.name('goal_open')} without an outline")
        return at, tuple(numbers), tuple(titles)

    def path(self, at: int, number: str) -> Path:
        header = self.g.header(number)
        if self.ids[at : at + len(header)] != header:
            raise StructureError(at, f"path {number} must begin with {self.g.decode(header)!r}")
        body = at + len(header)
        last, blocks = self.run(body, number, {"path_close"})
        return Path(at, last + 1, blocks, number, body)


_OUTSIDE = {
    "close": "a block", "goal_open": "the start of a block", "goal_close": "a goal", "outline_open": "a goal",
    "outline_close": "an outline", "path_open": "a block", "path_close": "a path", "conclusion_open": "a block",
    "conclusion_close": "a conclusion",
}
