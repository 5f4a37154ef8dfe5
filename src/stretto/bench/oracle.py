"""A model that knows the law: exact conditional distributions instead of weights, behind the interface of a runner.

Decoders can so be judged without any error of training. A row sees tokens exactly as in a real model (its cached
context and its local rows), and gets the law of its position given what it sees; every cache that is exact for a
real model is exact here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from stretto.bench.parallel_theory import marginals, outputs
from stretto.decoding.registry import make
from stretto.decoding.unmask import candidates, quota
from stretto.engine.cache import SlotAllocator
from stretto.engine.engine import Engine
from stretto.engine.host import Host
from stretto.engine.params import SamplingParams
from stretto.engine.runner import LatencyCurve
from stretto.models.batch import FlatBatch, ForwardResult
from stretto.models.config import ModelConfig

__all__ = ["OracleRunner", "simulate", "success_rate"]

MASK, STOP, FIRST = 0, 1, 2  # ids: mask, end of text, the first symbol
SYMBOLS = 16
IMPOSSIBLE = -1e9


class OracleRunner:
    """``law``: equally likely answers over symbols 0..; every prompt means this law.

    ``attention``: "full", "block" (one block of the answer's length) or "causal". The prompt is one token for full
    and causal attention, a whole block for "block". Where what is visible agrees with no answer, the law is that of
    an empty answer: the text is lost anyway.
    """

    def __init__(self, law: Sequence[Sequence[int]], *, attention: str = "full", slots: int = 65536):
        self.law = np.asarray(law, np.int64) + FIRST
        length = self.law.shape[1]
        self.prompt = [SYMBOLS + FIRST] * (length if attention == "block" else 1)
        self.config = ModelConfig(
            "qwen3", SYMBOLS + FIRST + 1, 8, 8, 1, 1, 1, 8, tie_word_embeddings=True, attention=attention,
            block_size=length if attention == "block" else 1, mask_token_id=None if attention == "causal" else MASK,
        )
        self.alloc, self.vocabulary = SlotAllocator(slots), self.config.vocab_size
        self.backend, self.native = "oracle", None
        self.max_rows, self.peak_rows, self.peak_logits = None, 0, 0
        self.states: dict = {}  # no hidden states are kept
        self._held = np.full((slots, 2), -1, np.int64)  # position and token of each slot
        self._logits = lru_cache(maxsize=1 << 16)(self._conditional)

    def forward(self, batch: FlatBatch, early: object = None) -> ForwardResult:
        self._held[batch.slots, 0], self._held[batch.slots, 1] = batch.positions, batch.tokens
        out, known = [], {}
        for row in batch.logit_rows.tolist():
            q = int(batch.context_of[row])
            local = batch.local[batch.local_ptr[row] : batch.local_ptr[row + 1]]
            key = (q, local.tobytes())
            if key not in known:
                context = batch.context[batch.context_ptr[q] : batch.context_ptr[q + 1]]
                known[key] = self._logits(self._answer(np.concatenate([context, batch.slots[local]])))
            predicted = int(batch.positions[row]) - len(self.prompt) + (self.config.attention == "causal")
            out.append(known[key][min(max(predicted, 0), self.law.shape[1] - 1)])
        logits = np.stack(out) if out else np.empty((0, self.vocabulary), np.float32)
        return ForwardResult(torch.from_numpy(logits), argmax=logits.argmax(-1))

    def curve(self, context: int = 128) -> LatencyCurve:
        """Rows are free."""
        return LatencyCurve([1, 64], [1e-3, 1e-3])

    def _answer(self, slots: np.ndarray) -> tuple[int, ...]:
        """The answer as far as it is visible in ``slots``; MASK elsewhere."""
        at, token = self._held[slots].T
        out = np.full(self.law.shape[1], MASK)
        inside = at >= len(self.prompt)
        out[at[inside] - len(self.prompt)] = token[inside]
        return tuple(out.tolist())

    def _conditional(self, answer: tuple[int, ...]) -> np.ndarray:
        """float32 [length, V]: log-probabilities of every position given the visible ones."""
        seen = np.asarray(answer)
        fits = ((self.law == seen) | (seen == MASK)).all(1)
        law = self.law[fits] if fits.any() else self.law
        out = np.full((self.law.shape[1], self.vocabulary), IMPOSSIBLE, np.float32)
        for i, p in enumerate(marginals(tuple(map(tuple, law.tolist())))):
            for token, share in p.items():
                out[i, token] = np.log(share)
        return out


def success_rate(
    operation: str, n: int, draws: int, *, method: str = "diffusion", attention: str = "full",
    temperature: float = 1.0, seed: int = 0, batch: int = 512, **options: object,
) -> tuple[float, float]:
    """(share of valid answers, tokens per forward) of ``draws`` answers that a real decoder makes on the oracle."""
    law = outputs(operation, n)
    runner = OracleRunner(law, attention=attention)
    host = Host(runner, (STOP,), 1 << 20, plan=False)  # type: ignore[arg-type]
    engine = Engine(runner, host, max_rows=1 << 20, max_seqs=batch, prefix_caching=False)  # type: ignore[arg-type]
    made = make(method, host, options)
    valid, right, tokens, forwards = set(map(tuple, (runner.law).tolist())), 0, 0, 0
    for start in range(0, draws, batch):
        params = SamplingParams(
            max_tokens=len(law[0]), temperature=temperature, seed=seed + start, n=min(batch, draws - start),
        )
        streams = engine.add(runner.prompt, params, made)
        while engine.busy:
            engine.step()
        for s in streams:
            right += tuple(s.seq.tokens[s.seq.prompt_len :]) in valid
            tokens += s.seq.metrics.tokens
            forwards += s.seq.metrics.forwards
    return right / draws, tokens / forwards


def simulate(operation: str, n: int, draws: int, steps: int | None = 1, seed: int = 0) -> float:
    """``success_rate`` of random-order decoding at temperature 1 for many draws: the decoder's own candidates and
    quotas, all draws of a step in one batch, no engine."""
    law = outputs(operation, n)
    runner = OracleRunner(law, slots=1)
    length, valid = len(law[0]), set(map(tuple, runner.law.tolist()))
    rng, params = np.random.default_rng(seed), SamplingParams(temperature=1.0)
    texts = np.full((draws, length), MASK)
    turn = 0
    while (masked := texts == MASK).any():
        k = quota(length, steps, turn)
        states, which = np.unique(texts, axis=0, return_inverse=True)
        logits = np.stack([runner._logits(tuple(s)) for s in states.tolist()])[which.ravel()]
        order = np.where(masked, rng.random(texts.shape), 2.0).argsort(1)[:, :k]
        rows = torch.from_numpy(np.take_along_axis(logits, order[:, :, None], 1).reshape(-1, logits.shape[2]))
        drawn = candidates(rows, params, rng.random(len(rows))).tokens.reshape(order.shape)
        np.put_along_axis(texts, order, drawn, 1)
        turn += 1
    return sum(tuple(t) in valid for t in texts.tolist()) / draws
