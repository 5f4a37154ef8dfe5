"""What ATTS claims, measured: chains over a draft and a target against each alone and against chains in step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from stretto.threads.atts import atts, calibrate
from stretto.threads.barrier import Cluster, run
from stretto.threads.chains import Scaled, Setting
from stretto.threads.conformal import Online, Tester
from stretto.threads.row_prices import best_gain, prices, replayed
from stretto.training.step_units import problems

__all__ = ["measure"]

DRAFT, TARGET = "zoo:tiny-steps-draft", "zoo:tiny-steps"
SHARE = 0.375  # 3 of 8 chains: what the ranking can take over exactly
ALPHAS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)
SEED, DRAWS = 17, 100_000
SETTING = Setting(k=8, alpha=SHARE, turns=15, chunk=32, stop=("\n",), seed=SEED, draft_limit=64, target_limit=64)
Pair = tuple[Any, Any]


def measure(pair: Pair, wide: Pair, quick: bool, large: Any = None) -> dict[str, Any]:
    """The claims at our scale. ``pair``: draft and target with one thread each; ``wide``: with all cores each, for the
    ways in which only one of them is at work; ``large``: a target of random weights, for its prices. See
    ``systems/atts.py``."""
    few, many = (3, 8) if quick else (8, 32)
    prompts, answers = _asked(pair[0], many, 23)
    held = _asked(pair[0], 8 if quick else 20, 29)[0]
    first = calibrate(*pair, held, setting=SETTING)
    online = Online(SHARE)
    atts(*pair, held, setting=SETTING, calibration=online)  # its warm-up: these decisions are not judged
    stream = {
        "online": atts(*pair, prompts, setting=SETTING, calibration=online),
        "first turn only": atts(*pair, prompts, setting=SETTING, calibration=_firsts(first.scores[0])),
        "target": atts(*pair, prompts, setting=SETTING, variant="target"),
        "draft": atts(*pair, prompts, setting=SETTING, variant="draft"),
    }
    judged = {name: stream[name].rates() for name in ("online", "first turn only")}
    whole = {name: _row(found, answers) for name, found in stream.items()}
    table = _table(pair, prompts[:few], answers[:few], held, first.scores[0], quick)
    clock = _clock(pair, wide, _asked(pair[0], 2 if quick else 12, 31)[0], online, 2 if quick else 4)
    costs = _costs(pair, prompts[0], large)
    draws = _draws(20_000 if quick else DRAWS)
    simulated = _simulated()
    return {
        "claims": _claims(whole, table, clock, judged, costs, draws, simulated), "by share": table,
        "rates by turn": judged,
        "seconds": clock, "price of a token": costs, "draws": draws, "simulation (no measurement)": simulated,
        "stream of questions": whole, "models": [DRAFT, TARGET], "questions": few,
        "k": SETTING.k, "questions of the stream": many, "seed": SEED,
    }


def _asked(llm: Any, n: int, seed: int) -> tuple[list[str], list[str]]:
    found = problems("test", n, seed)
    ask = lambda p: llm.chat_prompt([{"role": "user", "content": p.prompt}])
    return [ask(p) for p in found], [str(p.answer) for p in found]


def _firsts(scores: Sequence[float]) -> Tester:
    from stretto.threads.conformal import Calibration

    return Calibration({0: scores}, SHARE, firsts=True)


def _table(
    pair: Pair, prompts: list[str], answers: list[str], held: list[str], firsts: Sequence[float], quick: bool
) -> dict[str, dict[str, Any]]:
    """Accuracy, tokens and share of every way on the same questions. Times of these runs are single ones."""
    from stretto.threads.conformal import Calibration

    ways: dict[str, dict[str, Any]] = {
        "draft": {"variant": "draft"}, "target": {"variant": "target"}, "in step": {"variant": "sync"},
    }
    for alpha in (0.0, 0.4, 1.0) if quick else ALPHAS:
        warm = Online(alpha)
        if 0 < alpha < 1:
            atts(*pair, held[: 4 if quick else 8], setting=SETTING, alpha=alpha, calibration=warm)
        ways[f"online {alpha:g}"] = {"alpha": alpha, "calibration": warm}
    ways["marginal 0.4"] = {"alpha": 0.4, "calibration": Calibration({0: firsts}, 0.4, firsts=True)}
    ways["conditional 0.4"] = {"alpha": 0.4, "coverage": "conditional"}
    warm = Online(0.4)
    atts(*pair, held[: 4 if quick else 8], setting=SETTING, alpha=0.4, calibration=warm, on_reject="replace")
    ways["replace 0.4"] = {"alpha": 0.4, "calibration": warm, "on_reject": "replace"}
    return {name: _row(atts(*pair, prompts, setting=SETTING, **way), answers) for name, way in ways.items()}


def _row(found: Scaled, answers: list[str]) -> dict[str, Any]:
    tested = [t for q in found.questions for c in q.chains for t in c.turns if t.score is not None]
    share = sum(t.rejected for t in tested) / len(tested) if tested else None
    return {**found.grade(answers), "share": share, "tokens": found.tokens, "seconds": found.seconds["wall"]}


def _clock(pair: Pair, wide: Pair, prompts: list[str], online: Tester, groups: int) -> dict[str, Any]:
    """Wall clock of the ways in turns, on other questions every round: one question at a time (latency), and a round's
    questions at once (throughput). In step takes over the share that the asynchronous run of the same questions did."""
    size = len(prompts) // groups
    rounds = [prompts[i * size : (i + 1) * size] for i in range(groups)]
    out: dict[str, Any] = {"questions": len(prompts), "rounds": groups}
    single, whole = [[[q] for q in r] for r in rounds], [[r] for r in rounds]
    for name, batches in (("one at a time", single), ("all at once", whole)):
        times: dict[str, list[float]] = {}
        shares: dict[str, list[float]] = {}
        for batch in batches:
            spent: dict[str, float] = {}
            for questions in batch:
                for way, found in _ways(pair, wide, questions, online):
                    spent[way] = spent.get(way, 0.0) + found.seconds["wall"]
                    shares.setdefault(way, []).append(_row(found, [""] * len(questions))["share"] or 0.0)
            for way, seconds in spent.items():
                times.setdefault(way, []).append(seconds)
        out[name] = {
            "seconds": {way: statistics.median(t) for way, t in times.items()},
            "shares": {way: statistics.mean(s) for way, s in shares.items()},
            "in step / atts": _ratio(times, "in step", "in step, all cores"),
            "target / atts": _ratio(times, "target", "target, all cores"),
        }
    return out


def _ways(pair: Pair, wide: Pair, questions: list[str], online: Tester) -> Iterator[tuple[str, Scaled]]:
    """The same questions by every way."""
    first = atts(*pair, questions, setting=SETTING, calibration=online)
    yield "atts", first
    share = _row(first, [""] * len(questions))["share"] or 0.0
    for name, models in (("", pair), (", all cores", wide)):
        yield f"in step{name}", atts(*models, questions, setting=SETTING, variant="sync", alpha=share)
        yield f"target{name}", atts(*models, questions, setting=SETTING, variant="target")


def _ratio(times: dict[str, list[float]], *ways: str) -> dict[str, float]:
    """How many times longer the better of ``ways`` takes than atts; of rounds, which were taken in turns."""
    best = min(ways, key=lambda w: statistics.median(times[w]))
    found = sorted(b / a for a, b in zip(times["atts"], times[best], strict=True))
    return {"median": statistics.median(found), "low": found[0], "high": found[-1]}


def _costs(pair: Pair, prompt: str, large: Any) -> dict[str, Any]:
    """What written and scored tokens cost here, the gain that is possible with that, and a larger target of random
    weights: its prices, and real runs with replayed decisions."""
    draft, target = (prices(llm) for llm in pair)
    out: dict[str, Any] = {"draft": draft, "target": target, "possible": best_gain(draft, target, SHARE)}
    if large is not None:
        theirs = prices(large)
        out |= {"125M, random weights": theirs, "possible with 125M": best_gain(draft, theirs, SHARE),
                "replayed with 125M": replayed(pair[0], large, prompt, turns=3)}
    return out


def _draws(n: int) -> list[dict[str, float]]:
    """The rule on independent scores: how often it rejects, and how often it must."""
    rng, out = np.random.default_rng(SEED), []
    for size in (9, 16, 99):
        rows = rng.random((n, size + 1))
        rank = 1 + (rows[:, :size] >= rows[:, size:]).sum(1)
        for alpha in (0.1, 0.4):
            want = math.floor(alpha * (size + 1) + 1e-9) / (size + 1)
            rate = float(np.mean(rank <= alpha * (size + 1) + 1e-9))
            out.append({"n": size, "alpha": alpha, "rate": rate, "exact": want,
                        "errors": abs(rate - want) / math.sqrt(want * (1 - want) / n)})
    return out


def _simulated() -> dict[str, float]:
    """In step / alone on a cluster that is not here: heavy-tailed lengths, and equal ones."""
    ratio = lambda c: statistics.median(
        run(c, in_step=True, seed=s).seconds / run(c, in_step=False, seed=s).seconds for s in range(9)
    )
    return {f"sigma {sigma:g}": ratio(Cluster(sigma=sigma)) for sigma in (0.0, 0.5, 1.0, 1.5)}


def _off(rates: Sequence[dict[str, Any]], share: float) -> tuple[float, int]:
    """The largest distance from ``share`` in standard errors, and its turn; over the turns with at least 32 decisions
    of which nine in ten had scores of their own turn."""
    seen = [r for r in rates if r["n"] >= 32 and r["uncalibrated"] <= 0.1 * r["n"]]
    far = lambda r: abs(r["rate"] - share) / max(1e-9, (r["high"] - r["low"]) / (2 * 1.96))
    worst = max(seen, key=far)
    return far(worst), worst["turn"]


def _claims(
    whole: dict[str, dict[str, Any]], table: dict[str, dict[str, Any]], clock: dict[str, Any], judged: dict[str, Any],
    costs: dict[str, Any], draws: list[dict[str, float]], simulated: dict[str, float],
) -> list[dict[str, Any]]:
    one, every = clock["one at a time"], clock["all at once"]
    here, alone, small = whole["online"], whole["target"], whole["draft"]
    near = alone["vote"] - here["vote"] <= 0.05 and alone["mean"] - here["mean"] <= 0.1
    faster, step = one["target / atts"], one["in step / atts"]
    (drift, turn), (loose, later) = _off(judged["online"], SHARE), _off(judged["first turn only"], SHARE)
    exact = max(d["errors"] for d in draws)
    across = ", ".join(f"{name} {row['vote']:.2f}/{row['mean']:.2f}" for name, row in table.items() if "online" in name)
    listed = {name: ", ".join(f"{r['rate']:.2f}" for r in rates) for name, rates in judged.items()}
    right = lambda row: f"vote {row['vote']:.3f}, pass@8 {row['pass_at_k']:.3f}, {row['mean']:.3f} of chains"
    return [
        {
            "name": "speed against the target alone",
            "paper": "up to 56.7x faster, 4.14x throughput, no accuracy loss",
            "measured": f"{right(here)} at a share of {here['share']:.2f}; {_said(faster)} a question, "
                        f"{every['target / atts']['median']:.2f} x all at once",
            "baseline": f"target alone: {right(alone)}; draft alone: {right(small)}",
            "bar": "accuracy near the target's at a take-over share of 0.3-0.4, in well below the target's time",
            "holds": bool(near and faster["median"] >= 1.25 and faster["low"] > 1),
            "note": "holds = vote within 0.05, chains within 0.1, and 1.25 times faster than the better of one and all "
                    f"threads; vote/chains by share: {across}. {_why(costs)}",
        },
        {
            "name": "rejection rate", "paper": "held at its target",
            "measured": f"{exact:.1f} standard errors off at most over {len(draws)} cases; online calibration: at most "
                        f"{drift:.1f} off {SHARE} (turn {turn})",
            "baseline": f"first-turn scores only: {loose:.1f} off (turn {later}), rates {listed['first turn only']}",
            "bar": "equals floor(a(n+1))/(n+1) within 3 standard errors over 10^5 draws",
            "holds": bool(exact <= 3 and drift <= 3),
            "note": "holds = the draws, and every turn of the stream within 3 standard errors between questions; "
                    f"online rates {listed['online']}",
        },
        {
            "name": "synchronisation is the bottleneck",
            "paper": "ranking all candidates of a turn waits for the slowest",
            "measured": f"asynchronous {_said(step)} faster a question, {every['in step / atts']['median']:.2f} x all "
                        "at once, in wall clock",
            "baseline": f"in step, the better of one and all threads; shares taken over {one['shares']['in step']:.2f} "
                        f"in step, {one['shares']['atts']:.2f} asynchronous",
            "bar": "asynchronous beats synchronous clearly in the simulator with heavy-tailed lengths",
            "holds": bool(step["median"] >= 1.05 and step["low"] > 1),
            "note": "holds = the wall clock here, at least 1.05 times in the median and above 1 in every round; the "
                    f"simulator (simulated time, no part of holds) says {simulated['sigma 1']:.2f} x at sigma 1, "
                    f"{simulated['sigma 0']:.2f} x with equal lengths",
        },
    ]


def _why(costs: dict[str, Any]) -> str:
    """What the prices allow."""
    ms = lambda row: f"{1e3 * row['written']:.2f} ms written and {1e3 * row['scored']:.2f} scored"
    text = (
        f"A token costs the draft {ms(costs['draft'])}, the target {ms(costs['target'])}: with nothing lost between "
        f"two cores that allows {costs['possible']:.2f} x"
    )
    if "possible with 125M" not in costs:
        return text
    seen = costs["replayed with 125M"]
    return (
        f"{text}; a target of 125M random weights {ms(costs['125M, random weights'])}, which allows "
        f"{costs['possible with 125M']:.2f} x; runs of it with replayed decisions (no accuracy, no part of holds) were "
        f"{seen['atts / target']:.2f} x as fast as the target alone, {seen['atts / in step']:.2f} x as in step"
    )


def _said(r: dict[str, float]) -> str:
    return f"{r['median']:.2f} x ({r['low']:.2f} to {r['high']:.2f})"
