"""Short studies of slots for the evidence of ppd and hidden_transfer: accuracy by entry layer, by members, by distance.

All of them run on a few of the workbook's test prompts with the base's own greedy answers, and on parts that are
trained for a few steps here, on the same batches in the same order, so that only what is varied differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.models import checkpoint
from stretto.models.adapter import Adapter
from stretto.training.data import PackedBatch, pack
from stretto.training.optim import MuonAdamW, schedule
from stretto.training.parts import Answers, FrozenNet, Kind, make_part, own_documents
from stretto.training.run import special_ids
from stretto.training.slot_rows import HiddenTransfer, draw_cuts, laws, read
from stretto.zoo import workbook
from stretto.zoo.models import resolve

__all__ = ["Study"]

LENGTH, ROWS = 144, 6  # tokens of a packed row, rows of a batch


class Study:
    """A frozen base, ``batches`` to train on and ``tests`` to measure on."""

    def __init__(self, base: str = "zoo:tiny", *, examples: int = 192, tests: int = 3):
        model = checkpoint.load(resolve(base), dtype="float32")
        self.net, answers, pad = FrozenNet(model), Answers(model), special_ids()["<|pad|>"]
        stream = workbook.stream("train", 4_000_037)
        documents = own_documents([next(stream) for _ in range(examples)], answers, LENGTH, [True] * examples)
        rows = pack(documents, LENGTH, pad_id=pad)
        order = torch.randperm(len(rows.tokens), generator=torch.Generator().manual_seed(0)).split(ROWS)
        self.batches = [PackedBatch(rows.tokens[i], rows.docs[i], rows.positions[i], rows.answer[i]) for i in order]
        held = [e for task in workbook.TASKS for e in workbook.examples(task, "test", tests, 10_007)]
        rows = pack(own_documents(held, answers, LENGTH, [True] * len(held)), LENGTH, pad_id=pad)
        parts = torch.arange(len(rows.tokens)).split(2 * ROWS)
        self.tests = [PackedBatch(rows.tokens[i], rows.docs[i], rows.positions[i], rows.answer[i]) for i in parts]

    def trained(self, kind: str, steps: int, *, lr: float = 2e-2, adam_lr: float = 5e-2, **options: Any) -> Kind:
        """A part after ``steps`` steps."""
        torch.manual_seed(0)
        part = make_part(kind, self.net, **options)
        optimizer = MuonAdamW(part.module, lr=lr, adam_lr=adam_lr, weight_decay=0.0)
        for step in range(steps):
            batch = self.batches[step % len(self.batches)]
            part(self.net, batch, torch.Generator().manual_seed(step)).value.backward()
            torch.nn.utils.clip_grad_norm_(part.module.parameters(), 1.0)
            optimizer.step(schedule(step / steps, step, warmup=5, decay=0.5))
        return part

    def acceptance(self, part: Kind) -> list[list[float]]:
        """acc[d][r] on the test prompts."""
        return part.statistics(self.tests)["acceptance"]

    def shipped(self, adapter: Adapter) -> HiddenTransfer:
        """The matrices of an adapter, as the training sees them."""
        part = HiddenTransfer(self.net, entries=adapter.config["entries"], chain=adapter.config["chain"])
        adapter.into(part.module)
        return part

    @torch.no_grad()
    def cosines(self, part: HiddenTransfer) -> dict[int, list[float]]:
        """Layer -> cosine of every slot's state with the state of the real row that it stands for."""
        entries, total, count = part.config["entries"], {}, 0
        layers = range(max(entries), self.net.model.config.num_hidden_layers + 1)
        for batch in self.tests:
            text = read(self.net, batch, sorted({*entries, *layers}))
            cuts, tapped = draw_cuts(batch, 24, torch.Generator().manual_seed(0)), {}
            part.states(batch, cuts, text, tapped=tapped)
            at, k, last = cuts.clamp(min=0), len(entries), batch.tokens.shape[1] - 1
            inside = (cuts >= 0) & (at + k <= last)
            inside &= batch.docs.gather(1, (at + k).clamp(max=last)) == batch.docs.gather(1, at)
            count += int(inside.sum())
            for layer in layers:
                ours = tapped[layer].view(len(at), k, at.shape[1], -1)
                for i in range(k):
                    real = _gather(text.states[layer], (at + i + 1).clamp(max=last))
                    sums = total.setdefault(layer, [0.0] * k)
                    sums[i] += float(F.cosine_similarity(ours[:, i], real, dim=-1)[inside].sum())
        return {layer: [round(x / count, 4) for x in sums] for layer, sums in total.items()}

    @torch.no_grad()
    def hidden_steps(self, part: HiddenTransfer) -> Mapping[str, Sequence[float]]:
        """Agreement of each slot's first choice with the model's, with and without sight of the slots before it."""
        k = len(part.config["entries"])
        alone = np.eye(k, dtype=bool).reshape(k, 1, k, 1)
        out: dict[str, list[float]] = {}
        for name, mask in (("seen", "ensemble"), ("hidden", alone)):
            hits, tries = torch.zeros(k), torch.zeros(k)
            for batch in self.tests:
                text = read(self.net, batch, sorted(set(part.config["entries"])))
                cuts = draw_cuts(batch, 24, torch.Generator().manual_seed(0))
                states, at = part.states(batch, cuts, text, mask=mask), cuts.clamp(min=0)
                last = batch.tokens.shape[1] - 1
                for i in range(k):
                    there = (cuts >= 0) & (at + i + 1 <= last)
                    there &= batch.docs.gather(1, (at + i + 1).clamp(max=last)) == batch.docs.gather(1, at)
                    wanted = self.net.logits(_gather(text.final, (at + i + 1).clamp(max=last))[there]).argmax(-1)
                    hits[i] += (laws(self.net, states[:, i][there]).argmax(-1) == wanted).sum()
                    tries[i] += there.sum()
            out[name] = [round(float(x), 4) for x in hits / tries]
        return out


def _gather(states: Tensor, at: Tensor) -> Tensor:
    """states [b, t, H] at places [b, c] -> [b, c, H]"""
    return states.gather(1, at[..., None].expand(-1, -1, states.shape[2]))
