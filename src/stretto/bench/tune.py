"""``stretto tune``: find what is fastest on the user's own prompts within a quality budget, and keep it as a profile.

Three rounds of a knock-out, each interleaved with plain decoding: every method with its defaults on a few prompts; the
best of them with one option changed at a time; the last few on all prompts. Plain decoding wins unless beaten clearly.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from stretto.bench.arms import Fleet
from stretto.bench.measure import Arm, Item, Track, measure, ratios
from stretto.bench.provenance import provenance, write_json
from stretto.decoding.profiles import FORMAT, fingerprint, profile_path
from stretto.decoding.registry import METHODS, OptionInfo
from stretto.errors import OptionError, PromptError, StrettoError

__all__ = ["tune", "variants"]

MARGIN = 1.05  # a method must be this much faster than plain decoding, in the median ...
STEADY = 0.75  # ... and ahead in this share of the rounds
FEW = 6  # prompts of the first two rounds
KEPT = 3  # methods that get other settings, and settings that reach the last round

Prompt = str | Mapping[str, str]
Progress = Callable[[float, str], None]


def tune(
    model: str, prompts: Sequence[Prompt], *, quality: str | float = "lossless", out: str | Path | None = None,
    methods: str | Sequence[str] = (), options: Mapping[str, Mapping[str, Any]] | None = None, max_tokens: int = 128,
    batch: int = 1, dtype: str = "auto", device: str = "auto", threads: int | None = None,
    deterministic: bool = False, progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the methods on ``prompts`` and write the fastest admissible one as the profile of ``model``.

    ``prompts``: texts, or {"prompt", "answer"}. ``quality`` "lossless": only methods that promise plain decoding's
    text and gave it on every prompt. A number from 0 to 1: what may be lost, in share of right answers where all
    prompts have one, else in likeness to plain decoding's text. ``out``: profile file, default the user's own.
    Returns {"method", "options", "speedup", "rows", "path", ...}.

    Raises PromptError without prompts, OptionError for an impossible budget, InputError for unknown names.
    """
    items = _items(prompts, max_tokens)
    budget = _budget(quality)
    say = progress or (lambda share, text: None)
    say(0.0, f"loading {model}")
    fleet = Fleet(
        model, methods, options=options, twins=False, dtype=dtype, device=device, threads=threads,
        deterministic=deterministic, max_num_seqs=max(batch, 1),
    )
    plain, *others = fleet.arms()
    if budget is None:
        others = [a for a in others if METHODS[a.method].lossless]
    _able(fleet, [plain], items[0], must=[plain.method])
    others = _able(fleet, others, items[0], must=fleet.named)
    contest = _Contest(plain, items, batch, budget, say)
    first = contest.run(others, items[:FEW], 0.05, 0.4)[:KEPT]
    settings = _able(fleet, [a for arm in first for a in variants(arm)], items[0])
    second = contest.run(settings, items[:FEW], 0.4, 0.7)
    ranked = sorted([*first, *second], key=contest.guess, reverse=True)[: KEPT + 1]
    finalists = _able(fleet, [_explicit(a) for a in ranked], items[0])
    best = contest.winner(contest.run(finalists, items, 0.7, 1.0, final=True))
    result = {
        "method": best.method, "options": dict(best.options),
        "speedup": contest.guess(best) if best is not plain else 1.0,
        "quality": quality, "rows": contest.rows, "skipped": fleet.skipped,
        "reason": contest.reason(best),
        "provenance": provenance(
            fleet.llm, prompts=len(items), max_tokens=max_tokens, batch=batch, baseline=plain.label
        ),
    }
    whole = {"format": FORMAT, "model": str(model), "fingerprint": fingerprint(model), **result}
    result["path"] = str(write_json(out or profile_path(model), whole))
    say(1.0, "done")
    return {"model": model, **result}


def variants(arm: Arm, most: int = 4) -> list[Arm]:
    """The arm with one numeric option halved or doubled, within its range; at most ``most`` of them."""
    found = []
    for info in METHODS[arm.method].options:
        for value in _around(info, arm.options.get(info.name, info.default)):
            label = f"{arm.method} {info.name}={value:g}"
            found.append(Arm(arm.llm, arm.model, arm.method, {**arm.options, info.name: value}, label))
    return found[:most]


def _around(info: OptionInfo, value: Any) -> list[int | float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0 or info.high == value == info.low:
        return []
    steps = [value // 2, value * 2] if isinstance(value, int) else [value / 2, value * 2]
    if isinstance(value, float) and info.high is not None and info.high <= 1:
        steps = [value / 2, (1 + value) / 2]
    low, high = info.low if info.low is not None else 0, info.high
    return [s for s in steps if s != value and s > 0 and s >= low and (high is None or s <= high)]


class _Contest:
    """Timed rounds against plain decoding, and who is still admissible. ``rows``: one for every arm and round."""

    def __init__(self, plain: Arm, items: Sequence[Item], batch: int, budget: float | None, say: Progress):
        self.plain, self.batch, self.budget, self._say = plain, batch, budget, say
        self.rows: list[dict[str, Any]] = []
        self._speed: dict[int, float] = {}
        self._steady: dict[int, bool] = {}
        self._scored = all(i.score is not None for i in items)

    def run(
        self, arms: Sequence[Arm], items: Sequence[Item], start: float, end: float, *, final: bool = False
    ) -> list[Arm]:
        """Measure ``arms``; the admissible ones, fastest first."""
        if not arms:
            return []
        groups = [items[i : i + self.batch] for i in range(0, len(items), self.batch)]
        ticks, total = 0, len(groups) * (len(arms) + 1)

        def tick() -> None:
            nonlocal ticks
            ticks += 1
            self._say(start + (end - start) * ticks / total, f"{len(arms)} settings on {len(items)} prompts")

        base, *tracks = measure([self.plain, *arms], groups, batch=self.batch, tick=tick)
        return sorted(
            [t.arm for t in tracks if self._judge(t, base, items, final)], key=self.guess, reverse=True
        )

    def guess(self, arm: Arm) -> float:
        """The latest measured speed-up."""
        return self._speed[id(arm)]

    def winner(self, arms: Iterable[Arm]) -> Arm:
        return next((a for a in arms if self.guess(a) >= MARGIN and self._steady[id(a)]), self.plain)

    def reason(self, best: Arm) -> str:
        if best is not self.plain:
            return f"{best.label} was {self.guess(best):.2f} times as fast as plain decoding"
        if not any(r["admissible"] for r in self.rows):
            return "no method kept the quality asked for: plain decoding stays"
        return f"no admissible method was at least {MARGIN:.2f} times as fast as plain decoding: it stays"

    def _judge(self, track: Track, base: Track, items: Sequence[Item], final: bool) -> bool:
        found = ratios(base.rounds, track.rounds)
        speed = statistics.median(found)
        equal = [
            a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in zip(track.outputs, base.outputs, strict=True)
        ]
        kept = _score(track, items) - _score(base, items) if self._scored else _likeness(track, base) - 1
        good = all(equal) if self.budget is None else kept >= -self.budget - 1e-9
        self._speed[id(track.arm)] = speed
        self._steady[id(track.arm)] = sum(r > 1 for r in found) >= STEADY * len(found)
        self.rows.append({
            "method": track.arm.method, "options": dict(track.arm.options), "n": len(items), "speedup": speed,
            "speedup_low": min(found), "speedup_high": max(found), "equal": statistics.mean(equal),
            "quality_change": kept, "admissible": good, "final": final,
        })
        return good


def _explicit(arm: Arm) -> Arm:
    """The same setting with every default written out: it stays what was measured, and starts without memory."""
    defaults = {o.name: o.default for o in METHODS[arm.method].options if o.default is not None}
    return Arm(arm.llm, arm.model, arm.method, {**defaults, **arm.options}, arm.label)


def _able(fleet: Fleet, arms: Sequence[Arm], item: Item, must: Sequence[str] = ()) -> list[Arm]:
    """The arms that can decode half a prompt, their warm-up; a failure is skipped, or raised if it is in ``must``."""
    half = replace(item, prompt=item.prompt[: len(item.prompt) // 2 + 1])
    out = []
    for arm in arms:
        try:
            arm.generate([half])
        except StrettoError as error:
            if arm.method in must:
                raise
            fleet.skip(arm.model, arm.label, error)
            continue
        out.append(arm)
    return out


def _items(prompts: Sequence[Prompt], max_tokens: int) -> list[Item]:
    if isinstance(prompts, str) or not prompts:
        raise PromptError("tune needs a list of prompts, one or more: give a file with one prompt a line")
    out = []
    for prompt in prompts:
        text = prompt if isinstance(prompt, str) else prompt.get("prompt")
        if not isinstance(text, str) or not text:
            raise PromptError(f"a prompt must be a text, or an object with 'prompt' and 'answer'; given: {prompt!r}")
        answer = None if isinstance(prompt, str) else prompt.get("answer")
        out.append(Item("own", "own", text, max_tokens, _matcher(answer) if answer is not None else None))
    return out


def _matcher(answer: str) -> Callable[[str], float]:
    return lambda text: float(text.strip() == answer.strip())


def _budget(quality: str | float) -> float | None:
    if quality == "lossless":
        return None
    try:
        budget = float(quality)
    except ValueError:
        budget = -1.0
    if not 0 <= budget <= 1:
        raise OptionError("quality", quality, "lossless, or the share from 0 to 1 that may be lost")
    return budget


def _score(track: Track, items: Sequence[Item]) -> float:
    return statistics.mean(i.score(o.outputs[0].text) for i, o in zip(items, track.outputs, strict=True) if i.score)


def _likeness(track: Track, base: Track) -> float:
    """Mean share of tokens that two texts have in common, in order."""
    pairs = zip(track.outputs, base.outputs, strict=True)
    return statistics.mean(
        SequenceMatcher(None, a.outputs[0].token_ids, b.outputs[0].token_ids, autojunk=False).ratio() for a, b in pairs
    )
