"""Workers who write into one live cache that all of them read (Hogwild! Inference, Rodionov et al., 2025).

Every worker writes steps. What it reads is a list of lines (``shared.Shared``), by ``layout``:

    combined     history (prompt, everybody's finished steps), header, the others' steps under way, header, own step
    contiguous   prompt, everything that each other wrote, header, everything of its own
    interleaved  history, own step: others' steps are seen when they are finished

One forward gives each worker a token; it sees what the others were given in that forward. A step ends with the
separator behind sentence-final punctuation; its rows then move to the history, and the worker's next rows are the
separator and a prefix. An approximation by design: the output is not that of a single thread.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stretto.account import Usage
from stretto.engine.params import SamplingParams
from stretto.errors import CapacityError, OptionError, UnknownNameError
from stretto.models.tokenizer import Detokenizer
from stretto.session import Session, Thread
from stretto.shared import News, Shared
from stretto.threads.hogwild_texts import Texts

__all__ = ["LAYOUTS", "Collaboration", "Result", "WorkerEvent", "acollaborate", "collaborate"]

LAYOUTS = ("combined", "contiguous", "interleaved")
FINAL = (".", "?", "!", "…", "。", "？", "！")
FINISHER_TOKENS = 16


@dataclass(slots=True)
class WorkerEvent:
    """``kind``: "token" (new final tokens of a worker), "step" (its step is finished and in the history), "leave",
    "answer". ``worker``: its number; None = the forced answer."""

    worker: int | None
    kind: Literal["token", "step", "leave", "answer"]
    token_ids: list[int]
    text: str


@dataclass(slots=True)
class Result:
    """``answer``: None = none was found. ``ended``: "answer", "left" (all workers did), "length" (the forwards or the
    context were used up). ``steps``: (worker, text) in the order of the history, unfinished ones last; ``workers``: the
    whole text of each. ``forwards``: those in which the workers wrote; ``finisher_forwards``: of the forced answer.
    """

    answer: str | None = None
    ended: Literal["answer", "left", "length"] = "length"
    finished_by: int | None = None
    steps: list[tuple[int, str]] = field(default_factory=list)
    workers: list[str] = field(default_factory=list)
    checks: int = 0
    forwards: int = 0
    finisher_forwards: int = 0
    usage: Usage = field(default_factory=Usage)

    @property
    def tokens_per_forward(self) -> float:
        return self.usage.generated / self.forwards if self.forwards else 0.0


@dataclass(slots=True, eq=False)
class _Worker:
    number: int
    name: str
    line: Thread
    out: Detokenizer
    step: str  # the text of the step under way
    steps: int = 1
    left: bool = False
    text: str = ""


class Collaboration:
    """One problem and its workers. ``events()`` (or ``aevents()``) runs it; ``result`` is whole when they end.

    ``max_steps``: forwards at most. ``check_every``: tokens of all workers between two questions whether work is
    redundant, 0 = never. ``finisher``: force an answer where none was given. Raises OptionError and UnsupportedError
    for what cannot be served, CapacityError for a prompt that leaves no room.
    """

    def __init__(
        self, llm: Any, task: str, *, workers: int = 2, layout: str = "combined", max_steps: int = 256,
        check_every: int = 256, finisher: bool = True, worker_names: tuple[str, ...] | None = None,
        step_separator: str | None = None, banned_tokens: tuple[str, ...] | None = None, texts: Texts | None = None,
        sampling_params: SamplingParams | None = None,
    ):
        texts = texts or Texts.of(llm)
        if step_separator is not None:
            texts = replace(texts, step_separator=step_separator)
        if banned_tokens is not None:
            texts = replace(texts, banned=tuple(banned_tokens))
        if layout not in LAYOUTS:
            raise UnknownNameError("layout", layout, LAYOUTS)
        numbers = (("workers", workers, 1), ("max_steps", max_steps, 1), ("check_every", check_every, 0))
        for name, value, least in numbers:
            if not isinstance(value, int) or value < least:
                raise OptionError(name, value, f"a whole number from {least}")
        names = tuple(worker_names) if worker_names is not None else texts.names[:workers]
        if len(names) != workers or len(set(names)) != workers:
            raise OptionError("worker_names", names, f"{workers} different names, one for each worker")
        texts.check_separator(llm)
        self.llm, self.texts, self.layout, self.names = llm, texts, layout, names
        self.max_steps, self.check_every, self.finisher = max_steps, check_every, finisher
        self.result = Result()
        self._leave = llm.tokenizer.encode(texts.leave)[-1] if texts.leave else None
        base = sampling_params or SamplingParams(temperature=0.0)
        bias = {**(base.logit_bias or {}), **texts.banned_ids(llm)}
        self.params = replace(
            base, n=1, stop=[texts.step_separator], stop_token_ids=[self._leave] if self._leave is not None else [],
            ignore_eos=self._leave is None, logit_bias=bias or None,
        )
        self._prompt = llm.chat_prompt([{"role": "user", "content": texts.user_prompt(task, names)}])
        self._room(len(llm.tokenizer.encode(self._prompt)), workers)

    def _room(self, prompt: int, workers: int) -> None:
        most, slots = self.llm.host.max_model_len, self.llm.runner.alloc.total
        need = min(most, prompt + workers * self.max_steps) + 64
        if need > slots:
            raise CapacityError(
                f"{workers} workers may need {need} cache slots, there are {slots}: raise kv_cache_tokens, or lower "
                "max_steps or workers"
            )

    def events(self) -> Iterator[WorkerEvent]:
        """Run, event by event. Leaving early frees everything."""
        with self.llm.session(self._prompt) as session:
            shared = self._begin(session)
            try:
                while self._goes_on():
                    self._before()
                    yield from self._after(shared.step())
            finally:
                shared.stop()
            text = self._end()
        if text is not None:
            with self.llm.session(text) as plain:
                out = plain.gen(**self._final)
                yield from self._forced(out, plain)

    async def aevents(self) -> AsyncIterator[WorkerEvent]:
        """``events`` for asyncio: several problems share forwards."""
        with self.llm.session(self._prompt) as session:
            shared = self._begin(session)
            try:
                while self._goes_on():
                    self._before()
                    for event in self._after(await shared.astep()):
                        yield event
            finally:
                shared.stop()
            text = self._end()
        if text is not None:
            with self.llm.session(text) as plain:
                out = await plain.agen(**self._final)
                for event in self._forced(out, plain):
                    yield event

    @property
    def _final(self) -> dict[str, Any]:
        return {"max_tokens": FINISHER_TOKENS, "temperature": 0.0}

    def _begin(self, session: Session) -> Shared:
        t = self.texts
        self.session, self.shared = session, Shared(session)
        self._headers = [self.shared.line(h, [session]) for h in (t.others_header, t.own_header)]
        for header in self._headers:
            self.shared.evaluate(header)
        self._start_forwards, self._since, self._answer = session.usage.forwards, 0, None
        self._workers = []
        for i, name in enumerate(self.names):
            opening = t.openings[min(i, len(t.openings) - 1)].format(name=name) if t.openings else ""
            prefix = t.step_separator + t.step_prefix.format(name=name, step=1) + opening
            out = Detokenizer(self.llm.tokenizer, skip_special_tokens=False)
            self._workers.append(_Worker(i, name, self.shared.line(prefix), out, prefix))
        self._arrange()
        for worker in self._workers:
            self._write(worker)
        return self.shared

    def _arrange(self) -> None:
        """Tell everybody what to read now."""
        others_header, own_header = self._headers
        for worker in (w for w in self._workers if not w.left):
            others = [o.line for o in self._workers if o is not worker and o.line.alive]
            self.shared.read(worker.line, {
                "combined": [self.session, others_header, *others, own_header],
                "contiguous": [self.session, *others, own_header],
                "interleaved": [self.session],
            }[self.layout])  # fmt: skip

    def _write(self, worker: _Worker) -> None:
        left = self.max_steps - self.result.forwards
        if left > 0:
            self.shared.start(worker.line, replace(self.params, max_tokens=left))

    def _goes_on(self) -> bool:
        if self._answer is not None or not self.shared.writers:
            return False
        lines = [self.session, *self._headers, *(w.line for w in self._workers)]
        return sum(len(line.tokens) for line in lines) + 2 * len(self._workers) <= self.llm.host.max_model_len

    def _before(self) -> None:
        if self.check_every:
            self._since += sum(len(line.tokens) - len(line.view) for line in self.shared.writers)
        self.result.forwards += 1

    def _after(self, news: list[News]) -> Iterator[WorkerEvent]:
        """What follows from one forward: answers, finished steps, those who leave."""
        of = {n.line: n for n in news}
        ended = []
        for worker in self._workers:
            got = of.get(worker.line)
            if got is None:
                continue
            text = worker.out.push(i for i in got.token_ids if i != self._leave)
            worker.text += text
            worker.step += text
            yield WorkerEvent(worker.number, "token", got.token_ids, text)
            found = self.texts.find_answer(worker.step)
            if found is not None and self._answer is None:
                self._answer, self.result.finished_by = found, worker.number
                yield WorkerEvent(worker.number, "answer", [], found)
            if got.done is not None and got.done.finish_reason == "stop":
                ended.append(worker)
        if self._answer is None and ended:
            yield from self._settle(ended)

    def _settle(self, ended: list[_Worker]) -> Iterator[WorkerEvent]:
        for worker in ended:
            line = worker.line
            if line.tokens[-1] == self._leave:
                worker.left = True
                if self.layout != "contiguous":
                    line.end()
                yield WorkerEvent(worker.number, "leave", [], "")
            elif worker.step.rstrip().endswith(FINAL):
                yield self._next_step(worker)
        self._arrange()
        for worker in ended:
            if not worker.left:
                self._write(worker)

    def _next_step(self, worker: _Worker) -> WorkerEvent:
        t, line = self.texts, worker.line
        worker.steps += 1
        prefix = t.step_prefix.format(name=worker.name, step=worker.steps)
        if self.check_every and self._since >= self.check_every:
            self._since, prefix = 0, prefix + t.check
            self.result.checks += 1
        separator, text = line.tokens[-1], worker.step.removesuffix(t.step_separator)
        if self.layout == "contiguous":
            line.append(prefix)
        else:
            self.shared.move(line, self.session, keep=1)
            line.append([separator]).append(prefix)
        worker.step = t.step_separator + prefix
        self.result.steps.append((worker.number, text))
        return WorkerEvent(worker.number, "step", [], text)

    def _end(self) -> list[int] | None:
        """Write the result; the tokens of the text behind which an answer must be forced, if so."""
        result, t = self.result, self.texts
        tokens, encode = list(self.session.tokens), self.llm.tokenizer.encode
        for worker in self._workers:
            if worker.line.alive and worker.line.tokens:
                rest = [i for i in worker.line.tokens if i != self._leave]
                tokens += rest + ([] if worker.left else encode(t.unfinished))
                worker.text += worker.out.flush()
                result.steps += [] if worker.left else [(worker.number, worker.step)]
        left = all(w.left for w in self._workers)
        result.ended = "answer" if self._answer is not None else "left" if left else "length"
        result.answer, result.usage = self._answer, self.session.usage
        result.workers = [w.text for w in self._workers]
        if self._answer is not None or not self.finisher:
            return None
        end = encode(t.finisher)
        return [*tokens[: self.llm.host.max_model_len - FINISHER_TOKENS - len(end)], *end]

    def _forced(self, out: Any, plain: Session) -> Iterator[WorkerEvent]:
        self.result.finisher_forwards = plain.usage.forwards
        self.result.usage.evaluated += plain.usage.evaluated
        self.result.usage.generated += plain.usage.generated
        self.result.usage.forwards += plain.usage.forwards
        self.result.answer = self.texts.find_answer(self.texts.finisher + out.text)
        if self.result.answer is not None:
            yield WorkerEvent(None, "answer", out.token_ids, self.result.answer)


def collaborate(llm: Any, task: str, **options: Any) -> Result:
    """Solve ``task`` with several workers; options of ``Collaboration``."""
    run = Collaboration(llm, task, **options)
    for _ in run.events():
        pass
    return run.result


async def acollaborate(llm: Any, task: str, **options: Any) -> Result:
    """``collaborate`` for asyncio."""
    run = Collaboration(llm, task, **options)
    async for _ in run.aevents():
        pass
    return run.result
