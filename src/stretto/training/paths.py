"""Data with several independent solutions of one question (NAP): paths between tags, and a summary that reads them all.

Legend: m paths, l places of a path, s places of the summary. A path that is shorter than l is filled with the closing
tag, the summary with end-of-text, so that both lengths are learnt as content.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

from stretto.errors import OptionError
from stretto.training.data import Document

__all__ = ["PathLayout", "orders_of", "pick_paths", "sample_paths", "vote"]

Judge = Callable[[str], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class PathLayout:
    """The ids of the tags and the places of each part; the same numbers are options of method ``streams``."""

    open: int
    close: int
    summary: int
    end: int  # end-of-text
    streams: int = 3
    length: int = 40
    summary_length: int = 12

    @property
    def places(self) -> int:
        """The whole answer: what ``max_tokens`` must be."""
        return self.streams * (self.length + 2) + 1 + self.summary_length

    def document(self, prompt: Sequence[int], paths: Sequence[Sequence[int]], summary: Sequence[int]) -> Document:
        """Prompt and answer as training sees them. Raises OptionError where a part does not fit."""
        if len(paths) != self.streams:
            raise OptionError("paths", len(paths), f"exactly {self.streams} paths")
        tokens = list(prompt)
        for path in paths:
            tokens += [self.open, *self._filled("path", path, self.length, self.close), self.close]
        tokens += [self.summary, *self._filled("summary", summary, self.summary_length, self.end)]
        return Document(tokens, len(prompt))

    def _filled(self, what: str, part: Sequence[int], room: int, fill: int) -> list[int]:
        if len(part) > room:
            raise OptionError(f"{what} of {len(part)} tokens", len(part), f"at most {room}: raise the length")
        return [*part, *[fill] * (room - len(part))]


def sample_paths(
    generate: Callable[[Sequence[str], int], Sequence[Sequence[str]]], prompts: Sequence[str], judges: Sequence[Judge],
    *, n: int = 8, keep: int = 3, seed: int = 0,
) -> list[list[str] | None]:
    """For each prompt ``keep`` different right answers of a teacher, or None where it gave fewer.

    ``generate(prompts, n)`` gives n independent samples of each prompt (``LLM.generate`` with ``n`` choices and a
    temperature: they share the prompt's K/V).
    """
    return [
        pick_paths(answers, judge, keep, random.Random(f"{seed}/{prompt}"))
        for prompt, answers, judge in zip(prompts, generate(prompts, n), judges, strict=True)
    ]


def pick_paths(answers: Sequence[str], judge: Judge, keep: int, rng: random.Random) -> list[str] | None:
    """``keep`` different right answers in random order, so that no stream is the first by rule."""
    right = list(dict.fromkeys(a for a in answers if judge(a)))
    if len(right) < keep:
        return None
    rng.shuffle(right)
    return right[:keep]


def orders_of(numbers: Sequence[int], sign: Sequence[int]) -> list[str]:
    """Every order of adding ``numbers`` with their signs in which no partial sum is negative, one line a step."""
    out = []
    for order in permutations(range(len(numbers))):
        if sign[order[0]] < 0:
            continue
        total, lines = numbers[order[0]], []
        for i in order[1:]:
            new = total + sign[i] * numbers[i]
            lines.append(f"{total} {'+' if sign[i] > 0 else '-'} {numbers[i]} = {new}.")
            total = new
            if total < 0:
                break
        else:
            out.append("\n".join(lines))
    return list(dict.fromkeys(out))


def vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, the first among equals; None where there is none."""
    counts = Counter(a for a in answers if a is not None)
    return counts.most_common(1)[0][0] if counts else None
