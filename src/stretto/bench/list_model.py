"""A masked diffusion model of 85,000 parameters, trained in half a minute on four list operations, for ParallelBench.

Copy, replace at an index, replace anywhere, shuffle; lists of four different items, one token an item, so that the
exact success rates of ``parallel_theory`` apply to trained weights. Prompt: operation, index, word, items, separator.
Lists of the test are never trained on: a hash of the question decides. Legend: b rows, t places.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from stretto.decoding.registry import make
from stretto.engine.engine import Engine
from stretto.engine.host import Host
from stretto.engine.params import SamplingParams
from stretto.engine.runner import Runner
from stretto.models.config import ModelConfig
from stretto.models.transformer import Transformer
from stretto.training.data import PackedBatch
from stretto.training.nets import PackedNet, initialise
from stretto.training.objectives import MaskedDiffusion
from stretto.training.optim import MuonAdamW, schedule

__all__ = ["OPERATIONS", "measure", "train"]

OPERATIONS = ("copy", "replace_index", "replace_random", "shuffle")
N, ITEMS = 4, 24
MASK, STOP, OPS, SEP, NONE, FIRST = 0, 1, 2, 6, 7, 8  # ids
LAST = FIRST + ITEMS  # and the indices behind it


def _rows(operation: np.ndarray, rng: np.random.Generator, *, test: bool) -> tuple[np.ndarray, np.ndarray]:
    """(prompts [b, 8], answers [b, 4]) of the split."""
    b = len(operation)
    prompts, answers = np.empty((b, N + 4), np.int64), np.empty((b, N), np.int64)
    missing = np.arange(b)
    while len(missing):
        op, m = operation[missing], len(missing)
        items = np.argsort(rng.random((m, ITEMS)), 1)[:, : N + 1] + FIRST
        index, word, x = rng.integers(0, N, m), items[:, N], items[:, :N]
        answer, replaced, shuffled = x.copy(), (op == 1) | (op == 2), op == 3
        answer[replaced, index[replaced]] = word[replaced]
        order = np.argsort(rng.random((m, N)), 1)
        answer[shuffled] = np.take_along_axis(x[shuffled], order[shuffled], 1)
        head = np.stack([op + OPS, np.where(op == 1, LAST + index, NONE), np.where(replaced, word, NONE)], 1)
        prompts[missing] = np.concatenate([head, x, np.full((m, 1), SEP)], 1)
        answers[missing] = answer
        held = (x * np.array([1, 3, 7, 11])).sum(1) % 16 == 0  # one list in sixteen, whatever is asked of it
        missing = missing[held != test]
    return prompts, answers


def train(steps: int = 700, *, rows: int = 256, seed: int = 0) -> Transformer:
    """The model after ``steps`` of ``rows`` examples."""
    config = ModelConfig(
        "qwen3", LAST + N, 64, 128, 2, 4, 4, 16, tie_word_embeddings=True, qk_norm=True, max_position_embeddings=64,
        attention="full", mask_token_id=MASK, eos_token_ids=(STOP,),
    )
    model = Transformer(config)
    initialise(model, seed, layers=2)
    net, objective, rng = PackedNet(model), MaskedDiffusion(MASK, law="count"), np.random.default_rng(seed)
    optimizer = MuonAdamW(model, lr=6e-3, adam_lr=4e-3, weight_decay=0.01)
    for step in range(steps):
        prompts, answers = _rows(rng.integers(0, 4, rows), rng, test=False)
        tokens = torch.from_numpy(np.concatenate([prompts, answers], 1))
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        batch = PackedBatch(tokens, torch.zeros_like(tokens), places, places >= N + 4)
        objective(net, batch, torch.Generator().manual_seed((seed << 32) + step)).value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(schedule(step / steps, step, warmup=20, decay=0.5))
    return model.eval()


def measure(
    model: Transformer, operation: str, samples: int, *, temperature: float, seed: int = 1, method: str = "diffusion",
    **options: Any,
) -> dict[str, float]:
    """Share of valid answers, tokens per forward, and how many different answers one shuffled list gets."""
    rng = np.random.default_rng(seed)
    prompts, answers = _rows(np.full(samples, OPERATIONS.index(operation)), rng, test=True)
    runner = Runner(model, slots=16384)
    engine = Engine(runner, Host(runner, (STOP,), 64), max_seqs=128, prefix_caching=False)
    made = make(method, engine.host, options)
    streams = [
        engine.add(p, SamplingParams(max_tokens=N, temperature=temperature, seed=seed + i, ignore_eos=True), made)[0]
        for i, p in enumerate(prompts.tolist())
    ]
    while engine.busy:
        engine.step()
    got = np.array([s.seq.tokens[s.seq.prompt_len :] for s in streams])
    right = _valid(operation, prompts, answers, got)
    tokens, forwards = (sum(getattr(s.seq.metrics, k) for s in streams) for k in ("tokens", "forwards"))
    return {"score": float(right.mean()), "tokens_per_forward": tokens / forwards, "n": samples}


def _valid(operation: str, prompts: np.ndarray, answers: np.ndarray, got: np.ndarray) -> np.ndarray:
    """bool [b]. A shuffle may give the order of the question: that is what the exact law here says."""
    word, x = prompts[:, 2], prompts[:, 3 : 3 + N]
    if operation == "shuffle":
        return (np.sort(got, 1) == np.sort(x, 1)).all(1)
    if operation == "replace_random":
        return ((got == x).sum(1) == N - 1) & ((got == word[:, None]).sum(1) == 1)
    return (got == answers).all(1)


def table(model: Transformer, samples: int, seed: int = 1) -> list[Mapping[str, Any]]:
    """Every operation at 1, 2 and 4 tokens a step of random order, at temperature 1 and 0, beside the exact rate."""
    from stretto.bench.parallel_theory import success

    out = []
    for operation in OPERATIONS:
        for k in (1, 2, 4):
            for temperature in (1.0, 0.0):
                found = measure(
                    model, operation, samples, temperature=temperature, seed=seed, unmask="fixed", steps=N // k,
                    score="random", cache="none",
                )
                exact = success(operation, N, N // k) if temperature else None
                out.append({"operation": operation, "k": k, "temperature": temperature, "exact": exact, **found})
    return out
