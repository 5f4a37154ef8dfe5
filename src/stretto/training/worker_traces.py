"""What teaches a model to work with others on one live cache (Hogwild): traces of workers, token by token.

A simulator plays the workers forward by forward, as ``threads/hogwild.py`` runs them: at each decision a worker takes
the first item that nobody has written or visibly begun (of those who decide in the same forward, the second takes the
second, and so on), leaves when the rest is in others' hands, and answers when all results are there. Training then uses
the rows, the visibility and the distances of the run (``models/segments.py``). Some traces hide unfinished steps
(layout "interleaved"), some have one worker, some ask whether work was done twice, and some are the plain texts from
which a cut run must answer.

Legend of shapes: n rows, k learnt tokens.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from stretto.zoo import workbook
from stretto.zoo.pages.workers import LETTERS, NAMES, Problem, problem

__all__ = ["FILE", "TEXTS", "Row", "Trace", "problems", "prompt_ids", "simulate", "unfinished", "write_texts"]

FILE = "hogwild.json"  # beside the weights: the texts that the model was trained with
TEXTS = {
    "names": list(NAMES), "prompt": "Team: {names}. {task}", "openings": [],
    "step_prefix": " {name}:", "step_separator": "\n", "others_header": "<|thread|>",
    "own_header": "<|/thread|>", "check": " twice?", "unfinished": "...", "finisher": "\n Answer:",
    "answer": r"Answer: (\w+)\.", "banned": [], "leave": "<|im_end|>",
}


def write_texts(folder: Path) -> None:
    (folder / FILE).write_text(json.dumps(TEXTS, indent=1) + "\n")


@lru_cache(maxsize=4096)
def ids(text: str) -> tuple[int, ...]:
    return tuple(workbook._tokenizer().encode(text, add_special_tokens=False).ids)


SEPARATOR = ids(TEXTS["step_separator"])[0]
LEAVE = ids(TEXTS["leave"])[0]
PROMPT, OTHERS, OWN = -3, -2, -1  # lines that are no worker's
ANSWER, LEAVE_IT = "answer", "leave"  # choices beside the items


def prompt_ids(found: Problem, workers: int) -> list[int]:
    return list(workbook.encode(workbook.Example("", "", found.prompt(workers), ""))[0])


def problems(split: str, n: int, seed: int, items: tuple[int, int] = (8, 8)) -> list[Problem]:
    """``n`` different problems of a split of the workbook with so many items, the same for the same seed."""
    rng, out = random.Random(f"{split}/workers/{seed}/{items}"), {}
    while len(out) < n:
        found = problem(rng, rng.randint(*items))
        if workbook._split(found.text) == split:
            out.setdefault(found.text, found)
    return list(out.values())


@dataclass(slots=True)
class Row:
    """One evaluated token. ``line``: PROMPT, OTHERS and OWN (the headers), else the worker; ``block``: which of the
    line's blocks; ``at``: position in it; ``time``: the forward; ``moved``: position in the history later, or -1."""

    token: int
    line: int
    block: int
    at: int
    time: int
    moved: int = -1


@dataclass(slots=True)
class Trace:
    """``rows`` in the order of evaluation; ``history``: rows that the history got, in order; ``targets``: (row whose
    law decides, token, weight); ``common`` [time]: rows of the history before the forward; ``here`` [time]: for each
    worker (block, rows of it behind the forward), None = nobody reads it; ``steps``: items in the order of beginning.
    """

    layout: str
    workers: int
    rows: list[Row] = field(default_factory=list)
    history: list[int] = field(default_factory=list)
    targets: list[tuple[int, int, float]] = field(default_factory=list)
    common: list[int] = field(default_factory=list)
    here: list[list[tuple[int, int] | None]] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Worker:
    """``feed``: tokens of the next forward; ``script``: what it will choose behind them, as (token, weight);
    ``letter``: the item under way; ``last``: the one before."""

    index: int
    feed: list[int]
    script: list[tuple[int, float]] = field(default_factory=list)
    block: list[int] = field(default_factory=list)
    number: int = 0
    letter: str | None = None
    last: str | None = None
    left: bool = False
    asked: bool = False

    @property
    def deciding(self) -> bool:
        """It chooses an item in this forward."""
        return not self.left and not self.script and not self.asked


class _Simulator:
    def __init__(self, found: Problem, workers: int, layout: str, rng: random.Random, noise: float, check_every: int):
        self.problem, self.rng, self.noise, self.check_every = found, rng, noise, check_every
        self.trace = Trace(layout, workers)
        self.workers = [_Worker(w, _prefix(w)) for w in range(workers)]
        self.written: list[str] = []  # items of finished steps
        self.since, self.done = 0, False

    def run(self, limit: int = 400) -> Trace:
        trace = self.trace
        trace.rows += [Row(t, PROMPT, 0, i, -1, i) for i, t in enumerate(prompt_ids(self.problem, trace.workers))]
        trace.history += range(len(trace.rows))
        for line, name in ((OTHERS, "others_header"), (OWN, "own_header")):
            trace.rows += [Row(t, line, 0, i, -1) for i, t in enumerate(ids(TEXTS[name]))]
        for time in range(limit):
            if self.done or all(w.left for w in self.workers):
                break
            self._forward(time)
        return trace

    def _forward(self, time: int) -> None:
        trace, active = self.trace, [w for w in self.workers if not w.left]
        trace.common.append(len(trace.history))
        for w in active:
            for token in w.feed:
                w.block.append(len(trace.rows))
                trace.rows.append(Row(token, w.index, w.number, len(w.block) - 1, time))
            self.since += len(w.feed)
        gone = trace.layout != "contiguous"  # what a worker leaves behind that is in nobody's history
        trace.here.append([None if w.left and gone else (w.number, len(w.block)) for w in self.workers])
        scripts = [self._decide(w) if not w.script else w.script for w in active]
        for w, script in zip(active, scripts, strict=True):
            (token, weight), w.script = script[0], script[1:]
            trace.targets.append((w.block[-1], token, weight))
            self._settle(w, token)

    def _settle(self, w: _Worker, token: int) -> None:
        """What follows from the token that ``w`` has chosen."""
        w.feed = [token]
        if token == LEAVE:
            w.left = True
        elif token == SEPARATOR:
            check = bool(self.check_every) and self.since >= self.check_every
            self.since = 0 if check else self.since
            w.feed, w.asked = _prefix(w.index, check), check
            w.last, w.letter = w.letter, None
            self.written.append(w.last or "")
            if self.trace.layout != "contiguous":
                for row in w.block:
                    self.trace.rows[row].moved = len(self.trace.history)
                    self.trace.history.append(row)
                w.block, w.number = [], w.number + 1
        elif w.letter == ANSWER and not w.script:
            self.done = True

    def _decide(self, w: _Worker) -> list[tuple[int, float]]:
        """What ``w`` writes next, as (token, weight)."""
        if w.asked:
            w.asked = False
            begun = [o.letter for o in self.workers if o is not w]
            twice = self.written.count(w.last or "") > 1 or w.last in begun
            return [(t, 1.0) for t in ids(" yes." if twice else " no.")]
        choice, weight = self._choice(w), 3.0
        if choice == LEAVE_IT:
            return [(LEAVE, 1.0)]
        if choice == ANSWER:
            w.letter = ANSWER
            return [(t, weight if i == 0 else 1.0) for i, t in enumerate(ids(" Answer: all."))]
        if self.rng.random() < self.noise:
            choice, weight = self.rng.choice(self.problem.items)[0], 0.0
        w.letter = choice
        self.trace.steps.append(choice)
        return [(t, weight if i == 0 else 1.0) for i, t in enumerate([*ids(self.problem.step(choice)), SEPARATOR])]

    def _choice(self, w: _Worker) -> str:
        hidden = self.trace.layout == "interleaved"
        begun = [] if hidden else [o.letter for o in self.workers if not o.left]
        free = [letter for letter, _, _ in self.problem.items if letter not in self.written and letter not in begun]
        if hidden:
            return free[w.index % len(free)] if free else ANSWER
        before = sum(o.deciding for o in self.workers[: w.index])
        if before < len(free):
            return free[before]
        working = any(o.letter in LETTERS for o in self.workers if o is not w and not o.left)
        return LEAVE_IT if free or working else ANSWER


def _prefix(w: int, check: bool = False) -> list[int]:
    text = TEXTS["step_prefix"].format(name=NAMES[w]) + (TEXTS["check"] if check else "")
    return [SEPARATOR, *ids(text)]


def simulate(
    found: Problem, workers: int, layout: str, rng: random.Random, *, noise: float = 0.0, check_every: int = 0
) -> Trace:
    """One run. ``noise``: share of the decisions at random (they are not learnt); ``check_every``: tokens of all
    workers between two questions whether work was done twice, 0 = never."""
    return _Simulator(found, workers, layout, rng, noise, check_every).run()


def unfinished(found: Problem, rng: random.Random, workers: int) -> Trace:
    """The plain text of a run that was cut: some steps, some of them unfinished, and whether they are all."""
    trace = Trace("plain", workers)
    letters = [letter for letter, _, _ in found.items]
    done = rng.sample(letters, rng.choice([len(letters), rng.randint(1, len(letters) - 1)]))
    text = prompt_ids(found, workers)
    for letter in done:
        text += [*_prefix(rng.randrange(workers)), *ids(found.step(letter))]
    for w in range(rng.randint(0, workers)):
        rest = [letter for letter in letters if letter not in done]
        step = ids(found.step(rng.choice(rest))) if rest else ()
        text += [*_prefix(w), *step[: rng.randint(0, max(0, len(step) - 4))], *ids(TEXTS["unfinished"])]
    text += [SEPARATOR, *ids(TEXTS["finisher"].removeprefix(TEXTS["step_separator"]))]
    answer = ids(" all." if len(done) == len(letters) else " some.")
    trace.targets = [(len(text) - 1 + i, t, 3.0 if i == 0 else 1.0) for i, t in enumerate(answer)]
    text += answer[:-1]
    trace.rows = [Row(t, PROMPT, 0, i, -1, i) for i, t in enumerate(text)]
    trace.history = list(range(len(text)))
    return trace
