"""Causal diffusion decoding (WeDLM, arXiv 2512.22737): masks are filled in any order under plain causal attention.

Behind the final tokens stands a window of slots at consecutive positions, each a mask or filled. A forward evaluates,
in this physical order, the final tokens whose K/V is not cached yet, the filled slots behind the first gap, and the
masks; every row has its own logical position and sees all rows before it. So a mask sees everything that is known,
and the K/V of a final token depends on final tokens alone: it is exact at once, and no block has to be finished first.

State of the code against the paper: C = cached tokens, the n filled slots before the first mask are ``pending``. They
are handed out as soon as they are filled (nothing revises them); their K/V follows with the next forward, as for the
last token of plain decoding.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from stretto.decoding.ar import require_causal
from stretto.decoding.denoise import DRAW, processed, top_logprobs, uniforms
from stretto.decoding.options import option
from stretto.decoding.unmask import candidates
from stretto.engine.host import Host
from stretto.engine.types import Commit, Outcome, Sequence, Step
from stretto.errors import PromptError, UnsupportedError

__all__ = ["CausalDiffusion", "Options"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """``entropy_threshold`` is the dial between speed and quality."""

    window: int = option(16, "W: masks and filled slots evaluated beside the final tokens", low=1, high=256)
    entropy_threshold: float = option(
        0.4, "tau, nats: every mask whose entropy + lambda * distance is below is filled; 0 = one a forward", low=0.0,
    )
    position_penalty: float = option(
        0.02, "lambda, nats a token of distance from the first mask: holds back far slots", low=0.0,
    )
    streaming: bool = option(
        True, "refill the window in every forward; false = fill all of it first, block by block (for comparison)"
    )


@dataclass(slots=True)
class _Window:
    """``pending`` final tokens without K/V; ``filled``: position -> token, all behind the first mask."""

    stop: int  # end of the window where it is not refilled
    end: int  # nothing from here on is decided: max_tokens, or behind a filled end-of-text
    pending: int = 0
    filled: dict[int, int] = field(default_factory=dict)
    decided: dict[int, int] = field(default_factory=dict)  # position -> number of the forward
    logprobs: dict[int, dict[int, float]] = field(default_factory=dict)


class CausalDiffusion:
    """Fills a window of masks in any order, under causal attention: for models trained to recover masks so."""

    name = "wedlm"
    lossless = False
    aliases = ("causal-diffusion",)
    kinds = ("causal",)
    grammar = False

    def __init__(self, host: Host, options: Options):
        require_causal(host, self.name)
        c = host.config
        if c.mask_token_id is None:
            raise UnsupportedError(
                "method 'wedlm' needs a model that was trained to recover masks, and this one has no mask_token_id in "
                "its config.json: train one with 'stretto train zoo-tiny-wedlm'"
            )
        if any(w is not None for w in c.windows):
            raise UnsupportedError(
                "method 'wedlm' does not run on sliding-window attention: rows stand out of logical order"
            )
        self._o, self._mask = options, c.mask_token_id
        self._stops = frozenset(host.stop_ids)

    def admit(self, seq: Sequence) -> None:
        if self._mask in seq.tokens:
            raise PromptError(
                f"the prompt holds the mask token {self._mask} at position {seq.tokens.index(self._mask)}: take it out"
            )
        seq.state = _Window(seq.prompt_len, seq.prompt_len + seq.params.max_tokens)

    def prefill(self, seq: Sequence) -> int:
        return len(seq.tokens) - seq.state.pending

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        return [self._step(seq) for seq in seqs]

    def commit(
        self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]
    ) -> list[Commit]:
        laws = torch.cat([o.logits for o in outcomes])
        laws[:, self._mask] = -torch.inf
        entropy = entropies(laws)
        out, start = [], 0
        for seq, step, outcome in zip(seqs, steps, outcomes, strict=True):
            rows = slice(start, start + len(step.extra))
            start = rows.stop
            self._fill(seq, step.extra, laws[rows], entropy[rows], outcome.argmax)
            out.append(self._commit(seq))
        return out

    def release(self, seq: Sequence) -> None:
        seq.state = None

    def preemptible(self, seq: Sequence) -> bool:
        return True

    def _step(self, seq: Sequence) -> Step:
        """Rows: pending tokens, filled slots, masks; each group by ascending position."""
        state, at = seq.state, len(seq.tokens)
        first = at - state.pending
        if self._o.streaming or at >= state.stop:
            state.stop = at + self._o.window
        slots = range(at, min(state.stop, state.end))
        if not state.filled:  # rows in logical order: a plain chain behind the cache
            known, masks = state.pending, list(slots)
            return Step(
                [*seq.tokens[first:], *[self._mask] * len(masks)], logits=range(known, known + len(masks)), extra=masks
            )
        masks = [i for i in slots if i not in state.filled]
        filled = sorted(state.filled)
        known = len(filled) + state.pending
        return Step(
            [*seq.tokens[first:], *(state.filled[i] for i in filled), *[self._mask] * len(masks)],
            [*range(first, at), *filled, *masks], logits=range(known, known + len(masks)), extra=masks,
        )

    def _fill(
        self, seq: Sequence, masks: Seq[int], laws: Tensor, entropy: np.ndarray, argmax: np.ndarray
    ) -> None:
        """Write what this forward decides: entropy + lambda * distance below tau, at least the lowest."""
        state, o = seq.state, self._o
        penalised = entropy + o.position_penalty * (np.asarray(masks) - masks[0])
        chosen = np.flatnonzero(penalised < o.entropy_threshold)
        if not len(chosen):
            chosen = penalised.argmin()[None]
        tokens = self._tokens(seq, masks, laws, chosen, argmax)
        number = seq.metrics.forwards
        for i, token in zip(chosen.tolist(), tokens, strict=True):
            at = masks[i]
            if at >= state.end:
                break
            state.filled[at], state.decided[at] = token, number
            if seq.logprobs is not None:
                state.logprobs[at] = top_logprobs(laws[i], token, seq.params.logprobs or 0)
            if token in self._stops and not seq.params.ignore_eos:
                state.end = at + 1
                state.filled = {k: v for k, v in state.filled.items() if k <= at}

    def _tokens(
        self, seq: Sequence, masks: Seq[int], laws: Tensor, chosen: np.ndarray, argmax: np.ndarray
    ) -> list[int]:
        """The token of each chosen mask: the argmax, or a draw that depends on seed, forward and position."""
        if seq.sampler.plain:
            best = argmax[chosen]
            if self._mask not in best:
                return best.tolist()
        positions, laws = [masks[i] for i in chosen], laws[chosen]
        if processed(seq):
            path = list(seq.state.filled.values())
            laws = torch.stack([
                seq.sampler.process(row, at - seq.prompt_len, path)
                for row, at in zip(laws, positions, strict=True)
            ])
        uniform = uniforms(seq, seq.metrics.forwards, positions, DRAW) if seq.params.temperature else None
        return candidates(laws, seq.params, uniform).tokens.tolist()

    def _commit(self, seq: Sequence) -> Commit:
        """Hand out the filled slots before the first mask; keep the K/V of the tokens that were pending."""
        state = seq.state
        keep, at = range(state.pending), len(seq.tokens)
        tokens, steps = [], []
        while (token := state.filled.pop(at + len(tokens), None)) is not None:
            steps.append(state.decided.pop(at + len(tokens)))
            tokens.append(token)
        state.pending = len(tokens)
        commit = Commit(tokens, keep, step_map=steps)
        if seq.logprobs is not None:
            commit.logprobs = [state.logprobs.pop(at + i) for i in range(len(tokens))]
        return commit


def entropies(laws: Tensor) -> np.ndarray:
    """float64 [n], nats: the entropy of softmax of each row of float [n, V] logits; -inf is impossible."""
    law = torch.softmax(laws, -1)
    return torch.special.entr(law).sum(-1).double().numpy()
