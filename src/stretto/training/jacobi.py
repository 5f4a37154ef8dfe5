"""Jacobi Forcing: one packed forward teaches every noisy block of an answer to jump to its fixed point.

A row holds whole examples, each as its clean text (prompt and answer) and, at the same positions, one recorded state of
every block of the answer. Who sees whom, within an example: a clean place the clean places up to itself; a
noisy place of window v (w blocks in a row) the clean places before the window, and the noisy places of its window up to
itself. So a noisy block stands behind noisy blocks, as in decoding, and the clean half is a plain causal pass.
Legend of shapes: b rows, t places, k learnt places, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stretto.errors import OptionError
from stretto.training.objectives import Loss, Net
from stretto.training.trajectories import Trajectory

__all__ = ["SCHEDULES", "JacobiForcing", "TrajectoryBatch", "TrajectoryData", "choose_states", "noise_targets", "pack"]

SCHEDULES = ("progressive", "random", "reversed")


@dataclass(frozen=True, slots=True)
class TrajectoryBatch:
    """Packed rows; padding has ``docs`` = -1."""

    tokens: Tensor  # int64 [b, t]
    docs: Tensor  # int64 [b, t] number of the example within its row
    positions: Tensor  # int64 [b, t]
    answer: Tensor  # bool [b, t] clean places of the answer
    blocks: Tensor  # int64 [b, t] number of the noisy block within the row, -1 = clean
    window: Tensor  # int64 [b, t] position where the window begins, -1 = clean
    teacher: Tensor  # int64 [b, t] place of the clean twin of a learnt noisy place, -1 = not learnt

    def to(self, device: torch.device | str) -> TrajectoryBatch:
        return TrajectoryBatch(*(getattr(self, f.name).to(device) for f in fields(self)))

    def mask(self) -> Tensor:
        """bool [b, t, t]: place i sees place j."""
        of, at = (lambda x: x[:, :, None]), (lambda x: x[:, None, :])
        noisy, reach = self.blocks >= 0, torch.where(self.window >= 0, self.window, self.positions + 1)
        clean = ~at(noisy) & (at(self.positions) < of(reach))
        same = of(noisy) & at(noisy) & (of(self.window) == at(self.window)) & (at(self.positions) <= of(self.positions))
        return (of(self.docs) == at(self.docs)) & (clean | same)


@dataclass(frozen=True, slots=True)
class JacobiForcing:
    """``ar_weight`` x cross-entropy on the clean answers + soft cross-entropy of the noisy places against the detached
    law of their clean twins, averaged within each block and then over the blocks (so that short ones count)."""

    ar_weight: float = 10.0

    def __call__(self, net: Net, batch: TrajectoryBatch, generator: torch.Generator) -> Loss:
        hidden = net.hidden(batch.tokens, batch.positions, batch.mask())
        learnt = batch.teacher >= 0
        inside = (batch.docs[:, 1:] == batch.docs[:, :-1]) & batch.answer[:, 1:]
        targets = batch.tokens[:, 1:][inside]
        ar = F.cross_entropy(net.logits(hidden[:, :-1][inside]).float(), targets)
        if not learnt.any():
            return Loss(self.ar_weight * ar, len(targets))
        row = torch.arange(len(learnt), device=learnt.device)[:, None].expand_as(learnt)
        student = net.logits(hidden[learnt]).float()
        with torch.no_grad():
            law = net.logits(hidden[row[learnt], batch.teacher[learnt]]).float().softmax(-1)
        loss_k = -(law * student.log_softmax(-1)).sum(-1)
        key = row[learnt] * (int(batch.blocks.max()) + 1) + batch.blocks[learnt]
        _, of, count = key.unique(return_inverse=True, return_counts=True)
        consistency = (loss_k / count[of]).sum() / len(count)
        return Loss(self.ar_weight * ar + consistency, len(targets) + len(loss_k))


def noise_targets(blocks: int, window: int, schedule: str, phase: int, rng: random.Random) -> list[float]:
    """The wanted noise of each block: linspace(0, 1, w)[(b + phase) mod w], that reversed, or in random order.

    ``phase``: answers of a few blocks would else never have a noisy one.
    """
    if schedule not in SCHEDULES:
        raise OptionError("schedule", schedule, ", ".join(SCHEDULES))
    ramp = np.linspace(0.0, 1.0, window).tolist() if window > 1 else [1.0]
    if schedule == "random":
        return [rng.choice(ramp) for _ in range(blocks)]
    if schedule == "reversed":
        ramp.reverse()
    return [ramp[(b + phase) % window] for b in range(blocks)]


def choose_states(t: Trajectory, targets: Sequence[float]) -> list[np.ndarray]:
    """The recorded state of each block whose noise is nearest to its target; the earlier one among equals."""
    return [
        b.states[int(np.abs(b.noise() - target).argmin())] for b, target in zip(t.blocks, targets, strict=True)
    ]


@dataclass(slots=True)
class _Row:
    """One example as places: clean text, then the noisy blocks."""

    tokens: list[int]
    positions: list[int]
    answer: list[bool]
    blocks: list[int]
    window: list[int]
    teacher: list[int]


def _places(t: Trajectory, states: Sequence[np.ndarray], window: int, phase: int) -> _Row:
    """``window``: noisy blocks that see each other; with ``phase`` the first window is that much shorter."""
    n = len(t.tokens)
    row = _Row(list(t.tokens), list(range(n)), [i >= t.prompt for i in range(n)], [-1] * n, [-1] * n, [-1] * n)
    begin, differs, current = -1, False, -1
    for b, (block, state) in enumerate(zip(t.blocks, states, strict=True)):
        if (b + phase) // window != current:
            current, begin, differs = (b + phase) // window, block.start, False
        for i, token in enumerate(state.tolist()):
            at = block.start + i
            differs = differs or token != t.tokens[at]
            row.tokens.append(token)
            row.positions.append(at)
            row.answer.append(False)
            row.blocks.append(b)
            row.window.append(begin)
            row.teacher.append(at if differs and at + 1 < n else -1)  # what follows the end is not learnt
    return row


def pack(
    trajectories: Sequence[Trajectory], *, window: int, schedule: str, length: int, pad_id: int, rng: random.Random,
) -> TrajectoryBatch:
    """Rows of ``length`` holding every example, best fit by decreasing length; longer ones are left out."""
    made = []
    for t in trajectories:
        phase = rng.randrange(window)
        targets = noise_targets(len(t.blocks), window, schedule, phase, rng)
        made.append(_places(t, choose_states(t, targets), window, phase))
    rows: list[list[_Row]] = []
    free: list[int] = []
    for one in sorted(made, key=lambda r: -len(r.tokens)):
        n = len(one.tokens)
        if n > length:
            continue
        fits = [i for i, left in enumerate(free) if left >= n]
        if not fits:
            rows.append([])
            free.append(length)
        best = min(fits, key=free.__getitem__) if fits else len(rows) - 1
        rows[best].append(one)
        free[best] -= n
    if not rows:
        shortest = min((len(r.tokens) for r in made), default=0)
        raise OptionError("length", length, f"at least {shortest}, what the shortest of {len(made)} examples takes")
    return _fill(rows, length, pad_id)


def _fill(rows: list[list[_Row]], length: int, pad_id: int) -> TrajectoryBatch:
    shape = (len(rows), length)
    tokens, docs = np.full(shape, pad_id), np.full(shape, -1)
    positions, answer = np.zeros(shape, int), np.zeros(shape, bool)
    blocks, window, teacher = (np.full(shape, -1) for _ in range(3))
    for r, row in enumerate(rows):
        at = number = 0
        for d, one in enumerate(row):
            here = np.s_[r, at : at + len(one.tokens)]
            tokens[here], docs[here], positions[here], answer[here] = one.tokens, d, one.positions, one.answer
            window[here] = one.window
            blocks[here] = [b + number if b >= 0 else -1 for b in one.blocks]
            teacher[here] = [i + at if i >= 0 else -1 for i in one.teacher]
            number += max(one.blocks, default=-1) + 1
            at += len(one.tokens)
    arrays = (tokens, docs, positions, answer, blocks, window, teacher)
    return TrajectoryBatch(*(torch.from_numpy(a) for a in arrays))


class TrajectoryData:
    """An endless, resumable supply of batches. ``pool(k)`` gives the trajectories of pool k, which is read ``epochs``
    times, each time with other states; the place in the data is (pool * epochs + epoch, batch)."""

    def __init__(
        self, pool: Callable[[int], Sequence[Trajectory]], *, rows: int, length: int, pad_id: int, seed: int,
        window: int, schedule: str = "progressive", epochs: int = 2,
    ):
        self._pool, self.rows, self.length, self.pad_id, self.seed = pool, rows, length, pad_id, seed
        self.window, self.schedule, self.epochs = window, schedule, epochs
        self.position = (0, 0)

    def _batches(self, turn: int) -> list[TrajectoryBatch]:
        rng = random.Random(f"{self.seed}/{turn}")
        packed = pack(
            self._pool(turn // self.epochs), window=self.window, schedule=self.schedule, length=self.length,
            pad_id=self.pad_id, rng=rng,
        )
        order = torch.randperm(len(packed.tokens), generator=torch.Generator().manual_seed(rng.getrandbits(62)))
        used = len(order) - len(order) % self.rows or len(order)
        return [
            TrajectoryBatch(*(getattr(packed, f.name)[i] for f in fields(packed)))
            for i in order[:used].split(self.rows)
        ]

    def __iter__(self) -> Iterator[TrajectoryBatch]:
        while True:
            turn, i = self.position
            batches = self._batches(turn)
            while i < len(batches):
                self.position = (turn, i + 1)
                yield batches[i]
                i += 1
            self.position = (turn + 1, 0)
