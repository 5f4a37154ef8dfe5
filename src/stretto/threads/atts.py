"""Many chains a question: a draft writes, the target only scores each chunk, a conformal test decides who continues.

One turn of one chain: (1) the draft samples a chunk c behind the history; (2) the target evaluates c behind the
history that it has cached, nothing else: s = exp(-mean log p_target(c)); (3) if p(s) <= alpha the target writes a
chunk, and then the draft goes on behind it. A chain waits for nobody: the test needs scores that were set aside, not
those of its peers. Both models hold every history; a chunk that is dropped gives its slots back. (arXiv 2509.15148.)
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stretto.account import Generated
from stretto.engine.params import SamplingParams
from stretto.errors import CapacityError, OptionError, PromptError
from stretto.models.adapter import Base
from stretto.session import Session, Thread
from stretto.threads.atts_variants import chains_in_step, chains_of_one, mean_surprise
from stretto.threads.chains import Answered, Chain, Scaled, Setting, Turn, answer_in
from stretto.threads.conformal import Calibration, Online, Tester, Verdict
from stretto.threads.homes import Home, at_home, together

__all__ = ["Chunk", "Line", "Run", "aatts", "atts", "calibrate", "fingerprint"]

OTHER = 1 << 40  # the target's seed is another one: both would draw the same noise
ROOM = 64  # slots that a request must find free beside its own


@dataclass(frozen=True, slots=True)
class Chunk:
    """``over``: it ends the text; ``text``: without stop strings and special tokens."""

    ids: list[int]
    text: str
    over: bool
    logprobs: list[dict[int, float]] | None


class Line:
    """One chain: its history on the drafting model (``mine``) and on the target (``theirs``, None for one model)."""

    def __init__(self, run: Run, index: int, prompt: str, mine: Thread, theirs: Thread | None):
        self.run, self.index, self.mine, self.theirs = run, index, mine, theirs
        self.chain = Chain(index)
        self.start = len(mine.tokens)
        digest = hashlib.blake2b(prompt.encode(), digest_size=4).digest()
        self.seed = run.setting.seed + int.from_bytes(digest, "little")
        self.temperature = run.setting.temperature

    async def draw(self) -> Chunk:
        """The drafting model goes on."""
        return self.chunk(await self.run.draft.gen(self.mine, self.params()), self.run.draft)

    async def score(self, chunk: Chunk) -> float:
        """exp of the mean negative log-probability of the chunk's tokens under the target, which keeps them cached."""
        assert self.theirs is not None
        return mean_surprise(await self.run.target.score(self.theirs, self.run.to_target(chunk)))

    async def take_over(self, chunk: Chunk) -> Chunk:
        """The target writes behind the draft's chunk or in its place; the draft reads it."""
        assert self.theirs is not None
        if self.run.replaces(chunk):
            await self.drop(chunk)
        new = self.chunk(await self.run.target.gen(self.theirs, self.params(target=True)), self.run.target)
        await self.run.draft.call(lambda: self.mine.append(self.run.to_draft(new)))
        return new

    async def drop(self, chunk: Chunk) -> None:
        """Forget the draft's last chunk on both models."""
        mine, theirs = self.mine, self.theirs
        await self.run.draft.call(lambda: mine.truncate(len(mine.tokens) - len(chunk.ids)))
        if theirs is not None:
            length = len(theirs.tokens) - len(self.run.to_target(chunk))
            await self.run.target.call(lambda: theirs.truncate(length))

    def params(self, *, target: bool = False) -> SamplingParams:
        s, salt = self.run.setting, OTHER if target else 0
        return SamplingParams(
            max_tokens=s.chunk, temperature=self.temperature, seed=self.seed ^ salt, stop=list(s.stop),
            logprobs=0 if s.variant in ("reject", "fork") else None,
        )

    def room(self) -> bool:
        """Whether the draft's next chunk and the target's fit the contexts."""
        need = self.run.setting.chunk * 2 + 1
        lines = [(self.mine, self.run.draft), (self.theirs, self.run.target)]
        return all(t is None or len(t.tokens) + need <= h.llm.max_model_len for t, h in lines)

    def note(self, turn: Turn) -> None:
        self.chain.turns.append(turn)

    def read(self, chunk: Chunk) -> bool:
        """Take ``chunk`` for an end if it is one."""
        own = self.mine.tokens[self.start :]
        text = self.run.draft.llm.tokenizer.decode(own, skip_special_tokens=True)
        self.chain.answer = self.run.extract(text + ("\n" if chunk.over else ""))
        if self.chain.answer is not None:
            self.chain.ended = "answer"
        elif chunk.over:
            self.chain.ended = "end"
        elif not chunk.text.strip():
            self.chain.ended = "empty"
        else:
            return False
        return True

    def close(self) -> Chain:
        self.chain.token_ids = self.mine.tokens[self.start :]
        self.chain.text = self.run.draft.llm.tokenizer.decode(self.chain.token_ids, skip_special_tokens=True)
        return self.chain

    def chunk(self, g: Generated, home: Home) -> Chunk:
        over = bool(g.token_ids) and g.token_ids[-1] in home.llm.host.stop_ids
        return Chunk(g.token_ids, g.text, over, g.logprobs)


class Run:
    """One setting on one pair of models (``target`` is ``draft`` where one model is enough)."""

    def __init__(
        self, draft: Home, target: Home, setting: Setting, tester: Tester | None,
        extract: Callable[[str], str | None],
    ):
        self.draft, self.target, self.setting, self.tester, self.extract = draft, target, setting, tester, extract
        self.notes: list[str] = []
        self.pair = setting.variant in ("atts", "sync")
        a, b = draft.llm.tokenizer.inner, target.llm.tokenizer.inner
        self.alike = a is b or a.get_vocab() == b.get_vocab()
        if not self.alike:
            self.notes.append("draft and target have different tokenizers: chunks are handed over as text, read anew")

    def to_target(self, chunk: Chunk) -> list[int]:
        """The chunk's tokens as the target reads them; at least one."""
        return chunk.ids if self.alike else self._anew(chunk, self.draft, self.target)

    def to_draft(self, chunk: Chunk) -> list[int]:
        return chunk.ids if self.alike else self._anew(chunk, self.target, self.draft)

    def _anew(self, chunk: Chunk, source: Home, reader: Home) -> list[int]:
        ids = reader.llm.tokenizer.encode(source.llm.tokenizer.decode(chunk.ids, skip_special_tokens=True))
        return [*ids, reader.llm.host.stop_ids[0]] if chunk.over or not ids else ids

    def replaces(self, chunk: Chunk) -> bool:
        """Whether the target writes in the place of a rejected chunk; nothing can stand behind the end of a text."""
        return self.setting.on_reject == "replace" or chunk.over or not chunk.text.strip()

    async def questions(self, prompts: Seq[Any]) -> list[Answered]:
        """All of them, as many at the same time as the pools hold."""
        gate = asyncio.Semaphore(self._at_once(prompts))

        async def one(prompt: Any) -> Answered:
            async with gate:
                return await self.question(prompt)

        return await together([one(p) for p in prompts])

    async def question(self, prompt: Any) -> Answered:
        """Open it on both models, run its chains, close it."""
        start, k = time.perf_counter(), self.setting.k
        homes = [self.draft, self.target] if self.pair else [self.draft]
        sessions: list[tuple[Home, Session]] = []
        try:
            for home in homes:
                most = 2 * k if self.pair else k * (self.setting.turns + 2) * 2
                sessions.append((home, await home.open(prompt, most)))
            lines = await self.lines(prompt, sessions, k)
            if self.setting.variant == "sync":
                chains = await chains_in_step(self, lines)
            elif not self.pair:
                chains = await chains_of_one(self, lines)
            else:
                tester = self.tester or await self._own(prompt, sessions)
                chains = await together([self.chain(line, tester) for line in lines])
        finally:
            for home, session in sessions:
                await asyncio.shield(home.end(session))
        return Answered(prompt if isinstance(prompt, str) else str(prompt), chains, time.perf_counter() - start)

    async def lines(self, prompt: Any, sessions: Seq[tuple[Home, Session]], k: int) -> list[Line]:
        """``k`` forks of the question on each model."""
        forks = [await home.call(lambda s=session: s.fork(k)) for home, session in sessions]
        theirs = forks[1] if len(forks) > 1 else [None] * k
        return [Line(self, i, str(prompt), mine, other) for i, (mine, other) in enumerate(zip(forks[0], theirs))]

    async def chain(self, line: Line, tester: Tester) -> Chain:
        """Draft, score, test, and where rejected the target: until an answer, an end, or T turns."""
        start = time.perf_counter()
        for number in range(self.setting.turns):
            if not line.room():
                line.chain.ended = "context"
                break
            chunk = await line.draw()
            verdict = tester.test(await line.score(chunk), number)
            turn = judged(number, chunk, verdict)
            line.note(turn)
            if verdict.reject:
                chunk = await line.take_over(chunk)
                turn.target = len(chunk.ids)
            if line.read(chunk):
                break
        line.chain.seconds = time.perf_counter() - start
        chain = line.close()
        await self.draft.call(line.mine.end)
        assert line.theirs is not None
        await self.target.call(line.theirs.end)
        return chain

    async def _own(self, prompt: Any, sessions: Seq[tuple[Home, Session]]) -> Calibration:
        """Conditional coverage: the scores of k first chunks of this question, drawn for that and for nothing else."""
        lines = await self.lines(prompt, sessions, self.setting.k)
        for line in lines:
            line.seed += OTHER * 2

        async def first(line: Line) -> float:
            return await line.score(await line.draw())

        scores = await together([first(line) for line in lines])
        for line in lines:
            await self.draft.call(line.mine.end)
            assert line.theirs is not None
            await self.target.call(line.theirs.end)
        finite = [s for s in scores if math.isfinite(s)]
        return Calibration({0: finite}, self.setting.alpha, firsts=True)

    def _at_once(self, prompts: Seq[Any]) -> int:
        """How many questions fit both pools at their longest. CapacityError where not even one does."""
        most = self.setting.at_once or len(prompts)
        s = self.setting
        for home in [self.draft, self.target]:
            longest = max(len(home.llm.tokenizer.encode(p)) if isinstance(p, str) else len(p) for p in prompts)
            if longest + 2 * s.chunk + 1 > home.llm.max_model_len:
                raise PromptError(
                    f"the longest question has {longest} tokens and a turn may need {2 * s.chunk + 1}: together at "
                    f"most {home.llm.max_model_len} (max_model_len); shorten the question or lower chunk"
                )
            own = min(2 * s.turns * s.chunk, home.llm.max_model_len - longest) + 1
            need, have = longest + 2 * s.k * own, home.llm.runner.alloc.total - ROOM
            if need > have:
                raise CapacityError(
                    f"{s.k} chains of up to {own} tokens may need {need} cache slots, there are {have}: raise "
                    "kv_cache_tokens, or lower k, turns or chunk"
                )
            most = min(most, have // need)
        return most


def judged(number: int, chunk: Chunk, verdict: Verdict) -> Turn:
    p = None if math.isnan(verdict.p) else verdict.p
    return Turn(
        number, len(chunk.ids), 0, verdict.score, p, verdict.alpha, verdict.reject, verdict.calibrated,
    )


def atts(
    draft: Any, target: Any, questions: Seq[Any], *, setting: Setting | None = None,
    calibration: str | Path | Tester = "online", extract: Callable[[str], str | None] = answer_in,
    template: str = "", **values: Any,
) -> Scaled:
    """Scale ``questions`` (prompts, chat template included) over two LLMs; ``values`` are fields of ``Setting``.

    ``calibration``: "online" (a reservoir for each turn), a file that ``calibrate`` made, or a tester of conformal.py;
    with coverage="conditional" every question calibrates itself. One-model variants take the draft (variant "target":
    the target). ``template``: what stands around a question, part of the fingerprint.
    Raises InputError for what cannot be used, CapacityError where the chains do not fit.
    """
    return asyncio.run(aatts(
        draft, target, questions, setting=setting, calibration=calibration, extract=extract, template=template,
        **values,
    ))


async def aatts(
    draft: Any, target: Any, questions: Seq[Any], *, setting: Setting | None = None,
    calibration: str | Path | Tester = "online", extract: Callable[[str], str | None] = answer_in,
    template: str = "", **values: Any,
) -> Scaled:
    """``atts`` for a running event loop."""
    made = replace(setting, **values) if setting is not None else Setting(**values)
    if not len(questions) or isinstance(questions, str):
        raise PromptError("questions must be a list of at least one prompt")
    draft = target if made.variant == "target" else draft
    target = target if made.variant in ("atts", "sync") else draft
    tester = _tester(made, calibration, lambda: fingerprint(draft, target, made, template))
    with at_home((draft, made.draft_limit), (target, made.target_limit)) as (mine, theirs):
        run = Run(mine, theirs, made, tester, extract)
        start = time.perf_counter()
        answered = await run.questions(questions)
        wall = time.perf_counter() - start
        return Scaled(made, answered, _seconds(run, wall), _tokens(run), run.notes + _remarks(answered))


def _tester(setting: Setting, calibration: Any, made_with: Callable[[], dict[str, Any]]) -> Tester | None:
    """What judges; None where every question makes its own, or nothing is tested."""
    if setting.variant in ("sync", "draft", "target"):
        return None
    if setting.coverage == "conditional":
        if calibration != "online":
            raise OptionError("calibration", str(calibration), "nothing with coverage='conditional': it makes its own")
        return None if setting.variant == "atts" else Online(setting.alpha)
    if calibration == "online":
        return Online(setting.alpha)
    if isinstance(calibration, (str, Path)):
        return Calibration.load(calibration, setting.alpha, made_with())
    return calibration


def _seconds(run: Run, wall: float) -> dict[str, float]:
    return {"wall": wall, "draft": run.draft.seconds} | (
        {"target": run.target.seconds} if run.target is not run.draft else {}
    )


def _tokens(run: Run) -> dict[str, int]:
    mine, theirs = run.draft, run.target
    if theirs is mine:
        return {"draft": mine.generated, "target": 0, "scored": mine.scored}
    return {"draft": mine.generated, "target": theirs.generated, "scored": theirs.scored}


def _remarks(answered: Seq[Answered]) -> list[str]:
    turns = [t for q in answered for c in q.chains for t in c.turns]
    loose = sum(not t.calibrated for t in turns)
    if not loose:
        return []
    return [f"{loose} of {len(turns)} decisions were uncalibrated: too few scores of their turn"]


class _Listener:
    """Rejects nothing, remembers all."""

    def __init__(self) -> None:
        self.scores: dict[int, list[float]] = {}

    def test(self, score: float, turn: int, u: float | None = None) -> Verdict:
        if math.isfinite(score):
            self.scores.setdefault(turn, []).append(score)
        return Verdict(score, math.nan, 0.0, False, 0, True)


def calibrate(
    draft: Any, target: Any, questions: Seq[Any], *, setting: Setting | None = None, turns: int = 1,
    template: str = "", **values: Any,
) -> Calibration:
    """Score the draft's first ``turns`` chunks of k chains a question; set them aside as a calibration (``save`` it).

    ``turns`` = 1 is the published way. The questions must not be those that are judged by it later.
    """
    made = replace(setting, **values) if setting is not None else Setting(**values)
    heard = _Listener()
    atts(draft, target, questions, setting=replace(made, variant="atts", turns=turns, coverage="marginal"),
         calibration=heard)
    return Calibration(heard.scores, made.alpha, fingerprint(draft, target, made, template))


def fingerprint(draft: Any, target: Any, setting: Setting, template: str = "") -> dict[str, Any]:
    """What scores depend on: both models' weights, the chunk, the temperature, the template around a question."""
    text = hashlib.blake2b(template.encode(), digest_size=8).hexdigest()
    return {
        "draft": Base.of(draft.model).fingerprint, "target": Base.of(target.model).fingerprint, "chunk": setting.chunk,
        "stop": list(setting.stop), "temperature": setting.temperature, "template": text,
    }
