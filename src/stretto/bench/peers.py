"""``stretto bench --peers``: transformers and llama.cpp beside us, same random weights, same threads, in turns.

A full run of ``--only-peers`` is kept in ``evidence/peers.json``, with the bars that ``bars.py`` names.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from stretto.bench.bars import DEFAULT, ONE_ROW, SINGLY, judge
from stretto.bench.measure import spread
from stretto.bench.peers_engines import ENGINES, Ours, write_checkpoint
from stretto.bench.provenance import provenance
from stretto.errors import MissingExtraError

__all__ = ["SHAPES", "compared", "measure_peers"]

PROMPT, TOKENS = 16, 64  # tokens of the prompt and of the answer, one row
ROWS, CONTEXTS = 16, (64, 128, 256)
BATCH = 16
LENGTHS = (8, 96)  # of the mixed prompts; answers have the same range
KINDS = ("chain", "block", "tree")
FORWARDS, PARTS = 100, 5  # runs of a single forward, figures made of them
SECONDS = 12.0  # one peer, one measurement: no further rounds after that


def _qwen3(
    hidden: int, intermediate: int, layers: int, heads: int, kv: int, dim: int, vocabulary: int
) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "head_dim": dim, "vocab_size": vocabulary, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "max_position_embeddings": 4096, "tie_word_embeddings": True, "hidden_act": "silu",
        "attention_bias": False, "torch_dtype": "bfloat16",
    }


SHAPES: Mapping[str, dict[str, Any]] = {
    "tiny": _qwen3(192, 512, 6, 6, 2, 32, 2048),
    "125M": _qwen3(768, 3072, 12, 12, 4, 64, 32000),
    "600M": _qwen3(1024, 3072, 28, 16, 8, 128, 151936),
}


def measure_peers(
    *, shapes: Sequence[str] = (), quick: bool = False, threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """{"rows", "bars", "absent", "provenance"}: each row is one measurement of ours beside one peer's, ``ratio`` above
    1 = ours is better, with its range over the rounds. Peers that are not installed or cannot do it are in ``absent``.

    ``shapes``: names of SHAPES (default: tiny and 125M). ``quick``: fewer rounds.
    """
    import torch

    say = progress or (lambda text: None)
    count = threads or torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    absent: dict[tuple[str, str], str] = {}
    backend = ""
    for shape in shapes or ("tiny", "125M"):
        with tempfile.TemporaryDirectory(prefix="stretto-peers-") as folder:
            say(f"peers: random weights of {shape}")
            path = write_checkpoint(Path(folder) / "model", SHAPES[shape])
            ours = Ours(path, count)
            backend = ours.backend
            for make in ENGINES:
                say(f"peers: {make.name} at {shape}")
                with _opened(make, path, count, absent) as peer:
                    if peer is not None:
                        rows += _beside(ours, peer, shape, 3 if quick else 5, absent)
            say(f"peers: our own rows and modes at {shape}")
            rows.append(_batching(ours, shape, 2 if quick else 3))
            rows += _modes(path, count, shape, quick)
    facts = {"threads": count, "backend": backend, "dtype": "bfloat16", "versions": _versions(), "quick": quick}
    gone = [{"peer": name, "what": what, "reason": reason} for (name, what), reason in absent.items()]
    return {"rows": rows, "bars": judge(rows, gone), "absent": gone, "provenance": provenance(**facts)}


@contextmanager
def _opened(make: type, path: Path, threads: int, absent: dict[tuple[str, str], str]) -> Iterator[Any]:
    try:
        peer = make(path, threads)
    except MissingExtraError:
        absent[make.name, "all"] = f"not installed: pip install {make.package}"
        yield None
        return
    except Exception as error:  # another project's engine: whatever it raises is why it is absent
        absent[make.name, "all"] = _why(error)
        yield None
        return
    try:
        yield peer
    finally:
        if hasattr(peer, "close"):
            peer.close()


def _beside(
    ours: Ours, peer: Any, shape: str, rounds: int, absent: dict[tuple[str, str], str]
) -> list[dict[str, Any]]:
    """Every measurement that ``peer`` offers."""
    out = []
    for name in peer.offers:
        try:
            out.append(JOBS[name](ours, peer, shape, rounds))
        except Exception as error:  # as above
            absent[peer.name, f"{name}, {shape}"] = _why(error)
    return out


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"


def _one_row(ours: Ours, peer: Any, shape: str, rounds: int) -> dict[str, Any]:
    """Tokens per second of one prompt of PROMPT tokens, prompt included."""
    prompts, tokens = _prompts([PROMPT]), [TOKENS]
    mine, theirs = _turns(lambda: ours.decode(prompts, tokens), lambda: peer.decode(prompts, tokens), rounds)
    return compared("one row", shape, "tokens/s", peer.name, [TOKENS / s for s in mine], [TOKENS / s for s in theirs])


def _sixteen_rows(ours: Ours, peer: Any, shape: str, rounds: int) -> dict[str, Any]:
    """What a forward of 16 rows costs, in forwards of one row; lower is better."""
    mine = [ours.rows(ROWS, c) / ours.rows(1, c) for c in CONTEXTS]
    theirs = [peer.rows(ROWS, c) / peer.rows(1, c) for c in CONTEXTS]
    return compared(f"{ROWS} rows", shape, "× one row", peer.name, mine, theirs, lower=True)


def _mixed(ours: Ours, peer: Any, shape: str, rounds: int) -> dict[str, Any]:
    """Tokens per second of BATCH prompts and answers of mixed lengths at once."""
    prompts, tokens = _work()
    total = sum(tokens)
    mine, theirs = _turns(lambda: ours.decode(prompts, tokens), lambda: peer.decode(prompts, tokens), rounds)
    return compared(
        f"batch {BATCH}, mixed lengths", shape, "tokens/s", peer.name, [total / s for s in mine],
        [total / s for s in theirs],
    )


JOBS = {"one row": _one_row, "rows": _sixteen_rows, "batch": _mixed}


def _batching(ours: Ours, shape: str, rounds: int) -> dict[str, Any]:
    """Our batch against our own one prompt after the other."""
    prompts, tokens = _work()
    total = sum(tokens)

    def alone() -> float:
        return sum(ours.decode([p], [n]) for p, n in zip(prompts, tokens, strict=True))

    mine, single = _turns(lambda: ours.decode(prompts, tokens), alone, rounds)
    return compared(
        f"batch {BATCH}, mixed lengths", shape, "tokens/s", SINGLY, [total / s for s in mine],
        [total / s for s in single],
    )


def _modes(path: Path, threads: int, shape: str, quick: bool) -> list[dict[str, Any]]:
    """16 rows beside one; deterministic mode beside the default one: decoding, then forwards of each kind of rows."""
    exact, loose = (Ours(path, threads, deterministic=d, plan=False) for d in (True, False))
    prompts, tokens, rounds = _prompts([PROMPT]), [TOKENS], 3 if quick else 5
    out = []
    for method, what in (("ar", "one row"), ("lookahead", "decoding by trees (lookahead)")):
        mine, theirs = _turns(
            partial(exact.decode, prompts, tokens, method), partial(loose.decode, prompts, tokens, method), rounds
        )
        figures = [TOKENS / s for s in mine], [TOKENS / s for s in theirs]
        out.append(compared(f"{what}, deterministic", shape, "tokens/s", DEFAULT, *figures))
    modes = {"exact": exact, "loose": loose}
    calls = {(m, kind): engine.forward(ROWS, kind, CONTEXTS[1]) for m, engine in modes.items() for kind in KINDS}
    calls["loose", "one"] = loose.forward(1, "chain", CONTEXTS[1])
    times = _alternately(list(calls.values()), FORWARDS // (2 if quick else 1))
    found = dict(zip(calls, times, strict=True))
    for kind in KINDS:
        mine, theirs = found["exact", kind], found["loose", kind]
        out.append(
            compared(
                f"{ROWS} rows of a {kind}, deterministic", shape, "ms a forward", DEFAULT, mine, theirs, lower=True
            )
        )
    one, many = found["loose", "one"], found["loose", "chain"]
    costs = [m / o for m, o in zip(many, one, strict=True)]
    return [*out, compared(f"{ROWS} rows", shape, "× one row", ONE_ROW, costs, [1.0] * len(costs), lower=True)]


def _alternately(calls: Sequence[Callable[[], object]], forwards: int) -> list[list[float]]:
    """Milliseconds of each call, PARTS figures: each the quickest of its share of ``forwards`` runs, in turns."""
    out: list[list[float]] = [[] for _ in calls]
    for _ in range(PARTS):
        best = [float("inf")] * len(calls)
        for _ in range(forwards // PARTS):
            for i, call in enumerate(calls):
                start = time.perf_counter()
                call()
                best[i] = min(best[i], 1000 * (time.perf_counter() - start))
        for figures, quickest in zip(out, best, strict=True):
            figures.append(quickest)
    return out


def _turns(
    mine: Callable[[], float], theirs: Callable[[], float], rounds: int
) -> tuple[list[float], list[float]]:
    """Both in turns after a warm-up of each, in changing order; fewer rounds when they are slow."""
    mine(), theirs()
    a: list[float] = []
    b: list[float] = []
    start = time.perf_counter()
    while len(a) < rounds and (len(a) < 2 or time.perf_counter() - start < SECONDS):
        for call, found in ((mine, a), (theirs, b))[:: 1 if len(a) % 2 == 0 else -1]:
            found.append(call())
    return a, b


def compared(
    what: str, shape: str, unit: str, peer: str, mine: Sequence[float], theirs: Sequence[float], *, lower: bool = False
) -> dict[str, Any]:
    pairs = list(zip(mine, theirs, strict=True))
    ratio, low, high = spread([t / m if lower else m / t for m, t in pairs])
    return {
        "what": what, "shape": shape, "unit": unit, "peer": peer, "stretto": statistics.median(mine),
        "theirs": statistics.median(theirs), "ratio": ratio, "ratio_low": low, "ratio_high": high, "rounds": len(pairs),
    }


def _prompts(lengths: Sequence[int]) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(64, 1024) for _ in range(n)] for n in lengths]


def _work() -> tuple[list[list[int]], list[int]]:
    """(prompts, tokens to make for each), the same every time."""
    rng = random.Random(1)
    return _prompts([rng.randint(*LENGTHS) for _ in range(BATCH)]), [rng.randint(*LENGTHS) for _ in range(BATCH)]


def _versions() -> dict[str, str]:
    from importlib import metadata

    out = {}
    for package in ("torch", "transformers", "llama-cpp-python"):
        try:
            out[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return out
