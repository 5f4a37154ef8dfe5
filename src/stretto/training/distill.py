"""Distillation of diffusion models: certain about many tokens at once (dParallel), safe on long jumps (CD4LM).

Both objectives need the base and the model's own answers, and are indifferent to how the base attends: ``Views`` lays
out a batch for a kind of attention, forwards it with any set of hidden places, and gives the logits there.
Legend of shapes: b rows, t places, q places of a view, m maskable places, k hidden places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.models.lora import LoRALinear
from stretto.models.transformer import Transformer
from stretto.training.data import PackedBatch
from stretto.training.nets import PackedNet
from stretto.training.noise import ranks
from stretto.training.objectives import Loss, Net, full_mask, two_stream, two_stream_mask

__all__ = ["CertaintyForcing", "Dscd", "FrozenBase", "Views", "nested_counts", "segments", "spread", "views_of"]


class Views(Protocol):
    """A batch laid out for denoising. ``maskable`` bool [b, q]; ``block`` and ``text`` int64 [m]: which block of which
    text each maskable place belongs to, the former numbered from 0 in every text; ``targets`` int64 [b, q]."""

    maskable: Tensor
    block: Tensor
    text: Tensor
    targets: Tensor

    def states(self, net: Net, hide_bq: Tensor) -> Tensor:
        """[b, q, H]: the states of all places of the view with those of ``hide_bq`` hidden."""
        ...


class BlockViews:
    """Block-causal attention: every block is an active segment behind clean ones, all of them in one forward."""

    def __init__(self, batch: PackedBatch, mask_id: int, block: int):
        self._batch, self._mask, self._size = batch, mask_id, block
        place = two_stream(batch, block)
        seen = place.clamp(min=0)
        self._docs = batch.docs.gather(1, seen).masked_fill(place < 0, -2)
        self._positions = batch.positions.gather(1, seen)
        self.targets = batch.tokens.gather(1, seen)
        self.maskable = batch.answer.gather(1, seen) & (place >= 0)
        self._see = two_stream_mask(self._docs, self._positions, batch.docs, batch.positions, block)
        t = batch.tokens.shape[1]
        row = torch.arange(len(place), device=place.device)[:, None].expand_as(place)
        self.text = (row * t + self._docs)[self.maskable]
        self.block = (self._positions // block)[self.maskable]

    def states(self, net: Net, hide_bq: Tensor) -> Tensor:
        noisy = self.targets.masked_fill(hide_bq, self._mask)
        tokens = torch.cat([noisy, self._batch.tokens], 1)
        positions = torch.cat([self._positions, self._batch.positions], 1)
        return net.hidden(tokens, positions, self._see)[:, : noisy.shape[1]]


class FullViews:
    """Full attention: places behind a hidden block must be hidden too, see ``segments``."""

    def __init__(self, batch: PackedBatch, mask_id: int, block: int):
        self._batch, self._mask = batch, mask_id
        self.targets, self.maskable = batch.tokens, batch.answer
        t = batch.tokens.shape[1]
        group = torch.arange(len(batch.docs), device=batch.docs.device)[:, None] * t + batch.docs
        first = batch.positions.masked_fill(~batch.answer, t)
        start = torch.full((group.numel() + t,), t, device=group.device).scatter_reduce(
            0, group.clamp(min=0).flatten(), first.flatten(), "amin"
        )
        self.text = group[batch.answer]
        self.block = (batch.positions[batch.answer] - start[self.text]) // block

    def states(self, net: Net, hide_bq: Tensor) -> Tensor:
        noisy = self.targets.masked_fill(hide_bq, self._mask)
        return net.hidden(noisy, self._batch.positions, full_mask(self._batch))


def views_of(attention: str, batch: PackedBatch, mask_id: int, block: int) -> Views:
    """``attention``: "block" or "full"."""
    return BlockViews(batch, mask_id, block) if attention == "block" else FullViews(batch, mask_id, block)


def spread(places_m: Tensor, maskable_bq: Tensor) -> Tensor:
    """bool [m] of the maskable places -> bool [b, q]."""
    out = torch.zeros_like(maskable_bq)
    out[maskable_bq] = places_m
    return out


def segments(views: Views, attention: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(active, future) bool [m]. Full attention: one block of every text, drawn evenly, is active, and what lies behind
    it is future (hidden, without a loss). Block-causal attention: every block is active, no place sees a later one."""
    if attention == "block":
        every = torch.ones_like(views.block, dtype=torch.bool)
        return every, ~every
    texts, which = torch.unique(views.text, return_inverse=True)
    count = torch.zeros(len(texts), dtype=torch.long, device=which.device)
    count = count.scatter_reduce(0, which, views.block + 1, "amax")
    drawn = torch.rand(len(texts), generator=generator, dtype=torch.float64).to(count.device)
    chosen = (drawn * count).long()[which]
    return views.block == chosen, views.block > chosen


@dataclass(frozen=True, slots=True)
class CertaintyForcing:
    """dParallel: cross-entropy and, where the prediction is already right, its entropy at temperature T, on two
    complementary halves of the active segment: L = CE1 + CE2 + beta (H1 + H2), in nats.

    ``everywhere`` takes the entropy of wrong predictions too: the published ablation, for comparison only.
    """

    mask_id: int
    attention: str
    block: int = 32
    ratio: float = 0.5
    beta: float = 2.0
    temperature: float = 0.5
    everywhere: bool = False

    def __call__(self, net: Net, batch: PackedBatch, generator: torch.Generator) -> Loss:
        views = views_of(self.attention, batch, self.mask_id, self.block)
        active, future = segments(views, self.attention, generator)
        drawn = torch.rand(len(active), generator=generator, dtype=torch.float64).to(active.device)
        half = active & (drawn < self.ratio)
        value, labels = torch.zeros((), device=active.device), 0
        for chosen in (half, active & ~half):
            if not chosen.any():
                continue
            at = spread(chosen, views.maskable)
            states = views.states(net, spread(chosen | future, views.maskable))
            logits, targets = net.logits(states[at]), views.targets[at]
            value = value + F.cross_entropy(logits, targets) + self.beta * self.certainty(logits, targets)
            labels += len(targets)
        return Loss(value, labels)

    def certainty(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean entropy of softmax(z / T) where argmax z is right; a zero with a graph where nothing is."""
        right = logits.argmax(-1) == targets
        if self.everywhere:
            right = torch.ones_like(right)
        if not right.any():
            return 0.0 * logits.sum()
        law = torch.log_softmax(logits[right].float() / self.temperature, -1)
        return -(law.exp() * law).sum(-1).mean()


def nested_counts(length: Tensor, r_s: Tensor, r_t: Tensor, *, short: bool = True) -> tuple[Tensor, Tensor]:
    """How many of ``length`` places student and teacher see hidden: m_s = max(floor(L r_s), 2, ceil(L / 10)),
    m_t = min(floor(L r_t), m_s), both at most L. ``short``: the rules for short answers (L < 20: r_s at most 0.5;
    L <= 10: 2 and 1); off where the group is a block."""
    if short:
        r_s = torch.where(length < 20, r_s.clamp(max=0.5), r_s)
    least = torch.maximum(torch.full_like(length, 2), torch.ceil(length * 0.1).long())
    m_s = torch.maximum((length * r_s).long(), least)
    m_t = torch.minimum((length * r_t).long(), m_s)
    if short:
        m_s, m_t = torch.where(length <= 10, 2, m_s), torch.where(length <= 10, 1, m_t)
    m_s = torch.minimum(m_s, length)
    return m_s, torch.minimum(m_t, m_s)


@dataclass(slots=True)
class Dscd:
    """CD4LM: the student, with more hidden, shall say what the frozen teacher says with less hidden.

    Student ratio ~ U(``student``), teacher ratio = clip(student ratio * U(``share``), 0.1, 0.6), nested sets M_T in
    M_S of one permutation. L = lambda min(T^2 KL(teacher || student), 5) + (1 - lambda) min(CE, 5) over M_S; lambda is
    0.9 for a tenth of the run, then falls to 0.5 along a cosine. ``positions``: "student" = KL on all of M_S, as
    published;
    "both" = only where the teacher is blind too; "truth" = the true token where the teacher sees it. Noise levels are
    drawn per text (full attention) or per block (block-causal, where a student ratio above 1 hides whole blocks: the
    state in which every block begins).
    """

    mask_id: int
    attention: str
    teacher: Net
    block: int = 32
    temperature: float = 2.0
    weights: tuple[float, float] = (0.9, 0.5)
    student: tuple[float, float] = (0.4, 0.9)
    share: tuple[float, float] = (0.3, 0.7)
    positions: Literal["student", "both", "truth"] = "student"
    nested: bool = True
    progress: Callable[[], float] = field(default=lambda: 0.0)

    def weight(self) -> float:
        """lambda at this point of the run."""
        high, low = self.weights
        x = min(1.0, max(0.0, (self.progress() - 0.1) / 0.9))
        return low + (high - low) * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * x, dtype=torch.float64))))

    def __call__(self, net: Net, batch: PackedBatch, generator: torch.Generator) -> Loss:
        views = views_of(self.attention, batch, self.mask_id, self.block)
        student, teacher = self.masks(views, generator)
        hide_s, hide_t = spread(student, views.maskable), spread(teacher, views.maskable)
        targets = views.targets[hide_s]
        mine = net.logits(views.states(net, hide_s)[hide_s])
        consistency = self._consistency(views, mine, targets, hide_s, hide_t)
        weight = self.weight()
        truth = F.cross_entropy(mine, targets).clamp(max=5.0)
        value = weight * consistency.clamp(max=5.0) + (1 - weight) * truth
        return Loss(value, len(targets))

    def masks(self, views: Views, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(student, teacher) bool [m]."""
        group = views.text if self.attention == "full" else views.text * (1 << 20) + views.block
        rank, which, count = ranks(group.cpu(), generator)
        r = torch.rand(2, len(count), generator=generator, dtype=torch.float64)
        (low, high), (least, most) = self.student, self.share
        r_s = low + (high - low) * r[0]
        r_t = (r_s * (least + (most - least) * r[1])).clamp(0.1, 0.6)
        m_s, m_t = nested_counts(count, r_s, r_t, short=self.attention == "full")
        if not self.nested:
            other, _, _ = ranks(group.cpu(), generator)
            return (rank < m_s[which]).to(group.device), (other < m_t[which]).to(group.device)
        return (rank < m_s[which]).to(group.device), (rank < m_t[which]).to(group.device)

    def _consistency(self, views: Views, mine: Tensor, targets: Tensor, hide_s: Tensor, hide_t: Tensor) -> Tensor:
        blind = hide_t[hide_s]  # places of M_S that the teacher does not see
        with torch.no_grad():
            z = self.teacher.logits(views.states(self.teacher, hide_t)[hide_s])
            wanted = torch.softmax(z.float() / self.temperature, -1)
        if self.positions == "truth":
            wanted[~blind] = F.one_hot(targets[~blind], wanted.shape[-1]).to(wanted)
        rows = blind if self.positions == "both" else torch.ones_like(blind)
        if not rows.any():
            return 0.0 * mine.sum()
        law = torch.log_softmax(mine[rows].float() / self.temperature, -1)
        return self.temperature**2 * F.kl_div(law, wanted[rows], reduction="batchmean")


class FrozenBase:
    """The net of a model with LoRA paths, without them: the teacher of its own student. No gradient."""

    def __init__(self, model: Transformer):
        self._net = PackedNet(model)
        self._paths = [m for m in model.modules() if isinstance(m, LoRALinear)]

    @contextmanager
    def _bare(self) -> Iterator[None]:
        scales = [m.scale for m in self._paths]
        for m in self._paths:
            m.scale = 0.0
        try:
            with torch.no_grad():
                yield
        finally:
            for m, scale in zip(self._paths, scales, strict=True):
                m.scale = scale

    def hidden(self, tokens_bt: Tensor, positions_bt: Tensor, mask_btt: Tensor) -> Tensor:
        with self._bare():
            return self._net.hidden(tokens_bt, positions_bt, mask_btt)

    def logits(self, hidden_kH: Tensor) -> Tensor:
        with self._bare():
            return self._net.logits(hidden_kH)

    def balance(self) -> Tensor:
        return self._net.balance()
