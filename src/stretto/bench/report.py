"""The bench as one self-contained HTML page: no request leaves it, and the tables need no script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from stretto.bench.plot import speed_quality
from stretto.bench.provenance import write_atomically
from stretto.bench.report_tables import facts, figures, matrix, notes, origin, peers_section, scopes, totals
from stretto.bench.summary import is_base

__all__ = ["render", "write_report"]

TERMS = (
    ("forward", "One pass of the model over a batch of rows. Reading the weights dominates its cost, so a forward "
     "over 16 rows costs little more than one over a single row: this is what the methods use."),
    ("tokens per forward", "Tokens of the output divided by the forwards that decoded it; chunks of the prompt are not "
     "counted. Plain decoding has 1."),
    ("speed-up", "Wall-clock time of plain decoding divided by that of the method, prompt included, on the same "
     "prompts in the same minutes: median over rounds. The thin line spans the slowest and the fastest round."),
    ("lossless", "The method promises plain decoding's tokens, exactly."),
    ("same text", "Share of the outputs whose tokens equal those of plain decoding, all of them. A model of another "
     "kind has no such text to equal: its quality counts."),
    ("answers right", "Share of the answers that the task's own checker accepts, on prompts never used in training."),
    ("acceptance", "Drafted tokens that turned out right, of all that were drafted."),
    ("rows per forward", "Tokens and drafts evaluated together in one forward while decoding."),
)


def write_report(result: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page for ``result`` to ``path`` in one go; the path written."""
    return write_atomically(path, render(result))


def render(result: Mapping[str, Any]) -> str:
    """The page for a result of ``bench``."""
    parts = {
        "title": escape(f"stretto bench of {result['model']}"), "model": escape(result["model"]),
        "version": escape(str(result["provenance"]["version"])), "headline": _headline(result["headline"][0]),
        "lead": escape(" ".join(result["headline"][1:])), "facts": facts(result), "compared": _compared(result),
        "totals": totals(result), "notes": notes(result), "matrix": matrix(result), "plot": _plot(result),
        "count": f"{len(result['totals'])} methods on {len(result['provenance']['tasks'])} tasks, line by line",
        "scopes": scopes(result), "figures": figures(result), "peers": peers_section(result),
        "terms": "".join(f"<dt>{t}</dt><dd>{escape(d)}</dd>" for t, d in TERMS),
        "protocol": _protocol(result), "origin": origin(result), "command": escape(_command(result)),
        "samples": _json(_samples(result)), "style": _asset("report_style.html"),
        "script": _asset("report_script.html"),
    }
    page = _asset("report_page.html")
    first, *rest = page.split("{{")
    out = [first]
    for piece in rest:
        name, _, text = piece.partition("}}")
        out += [parts[name], text]
    return "".join(out)


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _json(data: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _samples(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The samples with the name of each run; plain decoding first, then the quickest."""
    return [
        {
            **s,
            "runs": [
                {**r, "on": "" if r["model"] == result["model"] else r["model"].removeprefix("zoo:")}
                for r in sorted(s["runs"], key=lambda r: (not is_base(result, r), r["seconds"]))
            ],
        }
        for s in result["samples"]
    ]


def _headline(sentence: str) -> str:
    """The sentence with its figure marked."""
    words = escape(sentence).split(" ")
    for i, word in enumerate(words[:-1]):
        if word[0].isdigit() and words[i + 1] == "times":
            return " ".join([*words[:i], f"<b>{word} times</b>", *words[i + 2 :]])
    return " ".join(words)


def _compared(result: Mapping[str, Any]) -> str:
    p = result["provenance"]
    return escape(
        f"Everything is measured against plain decoding ({result['baseline']['method']}) of {result['model']} by the "
        f"same engine: {p['samples']} prompts for each of {len(p['tasks'])} tasks, every method on every prompt, "
        "in turns."
    )


def _plot(result: Mapping[str, Any]) -> str:
    wide = speed_quality(result)
    if not wide:
        return ""
    narrow = speed_quality(result, width=360, height=400).replace('class="plot"', 'class="plot narrow"')
    wide = wide.replace('class="plot"', 'class="plot wide"')
    keys = (
        ('<circle cx="8" cy="8" r="5" class="mark base"/>', "plain decoding"),
        ('<circle cx="8" cy="8" r="6" class="mark same"/>', "lossless: the same text"),
        ('<path d="M8 1l7 7-7 7-7-7z" class="mark lossy"/>', "other text: judge by its answers"),
    )
    legend = "".join(f'<span><svg viewBox="0 0 16 16" aria-hidden="true">{s}</svg>{t}</span>' for s, t in keys)
    return (
        '<section aria-labelledby="h-plot"><h2 id="h-plot">Speed against quality</h2>'
        '<p class="sub">Further right is faster, further up is better.</p>'
        f'<figure class="card"><div class="key">{legend}</div>{wide}{narrow}'
        "<figcaption>Over all tasks; whiskers span the rounds.</figcaption></figure></section>"
    )


def _protocol(result: Mapping[str, Any]) -> str:
    p = result["provenance"]
    return escape(
        f"Greedy decoding, {p['batch']} prompt{'s' if p['batch'] > 1 else ''} at a time, after a warm-up on other "
        f"prompts. Within each of {p['rounds']} rounds the methods take turns prompt by prompt, in changing order, and "
        "no prompt is decoded twice by one method. Plain decoding runs twice in every round: its two runs differed by "
        f"{result['noise']:.1%} (median), which is the noise under every figure here."
    )


def _command(result: Mapping[str, Any]) -> str:
    p = result["provenance"]
    methods = dict.fromkeys(r["method"] for r in result["totals"])
    return (
        f"stretto bench {result['model']} --methods {','.join(methods)} --tasks {','.join(p['tasks'])} "
        f"--samples {p['samples']} --batch {p['batch']} --seed {p['seed']} --threads {p.get('threads', 1)}"
    )
