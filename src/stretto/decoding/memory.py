"""The memory of speculative decoding: what each part takes, what a budget buys, and what was used in fact.

Generation memory is everything beyond the target's weights. With S slots of K/V for the target and as many for the
draft, R rows in the largest forward, and T rows of one sequence in a step (root and drafts):

    M = W_D + S (kv + kv_D) + R (logits + activations + logits_D + activations_D) + workspaces

S counts committed rows and the scratch rows of the step alike: rejected rows give theirs back at commit. All terms
are bytes that the engine allocates, so a plan is a bound, not a guess. (SpecMemo, arXiv 2506.01986; the formulas are
ours, the paper's are not public.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from stretto.errors import OptionError

if TYPE_CHECKING:
    from stretto.engine.runner import Runner

__all__ = [
    "Plan", "Side", "calibrate", "estimate", "expected_value", "frontier", "knee", "least", "parse_size", "show",
    "side_of", "solve", "used",
]

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # rows of the largest forward that are tried
LAYER = 1280  # bytes of counters that a native forward has for each layer
TORCH = 4.0  # activations of the torch forward by the arrays of a row: its intermediate results


def parse_size(text: str) -> int:
    """Bytes of "3GiB", "1.5 MB", "4096". OptionError for anything else, and for nothing."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    unit = found.group(2).upper() if found else None
    if found is None or unit not in UNITS or float(found.group(1)) <= 0:
        raise OptionError("budget", text, "a positive size such as 512KiB, 24MiB, 1.5GB, or a number of bytes")
    return int(float(found.group(1)) * UNITS[unit])


def show(size: float) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} B"


@dataclass(frozen=True, slots=True)
class Side:
    """Bytes of one model: ``kv`` a slot; ``logits`` and ``activations`` a row; ``weights`` and ``workspace`` in all."""

    kv: int
    logits: int
    activations: int
    workspace: int
    weights: int


def side_of(runner: Runner) -> Side:
    """What the model of ``runner`` takes."""
    c, pool = runner.config, runner.pool
    kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * pool.k.element_size() + 4
    weights = sum(p.numel() * p.element_size() for p in runner.model.parameters())
    workspace, row = calibrate(runner)
    return Side(kv, 4 * c.vocab_size, row, workspace, weights)


def calibrate(runner: Runner) -> tuple[int, int]:
    """(a, e): activations are a + e R bytes. From two forwards of one layer in memory of their own, on the native
    backend; by the arrays of a layer on the other."""
    if runner not in _CALIBRATED:
        _CALIBRATED[runner] = _calibrate(runner)
    return _CALIBRATED[runner]


_CALIBRATED: WeakKeyDictionary[Runner, tuple[int, int]] = WeakKeyDictionary()


def _calibrate(runner: Runner) -> tuple[int, int]:
    c = runner.config
    if runner.native is None:
        inner = max(c.intermediate_size, c.moe.intermediate_size * c.moe.top_k if c.moe else 0)
        heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
        return 1 << 16, int(TORCH * 4 * (2 * c.hidden_size + heads * c.head_dim + 3 * inner))
    from stretto.models.batch import FlatBatch, KVPool
    from stretto.models.native import NativeForward
    from stretto.models.staged import slice_layers

    found, few, many = [], 16, 256
    for n in (few, many):
        forward = NativeForward(slice_layers(runner.model, 0, 1), _name(runner.native.weight_dtype))
        pool = KVPool(1, n, c.num_key_value_heads, c.head_dim)
        numbers, ptr = np.arange(n, dtype=np.int32), np.arange(n + 1, dtype=np.int32)
        none, zero = np.empty(0, np.int32), np.zeros(n, np.int32)
        batch = FlatBatch(
            np.zeros(n, np.int64), numbers, numbers, zero, none, np.zeros(2, np.int32), numbers, ptr, none
        )
        forward.forward(pool, batch)
        found.append(forward.scratch_bytes)
    row = -(-(found[1] - found[0]) // (many - few))
    # what a few rows take is a floor of its own: buffers of threads that do not grow below it
    return max(0, found[0] - few * row) + few * row // 2 + LAYER * c.num_hidden_layers, row


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Plan:
    """``slots``: S; ``rows``: R; ``nodes``: T; ``draft``: whether the draft is loaded; ``sequences`` of ``context``
    tokens fit side by side."""

    slots: int
    rows: int
    nodes: int
    draft: bool
    sequences: int
    context: int

    @property
    def scratch(self) -> int:
        """Slots of a step's rows."""
        return self.sequences * self.nodes


def estimate(target: Side, draft: Side | None, plan: Plan) -> dict[str, int]:
    """Bytes by part, and their "total"."""
    d = draft if plan.draft else None
    parts = {
        "draft weights": d.weights if d else 0,
        "kv": target.kv * (plan.slots - plan.scratch),
        "kv scratch": target.kv * plan.scratch,
        "draft kv": d.kv * plan.slots if d else 0,
        "logits": (target.logits + (d.logits if d else 0)) * plan.rows,
        "activations": target.workspace + target.activations * plan.rows
        + (d.workspace + d.activations * plan.rows if d else 0),
    }
    return parts | {"total": sum(parts.values())}


def least(target: Side, draft: Side | None, context: int) -> dict[str, int]:
    """The lower bound for one sequence of ``context`` tokens: with a draft two rows a step, without one row."""
    nodes = 2 if draft is not None else 1
    return estimate(target, draft, Plan(context + nodes, nodes, nodes, draft is not None, 1, context))


def expected_value(rows: int, nodes: int, draft: bool) -> float:
    """What a plan is worth where no measurement says it: tokens of a step at acceptance 0.75, and a little for longer
    chunks of a prompt, up to 64 rows."""
    return (1 - 0.75**nodes) / 0.25 - 1 / (4 + min(rows, 64))


Value = Callable[[int, int, bool], float]  # rows, nodes, draft -> worth


def solve(
    target: Side, draft: Side | None, budget: int, *, context: int, sequences: int, most_nodes: int,
    most_rows: int = 512, value: Value = expected_value,
) -> Plan | None:
    """The plan of the highest value inside ``budget``; all that is left becomes slots. Fewer sequences where not all
    fit; None where not one does."""
    for count in range(sequences, 0, -1):
        best: tuple[float, int, Plan] | None = None
        for plan in _plans(target, draft, budget, context, count, most_nodes, most_rows):
            item = (value(plan.rows, plan.nodes, plan.draft), plan.slots, plan)
            if best is None or item[:2] > best[:2]:
                best = item
        if best is not None:
            return best[2]
    return None


def _plans(
    target: Side, draft: Side | None, budget: int, context: int, sequences: int, most_nodes: int, most_rows: int,
) -> Iterator[Plan]:
    """Every plan of the grid that fits."""
    for drafting in (True, False) if draft is not None else (False,):
        d = draft if drafting else None
        for nodes in range(2, most_nodes + 1) if drafting else (1,):
            for rows in ROWS:
                if not nodes * sequences <= rows <= most_rows:
                    continue
                empty = Plan(0, rows, nodes, drafting, 0, context)
                left = budget - estimate(target, draft, empty)["total"]
                slots = left // (target.kv + (d.kv if d else 0))
                if slots >= sequences * (context + nodes):
                    yield Plan(slots, rows, nodes, drafting, sequences, context)


def frontier(
    target: Side, draft: Side | None, *, context: int, sequences: int, most_nodes: int, value: Value = expected_value,
) -> list[tuple[int, float, Plan]]:
    """(bytes, value, plan): the cheapest plans of each value, both rising; slots are just what the context needs."""
    found = []
    roof = 1 << 62
    for plan in _plans(target, draft, roof, context, sequences, most_nodes, ROWS[-1]):
        tight = Plan(sequences * (context + plan.nodes), plan.rows, plan.nodes, plan.draft, sequences, context)
        found.append((estimate(target, draft, tight)["total"], value(plan.rows, plan.nodes, plan.draft), tight))
    out: list[tuple[int, float, Plan]] = []
    for size, worth, plan in sorted(found, key=lambda f: (f[0], -f[1])):
        if not out or worth > out[-1][1]:
            out.append((size, worth, plan))
    return out


def knee(points: list[tuple[int, float, Plan]], keep: float = 0.96) -> tuple[int, float, Plan]:
    """The smallest budget that keeps the share ``keep`` of the best value."""
    best = max(worth for _, worth, _ in points)
    return next(p for p in points if p[1] >= keep * best)


def used(target: Runner, draft: Runner | None) -> Mapping[str, int]:
    """The same parts in fact: the most that was in use at one time, by the engine's own counters."""
    t = side_of(target)
    d = side_of(draft) if draft is not None else None
    parts = {
        "draft weights": d.weights if d else 0,
        "kv": t.kv * target.alloc.peak,
        "draft kv": d.kv * draft.alloc.peak if d and draft else 0,
        "logits": t.logits * target.peak_logits + (d.logits * draft.peak_logits if d and draft else 0),
        "activations": _scratch(target, t) + (_scratch(draft, d) if d and draft else 0),
    }
    return parts | {"total": sum(parts.values())}


def _scratch(runner: Runner, side: Side) -> int:
    """Scratch memory of the native forward as it is; for the torch forward the same formula."""
    if runner.native is not None:
        return int(runner.native.scratch_bytes)
    return side.workspace + side.activations * runner.peak_rows
