"""What ATTS is compared with, and its relatives with one model: chains in step, alone, drawn again, forked.

In step: every turn all chains of a question draft, all wait for the slowest, all are scored together and ranked, and
the worst ones are taken over together. Drawn again ("reject"): a rejected chunk is drawn up to three times more and the
best of them kept. Forked ("fork"): a rejected chain goes on as a fork of the best one that has not ended.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from stretto.session import Thread
from stretto.threads.chains import Chain, Turn
from stretto.threads.homes import together

if TYPE_CHECKING:
    from stretto.threads.atts import Chunk, Line, Run

__all__ = ["chains_in_step", "chains_of_one", "mean_surprise"]

TRIES = 3  # times that a rejected chunk is drawn again
BONUS = 0.01  # a turn already written is worth that much of the mean score
HEAT = 0.1  # what a fork's temperature is raised by


async def chains_in_step(run: Run, lines: list[Line]) -> list[Chain]:
    """The synchronous baseline with a fixed budget: the worst round(alpha n) of n chains, every turn."""
    start, alive = time.perf_counter(), list(lines)
    for number in range(run.setting.turns):
        for line in [x for x in alive if not x.room()]:
            line.chain.ended = "context"
            alive.remove(line)
        if not alive:
            break
        made = await run.draft.gen_each([(x.mine, x.params()) for x in alive])
        chunks = [x.chunk(g, run.draft) for x, g in zip(alive, made, strict=True)]
        pairs = [(x.theirs, run.to_target(c)) for x, c in zip(alive, chunks, strict=True)]
        scores = [mean_surprise(laws) for laws in await run.target.score_all(pairs)]
        order = sorted(range(len(alive)), key=lambda i: (-scores[i], alive[i].index))
        worst = order[: round(run.setting.alpha * len(alive))]
        for i, line in enumerate(alive):
            line.note(Turn(number, len(chunks[i].ids), 0, scores[i], None, run.setting.alpha, i in worst))
        if worst:
            for i in worst:
                if run.replaces(chunks[i]):
                    await alive[i].drop(chunks[i])
            new = await run.target.gen_each([(alive[i].theirs, alive[i].params(target=True)) for i in worst])
            for i, g in zip(worst, new, strict=True):
                chunks[i] = alive[i].chunk(g, run.target)
                alive[i].chain.turns[-1].target = len(chunks[i].ids)
                line, ids = alive[i].mine, run.to_draft(chunks[i])
                await run.draft.call(lambda line=line, ids=ids: line.append(ids))
        for line, chunk in zip(list(alive), chunks, strict=True):
            if line.read(chunk):
                alive.remove(line)
                line.chain.seconds = time.perf_counter() - start
    return [line.close() for line in lines]


def mean_surprise(laws: list[float]) -> float:
    """exp(-mean log p): the perplexity of a chunk; infinite where a token is impossible."""
    return math.exp(min(700.0, -sum(laws) / len(laws))) if all(map(math.isfinite, laws)) else math.inf


async def chains_of_one(run: Run, lines: list[Line]) -> list[Chain]:
    """Variants with one model: draft and target (nothing is tested), reject, fork."""
    peers = _Peers(run, lines)
    return await together([_alone(run, line, peers) for line in lines])


async def _alone(run: Run, line: Line, peers: _Peers) -> Chain:
    start = time.perf_counter()
    for number in range(run.setting.turns):
        if not line.room():
            line.chain.ended = "context"
            break
        chunk = await line.draw()
        turn = Turn(number, len(chunk.ids))
        answered = run.extract(chunk.text + "\n") is not None
        if run.setting.variant == "reject" and not answered:
            chunk = await _again(run, line, chunk, turn)
        forked = run.setting.variant == "fork" and not answered and await peers.moved(line, chunk, turn)
        line.note(turn)
        if not forked and line.read(chunk):
            break
        await peers.rest(line)
    peers.gone(line)
    line.chain.seconds = time.perf_counter() - start
    return line.close()


def own_score(chunk: Chunk) -> float:
    """The chunk's perplexity under the model that wrote it."""
    return mean_surprise([law[t] for t, law in zip(chunk.ids, chunk.logprobs or [], strict=True)])


async def _again(run: Run, line: Line, chunk: Chunk, turn: Turn) -> Chunk:
    """Draw while rejected, at most ``TRIES`` times more; the try with the lowest score stays."""
    assert run.tester is not None
    verdict = run.tester.test(own_score(chunk), turn.number)
    turn.score, turn.p, turn.alpha = verdict.score, verdict.p, verdict.alpha
    turn.rejected, turn.calibrated = verdict.reject, verdict.calibrated
    best, kept = chunk, True
    while verdict.reject and turn.tries <= TRIES:
        await line.drop(chunk) if kept else None
        chunk, kept = await line.draw(), True
        turn.tries += 1
        turn.draft += len(chunk.ids)
        verdict = run.tester.test(own_score(chunk), turn.number)
        if own_score(chunk) < own_score(best):
            best = chunk
    if best is not chunk:
        await line.drop(chunk)
        await run.draft.call(lambda: line.mine.append(best.ids))
    return best


class _Peers:
    """The chains of one question: where each rests between two chunks, and how well it has done."""

    def __init__(self, run: Run, lines: list[Line]):
        self.run, self.forks = run, run.setting.variant == "fork"
        self.scores: dict[Line, list[float]] = {line: [] for line in lines}
        self.at: dict[Line, Thread] = {}

    async def rest(self, line: Line) -> None:
        """Remember this place as one that others may go on from: slot numbers, no keys."""
        if self.forks:
            self.at[line] = (await self.run.draft.call(lambda: line.mine.fork(1)))[0]

    def gone(self, line: Line) -> None:
        self.at.pop(line, None)

    async def moved(self, line: Line, chunk: Chunk, turn: Turn) -> bool:
        """Where the chunk is rejected, the line goes on as a fork of the best other one that has not ended."""
        assert self.run.tester is not None
        verdict = self.run.tester.test(own_score(chunk), turn.number)
        turn.score, turn.p, turn.alpha = verdict.score, verdict.p, verdict.alpha
        turn.rejected, turn.calibrated = verdict.reject, verdict.calibrated
        self.scores[line].append(verdict.score)
        others = [x for x in self.at if x is not line and self.scores[x]]
        if not verdict.reject or not others:
            return False
        best = min(others, key=lambda x: (self._worth(x), x.index))
        place = self.at[best]
        line.mine = (await self.run.draft.call(lambda: place.fork(1)))[0]
        self.scores[line] = list(self.scores[best])
        line.temperature = self.run.setting.temperature + HEAT
        return True

    def _worth(self, line: Line) -> float:
        found = self.scores[line]
        return sum(found) / len(found) - BONUS * len(found)
