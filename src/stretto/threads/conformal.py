"""Conformal tests of scores: whether a new score is among the worst, given scores that it is exchangeable with.

    p = (1 + #{i: s_i >= s}) / (n + 1),   reject iff p <= alpha          (higher scores are worse)

If the n + 1 scores are exchangeable, P(reject) <= alpha, and it is floor(alpha (n + 1)) / (n + 1) where they are
distinct; with random tie breaking p is uniform on the grid k / (n + 1). A test looks at nobody else, so nobody waits.
(ATTS, arXiv 2509.15148; fixed sequences: conformalized ordinal classification, arXiv 2404.16610.)
"""

from __future__ import annotations

import bisect
import json
import math
from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from stretto.errors import InputError, OptionError

__all__ = [
    "Bucket", "Calibration", "Online", "Tester", "Verdict", "check_alpha", "fixed_sequence", "p_value", "rejects",
]

Bucket = Literal["turn", "log", "one"]
SLACK = 1e-9  # alpha (n + 1) is a product of floats


@dataclass(frozen=True, slots=True)
class Verdict:
    """``p`` among ``n`` scores; ``calibrated``: those were enough, and of this turn. p is NaN where there was none."""

    score: float
    p: float
    alpha: float
    reject: bool
    n: int
    calibrated: bool = True


class Tester(Protocol):
    """What judges chunks: ``test`` one score of turn ``turn`` (from 0), then learn from it or not."""

    def test(self, score: float, turn: int, u: float | None = None) -> Verdict: ...


def check_alpha(alpha: float, n: int | None = None) -> None:
    """OptionError outside [0, 1]; InputError where ``n`` scores can never lead to a rejection."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise OptionError("alpha", alpha, "a number from 0 to 1, the share of chunks that the target may take over")
    if n is not None and alpha > 0 and alpha * (n + 1) < 1 - SLACK:
        least = math.ceil(1 / alpha - 1 - SLACK)
        raise InputError(
            f"{n} calibration scores can never reject at alpha={alpha}: alpha (n + 1) must be at least 1; give at "
            f"least {least} scores, or alpha from {math.ceil(1000 / (n + 1)) / 1000}"
        )


def p_value(ordered: Seq[float], score: float, u: float | None = None) -> float:
    """p of ``score`` among ``ordered`` (ascending). ``u`` uniform in (0, 1): ties are broken at random by it."""
    return _rank(ordered, score, u) / (len(ordered) + 1)


def rejects(ordered: Seq[float], score: float, alpha: float, u: float | None = None) -> bool:
    """p <= alpha, in whole numbers; an infinite or undefined score is worse than all, unless nothing is rejected."""
    if not score < math.inf:
        return alpha > 0
    return _rank(ordered, score, u) <= alpha * (len(ordered) + 1) + SLACK


def _rank(ordered: Seq[float], score: float, u: float | None) -> int:
    if math.isnan(score):
        score = math.inf
    n, above = len(ordered), bisect.bisect_right(ordered, score)
    if u is None:
        return 1 + n - bisect.bisect_left(ordered, score)
    ties = above - bisect.bisect_left(ordered, score)
    return 1 + (n - above) + min(ties, int(u * (ties + 1)))


def fixed_sequence(
    tester: Tester, scores: Seq[float], turn: int, *, order: Seq[int] | None = None, most: int | None = None,
) -> list[int]:
    """Which chains of one turn are taken over: tested in ``order`` up to the first that is not rejected.

    With an order that was fixed before these scores were seen (say, by those of earlier turns), the chance of any false
    rejection among exchangeable chains is at most alpha, without a correction. None = from the worst score on: the
    accepted ones are then the contiguous best part, alpha holds for every chain, not for all together. ``most``: a
    budget of take-overs.
    """
    if order is None:
        order = sorted(range(len(scores)), key=lambda i: (-_worst(scores[i]), i))
    elif sorted(order) != list(range(len(scores))):
        raise OptionError("order", list(order), f"the numbers 0 to {len(scores) - 1} in some order")
    out: list[int] = []
    for i in order:
        if (most is not None and len(out) >= most) or not tester.test(scores[i], turn).reject:
            break
        out.append(i)
    return out


def _worst(score: float) -> float:
    return math.inf if math.isnan(score) else score


@dataclass(frozen=True)
class Calibration:
    """Scores that were set aside: a list a turn (or one for all turns), and what they were made with.

    ``fingerprint``: model pair, chunk length, template: a file made with others is refused. A turn without scores of
    its own is judged by the nearest one that has some, which is said (``Verdict.calibrated``); with ``firsts`` all
    turns are judged by the first, without a word, as the published code does.
    """

    scores: Mapping[int, Seq[float]]
    alpha: float = 0.4
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    firsts: bool = False

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        found = {int(t): sorted(float(s) for s in v) for t, v in self.scores.items() if len(v)}
        if not found or (self.firsts and 0 not in found):
            raise InputError("a calibration without scores: run chains of the draft and score their chunks first")
        for turn, values in found.items():
            bad = [v for v in values if not math.isfinite(v)]
            if bad:
                raise InputError(f"the calibration of turn {turn} holds {bad[0]}: every score must be a finite number")
            check_alpha(self.alpha, len(values))
        object.__setattr__(self, "scores", found)

    def test(self, score: float, turn: int, u: float | None = None) -> Verdict:
        at = 0 if self.firsts else min(self.scores, key=lambda t: (abs(t - turn), t))
        ordered = self.scores[at]
        reject = rejects(ordered, score, self.alpha, u)
        return Verdict(score, p_value(ordered, score, u), self.alpha, reject, len(ordered), self.firsts or at == turn)

    def save(self, path: str | Path) -> None:
        """One JSON file, written whole or not at all."""
        path = Path(path)
        data = {"fingerprint": dict(self.fingerprint), "scores": {str(t): list(v) for t, v in self.scores.items()}}
        part = path.with_name(path.name + ".partial")
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        part.rename(path)

    @classmethod
    def load(
        cls, path: str | Path, alpha: float, fingerprint: Mapping[str, Any], *, firsts: bool = False
    ) -> Calibration:
        """Raises InputError for a file that is none, was made with something else, or holds no usable scores."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            made, scores = dict(data["fingerprint"]), {int(t): list(v) for t, v in data["scores"].items()}
            numbers = all(isinstance(s, (int, float)) and not isinstance(s, bool) for v in scores.values() for s in v)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{path} is no calibration file: {e!r}; make one with --calibrate FILE") from None
        if not numbers:
            raise InputError(f"{path} holds scores that are no numbers: make it again with --calibrate FILE")
        for key in sorted({*made, *fingerprint}):
            if made.get(key) != fingerprint.get(key):
                raise InputError(
                    f"{path} was made with {key} {made.get(key)!r}, this run has {fingerprint.get(key)!r}: scores of "
                    "other models, chunks or templates say nothing here; make a calibration of your own"
                )
        return cls(scores, alpha, made, firsts)


@dataclass(slots=True)
class _Reservoir:
    """The last scores of one bucket, in order of arrival and ordered by size; ``alpha`` moves where it may."""

    alpha: float
    recent: deque[float] = field(default_factory=deque)
    ordered: list[float] = field(default_factory=list)

    def add(self, score: float, window: int) -> None:
        if not math.isfinite(score):
            return
        self.recent.append(score)
        bisect.insort(self.ordered, score)
        if len(self.recent) > window:
            self.ordered.pop(bisect.bisect_left(self.ordered, self.recent.popleft()))


class Online:
    """Calibration that goes on: a reservoir for each turn (or power of two of turns), fed with every score *after* the
    decision on it. Scores of later turns are no draws from the first turn's law, so each turn is its own judge.

    ``warm``: n0, scores that a reservoir must have; before, the nearest one that has them lends its own, and where
    there is none nothing is rejected (but all at alpha = 1); such decisions are marked. ``window``: newest scores that
    count.
    ``gamma`` > 0 moves the level, alpha <- alpha + gamma (target - rejected): it keeps the long-run rate without
    exchangeability (adaptive conformal inference). ``start``: scores by turn to begin with.
    """

    def __init__(
        self, alpha: float = 0.4, *, bucket: Bucket = "turn", warm: int = 32, window: int = 512, gamma: float = 0.0,
        start: Mapping[int, Iterable[float]] | None = None,
    ):
        check_alpha(alpha)
        if bucket not in ("turn", "log", "one"):
            raise OptionError("bucket", bucket, "turn, log or one")
        if not 1 <= warm <= window:
            raise OptionError("warm", warm, f"a whole number from 1 to the window of {window}")
        if not 0 <= gamma < 1:
            raise OptionError("gamma", gamma, "a number from 0 to below 1")
        check_alpha(alpha, warm)
        self.alpha, self.bucket, self.warm, self.window, self.gamma = alpha, bucket, warm, window, gamma
        self._found: dict[int, _Reservoir] = {}
        for turn, scores in (start or {}).items():
            for score in scores:
                self._at(turn).add(score, window)

    def sizes(self) -> dict[int, int]:
        """Scores by bucket."""
        return {b: len(r.recent) for b, r in sorted(self._found.items())}

    def test(self, score: float, turn: int, u: float | None = None) -> Verdict:
        mine, lent = self._at(turn), self._lender(turn)
        if lent is None:
            reject = self.alpha >= 1 or (self.alpha > 0 and not score < math.inf)
            verdict = Verdict(score, math.nan, mine.alpha, reject, len(mine.ordered), False)
        else:
            reject = rejects(lent.ordered, score, mine.alpha, u)
            p = p_value(lent.ordered, score, u)
            verdict = Verdict(score, p, mine.alpha, reject, len(lent.ordered), lent is mine)
        mine.add(score, self.window)
        if self.gamma and verdict.calibrated:
            mine.alpha += self.gamma * (self.alpha - verdict.reject)
        return verdict

    def _bucket(self, turn: int) -> int:
        return {"turn": turn, "log": (turn + 1).bit_length() - 1, "one": 0}[self.bucket]

    def _at(self, turn: int) -> _Reservoir:
        return self._found.setdefault(self._bucket(turn), _Reservoir(self.alpha))

    def _lender(self, turn: int) -> _Reservoir | None:
        """The reservoir of this turn, or the nearest that is warm."""
        here = self._bucket(turn)
        ready = [b for b, r in self._found.items() if len(r.ordered) >= self.warm]
        return self._found[min(ready, key=lambda b: (abs(b - here), b))] if ready else None
