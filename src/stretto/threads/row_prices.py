"""What a token costs a model that is written by chains together, and one that is only scored: what ATTS lives on.

A turn of k chains: the draft writes c tokens for each, the target scores them, and for a share alpha of the chains the
target writes c more, which the draft reads. The target alone writes all of them. With the draft on one core and the
target on another, and nothing lost between them,

    gain <= (1 + alpha) W / max(S + alpha W, w + alpha s)

W, S: the target's seconds of a token written, scored; w, s: the draft's. (Chunks of a turn are taken to be as long.)
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from stretto.engine.params import SamplingParams
from stretto.threads.atts import atts
from stretto.threads.chains import Setting
from stretto.threads.conformal import Verdict
from stretto.threads.homes import Home, at_home

__all__ = ["Replayed", "best_gain", "prices", "replayed"]


def prices(llm: Any, *, k: int = 8, chunk: int = 12, prompt: int = 96, turns: int = 3) -> dict[str, float]:
    """{"written", "scored"}: seconds a token of ``k`` chains behind ``prompt`` tokens, drawn at temperature 0.8, or
    given and scored; the least of ``turns``."""
    params = SamplingParams(max_tokens=chunk, temperature=0.8, seed=1, ignore_eos=True)
    start_of = [7 + i % 500 for i in range(prompt)]

    async def once(home: Home) -> tuple[float, float]:
        session = await home.open(start_of, 2 * k)
        try:
            threads = await home.call(lambda: session.fork(2 * k))
            start = time.perf_counter()
            written = await home.gen_each([(t, params) for t in threads[:k]])
            middle = time.perf_counter()
            await home.score_all([(t, g.token_ids) for t, g in zip(threads[k:], written, strict=True)])
            return middle - start, time.perf_counter() - middle
        finally:
            await home.end(session)

    async def all_turns(home: Home) -> list[tuple[float, float]]:
        return [await once(home) for _ in range(turns + 1)][1:]  # the first one makes kernels

    with at_home((llm, 2 * k)) as (home,):
        written, scored = (min(t) / (k * chunk) for t in zip(*asyncio.run(all_turns(home)), strict=True))
    return {"written": written, "scored": scored}


def best_gain(draft: Mapping[str, float], target: Mapping[str, float], alpha: float) -> float:
    """The bound above: how many times faster than the target alone the pair can be at most."""
    theirs = target["scored"] + alpha * target["written"]
    return (1 + alpha) * target["written"] / max(theirs, draft["written"] + alpha * draft["scored"])


class Replayed:
    """A tester that takes over ``over`` of every ``of`` chunks of a turn, whatever they score."""

    def __init__(self, over: int, of: int):
        self.over, self.of, self.seen = over, of, Counter()

    def test(self, score: float, turn: int, u: float | None = None) -> Verdict:
        self.seen[turn] += 1
        reject = self.seen[turn] * self.over % self.of < self.over
        return Verdict(score, math.nan, self.over / self.of, reject, 0)


def replayed(draft: Any, target: Any, prompt: str, *, rounds: int = 2, turns: int = 4) -> dict[str, Any]:
    """Real runs of 8 chains with decisions that are replayed (3 of 8 chunks of 16 tokens are taken over): tokens of
    text a second, asynchronous, in step, and by the target alone, in turns. Says nothing of accuracy."""
    setting = Setting(k=8, alpha=3 / 8, turns=turns, chunk=16, draft_limit=64, target_limit=64)
    ways: dict[str, dict[str, Any]] = {
        "atts": {}, "in step": {"variant": "sync"}, "target": {"variant": "target", "turns": math.ceil(turns * 11 / 8)},
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found = atts(
                draft, target, [prompt], setting=setting, calibration=Replayed(3, 8), extract=lambda text: None, **way
            )
            written = found.tokens["draft"] + found.tokens["target"]
            rates[name].append(written / found.seconds["wall"])
    best = {name: max(found) for name, found in rates.items()}
    return {
        "tokens a second": best, "atts / target": best["atts"] / best["target"],
        "atts / in step": best["atts"] / best["in step"],
    }
