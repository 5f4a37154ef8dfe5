"""From timed runs to the rows of a result: one per arm and task, per family, and over everything."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stretto.bench.measure import Arm, Item, Track, geometric, ratios, spread
from stretto.decoding.registry import METHODS

__all__ = ["ALL", "Cell", "noise", "rows_by", "sample_records"]

ALL = "all tasks"
_SAMPLE_TOKENS = 56  # a sample near this length fits on a screen beside those of the other methods


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm on one task: ``track``, the two runs of the baseline beside it, and the prompts."""

    track: Track
    base: tuple[Track, Track]
    items: Sequence[Item]
    twin: bool = False  # another model than the baseline's: its text need not be equal

    @property
    def is_base(self) -> bool:
        return self.track is self.base[0]

    @property
    def ratios(self) -> list[float]:
        """Per round, how many times faster than the mean of the baseline's two runs."""
        if self.is_base:
            return ratios(self.base[0].rounds, self.base[1].rounds)
        mean = [(a + b) / 2 for a, b in zip(self.base[0].rounds, self.base[1].rounds, strict=True)]
        return ratios(mean, self.track.rounds)

    @property
    def equal(self) -> list[bool]:
        pairs = zip(self.track.outputs, self.base[0].outputs, strict=True)
        return [a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in pairs]

    @property
    def scores(self) -> list[float]:
        pairs = zip(self.items, self.track.outputs, strict=True)
        return [float(i.score(o.outputs[0].text)) for i, o in pairs if i.score is not None]

    @property
    def rows_evaluated(self) -> int:
        """Rows of the forwards that decode; the prompt's own rows left out where they are cached."""
        config = self.track.arm.llm.config
        block = {"causal": 1, "block": config.block_size}.get(config.attention)
        rows = 0
        for out in self.track.outputs:
            m, n = out.metrics, len(out.prompt_token_ids)
            prompt = 0 if block is None else (n - 1 if block == 1 else n // block * block)
            rows += max(m.rows - max(prompt - m.cached_tokens, 0), m.forwards)
        return rows


def rows_by(cells: Sequence[Cell], kind: str) -> list[dict[str, Any]]:
    """Rows grouped by ``kind``: "task", "family" or "all"; the order of the cells is kept."""
    groups: dict[tuple[int, str], list[Cell]] = {}
    for cell in cells:
        key = ALL if kind == "all" else getattr(cell.items[0], kind)
        groups.setdefault((id(cell.track.arm), key), []).append(cell)
    return [_row(group, kind) for group in groups.values()]


def noise(cells: Sequence[Cell]) -> float:
    """How far two runs of the baseline on the same prompts differ: median over rounds and tasks, as a share."""
    found = [abs(r - 1) for cell in cells if cell.is_base for r in cell.ratios]
    return statistics.median(found) if found else 0.0


def _row(cells: Sequence[Cell], kind: str) -> dict[str, Any]:
    first = cells[0]
    arm, n = first.track.arm, sum(len(c.items) for c in cells)
    sums = {k: sum(c.track.total(k) for c in cells) for k in ("tokens", "forwards", "drafted", "accepted")}
    scores = [s for c in cells for s in c.scores]
    seconds = sum(sum(c.track.rounds) for c in cells)
    speedup, low, high = _speed(cells)
    return {
        "model": arm.model, "method": arm.label, "lossless": METHODS[arm.method].lossless and not first.twin,
        "task": ALL if kind == "all" else first.items[0].task if kind == "task" else None,
        "family": ALL if kind == "all" else first.items[0].family,
        "n": n, "speedup": speedup, "speedup_low": low, "speedup_high": high,
        "tokens_per_forward": _share(sums["tokens"], sums["forwards"]),
        "equal": None if first.twin else statistics.mean(e for c in cells for e in c.equal),
        "quality": statistics.mean(scores) if scores else None,
        "acceptance": _share(sums["accepted"], sums["drafted"]),
        "forwards": sums["forwards"] / n,
        "rows_per_forward": _share(sum(c.rows_evaluated for c in cells), sums["forwards"]),
        "seconds_per_token": _share(seconds, sums["tokens"]),
        "tokens": sums["tokens"] / n,
        "accepted_at": _accepted_at(cells),
        **_extra(arm),
        "notes": _notes(cells),
    }


def _speed(cells: Sequence[Cell]) -> tuple[float, float, float]:
    """Median and range over rounds; with several tasks, of their geometric mean in each round."""
    per_round = [geometric(r) for r in zip(*(c.ratios for c in cells), strict=True)]
    if cells[0].is_base:
        off = max(max(r, 1 / r) for r in per_round)
        return 1.0, 1 / off, off
    return spread(per_round)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _accepted_at(cells: Sequence[Cell], most: int = 8) -> list[float]:
    """For k = 1, 2, ..: the share of forwards that made at least k tokens final beyond plain decoding's one."""
    beyond: Counter[int] = Counter()
    for out in (o for c in cells for o in c.track.outputs):
        beyond.update(n - 1 for n in Counter(out.outputs[0].step_map).values())
    forwards = sum(c.track.total("forwards") for c in cells)
    shares = [round(sum(n for k, n in beyond.items() if k >= d) / max(forwards, 1), 4) for d in range(1, most + 1)]
    return shares[: next((i for i, s in enumerate(shares) if not s), most)]


def _extra(arm: Arm) -> dict[str, Any]:
    """What the method brings beside the model: parameters, bytes of weights and of every cached token, and the minutes
    of training where they are known."""
    extra = getattr(arm.llm.method(arm.method, arm.options), "extra", None)
    return {
        f"extra_{k}": getattr(extra, k, None if k == "training_minutes" else 0)
        for k in ("parameters", "bytes", "bytes_per_token", "training_minutes")
    }


def _notes(cells: Sequence[Cell], most: int = 3) -> list[str]:
    """What the outputs noted, the most frequent first; notes that differ only in their figures count as one."""
    outputs = [o for c in cells for o in c.track.outputs]
    said: dict[str, list[str]] = {}
    for out in outputs:
        for kind, note in {re.sub(r"[\d.]+", "#", note): note for note in out.metrics.notes}.items():
            said.setdefault(kind, []).append(note)
    lines = []
    for notes in sorted(said.values(), key=len, reverse=True)[:most]:
        often = "all" if len(notes) == len(outputs) else len(notes)
        such = ", for example" if len(set(notes)) > 1 else ""
        lines.append(f"in {often} of {len(outputs)} outputs{such}: {Counter(notes).most_common(1)[0][0]}")
    return lines


def sample_records(cells: Sequence[Cell], most: int = 6) -> list[dict[str, Any]]:
    """For up to ``most`` prompts, of different families if possible: what each arm made of it, forward by forward."""
    base = {c.items[0].task: c for c in cells if c.is_base}
    by_family: dict[str, list[tuple[Cell, int]]] = {}
    for cell in base.values():
        lengths = [len(o.outputs[0].token_ids) for o in cell.track.outputs]
        nearest = min(range(len(lengths)), key=lambda i: abs(lengths[i] - _SAMPLE_TOKENS))
        by_family.setdefault(cell.items[0].family, []).append((cell, nearest))
    picked = [p for rank in range(most) for found in by_family.values() for p in found[rank : rank + 1]][:most]
    records = []
    for cell, index in picked:
        item = cell.items[index]
        runs = [_run(c, index) for c in cells if c.items[0].task == item.task]
        records.append({"task": item.task, "family": item.family, "prompt": item.shown or item.prompt, "runs": runs})
    return records


def _run(cell: Cell, index: int) -> dict[str, Any]:
    arm, out = cell.track.arm, cell.track.outputs[index]
    choice, score = out.outputs[0], cell.items[index].score
    return {
        "model": arm.model, "method": arm.label, "tokens": _pieces(arm.llm.tokenizer, choice.token_ids),
        "step_map": list(choice.step_map), "forwards": out.metrics.forwards,
        "seconds": cell.track.seconds[index], "equal": None if cell.twin else cell.equal[index],
        "score": float(score(choice.text)) if score is not None else None,
    }


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text each token adds; a character split over tokens belongs to its last one."""
    decoder = tokenizer.decoder(False)
    pieces = [decoder.push([int(t)]) for t in ids]
    if pieces:
        pieces[-1] += decoder.flush()
    return pieces
