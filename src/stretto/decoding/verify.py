"""Verification of drafts: which rows of a tree are right, and the token that follows them.

Row 0 of a tree is the root: the last final token, not yet cached. The logits of a row judge its children. The rows
on the accepted path stay in the cache, and the law at its last row gives one more token, the next root.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np
import torch

from stretto.engine.sampling import noise
from stretto.engine.types import Commit, Outcome, Sequence

__all__ = [
    "DRAFT", "accept_chain", "accept_rejection", "accept_tree", "choose", "draw_without_replacement", "gumbel",
    "reject", "remove",
]

DRAFT, TRY, REST = 1, 2, 3  # noise of one output position: for drawing drafts, trying them, and what is left


def choose(seq: Sequence, outcome: Outcome, row: int, path: Seq[int] = ()) -> int:
    """The token that plain decoding would emit behind ``path`` (tokens after the final ones), given row ``row``.

    Greedy: the argmax. Sampling: the draw keyed by the output position, so that whoever asks gets the same token.
    """
    if seq.sampler.plain:
        return int(outcome.argmax[row])
    return seq.sampler.pick(outcome.logits[row], seq.generated + len(path), path)


def accept_tree(
    seq: Sequence, tokens: Seq[int], parent: Seq[int], outcome: Outcome
) -> Commit:
    """Walk from the root along the children that equal the target's own choice.

    ``tokens``, ``parent`` [T]: the tree, ``parent[i] < i``, -1 for the root; logits of all T rows must have been asked
    for. Drafts are point masses, so following the target's draw is lossless for greedy and for sampling alike: the
    probability that some child of a row is taken is the sum of the target's probabilities of the children.
    """
    best = outcome.argmax[: len(tokens)].tolist() if seq.sampler.plain else None
    row, rows, out = 0, [0], [best[0] if best else choose(seq, outcome, 0)]
    for i in range(1, len(tokens)):  # children come after their parents
        if parent[i] == row and tokens[i] == out[-1]:
            row = i
            rows.append(i)
            out.append(best[i] if best else choose(seq, outcome, i, out))
    return Commit(
        tokens=out, keep=rows, drafted=len(tokens) - 1, accepted=len(rows) - 1, logprob_rows=rows,
    )


def accept_chain(seq: Sequence, tokens: Seq[int], outcome: Outcome) -> Commit:
    """``accept_tree`` for a chain; one comparison of arrays when the choice is the plain argmax."""
    n = len(tokens)
    if not seq.sampler.plain:
        return accept_tree(seq, tokens, range(-1, n - 1), outcome)
    best = outcome.argmax[:n].tolist()
    hits = 0
    while hits < n - 1 and best[hits] == tokens[hits + 1]:
        hits += 1
    return Commit(
        tokens=best[: hits + 1], keep=range(hits + 1), drafted=n - 1, accepted=hits,
        logprob_rows=range(hits + 1),
    )


def accept_rejection(
    seq: Sequence, tokens: Seq[int], parent: Seq[int], laws: Mapping[int, np.ndarray], outcome: Outcome
) -> Commit:
    """Walk from the root by rejection sampling: the output follows the target's law whatever drew the drafts.

    The children of a row were drawn from ``laws[row]`` without replacement, in the order of their numbers. Random
    numbers are keyed by the output position, of which every walk uses at most one.
    """
    children: dict[int, list[int]] = {}
    for i in range(1, len(tokens)):
        children.setdefault(parent[i], []).append(i)
    rows, out, sampler = [0], [], seq.sampler
    while True:
        row, index = rows[-1], seq.generated + len(out)
        below = children.get(row)
        if below is None:
            out.append(sampler.pick(outcome.logits[row], index, out))
            break
        p = sampler.law(outcome.logits[row], index, out).numpy()
        tries = noise(sampler.key, index, TRY, len(below))
        hit, rest = reject(p, laws[row], [tokens[i] for i in below], tries)
        if hit is None:
            out.append(sampler.draw(torch.from_numpy(rest), index, REST))
            break
        rows.append(below[hit])
        out.append(tokens[below[hit]])
    return Commit(
        tokens=out, keep=rows, drafted=len(tokens) - 1, accepted=len(rows) - 1, logprob_rows=rows,
    )


def reject(
    p: np.ndarray, q: np.ndarray, children: Seq[int], tries: Seq[float]
) -> tuple[int | None, np.ndarray]:
    """Which of ``children`` is accepted (None: none), and the law that is left then.

    ``p``, ``q`` float64 [V], each summing to 1; the children were drawn from q one after the other without
    replacement, from the uniform law over the untried ones once q had no mass left. Child x is accepted with
    probability min(1, p(x) / q(x)), else p becomes norm((p - q)+) and x leaves q. (Sequoia, algorithm 2.)
    """
    p, q, tried = p.copy(), q.copy(), []
    for i, (x, r) in enumerate(zip(children, tries, strict=True)):
        if r * q[x] < p[x]:
            return i, p
        tried.append(x)
        p, q = remove(p, q, tried)
    return None, p


def remove(p: np.ndarray, q: np.ndarray, tried: Seq[int]) -> tuple[np.ndarray, np.ndarray]:
    """The target's law and the drafter's after the child ``tried[-1]`` was rejected."""
    rest = np.maximum(p - q, 0.0)
    total = rest.sum()
    p = rest / total if total > 0.0 else p  # p = q: a rejection was impossible up to rounding
    q = q.copy()
    q[tried[-1]] = 0.0
    left = q.sum()
    if left > 1e-12:
        return p, q / left
    q = np.ones_like(q)
    q[list(tried)] = 0.0
    return p, q / max(q.sum(), 1.0)


def gumbel(u: np.ndarray) -> np.ndarray:
    return -np.log(-np.log(u))


def draw_without_replacement(q: np.ndarray, u: np.ndarray, k: int) -> list[int]:
    """At most ``k`` tokens drawn one after the other from ``q`` without replacement, in that order.

    ``u`` [V] uniform: the k largest of log q + gumbel(u) are such a draw (Kool et al., 2019). Tokens without mass
    are never drawn.
    """
    with np.errstate(divide="ignore"):
        score = np.log(q) + gumbel(u)
    if k == 1:
        return [int(score.argmax())]
    k = min(k, int(np.count_nonzero(q)))
    top = np.argpartition(-score, k - 1)[:k]
    return top[np.argsort(-score[top], kind="stable")].tolist()
