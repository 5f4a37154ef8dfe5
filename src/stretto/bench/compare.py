"""Methods side by side on the workbook, for evidence: speed, tokens and rows per forward, equality, accuracy.

Every figure comes with its baseline from the same run: the first arm. Families of tasks are told apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stretto.bench.measure import Arm, Item, Track, measure
from stretto.bench.workload import load_items, pick_tasks

__all__ = ["Row", "accuracy", "compare"]


@dataclass(frozen=True, slots=True)
class Row:
    """One arm on one family (or on "all"). ``speedup``: median over rounds of the first arm's seconds by this one's;
    ``low``, ``high``: its range. ``equal``: share of texts equal to the reference arm of the same model.
    ``per_forward``: tokens; ``rows``: rows a forward, the prompt left out; ``right``: share of right answers."""

    arm: str
    family: str
    speedup: float
    low: float
    high: float
    tokens_per_second: float
    per_forward: float
    rows: float
    equal: float
    right: float
    n: int

    def plain(self) -> dict[str, Any]:
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}


def compare(
    arms: Sequence[Arm], *, tasks: str | Sequence[str] = "all", each: int = 4, rounds: int = 3, seed: int = 11,
    batch: int = 1, warm: int = 2,
) -> dict[tuple[str, str], Row]:
    """(label, family) -> Row. ``each``: prompts of a task and round; ``warm``: of a task, which do not count."""
    picked = pick_tasks(tasks)
    rows: dict[tuple[str, str], Row] = {}
    if warm:
        measure(arms, [load_items(picked, warm, seed + 1000)], batch=batch)
    groups = [load_items(picked, each, seed + r) for r in range(rounds)]
    families = list(dict.fromkeys(t.family for t in picked))
    tracks: dict[str, list[Track]] = {}
    for family in families:
        chosen = [[i for i in items if i.family == family] for items in groups]
        tracks[family] = measure(arms, chosen, batch=batch)
        for track in tracks[family]:
            rows[track.arm.label, family] = _row(track, tracks[family], family, _flat(chosen))
    whole = [_join([tracks[f][i] for f in families]) for i in range(len(arms))]
    items = [i for f in families for i in _flat([[i for i in g if i.family == f] for g in groups])]
    for track in whole:
        rows[track.arm.label, "all"] = _row(track, whole, "all", items)
    return rows


def accuracy(
    llm: Any, *, method: str = "ar", options: dict[str, Any] | None = None, n: int = 40, seed: int = 5
) -> dict[str, float]:
    """Share of right answers by task, decoded in one batch; "all" is the mean over tasks."""
    items = load_items(pick_tasks("all"), n, seed)
    outputs = Arm(llm, "", method, options or {}).generate(items)
    found: dict[str, list[float]] = {}
    for item, output in zip(items, outputs, strict=True):
        assert item.score is not None
        found.setdefault(item.task, []).append(item.score(output.outputs[0].text))
    shares = {task: statistics.fmean(v) for task, v in found.items()}
    return {**shares, "all": statistics.fmean(shares.values())}


def _flat(groups: Sequence[Sequence[Item]]) -> list[Item]:
    return [i for g in groups for i in g]


def _join(tracks: Sequence[Track]) -> Track:
    """The same arm over several families, round by round."""
    seconds = [sum(r) for r in zip(*(t.rounds for t in tracks), strict=True)]
    return Track(tracks[0].arm, seconds, [o for t in tracks for o in t.outputs], [s for t in tracks for s in t.seconds])


def _row(track: Track, all_tracks: Sequence[Track], family: str, items: Sequence[Item]) -> Row:
    base = all_tracks[0]
    reference = next(t for t in all_tracks if t.arm.llm is track.arm.llm)
    ratios = [b / o for b, o in zip(base.rounds, track.rounds, strict=True)]
    forwards, tokens = track.total("forwards"), track.total("tokens")
    prompts = sum(len(o.prompt_token_ids) - 1 - o.metrics.cached_tokens for o in track.outputs)
    pairs = zip(track.outputs, reference.outputs, strict=True)
    same = [a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in pairs]
    right = [i.score(o.outputs[0].text) for i, o in zip(items, track.outputs, strict=True) if i.score is not None]
    return Row(
        track.arm.label, family, statistics.median(ratios), min(ratios), max(ratios), tokens / sum(track.rounds),
        tokens / forwards, (track.total("rows") - prompts) / forwards, statistics.fmean(same),
        statistics.fmean(right) if right else float("nan"), len(track.outputs),
    )
