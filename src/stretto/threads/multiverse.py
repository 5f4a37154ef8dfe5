"""Multiverse (arXiv 2506.09991): the model itself writes Map, Process, Reduce; its paths are decoded at the same time.

    SEQUENTIAL  decode up to the end of a goal, or of the text
    PARALLEL    one thread for each outline, behind the line and a forced head; siblings do not see each other, and
                their positions are the same. A path may fork again
    REDUCE      the line lists the rows of all paths as they are (no key moves, none is evaluated again), goes on behind
                the furthest of them with a forced conclusion tag, and is sequential again

The structure is read from token ids by the grammar that made the training data (``stretto.outline``). What does not fit
is said in the answer, and decoding goes on in line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stretto.account import Usage
from stretto.engine.params import SamplingParams
from stretto.errors import InputError, OptionError, UnsupportedError
from stretto.outline import Grammar, Lengths, StructureError
from stretto.session import Session, Thread
from stretto.tags import Tags, read_tags
from stretto.threads.crew import Task, run_tasks
from stretto.zoo.models import resolve

__all__ = ["Answer", "run", "run_all"]

SUSPICIOUS = 20  # paths of one block: the paper's engine warns
Law = dict[int, float] | None


@dataclass(slots=True)
class Answer:
    """``token_ids``: the answer as one linear text, tags and forced tokens included. ``malformed``: why it is not of
    the grammar (None = it is). ``notes``: blocks that were not forked, and why. ``blocks``, ``paths``: how many ran in
    parallel. ``lengths``: of the text. ``usage.critical_path``: tokens that were generated one after the other.
    ``finish_reason``: "stop", "length", or "time". ``logprobs``: for each token, None where it was forced."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "stop"
    malformed: str | None = None
    notes: list[str] = field(default_factory=list)
    blocks: int = 0
    paths: int = 0
    lengths: Lengths = field(default_factory=lambda: Lengths(0, 0))
    usage: Usage = field(default_factory=Usage)
    logprobs: list[Law] | None = None

    @property
    def parallelism(self) -> float:
        """Degree of parallelism: generated tokens over those of the longest chain."""
        return self.usage.generated / self.usage.critical_path if self.usage.critical_path else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """``mode``: what the user's turn asks for ("auto": nothing, the model decides; "sequential" never forks).
    ``max_paths`` of a block, ``max_depth`` of blocks in each other, ``max_threads`` at once; a block beyond them, or
    with fewer than ``min_budget_to_fork`` positions left, is decoded in line. ``max_seconds``: then the answer ends."""

    mode: str = "auto"
    max_paths: int = SUSPICIOUS
    max_depth: int = 5
    max_threads: int = 64
    min_budget_to_fork: int = 30
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "parallel", "sequential"):
            raise OptionError("mode", self.mode, "auto, parallel or sequential")
        for name in ("max_paths", "max_depth", "max_threads", "min_budget_to_fork"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < (0 if name == "max_depth" else 1):
                raise OptionError(name, value, f"a whole number from {0 if name == 'max_depth' else 1}")


def run(
    llm: Any, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None, *, tags: Tags | None = None,
    **options: Any,
) -> Answer:
    """Answer ``prompt`` (the user's words, or the ids of a whole prompt). Greedy unless ``sampling_params`` say
    otherwise; their max_tokens bounds the *dependent chain*: positions, not tokens. ``options``: those of ``Options``;
    ``tags``: instead of those that lie beside the weights.

    Raises UnsupportedError where the model was not trained for it and ``mode`` is not "auto".
    """
    return run_all(llm, [prompt], sampling_params, tags=tags, **options)[0]


def run_all(
    llm: Any, prompts: Sequence[str | Sequence[int]], sampling_params: SamplingParams | None = None, *,
    tags: Tags | None = None, **options: Any,
) -> list[Answer]:
    """``run`` of several prompts: all paths of all prompts share forwards."""
    params = sampling_params or SamplingParams(temperature=0.0, max_tokens=512)
    if params.n != 1 or params.stop:
        raise OptionError("sampling_params", (params.n, params.stop), "n=1, and no stop strings")
    chosen = _options(options)
    grammar, words = _grammar(llm, tags, chosen.mode)
    with_sessions: list[_Writer] = []
    try:
        for prompt in prompts:
            with_sessions.append(_Writer(llm, _prompt(llm, prompt, words), params, grammar, chosen))
        run_tasks([w.task() for w in with_sessions], llm.engine.step, seconds=chosen.max_seconds)
        return [w.answer() for w in with_sessions]
    finally:
        for writer in with_sessions:
            writer.session.end()


def _options(given: dict[str, Any]) -> Options:
    try:
        return Options(**given)
    except TypeError:
        names = tuple(Options.__dataclass_fields__)
        wrong = next(k for k in given if k not in names)
        raise OptionError(wrong, given[wrong], f"options are {', '.join(names)}") from None


def _grammar(llm: Any, tags: Tags | None, mode: str) -> tuple[Grammar | None, str]:
    """(grammar, words that ask for the mode); no grammar: the model knows no tags."""
    modes: dict[str, str] = {}
    if tags is None:
        try:
            tags, more = read_tags(Path(resolve(llm.model_name)))
            modes = more.get("modes", {})
        except UnsupportedError as e:
            if mode != "auto":
                raise UnsupportedError(f"{e}; use zoo:tiny-multiverse, or mode='auto'") from None
            return None, ""
    if tags.conclusion_open is None or tags.loose:
        raise UnsupportedError(
            "the paths of these tags are joined by plain text (ThreadWeaver): use stretto.threads.threadweaver"
        )
    return Grammar(tags, llm.tokenizer.inner), modes.get(mode, "")


def _prompt(llm: Any, prompt: str | Sequence[int], words: str) -> list[int]:
    if not isinstance(prompt, str):
        return [int(t) for t in prompt]
    return llm.tokenizer.encode(llm.chat_prompt([{"role": "user", "content": prompt + words}]))


class _Writer:
    """One prompt under way."""

    def __init__(self, llm: Any, prompt: list[int], params: SamplingParams, grammar: Grammar | None, options: Options):
        if not prompt:
            raise InputError("the prompt is empty")
        self.llm, self.params, self.options = llm, params, options
        self.grammar = grammar if options.mode != "sequential" else None
        self.reader = grammar
        self.session = Session(llm, prompt, max_threads=options.max_threads)
        self.begin, self.limit = len(prompt), min(len(prompt) + params.max_tokens, llm.max_model_len - 1)
        self.method = llm.method("ar")
        self.out, self.laws = Answer(), {0: [None] * len(prompt)}

    def task(self) -> Task:
        if self.grammar is None and self.reader is None:
            self.out.notes.append("the model was not trained to write parallel blocks: decoded as plain text")
        if self.limit <= self.begin:
            self.out.finish_reason = "length"
            return
        self.out.finish_reason = "time"
        ended = yield from self._text(self.session, 0, "", ())
        self.out.finish_reason = "length" if ended == "length" else "stop"

    def answer(self) -> Answer:
        out, ids = self.out, self.session.tokens[self.begin :]
        out.token_ids, out.usage = list(ids), self.session.usage
        out.text = self.llm.tokenizer.decode(ids, skip_special_tokens=False)
        if self.reader is not None:
            out.lengths = self.reader.lengths(ids)
            try:
                self.reader.parse(self.session.tokens, start=self.begin)
            except StructureError as e:
                out.malformed = str(e)
        if self.params.logprobs is not None:
            out.logprobs = self.laws[0][self.begin :]
        return out

    def _room(self, thread: Thread) -> int:
        """Positions left behind ``thread``."""
        return self.limit - len(thread.tokens) - thread.shift

    def _text(self, thread: Thread, depth: int, number: str, ends: tuple[int, ...]) -> Task:
        """Write behind ``thread`` up to a tag of ``ends``, the end of the text or of the room; which of them it was."""
        g = self.grammar
        stops = [*ends, *([g.ids["goal_close"]] if g else [])]
        while True:
            room = self._room(thread)
            if room < 1:
                return "length"
            params = replace(
                self.params, max_tokens=room, stop_token_ids=[*(self.params.stop_token_ids or []), *stops],
            )
            (done,) = yield [(thread, self.method, params)]
            self.laws[thread.id] += done.logprobs or [None] * len(done.token_ids)
            last = done.token_ids[-1]
            if g is not None and last == g.ids["goal_close"]:
                if (yield from self._block(thread, depth, number)) == "length":
                    return "length"
            elif done.finish_reason == "length":
                return "length"
            else:
                return "tag" if last in ends else "text"

    def _block(self, thread: Thread, depth: int, number: str) -> Task:
        """The goal that ``thread`` ends with: its paths, and the head of its conclusion."""
        g = self.grammar
        assert g is not None
        try:
            numbers = g.outlines(thread.tokens)
        except StructureError as e:
            self.out.notes.append(f"went on in line: {e}")
            return ""
        reason = self._refusal(thread, depth, number, numbers)
        if reason:
            self.out.notes.append(f"decoded in line: {reason}")
            ended = yield from self._serial(thread, depth, numbers)
        else:
            ended = yield from self._parallel(thread, depth, numbers)
        if ended != "length":
            self._force(thread, [g.ids["conclusion_open"]])
        return ended

    def _refusal(self, thread: Thread, depth: int, number: str, numbers: Sequence[str]) -> str:
        o = self.options
        if number and not all(n.startswith(number + ".") for n in numbers):
            return f"outlines {', '.join(numbers)} inside path {number}"
        if depth >= o.max_depth:
            return f"a block in {depth} others (max_depth={o.max_depth})"
        if len(numbers) > o.max_paths:
            return f"{len(numbers)} paths (max_paths={o.max_paths})"
        if len(self.session.threads()) + len(numbers) > o.max_threads:
            return f"{len(numbers)} paths beside {len(self.session.threads())} threads (max_threads={o.max_threads})"
        free, least = self._free(), len(numbers) * o.min_budget_to_fork
        if free < least:
            return f"{free} cache slots are free, {len(numbers)} paths need at least {least} (kv_cache_tokens)"
        if self._room(thread) < o.min_budget_to_fork:
            return f"{self._room(thread)} positions are left (min_budget_to_fork={o.min_budget_to_fork})"
        return ""

    def _free(self) -> int:
        """Cache slots that threads can get now."""
        prefix = self.llm.engine.prefix
        return self.llm.runner.alloc.free + (prefix.slots if prefix is not None else 0)

    def _parallel(self, thread: Thread, depth: int, numbers: Sequence[str]) -> Task:
        assert self.grammar is not None
        if len(numbers) > SUSPICIOUS:
            self.out.notes.append(f"suspicious: {len(numbers)} paths in one block")
        if thread.shift:  # else the line goes into the paths' first forward
            yield self.session.pending(thread)
        kids = thread.fork(prefixes=[self.grammar.header(n) for n in numbers], late=True)
        for kid in kids:
            self.laws[kid.id] = [None] * (len(kid.tokens) - kid.start)
        self.out.blocks += 1
        self.out.paths += len(kids)
        ended = yield [self._path(kid, depth + 1, n) for kid, n in zip(kids, numbers, strict=True)]
        if "length" not in ended:
            thread.join(kids, "share")
        for kid in kids:
            self.laws[thread.id] += self.laws.pop(kid.id)
        if "length" not in ended:
            return ""
        for kid in kids:  # the answer ends here: its text is wanted, its cache is not
            thread.tokens += kid.own
            kid.end()
        return "length"

    def _path(self, kid: Thread, depth: int, number: str) -> Task:
        assert self.grammar is not None
        close = self.grammar.ids["path_close"]
        ended = yield from self._text(kid, depth, number, (close,))
        if ended == "text":
            self._close(kid, number)
        if ended != "length":
            yield self.session.pending(kid)
        return ended

    def _serial(self, thread: Thread, depth: int, numbers: Sequence[str]) -> Task:
        """The paths of a block that is not forked, one behind the other on the same line."""
        assert self.grammar is not None
        for number in numbers:
            self._force(thread, self.grammar.header(number))
            ended = yield from self._text(thread, depth + 1, number, (self.grammar.ids["path_close"],))
            if ended == "length":
                return "length"
            if ended == "text":
                self._close(thread, number)
        return ""

    def _close(self, thread: Thread, number: str) -> None:
        """A path in which the text ended: the end becomes the path's."""
        assert self.grammar is not None
        self.out.notes.append(f"path {number} ended the text: closed there")
        thread.tokens.pop()
        self.laws[thread.id].pop()
        self._force(thread, [self.grammar.ids["path_close"]])

    def _force(self, thread: Thread, ids: list[int]) -> None:
        thread.append(ids)
        self.laws[thread.id] += [None] * len(ids)
