"""The trainer beside the server (Aurora, arXiv 2602.06932): learns the drafter from what is served.

Run by the server as ``python -m stretto.serving.online JSON``. It holds the heads and the frozen LM head, not the
target: the target's law at every place comes from the recorded states. Loss of head i at place n:

    0.8^i [ (1 - b) KL(p_target || p_head) + b CE(next token) ]

with p_target = softmax(W_LM f_{n+1+i}), the law that decided token n + 2 + i, and b = ``cross_entropy``. Samples are
measured before they are trained on: acc_i is the agreement of head i with the served token, and
1 + sum_k prod_{i<=k} acc_i the simulated number of tokens per forward. A version with a value that is not finite, or
with less than ``min_gain``, is not published. ``share`` is the part of one core that training may use. Training that
is slower than serving takes the latest texts: a queue would keep it on traffic that is gone.

Legend: k places, r places of all texts of a batch, K heads, H width, V vocabulary.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.models.adapter import Adapter, Base, load_adapter, save_adapter
from stretto.models.checkpoint import load
from stretto.models.transformer import Transformer
from stretto.serving.samples import Sample, read_samples
from stretto.training.parts import FrozenNet, make_part
from stretto.training.run import write_json
from stretto.zoo.models import resolve

__all__ = ["LATEST", "Settings", "Trainer", "simulated"]

LATEST = "latest.json"
KIND = "medusa"
DECAY = 0.8
KEPT = 3  # versions that stay on disk


@dataclass(frozen=True, slots=True)
class Settings:
    """``sync``: optimizer steps between versions; ``threshold``: samples before the first step; ``replay``: share of a
    batch drawn from older samples (against forgetting); ``pool``: samples that are remembered; ``fresh``: samples that
    wait to be new ones of a batch, the oldest of them become older samples untrained."""

    model: str
    folder: str
    heads: int = 4
    lr: float = 6e-3
    cross_entropy: float = 0.5
    batch: int = 8
    sync: int = 40
    threshold: int = 32
    replay: float = 0.5
    pool: int = 1000
    fresh: int = 64
    share: float = 0.5
    min_gain: float = 1.1
    seed: int = 0


def simulated(acc: Sequence[float]) -> float:
    """Tokens per forward that the agreement of each head would give: 1 + acc_0 + acc_0 acc_1 + ..."""
    total, alive = 1.0, 1.0
    for a in acc:
        alive *= a
        total += alive
    return total


class Trainer:
    """One drafter for ``model``, of which only the LM head [V, H] is kept."""

    def __init__(self, settings: Settings, model: Transformer):
        part = make_part(KIND, FrozenNet(model), heads=settings.heads)
        self.settings, self.base = settings, Base.of(model, settings.model)
        self.module, self.config = part.module, part.config
        tied = model.config.tie_word_embeddings
        self.head = (model.model.embed_tokens.weight if tied else model.lm_head.weight).detach().float().clone()
        self.version = self.steps = self.seen = 0
        self._folder = Path(settings.folder)
        self._rng = random.Random(settings.seed)
        self._new: deque[Sample] = deque()
        self._old: deque[Sample] = deque(maxlen=settings.pool)
        self._right = torch.zeros(settings.heads)
        self._asked = torch.zeros(settings.heads)
        self._resume()
        self._optimizer = torch.optim.Adam(self.module.parameters(), lr=settings.lr)

    def _resume(self) -> None:
        """Go on from the last published version."""
        try:
            about = json.loads((self._folder / LATEST).read_text())
            load_adapter(about["path"]).into(self.module)
        except (OSError, ValueError, KeyError):
            return
        self.version = about["version"]

    def feed(self, samples: Sequence[Sample]) -> None:
        """Measure the drafter on samples that it has not seen, then keep them for training."""
        with torch.no_grad():
            for sample in samples:
                guesses = self._logits(sample.states).argmax(-1)
                for i in range(self.settings.heads):
                    n = min(len(sample.states), len(sample.tokens) - 2 - i)
                    if n > 0:
                        self._right[i] += (guesses[:n, i] == sample.tokens[2 + i : 2 + i + n]).sum()
                        self._asked[i] += n
        self._new.extend(samples)
        while len(self._new) > self.settings.fresh:
            self._old.append(self._new.popleft())
        self.seen += len(samples)

    @property
    def ready(self) -> bool:
        return self.seen >= self.settings.threshold

    def step(self) -> float:
        """One optimizer step; the loss."""
        s = self.settings
        batch = []
        while len(batch) < s.batch and (self._new or self._old):
            if self._new and (not self._old or self._rng.random() >= s.replay):
                batch.append(self._new.popleft())
                self._old.append(batch[-1])
            else:
                batch.append(self._rng.choice(self._old))
        total = self.loss(batch)
        self._optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 2.5)
        self._optimizer.step()
        self.steps += 1
        return float(total.detach())

    def loss(self, batch: Sequence[Sample]) -> Tensor:
        """Mean over the texts of ``batch``; see the module's docstring."""
        b, total = self.settings.cross_entropy, torch.zeros(())
        states = torch.cat([s.states for s in batch])  # [r, H]
        logits = self._logits(states).log_softmax(-1)
        laws = F.linear(states, self.head).log_softmax(-1)
        for i in range(self.settings.heads):
            rows, tokens, weights, start = [], [], [], 0
            for s in batch:
                n = max(0, min(len(s.states) - 1 - i, len(s.tokens) - 2 - i))
                rows.append(torch.arange(start, start + n))
                tokens.append(s.tokens[2 + i : 2 + i + n])
                weights.append(torch.full((n,), 1 / (n * len(batch)) if n else 0.0))
                start += len(s.states)
            at, weight = torch.cat(rows), torch.cat(weights)
            mine, theirs = logits[at, i], laws[at + 1 + i]
            kl = F.kl_div(mine, theirs, reduction="none", log_target=True).sum(-1)
            ce = F.nll_loss(mine, torch.cat(tokens), reduction="none")
            total = total + DECAY**i * (weight * ((1 - b) * kl + b * ce)).sum()
        return total

    def _logits(self, states: Tensor) -> Tensor:
        """[k, H] -> [k, K, V]"""
        return F.linear(self.module(states), self.head)

    @property
    def accuracy(self) -> list[float]:
        """Agreement of each head on samples before they were trained on, since the last version."""
        return (self._right / self._asked.clamp(min=1)).tolist()

    def publish(self) -> dict[str, Any] | None:
        """Write a version; None when it must not be used."""
        acc = self.accuracy
        weights = {n: t.detach().clone() for n, t in self.module.state_dict().items()}
        finite = all(bool(t.isfinite().all()) for t in weights.values())
        gain = simulated(acc)
        self._right.zero_()
        self._asked.zero_()
        if not finite or gain < self.settings.min_gain:
            return None
        self.version += 1
        folder = self._folder / f"v{self.version:05d}"
        statistics = {"acceptance": [[round(a, 4)] for a in acc], "simulated": round(gain, 3), "samples": self.seen}
        save_adapter(folder, Adapter(KIND, self.base, weights, self.config, statistics), dtype=torch.float32)
        about = {
            "version": self.version, "path": str(folder), "metric": round(gain, 4), "steps": self.steps,
            "samples": self.seen, "time": time.time(),
        }
        write_json(self._folder / LATEST, about)
        for old in sorted(self._folder.glob("v*"))[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        return about


def main(given: Mapping[str, Any]) -> None:
    """Train until the server is gone."""
    settings, parent = Settings(**given), os.getppid()
    os.nice(10)
    torch.set_num_threads(1)
    trainer = Trainer(settings, load(resolve(settings.model), dtype="float32", device="cpu"))
    inbox = Path(settings.folder) / "samples"
    since = 0
    while os.getppid() == parent:
        trainer.feed(read_samples(inbox, 64))
        if not trainer.ready:
            time.sleep(0.2)
            continue
        start = time.thread_time()
        trainer.step()
        since += 1
        if since >= settings.sync:
            trainer.publish()
            since = 0
        used = time.thread_time() - start
        time.sleep(used * (1 / settings.share - 1))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
