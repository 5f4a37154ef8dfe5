"""The measured part of docs/drafting.md, written from the evidence.

    python -m stretto.bench.drafting_page evidence/bench-zoo-tiny.json docs/drafting.md [--replay evidence/replay.json]

``--measure`` makes the replay anew (minutes; see replay.py) and writes it to that file; ``--also
evidence/jacobi-forcing.json`` replays that method with the acceptance it has on its own model. A line a method: what it
gave, at what price. The text between the marks is replaced, the rest of the page is left as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stretto.errors import InputError

__all__ = ["BEGIN", "END", "render", "update"]

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PAYS = 1.03  # a speed-up that is more than noise

Row = Mapping[str, Any]


def render(result: Mapping[str, Any], replayed: Mapping[str, Any] | None = None) -> str:
    """Markdown of a bench result and, where there is one, of a replay of its acceptance."""
    rows = [r for r in result["totals"] if r["lossless"] and r["speedup"] is not None]
    about = result.get("provenance", {})
    machine = about.get("machine", {})
    where = machine.get("processor", machine) if isinstance(machine, Mapping) else machine
    lines = [
        f"Measured on {result['model']}, batch {about.get('batch', 1)}, greedy, {about.get('date')}, {where}. "
        "Speed-ups are wall-clock ratios to plain decoding on the same prompts in the same rounds.",
        "", *_methods(rows), "", *_families(result), "", *_losses(result), *_replay(replayed),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _methods(rows: Sequence[Row]) -> list[str]:
    out = [
        "| method | speed-up | tokens per forward | rows per forward | accepted at least 1, 2, .. | extra parameters "
        "| extra memory | training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: -r["speedup"]):
        depths = ", ".join(f"{100 * share:.0f}" for share in r.get("accepted_at") or []) or "-"
        minutes = r.get("extra_training_minutes")
        out.append(
            f"| `{r['method']}` | {r['speedup']:.2f} ({r['speedup_low']:.2f}-{r['speedup_high']:.2f}) | "
            f"{_number(r['tokens_per_forward'])} | {_number(r['rows_per_forward'])} | {depths} % | "
            f"{_count(r.get('extra_parameters') or 0)} | {_memory(r)} | {f'{minutes:g} min' if minutes else '-'} |"
        )
    return out


def _families(result: Mapping[str, Any]) -> list[str]:
    """For each family of tasks: what was fastest, and what comes next."""
    out = ["| text | choose | then |", "|---|---|---|"]
    for family in dict.fromkeys(r["family"] for r in result["families"]):
        rows = [r for r in result["families"] if r["family"] == family and r["lossless"] and r["method"] != "ar"]
        best = sorted((r for r in rows if r["speedup_low"] > 1.0 and r["speedup"] >= PAYS), key=lambda r: -r["speedup"])
        cells = [f"`{r['method']}` {r['speedup']:.2f}" for r in best[:3]]
        out.append(f"| {family} | {cells[0] if cells else '`ar`: nothing paid'} | {', '.join(cells[1:]) or '-'} |")
    return out


def _losses(result: Mapping[str, Any]) -> list[str]:
    """Where a method was slower than plain decoding."""
    lost: dict[str, list[str]] = {}
    for r in result["families"]:
        if r["lossless"] and r["method"] != "ar" and r["speedup"] < 1 / PAYS:
            lost.setdefault(r["method"], []).append(f"{r['family']} {r['speedup']:.2f}")
    if not lost:
        return ["No method was slower than plain decoding by more than noise on any of these texts."]
    return ["Slower than plain decoding: " + "; ".join(f"`{m}` on {', '.join(f)}" for m, f in lost.items()) + "."]


def _replay(replayed: Mapping[str, Any] | None) -> list[str]:
    if not replayed:
        return []
    out = [
        "", "The same acceptance replayed on larger shapes with random weights (`bench/replay.py`: the step is timed "
        "there, drafting included; draft models are random too, half as wide with a third of the layers; methods that "
        "were switched off have no acceptance to replay):", "",
        "| shape | method | rows | plain step, ms | drafted step, ms | of it drafting, ms | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in replayed["rows"]:
        out.append(
            f"| {r['shape']} | `{r['method']}` {r.get('model', '')} | {r['rows']} | {r['plain_ms']:.1f} | "
            f"{r['step_ms']:.1f} | {r['draft_ms']:.1f} | {r['speedup']:.2f} |"
        )
    return out


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _count(n: float) -> str:
    return "-" if not n else f"{n / 1e6:.2f} M" if n >= 1e5 else f"{n:,.0f}"


def _memory(r: Row) -> str:
    weights, token = r.get("extra_bytes") or 0, r.get("extra_bytes_per_token") or 0
    if not weights and not token:
        return "-"
    return f"{weights / 1e6:.2f} MB + {token:,} B a token"


def update(page: Path, result: Mapping[str, Any], replayed: Mapping[str, Any] | None = None) -> None:
    """Replace what stands between the marks of ``page``. Raises InputError where they are not there."""
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(f"{page} must hold {BEGIN!r} and {END!r} once each, in this order")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{render(result, replayed)}{END}{after}", encoding="utf-8")


def _arms(evidence: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a system's own method reached over all tasks in its evidence, as bench rows."""
    method = evidence["system"].replace("-", "_")
    model = evidence["training"]["recipe"].replace("-", ":", 1)
    return [
        {"method": r["arm"], "model": model, "tokens_per_forward": r["per_forward"], "rows_per_forward": r["rows"]}
        for r in evidence["rows"] if r["family"] == "all" and r["arm"] == method
    ]


def _main(arguments: Sequence[str] | None = None) -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--replay", type=Path, help="file of the replay")
    parser.add_argument("--measure", action="store_true", help="replay now, and write the file")
    parser.add_argument("--also", type=Path, help="with --measure: evidence of a system that is replayed too")
    given = parser.parse_args(arguments)
    result = json.loads(given.result.read_text())
    replayed = None
    if given.measure:
        from stretto.bench.replay import replay

        found = [r | {"options": result.get("options", {}).get(r["method"])} for r in result["totals"]]
        replayed = replay(found + (_arms(json.loads(given.also.read_text())) if given.also else []))
        if given.replay:
            given.replay.write_text(json.dumps(replayed, indent=1) + "\n")
    elif given.replay:
        replayed = json.loads(given.replay.read_text())
    update(given.page, result, replayed)


if __name__ == "__main__":
    _main()
