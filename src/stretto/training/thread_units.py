"""What teaches a model to reason in threads (ThreadWeaver): solutions as the state machine would get them.

The user's turn says which way is wanted, as for Multiverse: step by step, in parallel, or nothing (the model decides).
A trajectory is read back by the machine itself (``machine.Script``): its pieces are the units, each behind what
it saw; forced tokens and the second copies of threads in the joined text are context. Stage "sft" learns from the
page's solutions, curated by rules; stage "self" from the model's own answers in threads that are well formed and right.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stretto.decoding.registry import make
from stretto.engine.engine import Engine, Stream
from stretto.engine.params import SamplingParams
from stretto.machine import Ask, Machine, Reply, Script, Spec, Woven, drive, machine
from stretto.models.transformer import Transformer
from stretto.outline import Grammar, StructureError
from stretto.tags import THREADWEAVER
from stretto.training.p_grpo import Rollout
from stretto.training.parallel_units import MODES, grammar_of, pair_of
from stretto.training.policy import rollout_engine
from stretto.training.trie import Unit
from stretto.zoo import workbook
from stretto.zoo.pages import reasoning

__all__ = [
    "LEARNT", "SHARES", "TASKS", "cases", "own_answers", "prompt_of", "right", "roll_out", "rollout_of", "spec_of",
    "supervised", "units_of",
]


def _few(rng: random.Random) -> reasoning.Case:
    """Small cases: more questions and conclusions in as many tokens."""
    if rng.random() < 0.6:
        return reasoning.rows(rng, rng.choice([2, 3]), rng.choice([2, 3]))
    return reasoning.tree(rng, rng.choice([2, 3]), rng.choice([2, 3]), "Sum Sum Max")


TASKS: dict[str, Callable[[random.Random], reasoning.Case]] = {
    "rows": reasoning.rows, "tree": lambda rng: reasoning.tree(rng, words="Sum Sum Max"), "serial": reasoning.serial,
    "few": _few,
}
SHARES = {"rows": 1.0, "tree": 1.2, "serial": 0.6}
LEARNT = {**SHARES, "few": 0.8}
WAYS = {"auto": 0.6, "parallel": 0.1, "sequential": 0.3}  # shares of the training mix


def cases(
    split: str, n: int, seed: int, task: str | None = None, shares: Mapping[str, float] = SHARES
) -> list[reasoning.Case]:
    """``n`` different cases of a split, of one task or of several by ``shares``; the same for the same seed."""
    rng, out = random.Random(f"{split}/threads/{task}/{seed}"), {}
    shares = {task: 1.0} if task else shares
    while len(out) < n:
        case = TASKS[rng.choices(list(shares), list(shares.values()))[0]](rng)
        if workbook._split(case.prompt) == split:
            out.setdefault(case.prompt, case)
    return list(out.values())


def prompt_of(case: reasoning.Case, way: str = "auto") -> list[int]:
    """Ids of the user's turn, ready for an answer."""
    return workbook.encode(workbook.Example("", "", case.prompt + MODES[way], ""))[0]


def right(case: reasoning.Case, ids: Sequence[int]) -> bool:
    """Whether an answer (of either way) ends with the right number."""
    return reasoning.final(workbook._tokenizer().decode(list(ids), skip_special_tokens=True)) == case.answer


def spec_of(prompt: Sequence[int], *, max_tokens: int = 400, max_threads: int = 8) -> Spec:
    """The machine of the zoo's tags."""
    end = workbook._tokenizer().token_to_id("<|im_end|>")
    return Spec(grammar_of(THREADWEAVER), (end,), len(prompt) + max_tokens, max_threads)


def units_of(prompt: Sequence[int], answer: Sequence[int]) -> list[Unit]:
    """The units of a trajectory, the longest line first. Raises InputError for one that the machine would not write."""
    spec = spec_of(prompt, max_tokens=len(answer) + 64)
    got = drive(machine(prompt, spec), Script(prompt, answer, spec.ends))
    return _units(got)


def _units(got: Woven) -> list[Unit]:
    units = [Unit([*p.context, *p.ids], len(p.context)) for p in got.pieces]
    return sorted(units, key=lambda u: -len(u.tokens))


def supervised(split: str, n: int, seed: int, way: str | None = None) -> list[list[Unit]]:
    """``n`` examples of the page, in one way or in all by ``WAYS``: curated solutions in threads, and flat ones."""
    rng, grammar = random.Random(f"ways/{seed}"), grammar_of(THREADWEAVER)
    ways = [way] * n if way else rng.choices(list(WAYS), list(WAYS.values()), k=n)
    return [units_of(*pair_of(c, w, grammar)) for c, w in zip(cases(split, n, seed, shares=LEARNT), ways, strict=True)]


def rollout_of(got: Woven, grammar: Grammar) -> Rollout:
    """What P-GRPO wants of an answer."""
    lengths = grammar.lengths(got.tokens, tags_serial=True)
    try:
        grammar.parse(got.tokens)
        formed = True
    except StructureError:
        formed = False
    return Rollout(
        _units(got), got.tokens, lengths.total, lengths.longest, got.finish_reason == "stop", len(got.blocks), formed
    )


@dataclass(slots=True)
class _Run:
    """One answer under way."""

    work: Machine
    ask: Ask
    seed: int
    streams: list[Stream] = field(default_factory=list)
    asked: int = 1
    done: Woven | None = None

    def go_on(self, engine: Engine, method: Any, temperature: float) -> None:
        """Give the machine what was completed, and queue what it asks for next: the common text is cached already."""
        replies = [Reply(s.seq.tokens[s.seq.prompt_len :], s.finish_reason or "length") for s in self.streams]
        try:
            ask = self.work.send(replies)
        except StopIteration as end:
            self.done, self.streams = end.value, []
            return
        self.streams = []
        for i, head in enumerate(ask.heads):
            params = _params(ask, temperature, (self.seed * 64 + self.asked) * 64 + i)
            self.streams += engine.add([*ask.context, *head], params, method)
        self.asked += 1


def _params(ask: Ask, temperature: float, seed: int, n: int = 1) -> SamplingParams:
    return SamplingParams(temperature=temperature, seed=seed, max_tokens=ask.room, stop_token_ids=list(ask.stops), n=n)


def roll_out(
    model: Transformer, prompts: Sequence[Sequence[int]], group: int, seed: int, *, temperature: float = 1.0,
    max_tokens: int = 400,
) -> list[list[Rollout]]:
    """``group`` answers to each prompt through the state machine, on the model's present weights: the lines and threads
    of all answers share forwards, what they have in common is evaluated once."""
    spec = spec_of((), max_tokens=max_tokens)
    engine = rollout_engine(model, spec.ends, seqs=min(256, 4 * group * len(prompts)), slots=384, prefix_caching=True)
    method, groups = make("ar", engine.host, {}), []
    for i, prompt in enumerate(prompts):
        works = [machine(prompt, spec_of(prompt, max_tokens=max_tokens)) for _ in range(group)]
        runs = [_Run(w, next(w), ((seed << 16) + i) * 256 + k) for k, w in enumerate(works)]
        first = runs[0].ask
        for run, stream in zip(runs, engine.add(first.context, _params(first, temperature, runs[0].seed * 4096, group),
                                                method), strict=True):  # fmt: skip
            run.streams = [stream]
        groups.append(runs)
    waiting = [run for runs in groups for run in runs]
    while waiting:
        engine.step()
        for run in waiting:
            if all(s.finish_reason is not None for s in run.streams):
                run.go_on(engine, method, temperature)
        waiting = [run for run in waiting if run.done is None]
    grammar = grammar_of(THREADWEAVER)
    return [[rollout_of(run.done, grammar) for run in runs if run.done is not None] for runs in groups]


def own_answers(
    model: Transformer, found: Sequence[reasoning.Case], seed: int, *, max_tokens: int = 400,
) -> list[list[Unit]]:
    """The units of the model's own answers in threads that are well formed, complete and right, one each at most."""
    out = []
    for i in range(0, len(found), 64):
        batch = found[i : i + 64]
        answers = roll_out(model, [prompt_of(c) for c in batch], 1, seed + i, max_tokens=max_tokens)
        for case, (r,) in zip(batch, answers, strict=True):
            if r.complete and r.formed and right(case, r.tokens):
                out.append(list(r.units))
    return out
