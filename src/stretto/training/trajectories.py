"""Jacobi trajectories of a model, recorded by the engine on the model's own greedy answers.

The answer is decoded block by block: a block of n tokens starts as its first token (known right) and n - 1 random
tokens of the context; every forward replaces what is not yet fixed by the model's answers, until nothing changes. All
states on the way are kept. (Jacobi Forcing, arXiv 2512.14681, section 3; CLLM, arXiv 2403.00835.)
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from stretto.engine import types as engine
from stretto.engine.engine import Engine, Stream
from stretto.engine.host import Host
from stretto.engine.params import SamplingParams
from stretto.engine.runner import Runner
from stretto.errors import CheckpointError, UnsupportedError
from stretto.models.transformer import Transformer

__all__ = ["Block", "Recorder", "Trajectory", "collect", "fingerprint", "read", "write"]

BATCH = 64  # sequences that record at the same time


@dataclass(frozen=True, slots=True)
class Block:
    """``states`` int32 [s, m]: row 0 is the random start, the last row the fixed point, column 0 the seed. ``start``:
    position of the seed in the text."""

    start: int
    states: np.ndarray

    def noise(self) -> np.ndarray:
        """float64 [s]: the share of the block from the first token that differs from the fixed point on."""
        m = self.states.shape[1]
        wrong = self.states != self.states[-1]
        first = np.where(wrong.any(1), wrong.argmax(1), m)
        return (m - first) / m


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One answer: ``tokens`` = prompt and greedy answer, of which the first ``prompt`` are given; ``blocks`` follow
    each other without a gap."""

    tokens: list[int]
    prompt: int
    blocks: list[Block]


@dataclass(slots=True)
class _Recording:
    rng: random.Random
    size: int  # of the block under way
    next: int  # position of the seed of the block to come
    start: int = -1  # position of its own seed, -1 = none is open
    state: list[int] = field(default_factory=list)
    states: list[list[int]] = field(default_factory=list)
    blocks: list[tuple[int, list[list[int]]]] = field(default_factory=list)


class Recorder:
    """Block-wise Jacobi decoding that keeps every state; ``done`` maps finished sequences to their trajectories.

    ``n``: tokens of a block; the first block of an answer has n/2..n, so that borders fall everywhere. ``banned``:
    tokens that a random start never has. Random numbers depend on ``seed`` and the prompt alone. Greedy decoding only.
    """

    name = "recorder"
    lossless = True

    def __init__(self, n: int, seed: int, banned: Iterable[int]):
        self.n, self.seed, self.banned = n, seed, frozenset(banned)
        self.done: dict[engine.Sequence, Trajectory] = {}

    def admit(self, seq: engine.Sequence) -> None:
        if not seq.sampler.plain:
            raise UnsupportedError("trajectories are recorded with temperature 0 and without penalties or grammar")
        rng = random.Random(f"{self.seed}/{seq.tokens}")
        seq.state = _Recording(rng, rng.randint(max(2, self.n // 2), self.n), seq.prompt_len)

    def prefill(self, seq: engine.Sequence) -> int:
        return len(seq.tokens) - 1

    def propose(self, seqs: list[engine.Sequence]) -> list[engine.Step]:
        return [engine.Step([s.tokens[-1], *self._guesses(s)]) for s in seqs]

    def commit(
        self, seqs: list[engine.Sequence], steps: list[engine.Step], outcomes: list[engine.Outcome]
    ) -> list[engine.Commit]:
        return [self._commit(*item) for item in zip(seqs, steps, outcomes, strict=True)]

    def release(self, seq: engine.Sequence) -> None:
        rec, length = seq.state, len(seq.tokens)
        if rec.start >= 0:
            rec.blocks.append((rec.start, rec.states))
        blocks = []
        for start, states in rec.blocks:
            fixed = seq.tokens[start : start + len(states[0])]
            if len(fixed) > 1:
                rows = [s[: len(fixed)] for s in states]
                blocks.append(Block(start, np.array([*(r for r in rows if r != fixed), fixed], np.int32)))
        self.done[seq] = Trajectory(seq.tokens[:length], seq.prompt_len, blocks)
        seq.state = None

    def preemptible(self, seq: engine.Sequence) -> bool:
        return True

    def _guesses(self, seq: engine.Sequence) -> list[int]:
        """What of the block is not fixed; opens the next block when the text holds its seed."""
        rec, at = seq.state, len(seq.tokens) - 1
        if rec.start < 0 and at >= rec.next:
            allowed = [t for t in seq.tokens if t not in self.banned] or [seq.tokens[0]]
            rec.start, rec.state = at, [seq.tokens[-1], *rec.rng.choices(allowed, k=rec.size - 1)]
            rec.states = [rec.state]
        return rec.state[at - rec.start + 1 :] if rec.start >= 0 else []

    def _commit(self, seq: engine.Sequence, step: engine.Step, outcome: engine.Outcome) -> engine.Commit:
        rec, n = seq.state, len(step.tokens) - 1
        answers, hits = outcome.argmax[: n + 1].tolist(), 0
        while hits < n and answers[hits] == step.tokens[hits + 1]:
            hits += 1
        if rec.start >= 0:
            fixed = len(seq.tokens) - rec.start  # tokens of the block that were final before
            if hits < n:
                rec.state = rec.state[:fixed] + answers[:n]
                rec.states.append(rec.state)
            if fixed + hits + 1 >= rec.size:
                rec.blocks.append((rec.start, rec.states))
                rec.next, rec.start, rec.size = rec.start + rec.size, -1, self.n
        return engine.Commit(answers[: hits + 1], keep=range(hits + 1), drafted=n, accepted=hits)


def collect(
    model: Transformer, prompts: Sequence[list[int]], *, n: int, seed: int, stop_ids: Sequence[int],
    banned: Iterable[int], max_tokens: int = 128,
) -> tuple[list[Trajectory], dict[str, float]]:
    """A trajectory for each prompt, and what it took: {"forwards", "tokens"} summed over the answers."""
    net = copy.deepcopy(model).eval()
    most = max(map(len, prompts)) + max_tokens + n
    runner = Runner(net, slots=BATCH * most + 64, deterministic=True)
    host = Host(runner, tuple(stop_ids), model.config.max_position_embeddings, plan=False)
    eng = Engine(runner, host, max_rows=2048, max_seqs=BATCH, prefix_caching=False)
    recorder, params = Recorder(n, seed, banned), SamplingParams(max_tokens=max_tokens, temperature=0.0)
    streams: list[Stream] = [eng.add(list(p), params, recorder)[0] for p in prompts]
    while eng.busy:
        eng.step()
    sums = {
        "forwards": float(sum(s.seq.metrics.forwards for s in streams)),
        "tokens": float(sum(s.seq.metrics.tokens for s in streams)),
    }
    return [recorder.done[s.seq] for s in streams], sums


def fingerprint(model: Transformer) -> str:
    """sha256 over the names and bytes of the parameters, as 16 hex digits."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def write(path: Path, trajectories: Sequence[Trajectory], about: dict[str, Any]) -> None:
    """One safetensors file, in one go; ``about`` goes to its metadata as JSON."""
    blocks = [(i, b) for i, t in enumerate(trajectories) for b in t.blocks]
    states = [b.states.ravel() for _, b in blocks]
    arrays = {
        "tokens": np.array([x for t in trajectories for x in t.tokens], np.int32),
        "texts": np.array([(len(t.tokens), t.prompt) for t in trajectories], np.int32).reshape(-1, 2),
        "blocks": np.array([(i, b.start, *b.states.shape) for i, b in blocks], np.int32).reshape(-1, 4),
        "states": np.concatenate(states) if states else np.empty(0, np.int32),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(arrays, partial, metadata={"about": json.dumps(about)})
    partial.rename(path)


def read(path: Path, expect: dict[str, Any]) -> tuple[list[Trajectory], dict[str, Any]]:
    """The inverse of :func:`write`. CheckpointError when ``about`` does not have the values of ``expect``."""
    try:
        with safe_open(path, "numpy") as f:
            about = json.loads((f.metadata() or {})["about"])
            tokens, texts, table, flat = (f.get_tensor(k) for k in ("tokens", "texts", "blocks", "states"))
    except Exception as e:  # the library raises many kinds; the reason is what counts
        raise CheckpointError(f"{path} is not a file of trajectories: {e}") from e
    for key, value in expect.items():
        if about.get(key) != value:
            raise CheckpointError(
                f"{path} was recorded with {key} {about.get(key)!r}, wanted is {value!r}: delete it, or train with "
                "what it was recorded with"
            )
    ends = np.cumsum(texts[:, 0])
    out = [
        Trajectory(tokens[e - n : e].tolist(), int(p), []) for (n, p), e in zip(texts.tolist(), ends, strict=True)
    ]
    at = 0
    for i, start, s, m in table.tolist():
        out[i].blocks.append(Block(start, flat[at : at + s * m].reshape(s, m)))
        at += s * m
    return out, about
