"""ATTS: what its paper claims."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stretto.systems.types import Claim, System


def evidence(quick: bool) -> Mapping[str, Any]:
    """Held-out problems of many steps by every way, the same models and seeds; times in turns."""
    from stretto.bench.provenance import provenance
    from stretto.llm import LLM
    from stretto.threads.measure_atts import DRAFT, TARGET, measure

    load = lambda threads: tuple(LLM(m, threads=threads, enable_prefix_caching=False) for m in (DRAFT, TARGET))
    wide = load(len(os.sched_getaffinity(0)))
    pair = load(1)
    found = measure(pair, wide, quick, None if quick else _large())
    return found | {"provenance": provenance(pair[1], threads="one a model, or all cores where the row says so")}


def _large() -> Any:
    """125M random weights with the zoo's vocabulary, bfloat16 on one thread: its prices are those of a trained
    model, its texts are nothing."""
    from stretto.bench.peers import SHAPES
    from stretto.bench.peers_engines import write_checkpoint
    from stretto.llm import LLM

    with tempfile.TemporaryDirectory(prefix="stretto-large-") as folder:
        made = write_checkpoint(Path(folder) / "model", SHAPES["125M"] | {"vocab_size": 2048})
        return LLM(made, dtype="bfloat16", threads=1, enable_prefix_caching=False, plan=False, kv_cache_tokens=8192)


SYSTEM = System(
    slug="atts",
    title="ATTS",
    room="threads",
    parts=(
        "stretto.threads.atts", "stretto.threads.atts_variants", "stretto.threads.chains", "stretto.threads.conformal",
        "stretto.threads.homes", "stretto.threads.row_prices",
        "stretto.threads.barrier", "stretto.planning.stations", "stretto.training.step_units",
    ),
    command="stretto scale --questions steps:4 --chunk 32 --stop '\\n'",
    evidence=evidence,
    purpose=(
        "Gives many reasoning chains per question at little more than the draft's cost: the target "
        "scores chunks without a barrier and takes over a chosen share."
    ),
    paper=(
        "ATTS: Asynchronous Test-Time Scaling via Conformal Prediction, Sep 2025 (arXiv "
        "2509.15148, ICLR 2026)"
    ),
    claims=(
        Claim(
            name="speed against the target alone",
            paper="up to 56.7x faster, 4.14x throughput, no accuracy loss",
            bar=(
                "accuracy near the target's at a take-over share of 0.3-0.4, in well below the "
                "target's time"
            ),
        ),
        Claim(
            name="rejection rate",
            paper="held at its target",
            bar="equals floor(a(n+1))/(n+1) within 3 standard errors over 10^5 draws",
        ),
        Claim(
            name="synchronisation is the bottleneck",
            paper="ranking all candidates of a turn waits for the slowest",
            bar="asynchronous beats synchronous clearly in the simulator with heavy-tailed lengths",
        ),
    ),
)
