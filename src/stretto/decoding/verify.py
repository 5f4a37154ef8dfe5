"""Verification of drafts: which rows of a tree are right, and the token that follows them.

Row 0 of a tree is the root: the last final token, not yet cached. The logits of a row judge its children. The rows
on the accepted path stay in the cache, and the law at its last row gives one more token, the next root.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from stretto.engine.types import Commit, Outcome, Sequence

__all__ = ["accept_chain", "accept_tree", "choose"]


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

    ``tokens``, ``parent`` [T]: the tree; logits of all T rows must have been asked for. Drafts are point masses, so
    following the target's draw is lossless for greedy and for sampling alike: the probability that some child of a
    row is taken is the sum of the target's probabilities of the children.
    """
    children: dict[int, dict[int, int]] = {}
    for i in range(1, len(tokens)):
        children.setdefault(parent[i], {}).setdefault(int(tokens[i]), i)
    rows, out = [0], []
    while True:
        token = choose(seq, outcome, rows[-1], out)
        out.append(token)
        child = children.get(rows[-1], {}).get(token)
        if child is None:
            break
        rows.append(child)
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
