"""The Curator: from a sequential solution to one with parallel blocks (Multiverse's recipe, by rules).

    extract    lines are steps; lines marked "- " are the sub-steps of the one before
    group      adjacent steps without a dependency among them; the next step that needs them is the conclusion
    outline    one title a step
    refill     the original sentences, in order, nothing dropped
    rewrite    a path must not refer to its siblings
    check      the grammar of the tags, and the edit distance to the source

A step depends on an earlier one if it uses a number that the other one found, unless that number stands in the prompt's
own line about the step. ``title`` and ``rewrite`` may be a language model (any callable). Source: arXiv 2506.09991,
section 5 (there all steps are a language model's).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stretto.outline import Grammar, StructureError
from stretto.zoo.pages.reasoning import Branch, Group, Part

__all__ = ["Curated", "Curator", "Step", "distance", "extract", "flat_of", "render"]

_MARK = "- "
_TITLE = re.compile(r"([A-Za-z][\w ]*):(?:\s+|$)")
_NUMBER = re.compile(r"\d+")
_FOUND = re.compile(r"= (-?\d+)")
_SIBLING = re.compile(r"^(?:Next|Then|Also|Similarly|Likewise|After that|As above),? +", re.I)


@dataclass(frozen=True, slots=True)
class Step:
    """A line of a solution. ``title`` "" where the line has none; ``subs``: its sub-steps."""

    text: str
    title: str = ""
    subs: tuple[Step, ...] = ()

    @property
    def whole(self) -> str:
        return "\n".join([self.text, *(s.text for s in self.subs)])


@dataclass(frozen=True, slots=True)
class Curated:
    """``parts`` None: the solution was rejected, with ``reason``; ``blocks``: how many groups were found."""

    parts: tuple[Part, ...] | None
    reason: str = ""
    blocks: int = 0


class Rewrite(Protocol):
    def __call__(self, text: str, prompt: str, /) -> str: ...


def _keep(title: str, prompt: str) -> str:
    return title


def _alone(text: str, prompt: str) -> str:
    """Without words that point at a sibling."""
    return _SIBLING.sub("", text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curator:
    """``title(text, prompt)``: the outline of a step from its title; ``rewrite(text, prompt)``: the path's sentences
    without references to siblings. ``least``: branches of a block; ``most``: share of words that may change."""

    title: Rewrite = _keep
    rewrite: Rewrite = _alone
    least: int = 2
    most: float = 0.2
    attempts: int = 2  # of rewriting what a check refused

    def curate(self, prompt: str, flat: str, grammar: Grammar | None = None) -> Curated:
        """The solution ``flat`` of ``prompt`` as a tree; with ``grammar``, its rendering is checked too."""
        reason = ""
        for _ in range(self.attempts):
            parts = tuple(self._parts(prompt, extract(flat)))
            reason = self._check(flat, parts, grammar)
            if not reason:
                return Curated(parts, "", _blocks(parts))
        return Curated(None, reason)

    def curate_all(self, pairs: Sequence[tuple[str, str]], grammar: Grammar) -> tuple[list[Curated], dict[int, str]]:
        """Every (prompt, flat solution), and index -> reason of those that were rejected."""
        done = [self.curate(p, f, grammar) for p, f in pairs]
        return done, {i: c.reason for i, c in enumerate(done) if c.parts is None}

    def _check(self, flat: str, parts: tuple[Part, ...], grammar: Grammar | None) -> str:
        away = distance(flat.split(), flat_of(parts).split())
        if away > self.most:
            return f"{away:.2f} of the words differ from the source, at most {self.most} may"
        if grammar is not None:
            try:
                grammar.parse(render(parts, grammar))
            except StructureError as e:
                return str(e)
        return ""

    def _parts(self, prompt: str, steps: Sequence[Step]) -> list[Part]:
        needs = dependencies(prompt, steps)
        out: list[Part] = []
        at = 0
        while at < len(steps):
            stop = at + 1
            while stop < len(steps) and not any(at <= j for j in needs[stop]):
                stop += 1
            if stop - at < self.least or not all(s.title for s in steps[at:stop]):
                out += self._single(prompt, steps[at])
                at += 1
                continue
            branches = tuple(self._branch(prompt, s) for s in steps[at:stop])
            ends = stop < len(steps) and not steps[stop].subs
            out.append(Group(branches, steps[stop].text if ends else ""))
            at = stop + ends
        return out

    def _single(self, prompt: str, step: Step) -> list[Part]:
        return [step.text, *self._parts(prompt, step.subs)] if step.subs else [step.text]

    def _branch(self, prompt: str, step: Step) -> Branch:
        body = _TITLE.sub("", self.rewrite(step.text, prompt), count=1)
        inner = self._parts(prompt, step.subs)
        return Branch(self.title(step.title, prompt), (*([body] if body else []), *inner))


def extract(flat: str) -> list[Step]:
    """The steps of a solution, two levels. Lines marked "- " belong to the line before."""
    steps: list[tuple[str, list[Step]]] = []
    for line in flat.splitlines():
        if not line.strip():
            continue
        if line.startswith(_MARK) and steps:
            steps[-1][1].append(_step(line.removeprefix(_MARK)))
        else:
            steps.append((line, []))
    return [_step(text, subs) for text, subs in steps]


def _step(text: str, subs: Sequence[Step] = ()) -> Step:
    found = _TITLE.match(_SIBLING.sub("", text))
    return Step(text, found[1] if found else "", tuple(subs))


def dependencies(prompt: str, steps: Sequence[Step]) -> list[set[int]]:
    """For each step the earlier ones that it needs."""
    out: list[set[int]] = []
    found: list[set[str]] = []
    for i, step in enumerate(steps):
        needs: set[int] = set()
        for line in step.subs or [step]:
            own = set(_NUMBER.findall(_about(prompt, line.title or step.title)))
            for number, before in _operands(step.whole, line.text):
                if number not in own and number not in before:
                    needs |= {j for j in range(i) if number in found[j]}
        out.append(needs)
        bare = set() if "=" in step.whole else set(_NUMBER.findall(step.whole))
        found.append(set(_FOUND.findall(step.whole)) | bare)
    return out


def _operands(whole: str, line: str) -> list[tuple[str, set[str]]]:
    """The numbers that ``line`` uses, each with what the step had found before."""
    begin = whole.find(line)
    before = set(_FOUND.findall(whole[:begin]))
    out = []
    for sentence in line.split("."):
        results = _FOUND.findall(sentence)
        used = _FOUND.sub("", sentence)
        out += [(n, set(before)) for n in _NUMBER.findall(used)]
        before |= set(results)
    return out


def _about(prompt: str, title: str) -> str:
    """The prompt's own lines about ``title``: that begin with it, else that hold it."""
    if not title:
        return ""
    word = re.compile(rf"{re.escape(title)}\b", re.I)
    lines = prompt.splitlines()
    found = [x for x in lines if word.match(x)]
    return "\n".join(found or [x for x in lines if word.search(x)])


def _blocks(parts: Sequence[Part]) -> int:
    return sum(1 + sum(_blocks(b.parts) for b in p.branches) for p in parts if isinstance(p, Group))


def flat_of(parts: Sequence[Part]) -> str:
    """A tree as sequential text (what ``Case.flat`` is)."""
    out: list[str] = []
    for part in parts:
        if isinstance(part, str):
            out.append(part)
            continue
        for branch in part.branches:
            out.append(f"{branch.title}: {flat_of(branch.parts)}")
        out += [part.conclusion] if part.conclusion else []
    return "\n".join(out)


def distance(a: Sequence[str], b: Sequence[str]) -> float:
    """Edit distance of two lists of words (marks of sub-steps do not count), as a share of the longer one."""
    a, b = ([w for w in x if w != _MARK.strip()] for x in (a, b))
    if a == b:
        return 0.0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1] / max(len(a), len(b))


@dataclass(slots=True)
class _Writer:
    grammar: Grammar
    ids: list[int] = field(default_factory=list)

    def text(self, text: str) -> None:
        self.ids += self.grammar.encode(text)

    def parts(self, parts: Sequence[Part], number: str) -> None:
        for i, part in enumerate(parts):
            if isinstance(part, Group):
                self.group(part, number)
            else:
                self.text(("\n" if i and isinstance(parts[i - 1], str) else "") + part)

    def group(self, group: Group, number: str) -> None:
        g = self.grammar
        numbers = [f"{number}.{i}" if number else str(i) for i in range(1, len(group.branches) + 1)]
        self.ids += g.goal([(n, b.title) for n, b in zip(numbers, group.branches, strict=True)])
        for n, branch in zip(numbers, group.branches, strict=True):
            self.ids += g.header(n)
            self.branch(branch, n)
            self.ids.append(g.ids["path_close"])
        if "conclusion_open" in g.ids:
            self.ids.append(g.ids["conclusion_open"])
            self.text(group.conclusion)
            self.ids.append(g.ids["conclusion_close"])
        self.ids.append(g.ids["close"])
        if "conclusion_open" not in g.ids:
            self.text(group.conclusion + "\n" if group.conclusion else "")

    def branch(self, branch: Branch, number: str) -> None:
        if all(isinstance(p, str) for p in branch.parts):
            self.text(f" {branch.title}: {' '.join(map(str, branch.parts))}")
        elif self.grammar.tags.nested:
            self.text(f" {branch.title}:")
            self.parts(branch.parts, number)
        else:
            self.text(f" {branch.title}:\n{flat_of(branch.parts)}")


def render(parts: Sequence[Part], grammar: Grammar) -> list[int]:
    """The tree as token ids with the tags of ``grammar``; groups inside a path are flat text where it nests nothing."""
    writer = _Writer(grammar)
    writer.parts(parts, "")
    return writer.ids


