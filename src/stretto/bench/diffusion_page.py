"""One comparison of all diffusion decoders with their autoregressive twin, and the page that is written from it.

``compare`` measures; ``stretto reproduce parallelbench`` keeps its result; ``python -m stretto.bench.diffusion_page``
writes docs/diffusion.md from that evidence, so that no figure on the page was typed by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stretto.bench.curves import aup
from stretto.decoding.registry import METHODS
from stretto.errors import CheckpointError, StrettoError

__all__ = ["ENTRIES", "compare", "render"]

STATIC = {"unmask": "fixed"}
SLOW = 3.0  # seconds: what takes as long is timed once
ENTRIES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (  # (label, model, method, options)
    ("autoregressive", "tiny", "ar", {}),
    ("autoregressive, suffix drafts", "tiny", "suffix", {}),
    ("autoregressive, n-gram drafts", "tiny", "ngram", {}),
    ("autoregressive, draft model", "tiny", "draft", {}),
    ("autoregressive, EAGLE", "tiny", "eagle", {}),
    ("blocks, one token a step", "tiny-blocks", "diffusion", STATIC),
    ("blocks, FreeDave", "tiny-blocks", "freedave", {"draft_steps": 8}),
    ("blocks, threshold 0.9", "tiny-blocks", "diffusion", {"threshold": 0.9}),
    ("blocks, threshold 0.6", "tiny-blocks", "diffusion", {"threshold": 0.6}),
    ("blocks, CAD", "tiny-blocks", "diffusion", {"unmask": "cad"}),
    ("blocks, Learn2PD filter", "tiny-blocks", "diffusion", {"unmask": "filter"}),
    ("blocks, fine-tuned on own answers", "tiny-own-sft", "diffusion", {"threshold": 0.6}),
    ("blocks, dParallel", "tiny-dparallel", "diffusion", {"unmask": "entropy", "threshold": 0.5}),
    ("blocks, CD4LM", "tiny-cd4lm", "diffusion", {"unmask": "cad"}),
    ("blocks, LightningRL", "tiny-lightningrl", "diffusion", {"threshold": 0.9}),
    ("blocks, mixture of experts", "tiny-blocks-moe", "diffusion", {"threshold": 0.9}),
    ("blocks, mixture of experts, DES", "tiny-blocks-moe", "diffusion",
     {"threshold": 0.9, "moe_sharing": "vote", "moe_budget": 4}),
    ("causal window's weights, autoregressive", "tiny-wedlm", "ar", {}),
    ("causal window, WeDLM", "tiny-wedlm", "wedlm", {"window": 5, "entropy_threshold": 0.2}),
    ("causal window, WeDLM, wide", "tiny-wedlm", "wedlm", {"window": 16, "entropy_threshold": 0.4}),
    ("full attention, one token a step", "tiny-diffusion", "diffusion", STATIC),
    ("full attention, FreeDave", "tiny-diffusion", "freedave", {"draft_steps": 4}),
    ("full attention, threshold 0.9", "tiny-diffusion", "diffusion", {"threshold": 0.9}),
    ("full attention, dual cache", "tiny-diffusion", "diffusion", {"threshold": 0.9, "cache": "dual"}),
    ("full attention, Learn2PD filter", "tiny-diffusion", "diffusion", {"unmask": "filter"}),
)

WITHOUT = {  # systems of this page that have no recipe
    "full attention, NAP": "its streams are trained by its own evidence, see systems/nap.md",
}


def compare(quick: bool) -> dict[str, Any]:
    """Every entry that is here, on the same prompts, one at a time: accuracy, tokens per forward, rows, time. Seconds
    are minima of two turns (of one where it is slow); ratios are to plain autoregressive decoding of ``zoo:tiny``."""
    from stretto.bench.distilled import items_for
    from stretto.bench.trial import trial
    from stretto.llm import LLM

    rows, models = [], {}
    skipped = [{"decoder": k, "reason": v} for k, v in WITHOUT.items()]
    for label, name, method, options in ENTRIES:
        if quick and label not in ("autoregressive", "blocks, threshold 0.9", "blocks, FreeDave"):
            continue
        try:
            if method not in METHODS:
                raise CheckpointError(f"method {method} is not here")
            llm = models.get(name) or models.setdefault(name, LLM(f"zoo:{name}", max_num_seqs=1))
            items = items_for(llm, True, 31)
            trial(llm, items[:2], method, options, batch=1)
            runs = [trial(llm, items, method, options, label=label, batch=1)]
            if runs[0].seconds < SLOW:
                runs.append(trial(llm, items, method, options, label=label, batch=1))
        except StrettoError as error:
            skipped.append({"decoder": label, "reason": str(error)})
            continue
        row = {"model": f"zoo:{name}", "method": method, "options": options, **runs[0].row()}
        row["seconds_per_token"] = min(r.seconds for r in runs) / runs[0].total("tokens")
        rows.append(row)
    base = rows[0]["seconds_per_token"]
    for row in rows:
        row["speed"] = round(base / row["seconds_per_token"], 3)
    return {"rows": rows, "skipped": skipped, "aup": areas(rows), "prompts": rows[0]["n"], "seed": 31, "batch": 1}


def areas(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """AUP of each model over its rows of the table; the best accuracy of any row is the yardstick."""
    best = max(100 * r["accuracy"] for r in rows)
    points: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        points.setdefault(r["model"], []).append((r["tokens_per_forward"], 100 * r["accuracy"]))
    return {model: round(aup(found, best), 1) for model, found in points.items()}


HEAD = """# Diffusion decoding: which one when

A masked diffusion model may finish several tokens in one forward, in any order. What that is worth depends on the text,
the rule and the model's training. The table is one run over the same prompts, one at a time (`stretto reproduce
parallelbench`); times are ratios to plain decoding of the autoregressive twin, which was trained on the same data.

| decoder | right | tokens per forward | rows per token | speed |
|---|---:|---:|---:|---:|
"""

WHEN = """
## Which one
- **The text must be that of slow decoding**: `freedave`. It saves forwards without changing a token, on any diffusion
  model, and switches its drafts off where rows cost more than they save.
- **An untouched model, some loss allowed**: `diffusion` with `unmask=threshold`. The threshold is the one dial: measure
  it on your own prompts (`stretto bench MODEL --sweep 'threshold:0.5,0.7,0.9;static:1,4'`). A filter (`unmask=filter`,
  Learn2PD) replaces it where a fixed threshold fits badly.
- **An autoregressive checkpoint, streaming, exact cache**: `wedlm`, with weights trained so (`zoo:tiny-wedlm`); they
  still decode autoregressively without loss. Begin with a narrow window and a low threshold: neighbours of one forward
  may repeat each other.
- **A mixture of experts**: sharing (`moe_sharing=vote`, DES) reads fewer experts a forward; it pays where weights do
  not sit in cache.
- **You may train**: dParallel or CD4LM make the model itself sure of more tokens at once; the decoder stays the same.
  Check them on tasks that they were not trained on: a model that is always sure cannot be slowed down by its threshold.
- **Many requests at a time**: a forward of many rows costs more than one of few, so tokens per forward turn into less
  time. Compare `rows per token` first.
- **Random choices that depend on each other** (shuffle, insert anywhere): no rule helps beyond the exact law; see
  [parallelbench](systems/parallelbench.md).

## Terms
*Tokens per forward* count returned tokens only, up to the end of the text. *Rows* are all positions that forwards
evaluated, prompt and masks included. Kinds of models: *blocks* see earlier blocks and all of their own (exact cache);
*full attention* sees the whole canvas (cache approximate).
"""


def render(evidence: Mapping[str, Any]) -> str:
    """The page, from ``evidence/parallelbench.json``."""
    found = evidence["comparison"]
    lines = [
        f"| {r['decoder']} | {r['accuracy']:.1%} | {r['tokens_per_forward']:.2f} | {r['rows_per_token']:.1f} | "
        f"{r['speed']:.2f}x |"
        for r in found["rows"]
    ]
    about = evidence.get("provenance", {})
    source = f"{found['prompts']} prompts, {about.get('cpu', 'this machine')}, commit {about.get('commit', 'unknown')}"
    skipped = "".join(f"\nNot measured: {s['decoder']} ({s['reason']}).\n" for s in found["skipped"])
    return HEAD + "\n".join(lines) + f"\n\n{source}.\n{skipped}" + _findings(found) + WHEN


def _findings(found: Mapping[str, Any]) -> str:
    """What the table says: the fastest exact one, the fastest near the twin's accuracy, the fastest of all; AUP."""
    rows = found["rows"]
    base = rows[0]
    exact = [r for r in rows[1:] if METHODS[r["method"]].lossless]
    near = [r for r in rows if r["accuracy"] >= base["accuracy"] - 0.01]
    said = [
        ("Fastest of those that change no token", max(exact, key=lambda r: r["speed"], default=None)),
        ("Fastest at one point of accuracy lost or less", max(near, key=lambda r: r["speed"], default=None)),
        ("Fastest of all", max(rows, key=lambda r: r["speed"])),
    ]
    aups = ", ".join(f"{m} {a:.0f}" for m, a in found.get("aup", {}).items())
    return "\n" + "".join(
        f"- {what}: **{r['decoder']}**, {r['speed']:.2f}x, {r['accuracy']:.1%} right.\n" for what, r in said if r
    ) + (f"- AUP (area of accuracy over tokens per forward, of all rows of a model): {aups}.\n" if aups else "")


def main() -> None:
    """Write docs/diffusion.md from the evidence."""
    from stretto.bench.provenance import write_atomically

    root = Path(__file__).parents[3]
    evidence = json.loads((root / "evidence" / "parallelbench.json").read_text(encoding="utf-8"))
    print(write_atomically(root / "docs" / "diffusion.md", render(evidence)))


if __name__ == "__main__":
    main()
