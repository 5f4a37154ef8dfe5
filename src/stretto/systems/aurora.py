"""Aurora: what its paper claims, and what of it holds here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stretto.decoding.registry import METHODS
from stretto.systems.types import Claim, System

DAY0, SHIFT, MIXED, OUTPUT = (
    "day-0 start from an untrained drafter", "gain under traffic shift", "mixed stream of 40 k prompts", "output",
)
FIRST, SECOND = ("json_call",), ("text_letter", "python_total")  # domains before and after the shift
CHUNK = 16  # requests between two looks


def evidence(quick: bool = False) -> Mapping[str, Any]:
    """One server that learns from nothing, traffic of one domain, then of another, chunk by chunk.

    In every chunk the same prompts are also sent without speculation, and after the shift with the drafter as it was
    before (static), all to the same server while its trainer runs; so the comparisons share the machine.
    """
    seconds = (9.0, 9.0) if quick else (40.0, 50.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        static = folder / "static"
        server, url = _start(folder, static)
        try:
            before, requests = _phase(url, FIRST, seconds[0], ("online", "plain"), 0, wait=3 * seconds[0])
            frozen = _freeze(folder, static)
            arms = ("online", "static", "plain") if frozen else ("online", "plain")
            after, more = _phase(url, SECOND, seconds[1], arms, requests, static)
            mixed, _ = _phase(url, FIRST + SECOND, 0.0, arms, more, static)
            about = _get(url, "/v1/drafters")
            pid = about["trainer"].get("pid")
            cost = _cost_of_training(url, pid, 2 if quick else 6) if pid else {}
        finally:
            server.terminate()
            server.wait(60)
    rows = [*before, *after, *mixed]
    _draw(rows, requests, more, quick)
    claims = [_day0(before), _shift(before, after, frozen), _mixed(mixed), _same(rows)]
    return {
        "claims": claims, "timeline": rows, "drafters": about, "while_training": cost,
        "settings": {"model": "zoo:tiny", "share": 0.5, "chunk": CHUNK, "concurrency": 4, "sync": 20},
    }


def _draw(rows: Sequence[Mapping[str, Any]], shift: int, mix: int, quick: bool) -> None:
    """Tokens per forward and speed over the requests, as a picture beside the evidence, with a full run."""
    from stretto.bench.over_time import over_time
    from stretto.systems.types import evidence_folder

    if quick:
        return
    arms = ("online", "static", "plain")
    forward, speed = ({a: [] for a in arms} for _ in range(2))
    for row in rows:
        plain = row["arms"]["plain"]["tokens_per_second"]
        for arm, found in row["arms"].items():
            forward[arm].append((row["requests"], found["tokens_per_forward"] or 0.0))
            speed[arm].append((row["requests"], (found["tokens_per_second"] or 0.0) / plain if plain else 0.0))
    picture = over_time(
        {"tokens per forward": forward, "speed over plain decoding": speed},
        title="a drafter that learns while it serves", x_label="requests", marks={"other texts": shift, "both": mix},
    )
    evidence_folder().mkdir(parents=True, exist_ok=True)
    (evidence_folder() / "aurora.svg").write_text(picture, encoding="utf-8")


def _start(folder: Path, static: Path) -> tuple[subprocess.Popen[str], str]:
    command = [
        sys.executable, "-m", "stretto", "serve", "zoo:tiny", "--port", "0", "--json", "--deterministic", "--no-plan",
        "--threads", "1", "--online-training", "--online-share", "0.5", "--online-dir", str(folder), "--sync-interval",
        "20", "--allow-model", str(static),
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    return server, json.loads(server.stdout.readline())["url"]


def _phase(
    url: str, tasks: Sequence[str], seconds: float, arms: Sequence[str], start: int, static: Path | None = None,
    *, wait: float = 0.0,
) -> tuple[list[dict[str, Any]], int]:
    """Chunks of one domain for ``seconds`` (at least two), up to ``wait`` more while there is no version yet: rows of
    the timeline, and how many prompts were used."""
    from stretto.bench.load import Load, fire, summary
    from stretto.zoo.workbook import examples

    bodies = {
        "online": {"method": "online"}, "plain": {"method": "ar", "store": False},
        "static": {"method": "medusa", "options": {"adapter": str(static)}, "store": False},
    }
    rows, end, number = [], time.monotonic() + seconds, start
    while len(rows) < 2 or time.monotonic() < end + (0.0 if rows[-1]["version"] else wait):
        pool = [e for t in tasks for e in examples(t, "test", CHUNK // len(tasks), 1000 + number)]
        texts, row = [e.prompt for e in pool], {"requests": number + len(pool), "tasks": list(tasks), "arms": {}}
        said: dict[str, list[str]] = {}
        for arm in arms:
            load = Load(requests=len(texts), rate=0, concurrency=4, max_tokens=64, body=bodies[arm])
            shots = fire(url, load, texts, model="zoo:tiny")
            found = summary(shots, load)
            said[arm] = [s.text for s in shots]
            row["arms"][arm] = {
                "tokens_per_forward": found["tokens_per_forward"], "tokens_per_second": found["tokens_per_second"],
                "failed": found["failed"],
            }
        row["equal"] = all(texts == said["plain"] for texts in said.values())
        row["version"] = _get(url, "/v1/drafters")["current"]
        rows.append(row)
        number += len(pool)
    return rows, number


def _cost_of_training(url: str, trainer: int, pairs: int) -> dict[str, float]:
    """Speed of plain decoding with the trainer stopped and running, in turns (tokens/s, medians), and their ratio:
    what the share of a core that training takes costs those who are served."""
    from stretto.bench.load import Load, fire, summary
    from stretto.zoo.workbook import examples

    speeds: dict[str, list[float]] = {"stopped": [], "running": []}
    load = Load(requests=2 * CHUNK, rate=0, concurrency=4, max_tokens=64, body={"method": "ar", "store": False})
    ways = {"stopped": signal.SIGSTOP, "running": signal.SIGCONT}
    for pair in range(pairs):
        texts = [e.prompt for e in examples(FIRST[0], "test", 2 * CHUNK, 5000 + pair)]
        for name in sorted(ways, reverse=bool(pair % 2)):
            os.kill(trainer, ways[name])
            speeds[name].append(summary(fire(url, load, texts, model="zoo:tiny"), load)["tokens_per_second"] or 0.0)
    os.kill(trainer, signal.SIGCONT)
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    return medians | {"ratio": medians["running"] / medians["stopped"] if medians["stopped"] else 0.0}


def _freeze(folder: Path, static: Path) -> bool:
    """Keep the drafter as it is now; False while there is none, or no method that reads it."""
    if "medusa" not in METHODS:
        return False
    try:
        shutil.copytree(json.loads((folder / "latest.json").read_text())["path"], static)
    except OSError:
        return False
    return True


def _get(url: str, path: str) -> dict[str, Any]:
    import urllib.request

    with urllib.request.urlopen(url + path, timeout=60) as answer:
        return json.loads(answer.read())


def _mean(rows: Sequence[Mapping[str, Any]], arm: str, key: str = "tokens_per_forward") -> float:
    found = [r["arms"][arm][key] or 0.0 for r in rows if arm in r["arms"]]
    return sum(found) / len(found) if found else 0.0


def _day0(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, last = rows[0]["arms"]["online"]["tokens_per_forward"], _mean(rows[-3:], "online")
    reached = next((r["requests"] for r in rows if r["arms"]["online"]["tokens_per_forward"] >= 2.0), None)
    speed = _mean(rows[-3:], "online", "tokens_per_second") / _mean(rows[-3:], "plain", "tokens_per_second")
    return {
        "name": DAY0, "paper": "about 1.5x on new frontier models; MiniMax M2.1: accepted length 2.8",
        "measured": round(last, 2), "baseline": f"{first:.2f} tokens a forward in the first {CHUNK} requests",
        "bar": "from 1.0 to 2-3 within some hundred requests of templated traffic",
        "holds": first <= 1.1 and last >= 2.0 and reached is not None and reached <= 500,
        "note": f"2.0 reached after {reached} requests; wall clock against plain decoding, same server: {speed:.2f}",
    }


def _shift(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], frozen: bool) -> dict[str, Any]:
    at, last = after[0]["arms"]["online"]["tokens_per_forward"], _mean(after[-3:], "online")
    static = _mean(after[-3:], "static") if frozen else 0.0
    peak = _mean(before[-3:], "online")
    start = before[-1]["requests"]
    back = (r["requests"] - start for r in after if r["arms"]["online"]["tokens_per_forward"] >= 0.9 * peak)
    recovered = next(back, None) if frozen else None
    return {
        "name": SHIFT, "paper": "1.25x more than a well-trained static drafter",
        "measured": round(last / static, 3) if static else None, "baseline": f"the drafter of before: {static:.2f}",
        "bar": "accepted length recovers after the shift while the static drafter's stays low",
        "holds": bool(static) and last >= 1.15 * static and last > at,
        "note": f"tokens a forward: {peak:.2f} before, {at:.2f} in the first chunk after, {last:.2f} at the end; "
        + (f"0.9 of the first again after {recovered} requests" if recovered else "0.9 of the first not reached again")
        + ("" if frozen else "; no drafter was ready before the shift"),
    }


def _mixed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    online, static = _mean(rows, "online"), _mean(rows, "static")
    return {
        "name": MIXED, "paper": "accepted length 3.08 online, 2.63 static, 2.99 offline fine-tuned",
        "measured": round(online, 2), "baseline": f"static {static:.2f}", "bar": "at least the static drafter's",
        "holds": online >= static > 0, "note": f"{len(rows) * CHUNK} requests of both domains at the end",
    }


def _same(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    equal = sum(r["equal"] for r in rows)
    versions = sorted({r["version"] for r in rows if r["version"]})
    return {
        "name": OUTPUT, "paper": "unchanged, whatever the drafter's version", "measured": f"{equal} of {len(rows)}",
        "baseline": "plain decoding of the same prompts",
        "bar": "served greedy text equals plain decoding across swaps",
        "holds": equal == len(rows) and len(versions) > 1,
        "note": f"chunks whose texts are all equal; {len(versions)} versions served",
    }

SYSTEM = System(
    slug="aurora",
    title="Aurora",
    room="serving",
    purpose=(
        "Makes a drafter fit a service's own traffic while it serves, from nothing if need be, "
        "without touching the output."
    ),
    paper=(
        "When RL Meets Adaptive Speculative Training: A Unified Training-Serving System, Feb 2026 "
        "(arXiv 2602.06932, ICML 2026)"
    ),
    claims=(
        Claim(
            name="day-0 start from an untrained drafter",
            paper="about 1.5x on new frontier models; MiniMax M2.1: accepted length 2.8",
            bar="accepted length from 1.0 to 2-3 within some hundred requests of templated traffic",
        ),
        Claim(
            name="gain under traffic shift",
            paper="1.25x more than a well-trained static drafter",
            bar="accepted length recovers after each shift while the static drafter's stays low",
        ),
        Claim(
            name="mixed stream of 40 k prompts",
            paper="accepted length 3.08 online, 2.63 static, 2.99 offline fine-tuned",
        ),
        Claim(
            name="output",
            paper="unchanged, whatever the drafter's version",
            bar="served greedy text equals plain decoding across swaps",
        ),
    ),
    parts=("stretto.serving.online", "stretto.serving.drafters", "stretto.serving.samples"),
    command="stretto serve MODEL --online-training",
    evidence=evidence,
)
