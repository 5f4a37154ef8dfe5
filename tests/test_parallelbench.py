"""ParallelBench: exact theory, an oracle under the real decoders, generators and scorers, curves."""

import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from stretto.bench import parallel_theory as theory
from stretto.bench.curves import aup, budget, kendall, spearman
from stretto.bench.diffusion_page import render
from stretto.bench.list_model import OPERATIONS, _rows, _valid, measure, train
from stretto.bench.oracle import simulate, success_rate
from stretto.bench.parallel_tasks import PARALLEL_TASKS, parse_list
from stretto.bench.parallel_text import bleu, chrf, grammatical, rouge_l
from stretto.bench.parallelbench import (
    card_settings,
    ideal,
    parallel_items,
    parse_decoders,
    pick_parallel,
    samples,
)
from stretto.bench.workload import load_items, pick_tasks
from stretto.errors import OptionError, UnknownNameError

CARD = {  # the card's figures, n = 3..6
    "replace_random": [0.4444, 0.4219, 0.4096, 0.4019], "shuffle": [0.2222, 0.0938, 0.0384, 0.0154],
    "shuffle_other": [0.2240, 0.0919, 0.0381, 0.0154], "remove_random": [0.8889, 0.7500, 0.6144, 0.4938],
    "insert_random": [0.1875, 0.1229, 0.0823, 0.0560],
}
CORRELATION = {
    "remove_random": [0.1744, 0.4315, 0.7374, 1.0755], "insert_random": [1.8178, 2.3468, 2.8673, 3.3826],
}


def test_one_step_success_and_correlation_are_the_cards():
    for name, values in CARD.items():
        assert [theory.success(name, n) for n in (3, 4, 5, 6)] == pytest.approx(values, abs=6e-5)
    for name, values in CORRELATION.items():
        assert [theory.correlation(name, n) for n in (3, 4, 5, 6)] == pytest.approx(values, abs=6e-5)
    for n in (3, 5, 7):
        assert theory.correlation("replace_random", n) == pytest.approx((n - 1) * math.log(n / (n - 1)))
        assert theory.correlation("shuffle", n) == pytest.approx(n * math.log(n) - math.log(math.factorial(n)))
    for name in ("copy", "reverse", "sort", "insert_index", "remove_index", "replace_index"):
        assert theory.success(name, 5) == 1.0 and theory.correlation(name, 5) == 0.0


def test_closed_forms_of_several_steps_equal_enumeration():
    def replace(m, ks):
        if not ks:
            return 0.0
        k = ks[0]
        return k / m * (1 - 1 / m) ** (k - 1) + (1 - 1 / m) ** k * replace(m - k, ks[1:]) if m > 1 else 1.0

    for n, steps in itertools.product((3, 4, 5), (1, 2, 3, None)):
        ks = theory.schedule(n, steps)
        assert theory.success("shuffle", n, steps) == pytest.approx(theory._walk(theory.outputs("shuffle", n), (), tuple(ks)))
        if set(ks) == {1} or len(ks) == 1:
            assert theory.success("replace_random", n, steps) == pytest.approx(replace(n, ks))
    for name in theory.OPERATIONS:
        rates = [theory.success(name, 4, t) for t in (1, 2, 3, None)]
        bounds = [theory.correlation(name, 4, t) for t in (1, 2, 3, None)]
        assert rates == sorted(rates) and rates[-1] == pytest.approx(1.0)
        assert bounds == sorted(bounds, reverse=True) and bounds[-1] == pytest.approx(0.0, abs=1e-12)
        assert all(-math.log(r) <= b + 1e-9 for r, b in zip(rates, bounds, strict=True)), "KL bounds the mass kept"


def test_greedy_in_one_step_copies_what_should_be_replaced():
    assert [theory.greedy_one_step("replace_random", n) for n in (2, 3, 6)] == [False, False, False]
    assert theory.greedy_one_step("copy", 4) and not theory.greedy_one_step("shuffle", 4)


@pytest.mark.parametrize("operation", ["shuffle", "replace_random", "insert_random", "remove_random"])
@pytest.mark.parametrize("steps", [1, 2, None])
def test_the_oracle_meets_theory_in_many_draws(operation, steps):
    n, draws = 4, 20_000
    p = theory.success(operation, n, steps)
    got = simulate(operation, n, draws, steps, seed=1)
    assert abs(got - p) <= 3 * math.sqrt(p * (1 - p) / draws)


@pytest.mark.parametrize("attention, options", [
    ("full", {"cache": "none"}), ("full", {"cache": "dual"}), ("block", {}),
])
def test_real_decoders_on_the_oracle_meet_theory(attention, options):
    draws, p = 300, theory.success("shuffle", 4, 2)
    got, speed = success_rate(
        "shuffle", 4, draws, attention=attention, unmask="fixed", steps=2, score="random", **options
    )
    assert abs(got - p) <= 4 * math.sqrt(p * (1 - p) / draws) and speed == 2.0


def test_lossless_decoders_on_the_oracle_are_never_wrong():
    assert success_rate("shuffle", 5, 40, method="ar", attention="causal") == (1.0, 1.0)
    rate, speed = success_rate("shuffle", 5, 40, method="freedave", draft_steps=4, attention="block")
    assert rate == 1.0 and speed > 1.0
    rate, speed = success_rate("copy", 5, 4, method="freedave", draft_steps=8, temperature=0.0, cache="none")
    assert rate == 1.0 and speed == 2.5
    assert success_rate("replace_random", 5, 4, unmask="fixed", steps=1, temperature=0.0, cache="none") == (0.0, 5.0)
    assert success_rate("copy", 6, 4, unmask="threshold", threshold=0.99, cache="none") == (1.0, 6.0)


@pytest.mark.parametrize("style", ["plain", "story"])
@pytest.mark.parametrize("name", PARALLEL_TASKS)
def test_samples_are_seeded_different_and_their_answers_right(name, style):
    task = PARALLEL_TASKS[name]
    made = samples(name, 12, style=style)
    assert made == samples(name, 12, style=style) and len({s.question for s in made}) == 12
    assert not {s.question for s in made} & {s.question for s in samples(name, 12, style=style, seed=1)}
    for s in made:
        assert s.score("") == 0.0
        assert name in ("line_copy", "line_sort") or s.score(s.question) < 1.0
        if s.answer is not None:
            assert s.score(s.answer) == pytest.approx(1.0) and s.score(s.answer, strict=True) == pytest.approx(1.0)
    if task.family == "waiting_line":
        assert {len(s.label["items"]) for s in made} == {3, 4, 5, 6}
        assert (made[0].shot is not None) == (style == "story")
        assert len(samples(name, 1, style=style, size=15)[0].label["items"]) == 15


def test_there_are_seventeen_tasks_with_the_papers_counts():
    assert len(PARALLEL_TASKS) == 17
    assert [t.count for t in PARALLEL_TASKS.values() if t.name.startswith("sudoku")] == [108]
    assert len(pick_parallel("parallelbench")) == 17 and len(pick_parallel("waiting_line")) == 10
    with pytest.raises(UnknownNameError, match="line_copy"):
        samples("line_copi")
    for bad in ({"n": 0}, {"size": 1}, {"style": "long"}):
        with pytest.raises(OptionError):
            samples("line_copy", **bad)


def label(op, items, word="", index=0, answer=None):
    return {"op": op, "items": items, "word": word, "index": index, "answer": answer, "style": "story"}


@pytest.mark.parametrize("op, text, right", [
    ("shuffle", '["b", "a", "c"]', 1), ("shuffle", '["a", "b", "c"]', 0), ("shuffle", '["b", "a"]', 0),
    ("shuffle", 'Here: ["x"] no, ["c", "a", "b"].', 1), ("shuffle", '["b", "a", "c", "c"]', 0),
    ("insert_random", '["a", "w", "b", "c"]', 1), ("insert_random", '["w", "a", "b", "c", "w"]', 0),
    ("insert_random", '["b", "a", "w", "c"]', 0), ("remove_random", '["a", "c"]', 1),
    ("remove_random", '["c", "a"]', 0), ("remove_random", '["a"]', 0), ("replace_random", '["a", "w", "c"]', 1),
    ("replace_random", '["a", "b", "c"]', 0), ("replace_random", '["w", "w", "c"]', 0),
])
def test_scorers_of_random_operations(op, text, right):
    assert PARALLEL_TASKS[f"line_{op}"].score(label(op, ["a", "b", "c"], "w"), text, False) == right


def test_loose_and_strict():
    s = PARALLEL_TASKS["line_copy"].score
    how = label("copy", ["A B", "C D"], answer=["A B", "C D"])
    assert s(how, 'The list is ["A B", "C D"].', False) == 1.0 and s(how, 'The list is ["A B", "C D"].', True) == 0.0
    assert s(how, "[A B, C D]", False) == 1.0 and s(how, "[A B, C D]", True) == 0.0
    assert parse_list('x [ "a" , b ] y') == ["a", "b"] and parse_list("[]") == [] and parse_list("a, b\nc") == ["a", "b"]


def test_sudokus_have_one_answer():
    for s in samples("sudoku_n4_12", 5):
        rows = [list(map(int, r)) for r in s.question.splitlines()[-4:]]
        assert sum(v == 0 for r in rows for v in r) == 4
        found = 0
        blanks = [(r, c) for r in range(4) for c in range(4) if rows[r][c] == 0]
        for fill in itertools.product(range(1, 5), repeat=4):
            g = [list(r) for r in rows]
            for (r, c), v in zip(blanks, fill, strict=True):
                g[r][c] = v
            boxes = [[g[r + i][c + j] for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
            found += all(len(set(x)) == 4 for x in [*g, *zip(*g, strict=True), *boxes])
        assert found == 1


def test_measures_of_text():
    assert bleu("the cat sat on the mat", "the cat sat on the mat") == pytest.approx(1.0) and bleu("a b", "") == 0
    assert chrf("abcdefg", "abcdefg") == pytest.approx(1.0) and chrf("abc", "xyz") == 0.0
    assert rouge_l("a b c d", "a c d") == pytest.approx(6 / 7)
    good = ["The cook has a spoon.", "She said \"no\" to him.", "Do boats sail?"]
    bad = ["the cook has a spoon.", "The cook has a spoon", "The the cook has a pot.", "The pot , red, is hot.", "Hi."]
    assert [grammatical(t) for t in good[:2]] == [True, True] and not any(map(grammatical, bad))


def test_bench_and_eval_know_the_tasks():
    tasks = pick_tasks(["parallelbench", "list_copy"])
    assert len(tasks) == 18 and [t.name for t in pick_tasks("puzzle")] == ["latin_square_n4", "sudoku_n4_12"]
    items = load_items(pick_tasks("line_copy"), 2, 0)
    assert items[0].prompt.startswith("<|im_start|>user\nCopy this list: ") and items[0].max_tokens == 32
    assert items[0].score(items[0].shown.partition(": ")[2]) == 1.0
    with pytest.raises(UnknownNameError, match="line_copi"):
        pick_tasks("line_copi")


class Chat:
    templates = True

    class inner:
        @staticmethod
        def get_vocab():
            return {"a": 0}

    def chat(self, messages, add_generation_prompt):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def test_other_models_get_the_papers_chat_with_a_worked_example():
    (item,) = parallel_items(PARALLEL_TASKS["line_reverse"], 1, 0, None, Chat())
    roles = [part.partition(">")[0] for part in item.prompt.split("<")[1:]]
    assert roles == ["user", "assistant", "user", "assistant"] and '["' in item.prompt


def test_settings_of_the_card_and_of_the_user():
    static = [d for d in card_settings(32) if d.label.startswith("static confidence")]
    assert len(static) == 21 and len([d for d in card_settings(64) if d.label.startswith("static random")]) == 28
    got = parse_decoders("threshold:0.5,0.9;static:1,4;freedave:8;ar", block=8)
    assert [d.label for d in got] == ["threshold 0.5", "threshold 0.9", "static 1", "static 4", "freedave 8", "ar"]
    assert got[3].options["steps"] == 2 and got[4].options == {"draft_steps": 8}
    for bad in ("treshold:0.5", "threshold:x", ""):
        with pytest.raises((UnknownNameError, OptionError)):
            parse_decoders(bad)


def test_curves():
    assert aup([(1.0, 80.0)], 80.0) == 80.0
    flat = aup([(1, 80.0), (3, 80.0)], 80.0)
    assert flat == pytest.approx(240.0) and aup([(1, 80.0), (3, 80.0), (5, 60.0)], 80.0) == pytest.approx(flat)
    assert aup([(3, 78.0), (1, 80.0)], 80.0) == pytest.approx(80 + (80 + 78 * math.exp(-3 * 0.025)))
    assert budget([(1, 99), (2, 91), (4, 85)], 90) == 2 and budget([(1, 50)], 80) is None
    rng = random.Random(0)
    a, b = [rng.randint(0, 5) for _ in range(20)], [rng.randint(0, 5) for _ in range(20)]
    assert kendall(a, a) == pytest.approx(1.0) and spearman(a, [-x for x in a]) == pytest.approx(-1.0)
    assert kendall([1, 1], [1, 2]) is None and spearman(a, b) == pytest.approx(spearman(b, a))
    assert ideal("line_shuffle", 4) == theory.success("shuffle_other", 4)


def test_the_page_is_written_from_the_evidence():
    rows = [
        {"decoder": d, "model": "zoo:x", "method": m, "accuracy": a, "tokens_per_forward": t, "rows_per_token": 3.0,
         "speed": v}
        for d, m, a, t, v in (("autoregressive", "ar", 0.95, 1.0, 1.0), ("blocks, FreeDave", "freedave", 0.94, 3.0, 1.4),
                              ("blocks, threshold 0.6", "diffusion", 0.9, 5.0, 3.0))
    ]
    about = {"rows": rows, "skipped": [{"decoder": "y", "reason": "not here"}], "prompts": 7}
    text = render({"comparison": about, "provenance": {"commit": "abc"}})
    assert "| blocks, FreeDave | 94.0% | 3.00 | 3.0 | 1.40x |" in text and "commit abc" in text
    assert "change no token: **blocks, FreeDave**" in text and "one point of accuracy lost or less: **blocks, FreeDave**" in text
    assert "Fastest of all: **blocks, threshold 0.6**" in text and "Not measured: y (not here)" in text
    root = Path(__file__).parents[1]
    if (root / "evidence" / "parallelbench.json").exists():
        evidence = json.loads((root / "evidence" / "parallelbench.json").read_text())
        page = (root / "docs" / "diffusion.md").read_text()
        assert page == render(evidence), "write it again: python -m stretto.bench.diffusion_page"


def test_the_list_model_learns_and_its_test_lists_are_never_trained_on():
    rng = np.random.default_rng(0)
    ops = np.arange(400) % 4
    held, seen = (_rows(ops, rng, test=t)[0][:, 3:7] for t in (True, False))
    assert not {tuple(x) for x in held.tolist()} & {tuple(x) for x in seen.tolist()}
    prompts, answers = _rows(ops, rng, test=True)
    assert all(_valid(name, prompts[i::4], answers[i::4], answers[i::4]).all() for i, name in enumerate(OPERATIONS))
    net = train(3, rows=16)
    found = measure(net, "copy", 8, temperature=0.0, unmask="fixed", steps=2, score="random", cache="none")
    assert found["tokens_per_forward"] == 2.0 and 0 <= found["score"] <= 1
