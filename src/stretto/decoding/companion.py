"""Extra layers that run beside the target, with K/V of their own under the target's slots.

A row of the text has its K/V in the slot that the target gave it, so that prefix sharing, forks, truncation and
compaction need nothing here: a slot whose K/V is not of the forward that last wrote it (``Host.written``) is computed
when it is needed, all such rows of all sequences in one forward. Rows of drafts lie in slots of their own behind the
target's and are forgotten with the step.

Legend: n rows, H width, S slots of the target.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor, nn

from stretto.decoding.drafting import Rows, flat
from stretto.engine.host import Host
from stretto.engine.runner import Runner
from stretto.engine.types import Sequence
from stretto.models.heads import with_layers

__all__ = ["Companion"]

SCRATCH = 4096  # rows of drafts of one step


class Companion:
    """``layers``: extra blocks of the target's width. ``shift``: row p of the text reads the feature of row p - 1
    beside its token, and so begins with row 1; its position is that of the feature. ``norm``: a final norm, or none.
    """

    def __init__(self, host: Host, layers: nn.ModuleList, *, shift: bool, norm: nn.Module | None = None):
        self._host, self._shift = host, int(shift)
        self._slots = host.runner.alloc.total
        native = host.runner.native is not None
        model = with_layers(host.runner.model, layers, norm)
        if native:
            model = model.to(host.runner.native.weight_dtype)
        self.runner = Runner(
            model, slots=self._slots + SCRATCH, backend="native" if native else "torch",
            deterministic=host.runner.deterministic,
        )
        self._taps = (len(layers),) if norm is None else (-1, len(layers))
        self._seen = np.full(self._slots, np.iinfo(np.int64).min)  # the forward whose rows our K/V belongs to
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Memory of its K/V, were every slot used."""
        return self.runner.pool.nbytes

    def begin(self) -> None:
        """A new step: the rows of the last drafts are forgotten."""
        self._next = 0

    def scratch(self, n: int) -> np.ndarray:
        """int32 [n] slots for rows of drafts."""
        self._next += n
        if self._next > SCRATCH:
            raise AssertionError(f"more than {SCRATCH} rows of drafts in a step")
        return np.arange(self._slots + self._next - n, self._slots + self._next, dtype=np.int32)

    def missing(self, seq: Sequence) -> Rows:
        """The rows of the text whose K/V is not there yet, behind those that have it; there may be none.

        Rows before and among those without states (the method slept) are left out: nobody sees them."""
        slots, start = seq.view.slots[self._shift :], self.start(seq)
        stale = self._seen[slots[start:]] != self._host.written[slots[start:]]
        first = start + int(stale.argmax()) if stale.any() else len(slots)
        tokens = seq.tokens[first + self._shift : len(slots) + self._shift]
        self._seen[slots[first:]] = self._host.written[slots[first:]]
        return Rows(tokens, first, slots[first:], slots[start:first])

    def start(self, seq: Sequence) -> int:
        """The first row of the text that is seen."""
        holes = np.flatnonzero(self._host.written[seq.view.slots] == 0)
        return int(holes[-1]) + 1 if len(holes) else 0

    def features(self, seq: Sequence, rows: Rows, layers: Seq[int]) -> list[Tensor]:
        """[n, H] for each of ``layers``: the target's kept states that text rows read, in the order of ``rows``."""
        at = seq.view.slots[rows.position : rows.position + len(rows.tokens)]
        index = torch.from_numpy(at.astype(np.int64))
        return [self._host.states(layer)[index] for layer in layers]

    @torch.inference_mode()
    def forward(self, rows: list[Rows], x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, H], the inputs of all rows in order -> outputs of the last layer [n, H], and those after ``norm``."""
        batch = flat(rows)
        n = len(batch.tokens)
        batch.tokens = np.zeros(n, np.int64)
        batch.embeds, batch.embed_rows = x, np.arange(n, dtype=np.int32)
        batch.taps, batch.logit_rows = self._taps, np.empty(0, np.int32)
        hidden = self.runner.forward(batch).hidden
        return hidden[self._taps[-1]].float(), hidden[self._taps[0]].float()
