"""``stretto bench``: every method on every task, interleaved with plain decoding, in one result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stretto.bench.arms import Fleet
from stretto.bench.measure import Arm, Item, measure
from stretto.bench.provenance import provenance
from stretto.bench.rows import Cell, noise, rows_by, sample_records
from stretto.bench.summary import headline
from stretto.bench.workload import load_items, one_per_family, pick_tasks
from stretto.errors import OptionError, StrettoError

__all__ = ["bench"]

Progress = Callable[[float, str], None]  # (share done from 0 to 1, what is going on)

SECONDS = {False: 170.0, True: 22.0}  # budget of the timed part, by ``quick``
ROUNDS = {False: 5, True: 3}
SAMPLES = {False: (5, 32), True: (3, 6)}  # fewest and most prompts per task when ``samples`` is not given
WARM_SEED = 104_729  # prompts of the warm-up are never measured


def bench(
    model: str, methods: str | Sequence[str] = (), tasks: str | Sequence[str] = (), *,
    quick: bool = False, samples: int | None = None, batch: int = 1, max_tokens: int | None = None,
    html: str | Path | None = None, peers: bool = False, seed: int = 0, threads: int | None = None,
    dtype: str = "auto", device: str = "auto", deterministic: bool = True,
    options: Mapping[str, Mapping[str, Any]] | None = None, progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure ``methods`` on ``tasks`` and return a JSON-ready result; ``html`` also writes the report there.

    No methods, or "all": whatever runs on the model's kind of attention. No tasks, or "all": the whole workbook, or
    one task per family where time is short. ``samples`` prompts a task (default: as many as fit the time), decoded
    ``batch`` at a time.
    ``speedup`` is the wall-clock ratio to plain decoding of ``model`` on the same prompts in the same rounds:
    median, with the smallest and largest round. ``peers`` adds transformers and llama.cpp.

    Raises InputError for unknown names and absurd numbers, CheckpointError for files that are no model.
    """
    _check(samples=samples, batch=batch, max_tokens=max_tokens)
    say = progress or (lambda share, text: None)
    say(0.0, f"loading {model}")
    chosen = pick_tasks(tasks)
    free = not tasks or tasks == "all" or list(tasks) == ["all"]
    fleet = Fleet(
        model, methods, options=options, threads=threads, dtype=dtype, device=device,
        deterministic=deterministic, max_num_seqs=max(batch, 1),
    )
    tokenizer = fleet.llm.tokenizer
    items = partial(load_items, max_tokens=max_tokens, tokenizer=tokenizer)
    arms, cost = _warm_up(fleet, fleet.arms(), items(one_per_family(), 1, seed + WARM_SEED), say)
    if free and (quick or cost * len(chosen) * SAMPLES[quick][0] > SECONDS[quick]):
        chosen = one_per_family()
    count, rounds = _plan(samples, batch, quick, cost * len(chosen))
    cells = _measure(arms, [items([t], count, seed) for t in chosen], rounds, batch, say)
    result = _result(fleet, arms, cells)
    result["provenance"] = provenance(
        fleet.llm, seed=seed, samples=count, rounds=rounds, batch=batch, quick=quick, tasks=[t.name for t in chosen]
    )
    result["headline"] = headline(result)
    if peers:
        from stretto.bench.peers import measure_peers

        result["peers"] = measure_peers(quick=quick, threads=threads, progress=lambda t: say(0.99, t))
    if html is not None:
        from stretto.bench.report import write_report

        result["html"] = str(write_report(result, html))
    say(1.0, "done")
    return result


def _result(fleet: Fleet, arms: Sequence[Arm], cells: Sequence[Cell]) -> dict[str, Any]:
    return {
        "model": fleet.model, "baseline": {"model": fleet.model, "method": arms[0].label},
        "rows": rows_by(cells, "task"), "families": rows_by(cells, "family"), "totals": rows_by(cells, "all"),
        "samples": sample_records(cells), "skipped": fleet.skipped, "noise": noise(cells),
        "options": {a.label: dict(a.options) for a in arms if a.options},
    }


def _check(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise OptionError(name, value, "a whole number from 1")


def _warm_up(
    fleet: Fleet, arms: list[Arm], items: Sequence[Item], say: Progress
) -> tuple[list[Arm], float]:
    """The arms that can decode, and the seconds that one prompt of one task costs over all of them."""
    kept, cost = [], 0.0
    for i, arm in enumerate(arms):
        say(0.02 + 0.08 * i / len(arms), f"warming up {arm.label} on {arm.model}")
        try:
            arm.generate(items[:1])
            start = time.perf_counter()
            for item in items:
                arm.generate([item])
        except StrettoError as error:
            if i == 0 or arm.method in fleet.named:
                raise
            fleet.skip(arm.model, arm.method, error)
            continue
        kept.append(arm)
        cost += (time.perf_counter() - start) / len(items) * (2 if i == 0 else 1)
    return kept, cost


def _plan(samples: int | None, batch: int, quick: bool, cost: float) -> tuple[int, int]:
    """(prompts a task, rounds). ``cost``: seconds of one prompt of every task over all arms, one by one."""
    rounds = ROUNDS[quick]
    if samples is None:
        low, high = SAMPLES[quick]
        samples = max(batch * rounds, min(high, max(low, int(SECONDS[quick] / max(cost, 1e-9)))))
    return samples, max(1, min(rounds, samples // batch))


def _measure(
    arms: Sequence[Arm], tasks: Sequence[list[Item]], rounds: int, batch: int, say: Progress
) -> list[Cell]:
    """All cells, in the order of the arms. The baseline runs twice, so that its own noise is known and halved."""
    doubled = [*arms, Arm(arms[0].llm, arms[0].model, arms[0].method, arms[0].options)]
    groups = [[t[i * len(t) // rounds : (i + 1) * len(t) // rounds] for i in range(rounds)] for t in tasks]
    total = len(doubled) * sum(-(-len(g) // batch) for task in groups for g in task)
    cells: list[list[Cell]] = [[] for _ in arms]
    ticks = 0
    for items, split in zip(tasks, groups, strict=True):

        def tick(text: str = f"{items[0].task}: {len(arms)} methods, {len(items)} prompts") -> None:
            nonlocal ticks
            ticks += 1
            say(0.1 + 0.88 * ticks / total, text)

        *tracks, again = measure(doubled, split, batch=batch, tick=tick)
        for found, track in zip(cells, tracks, strict=True):
            twin = track.arm.model != arms[0].model
            found.append(Cell(track, (tracks[0], again), items, twin))
    return [cell for found in cells for cell in found]
