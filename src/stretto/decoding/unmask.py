"""Which masked positions become tokens: a candidate and a score for each, and a rule that picks.

Pure functions of arrays. Legend: n masked positions in ascending order, V vocabulary. All rules
return bool [n]; ``select`` adds what holds for all of them: at least one position, then the one of
the highest score, ties to the lowest position.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stretto.engine.params import SamplingParams
from stretto.engine.sampling import truncate

__all__ = [
    "DIALS", "RULES", "SCORES", "Candidates", "Credit", "candidates", "quota", "score", "select",
]

SCORES = ("confidence", "margin", "neg_entropy", "random", "position")
RULES = ("threshold", "fixed", "factor", "entropy", "eb", "dynamic", "hierarchy", "cad", "filter")
DIALS = {
    "threshold": 0.9, "dynamic": 0.9, "hierarchy": 0.9, "factor": 1.0, "entropy": 0.45, "eb": 0.1,
    "cad": 0.95,
}
CHUNK = 1 << 22  # elements of a law held at a time


@dataclass(frozen=True, slots=True)
class Candidates:
    """One candidate token a position, and what its law says. ``margin``, ``entropy``: zeros unless
    asked for."""

    tokens: np.ndarray  # int64 [n]
    confidence: np.ndarray  # float64 [n], p(token)
    margin: np.ndarray  # float64 [n], largest minus second largest probability
    entropy: np.ndarray  # float64 [n], nats

    def part(self, start: int, stop: int) -> Candidates:
        s = slice(start, stop)
        return Candidates(self.tokens[s], self.confidence[s], self.margin[s], self.entropy[s])

    def held_back(self, held: np.ndarray) -> Candidates:
        """The positions of bool ``held`` [n] made the least attractive ones."""
        return Candidates(
            self.tokens, np.where(held, -np.inf, self.confidence),
            np.where(held, -np.inf, self.margin), np.where(held, np.inf, self.entropy),
        )


def candidates(
    logits: Tensor, params: SamplingParams, uniform: np.ndarray | None = None, *,
    best: np.ndarray | None = None, margin: bool = False, entropy: bool = False,
) -> Candidates:
    """Candidates of processed logits float [n, V].

    Temperature 0: the argmax, judged by the plain law; ``best`` [n] may give the argmax of the
    logits before some of them were set to -inf. Else a draw from the law after temperature, top-k,
    top-p and min-p, judged by that law; ``uniform`` [n] in (0, 1) are its random numbers.
    """
    rows = max(1, CHUNK // logits.shape[-1])
    parts = []
    for i in range(0, len(logits), rows):
        s = slice(i, i + rows)
        noise, known = (None if x is None else x[s] for x in (uniform, best))
        parts.append(_judge(logits[s], params, noise, known, margin, entropy))
    if len(parts) == 1:
        return Candidates(*parts[0])
    return Candidates(*map(np.concatenate, zip(*parts, strict=True)))


def _judge(
    logits: Tensor, params: SamplingParams, uniform: np.ndarray | None, best: np.ndarray | None,
    margin: bool, entropy: bool,
) -> tuple[np.ndarray, ...]:
    """The columns of Candidates for logits that are few enough to hold their law."""
    zeros = np.zeros(len(logits))
    law = _law(logits, params) if uniform is not None or margin or entropy else None
    if uniform is not None:
        tokens = draw(law, uniform)
        confidence = law.gather(-1, tokens[:, None])[:, 0]
    else:
        peak = logits.amax(-1, keepdim=True)
        tokens = _argmax(logits, peak, best)
        confidence = 1 / (logits - peak).exp_().sum(-1)
    return (
        tokens.cpu().numpy(),
        confidence.double().cpu().numpy(),
        -law.topk(2).values.diff()[:, 0].double().cpu().numpy() if margin else zeros,
        torch.special.entr(law).sum(-1).double().cpu().numpy() if entropy else zeros,
    )


def _argmax(logits: Tensor, peak: Tensor, best: np.ndarray | None) -> Tensor:
    """int64 [n]; only rows whose ``best`` is not the largest any more are searched."""
    if best is None:
        return logits.argmax(-1)
    tokens = torch.tensor(best, device=logits.device)
    lost = logits.gather(-1, tokens[:, None]) < peak
    if lost.any():
        lost = lost[:, 0]
        tokens[lost] = logits[lost].argmax(-1)
    return tokens


def _law(logits: Tensor, params: SamplingParams) -> Tensor:
    if params.temperature == 0.0:
        return torch.softmax(logits, -1)
    return truncate(torch.softmax(logits.double() / params.temperature, -1), params)


def draw(law: Tensor, uniform: np.ndarray) -> Tensor:
    """int64 [n]: a token from each row of float64 ``law`` [n, V], by inverting its distribution."""
    cumulated = law.cumsum(-1)
    total = cumulated[:, -1:].contiguous()
    at = torch.from_numpy(np.ascontiguousarray(uniform)).to(law)[:, None] * total
    last = torch.searchsorted(cumulated, total)  # the last token that is not impossible
    return torch.minimum(torch.searchsorted(cumulated, at, right=True), last)[:, 0]


def score(name: str, c: Candidates, uniform: np.ndarray | None = None) -> np.ndarray:
    """float64 [n]: which position comes first. ``uniform`` [n] is needed by "random" alone."""
    if name == "random":
        out = np.asarray(uniform, np.float64)
    elif name == "position":
        out = -np.arange(len(c.tokens), dtype=np.float64)
    else:
        out = {"confidence": c.confidence, "margin": c.margin, "neg_entropy": -c.entropy}[name]
    return np.where(np.isneginf(c.confidence), -np.inf, out)


def quota(masked: int, steps: int | None, turn: int) -> int:
    """How many of n ``masked`` positions step ``turn`` (0-based) of S ``steps`` takes.

    n // S, and one more in the first n mod S steps; None: as many steps as positions.
    """
    steps = steps or masked
    return max(1, masked // steps + (turn < masked % steps))


def take_best(score: np.ndarray, k: int) -> np.ndarray:
    """The k positions of the highest score."""
    out = np.zeros(len(score), bool)
    out[np.argsort(-score, kind="stable")[:k]] = True
    return out


def take_factor(confidence: np.ndarray, f: float) -> np.ndarray:
    """The n most confident: the largest n with c(j) >= 1 - f / (j + 1) for all j in 1..n
    (Fast-dLLM)."""
    order = np.argsort(-confidence, kind="stable")
    good = confidence[order] >= 1 - f / (np.arange(1, len(order) + 1) + 1)
    return _leading(order, good)


def take_bounded(entropy: np.ndarray, gamma: float) -> np.ndarray:
    """The largest set U of lowest entropies with sum H - max H <= gamma (EB-Sampler)."""
    order = np.argsort(entropy, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(entropy[order])[:-1]])
    return _leading(order, before <= gamma)


def take_dynamic(confidence: np.ndarray, score: np.ndarray, tau: float, k: int) -> np.ndarray:
    """All above tau if these are at least k, else the best k (SDAR)."""
    above = confidence > tau
    return above if above.sum() >= k else take_best(score, k)


def take_clamped(
    confidence: np.ndarray, score: np.ndarray, tau: float, least: int, most: int | None
) -> np.ndarray:
    """The best k, k = how many reach tau, at least ``least`` and at most ``most`` (CD4LM's CAD)."""
    reach = int((confidence >= tau).sum())
    return take_best(score, max(least, min(reach, most or len(score))))


def take_runs(confidence: np.ndarray, positions: Seq[int], low: float, tau: float) -> np.ndarray:
    """The best of each run of masked neighbours if it reaches ``low``, and all from tau on
    (dInfer)."""
    out = confidence >= tau
    starts = np.flatnonzero(np.diff(np.asarray(positions), prepend=-2) != 1)
    for a, b in zip(starts, [*starts[1:], len(confidence)], strict=True):
        best = a + int(np.argmax(confidence[a:b]))
        out[best] |= confidence[best] >= low
    return out


def _leading(order: np.ndarray, good: np.ndarray) -> np.ndarray:
    """The first elements of ``order`` as long as ``good`` holds."""
    n = len(good) if good.all() else int(np.argmin(good))
    out = np.zeros(len(order), bool)
    out[order[:n]] = True
    return out


def select(
    rule: str, c: Candidates, score: np.ndarray, positions: Seq[int], *,
    dial: float, k: int, low: float = 0.6, least: int = 1, most: int | None = None,
    final: np.ndarray | None = None,
) -> np.ndarray:
    """bool [n]: the positions that become final.

    ``dial``: tau, f, nats or gamma, as the rule has it; ``k``: the quota of this step; ``least`` and
    ``most``: the bounds of cad; ``final`` [n]: what a filter says. Positions of score -inf are taken
    only when there are no others, and then ``least`` at a time.
    """
    if rule == "threshold":
        out = c.confidence >= dial
    elif rule == "fixed":
        out = take_best(score, k)
    elif rule == "factor":
        out = take_factor(c.confidence, dial)
    elif rule == "entropy":
        out = c.entropy <= dial
    elif rule == "eb":
        out = take_bounded(c.entropy, dial)
    elif rule == "dynamic":
        out = take_dynamic(c.confidence, score, dial, k)
    elif rule == "cad":
        out = take_clamped(c.confidence, score, dial, least, most)
    elif rule == "filter":
        assert final is not None
        out = final > dial
    else:
        out = take_runs(c.confidence, positions, low, dial)
    out &= ~np.isneginf(score)
    return out if out.any() else take_best(score, least)


class Credit:
    """Credit of the tokens that led before (CreditDecoding): credit <- decay * credit + [token
    leads] * p^gamma in each step, and logits + alpha * ln(1 + credit)."""

    GAMMA, DECAY = 0.2, 0.8

    def __init__(self, alpha: float):
        self._alpha = alpha
        self._table: dict[int, dict[int, float]] = {}  # position -> token -> credit

    def fuse(self, logits: Tensor, positions: Seq[int]) -> None:
        """Count one step and add the credit to float ``logits`` [n, V] in place."""
        top = torch.softmax(logits, -1).max(-1)
        rows, tokens, gains = [], [], []
        for i, (at, p, token) in enumerate(
            zip(positions, top.values.tolist(), top.indices.tolist(), strict=True)
        ):
            table = {t: self.DECAY * v for t, v in self._table.get(at, {}).items()}
            table[token] = table.get(token, 0.0) + p**self.GAMMA
            self._table[at] = table
            rows += [i] * len(table)
            tokens += table.keys()
            gains += table.values()
        logits[rows, tokens] += self._alpha * torch.tensor(gains).log1p().to(logits)
