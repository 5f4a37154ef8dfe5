"""Served texts as training samples: token ids and the states that a drafter reads, one small file each.

The engine's thread only copies rows; a thread of its own writes. The folder holds at most ``most`` samples: when the
trainer does not keep up, the oldest are dropped and counted. Samples are the users' texts: the folder is readable by
its owner alone, and files vanish when they were read.

Legend: n places of the answer, counted from the last prompt token on; H width.
"""

from __future__ import annotations

import os
import queue
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from stretto.engine.engine import Stream

__all__ = ["Recorder", "Sample", "read_samples"]

LAYER = -1  # final-normed states: what the LM head reads
WAITING = 64  # samples between the engine's thread and the writer


@dataclass(frozen=True, slots=True)
class Sample:
    """``tokens`` int64 [n + 1]: the last token of the prompt, then the answer; ``states`` float32 [m, H], m <= n: of
    the rows that read ``tokens[:m]``."""

    tokens: Tensor
    states: Tensor


class Recorder:
    """Watches an engine: ``wanted(stream)`` says whether a text may be kept, ``share`` is the fraction that is."""

    def __init__(
        self, runner: Any, folder: Path, wanted: Callable[[Stream], bool], *, share: float = 1.0, most: int = 1000,
        seed: int = 0,
    ):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._runner, self._folder, self._wanted, self._share, self._most = runner, folder, wanted, share, most
        self._rng, self._number = random.Random(seed), 0
        self._queue: queue.Queue[dict[str, Tensor]] = queue.Queue(WAITING)
        self.recorded = self.dropped = 0
        threading.Thread(target=self._write, name="samples", daemon=True).start()

    def __call__(self, stream: Stream) -> None:
        """A stream is about to end: its rows are still in the cache."""
        seq = stream.seq
        start = seq.prompt_len - 1
        rows = min(len(seq.view), len(seq.tokens)) - start
        if rows < 3 or LAYER not in seq.taps or self._rng.random() >= self._share or not self._wanted(stream):
            return
        slots = torch.from_numpy(seq.view.slots[start : start + rows].astype(np.int64))
        states = self._runner.keep(LAYER)[slots].to(torch.bfloat16)
        try:
            self._queue.put_nowait({"tokens": torch.tensor(seq.tokens[start:], dtype=torch.int32), "states": states})
        except queue.Full:
            self.dropped += 1

    def _write(self) -> None:
        while True:
            data = save(self._queue.get())
            files = sorted(self._folder.glob("*.safetensors"))
            for old in files[: max(0, len(files) + 1 - self._most)]:
                old.unlink(missing_ok=True)
                self.dropped += 1
            name = self._folder / f"{os.getpid()}-{self._number:09d}"
            name.with_suffix(".partial").write_bytes(data)
            os.replace(name.with_suffix(".partial"), name.with_suffix(".safetensors"))
            self._number += 1
            self.recorded += 1


def read_samples(folder: Path, most: int) -> list[Sample]:
    """Up to ``most`` samples, oldest first; their files are gone afterwards. Damaged ones are left out."""
    out = []
    for path in sorted(folder.glob("*.safetensors"), key=lambda p: p.name.rpartition("-")[2])[:most]:
        try:
            data = load(path.read_bytes())
            out.append(Sample(data["tokens"].long(), data["states"].float()))
        except (OSError, KeyError, SafetensorError):
            pass
        path.unlink(missing_ok=True)
    return out
