"""Packing: the steps of all sequences become one FlatBatch.

Before a step's own rows may stand *lead* rows: prompt tokens that the engine still has to cache. They see the view and
each other as the model's attention says (causal, or block-causal for a model trained so); the step's rows see
all of them.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from stretto.engine.runner import Runner
from stretto.engine.team import join_runs, read
from stretto.engine.types import CAUSAL, FULL, Sequence, Step, Visible
from stretto.models.batch import FlatBatch, ForwardResult
from stretto.models.entries import Entry

__all__ = ["Plan", "keep_states", "pack"]

NO_ROWS = np.empty(0, np.int32)


@dataclass(slots=True)
class Plan:
    """What one sequence brings to the next forward."""

    seq: Sequence
    lead: int  # tokens to cache first
    step: Step | None = None  # None: only the lead rows (a chunk of the prompt)
    rows: int = 0  # lead rows and the step's
    logits: int = 0  # rows of the step whose logits are wanted
    slots: np.ndarray | None = None  # int32 [rows]
    row: int = 0  # first row in the batch; pack writes it
    logit: int = 0  # first row among the logits; pack writes it
    base: Plan | None = None  # evaluates what stands before these rows, in this forward: they see its view and its rows

    def __post_init__(self) -> None:
        self.put(self.step)

    def put(self, step: Step | None, lead: int | None = None) -> None:
        """Set the step (and the lead), and with it the counts."""
        self.step = step
        self.lead = self.lead if lead is None else lead
        n = 0 if step is None else len(step.tokens)
        self.rows = self.lead + n
        self.logits = n if step is None or step.logits is None else len(step.logits)

    def chain(self, block: int) -> bool:
        """Every row sees the whole view and the rows before it, at consecutive positions."""
        return not (self.seq.reads or self.base or (self.lead and block > 1)) and self.plain_chain

    @property
    def plain_chain(self) -> bool:
        """The step chooses neither context nor positions nor visibility."""
        step = self.step
        return step is None or (
            step.context is None and step.positions is None and step.embeds is None
            and not step.entries and step.sharing is None
            and isinstance(step.see, str) and (step.see == CAUSAL or len(step.tokens) == 1)
        )

    @property
    def prepared(self) -> bool:
        """A step whose layout was prepared, with nothing before it, all of its logits wanted and no states."""
        step = self.step
        return (
            not self.lead and not self.seq.reads and not self.base and step is not None
            and isinstance(step.see, Visible)
            and step.context is None and step.logits is None and isinstance(step.positions, np.ndarray)
            and not step.taps and not self.seq.taps
        )

    @property
    def single(self) -> bool:
        """One row behind the view, and nothing else."""
        return self.rows == 1 and self.logits == 1 and self.chain(1) and not self.step.taps


def _causal(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(columns, counts) of a lower triangle of n rows."""
    return _triangle(n)[2], np.arange(1, n + 1, dtype=np.int32)


def _triangle(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What every chain of n rows has: context_of [n], local_ptr [n + 1], local."""
    return _small_triangle(n) if n <= 128 else _make_triangle(n)


def _make_triangle(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.zeros(n, np.int32), _ptr(np.arange(1, n + 1)), np.tril_indices(n)[1].astype(np.int32)


_small_triangle = lru_cache(maxsize=128)(_make_triangle)  # the larger ones are those of prompts, once each


@lru_cache(maxsize=512)
def _numbers(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.int32)


def _ancestors(parent: Seq[int]) -> tuple[np.ndarray, np.ndarray]:
    paths: list[list[int]] = []
    for i, p in enumerate(parent):
        paths.append(paths[p] + [i] if p >= 0 else [i])
    flat = np.fromiter((j for path in paths for j in path), np.int32)
    return flat, np.fromiter((len(path) for path in paths), np.int32, len(paths))


def _visible(step: Step) -> tuple[np.ndarray, np.ndarray]:
    """(columns, counts per row) of what the step's rows see among themselves."""
    n, see = len(step.tokens), step.see
    if isinstance(see, str):
        if see == CAUSAL:
            return _causal(n)
        if see == FULL:
            return np.tile(np.arange(n, dtype=np.int32), n), np.full(n, n, np.int32)
        raise ValueError(f"see={see!r}")
    if isinstance(see, Visible):
        return see.columns, see.counts
    if isinstance(see, np.ndarray) and see.ndim == 2:
        return np.nonzero(see)[1].astype(np.int32), see.sum(1).astype(np.int32)
    return _ancestors(see)


def _lead_visible(start: int, lead: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Lead rows at positions start..start+lead-1; ``block`` > 1 sees to the end of the own block."""
    if block <= 1:
        return _causal(lead)
    ends = np.minimum((np.arange(start, start + lead) // block + 1) * block - start, lead)
    cols = np.concatenate([np.arange(e, dtype=np.int32) for e in ends])
    return cols, ends.astype(np.int32)


def _join(lead: int, a: tuple, b: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Lead rows' lists, then the step's lists behind all lead rows."""
    cols, counts = b
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    shifted = np.insert(cols + lead, np.repeat(starts, lead), np.tile(np.arange(lead), len(counts)))
    return (
        np.concatenate([a[0], shifted.astype(np.int32)]),
        np.concatenate([a[1], counts + np.int32(lead)]),
    )


def _local(plan: Plan, block: int) -> tuple[np.ndarray, np.ndarray]:
    start = len(plan.seq.view)
    if plan.step is None:
        return _lead_visible(start, plan.lead, block)
    if not plan.lead:
        return _visible(plan.step)
    if block <= 1 and plan.plain_chain:
        return _causal(plan.rows)
    return _join(plan.lead, _lead_visible(start, plan.lead, block), _visible(plan.step))


def _riding(plan: Plan, base: Plan, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(columns in the batch, counts) of rows that all see every row of ``base`` before what they see of their own."""
    cols, counts = _local(plan, block)
    before, own = np.arange(base.row, base.row + base.rows, dtype=np.int32), cols + np.int32(plan.row)
    at, pieces = 0, []
    for n in counts.tolist():
        pieces += [before, own[at : at + n]]
        at += n
    return np.concatenate(pieces), counts + np.int32(base.rows)


def _context(plan: Plan) -> np.ndarray:
    slots = plan.seq.view.slots
    if plan.step is None or plan.step.context is None:
        return slots
    if plan.lead:
        raise ValueError("a step that chooses its context cannot follow lead rows")
    return np.concatenate([slots[a:b] for a, b in plan.step.context] or [slots[:0]])


def pack(plans: list[Plan], *, block: int = 1) -> FlatBatch:
    """One FlatBatch for all plans; writes ``row`` and ``logit`` of each. ``block``: attention of the lead rows."""
    if len(plans) == 1 and plans[0].chain(block):
        return _lone(plans[0])
    if len(plans) == 1 and plans[0].prepared:
        return _prepared(plans[0])
    if all(p.single for p in plans):
        return _singles(plans)
    return _pack(plans, block)


def _pack(plans: list[Plan], block: int) -> FlatBatch:
    """``pack`` for whatever there is: the reference for its two short ways."""
    tokens: list[int] = []
    positions: list[np.ndarray] = []
    contexts, local, counts, logit_rows, embeds, embed_rows = [], [], [], [], [], []
    entries: list[Entry] = []
    taps: set[int] = set()
    runs: list[Any] = []
    row = logit = 0
    for plan in plans:
        plan.row, row = row, row + plan.rows
    writers = {p.seq.view: p for p in plans if p.seq.team is not None}
    for plan in plans:
        seq, step, lead, row = plan.seq, plan.step, plan.lead, plan.row
        start = len(seq.view) if plan.base is None else len(plan.base.seq.view) + plan.base.rows
        first = start + seq.shift
        plan.logit = logit
        if plan.base is not None:
            (cols, n_cols), context, run = _riding(plan, plan.base, block), plan.base.seq.view.slots, plan.rows
        elif seq.reads:
            context, cols, n_cols, run = read(plan, writers)
        else:
            context, (cols, n_cols), run = _context(plan), _local(plan, block), plan.rows
            cols = cols + np.int32(row)
        local.append(cols)
        counts.append(n_cols)
        contexts.append(context)
        runs.append(run)
        if lead:
            tokens += seq.tokens[start : start + lead]
        taps.update(seq.taps)
        positions += _positions(plan, first)
        if step is not None:
            tokens += step.tokens
            wanted = range(len(step)) if step.logits is None else step.logits
            logit_rows += [row + lead + i for i in wanted]
            logit += len(wanted)
            taps.update(step.taps)
            if step.embeds is not None:
                embeds.append(step.embeds)
                embed_rows += [row + lead + i for i in step.embed_rows]
            entries += [e.shifted(row + lead) for e in step.entries]
    of = np.repeat(_numbers(len(plans)), [p.rows for p in plans])
    ptr, local_ptr = _ptr([len(c) for c in contexts]), _ptr(np.concatenate(counts))
    wanted = np.array(logit_rows, np.int32)
    parts = [*positions, *(p.slots for p in plans), of, ptr, local_ptr, *contexts, *local, wanted]
    return FlatBatch.lay(
        np.array(tokens, np.int64), len(of), len(plans), parts, taps=tuple(sorted(taps)),
        embeds=torch.cat(embeds) if embeds else None, embed_rows=np.array(embed_rows, np.int32) if embeds else None,
        entries=entries, sharing=_sharing(plans), runs=join_runs(runs) if any(p.seq.reads for p in plans) else None,
        sure=any(p.step is not None and p.step.sure for p in plans),
    )


def keep_states(runner: Runner, plans: list[Plan], result: ForwardResult, number: int) -> None:
    """Write the states that sequences want kept (``Sequence.taps``) to the slots of their rows; ``number``: of the
    forward. Rows of sequences that want none are marked as rows without states (0)."""
    for plan in plans:
        taps, slots = plan.seq.taps, plan.slots
        runner.written[slots] = number if taps else 0
        for layer in taps:
            states, rows = runner.keep(layer), result.hidden[layer]
            if len(rows) != plan.rows:
                rows = rows[plan.row : plan.row + plan.rows]
            if states.is_cpu and rows.dtype == torch.float32:
                states.numpy()[slots] = rows.numpy()  # a fifth of the time of torch's
            else:
                states[torch.from_numpy(np.asarray(slots, np.int64)).to(states.device)] = rows.to(states.dtype)


def _positions(plan: Plan, first: int) -> list[np.ndarray]:
    """Pieces of int32 [rows]."""
    step = plan.step
    if step is None or step.positions is None:
        return [np.arange(first, first + plan.rows, dtype=np.int32)]
    own = np.asarray(step.positions, np.int32) + np.int32(plan.seq.shift)
    return [np.arange(first, first + plan.lead, dtype=np.int32), own] if plan.lead else [own]


def _lone(plan: Plan) -> FlatBatch:
    """``pack`` for one sequence whose rows are a chain behind its view."""
    seq, step, n, lead = plan.seq, plan.step, plan.rows, plan.lead
    context = seq.view.slots
    start = len(context)
    plan.row = plan.logit = 0
    tokens = seq.tokens[start : start + lead] if lead else []
    wanted, taps = NO_ROWS, seq.taps
    if step is not None:
        tokens = [*tokens, *step.tokens]
        wanted = _numbers(n)[lead:] if step.logits is None else np.array(step.logits, np.int32) + np.int32(lead)
        taps = (*taps, *step.taps)
    of, local_ptr, local = _triangle(n)
    first = start + seq.shift
    at, ptr = np.arange(first, first + n, dtype=np.int32), np.array((0, start), np.int32)
    parts = (at, plan.slots, of, ptr, local_ptr, context, local, wanted)
    return FlatBatch.lay(np.array(tokens, np.int64), n, 1, parts, taps=tuple(sorted(set(taps))) if taps else ())


def _prepared(plan: Plan) -> FlatBatch:
    """``pack`` for one sequence with a prepared layout behind its view."""
    seq, step, n = plan.seq, plan.step, plan.rows
    context, see, embeds = seq.view.slots, step.see, step.embeds
    plan.row = plan.logit = 0
    at = step.positions + np.int32(seq.shift) if seq.shift else step.positions
    wanted, ptr = _numbers(n), np.array((0, len(context)), np.int32)
    parts = (at, plan.slots, _triangle(n)[0], ptr, see.ptr, context, see.columns, wanted)
    return FlatBatch.lay(
        np.array(step.tokens, np.int64), n, 1, parts, embeds=embeds, entries=step.entries, sure=step.sure,
        embed_rows=None if embeds is None else np.array(step.embed_rows, np.int32),
    )


def _sharing(plans: list[Plan]) -> list[tuple[Any, np.ndarray]]:
    """(rule, rows of the batch) of every group; those of one rule whose scope is the batch together."""
    out, together = [], {}
    for plan in plans:
        if plan.step is None or plan.step.sharing is None:
            continue
        rule, groups = plan.step.sharing
        for group in groups:
            rows = np.asarray(group, np.int32) + np.int32(plan.row + plan.lead)
            if rule.scope == "batch":
                together.setdefault(rule, []).append(rows)
            else:
                out.append((rule, rows))
    return out + [(rule, np.concatenate(rows)) for rule, rows in together.items()]


def _singles(plans: list[Plan]) -> FlatBatch:
    """``pack`` when every sequence brings one row: plain decoding."""
    n = len(plans)
    views = [p.seq.view.slots for p in plans]
    lengths = np.fromiter(map(len, views), np.int32, n)
    rows, ends = _numbers(n), _numbers(n + 1)
    for i, plan in enumerate(plans):
        plan.row = plan.logit = i
    shifts = [p.seq.shift for p in plans]
    at = lengths + np.array(shifts, np.int32) if any(shifts) else lengths
    parts = [at, *(p.slots for p in plans), rows, _ptr(lengths), ends, *views, rows, rows]
    tokens = np.fromiter((p.step.tokens[0] for p in plans), np.int64, n)
    return FlatBatch.lay(tokens, n, n, parts, taps=tuple(sorted({t for p in plans for t in p.seq.taps})))


def _ptr(counts: Seq[int] | np.ndarray) -> np.ndarray:
    out = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=out[1:])
    return out
