"""The bench: interleaved timing, rows, report, table, evaluation, tuning and profiles."""

import importlib
import io
import json
import re
import shutil
from dataclasses import dataclass, field
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import stretto.zoo
from stretto.bench import arms as arms_module
from stretto.bench import runner as runner_module
from stretto.bench.evaluate import evaluate
from stretto.bench.measure import Arm, Item, geometric, measure, ratios
from stretto.bench.plot import Box, Frame, Point, speed_quality
from stretto.bench.provenance import write_atomically, write_json
from stretto.bench.report import render
from stretto.bench.rows import Cell, rows_by, sample_records
from stretto.bench.runner import bench
from stretto.bench.table import print_evaluation, print_rows
from stretto.bench.tune import tune, variants
from stretto.bench.workload import answer_room, load_items, one_per_family, pick_tasks
from stretto.decoding.profiles import fingerprint, load_profile, profile_path, resolve_auto
from stretto.decoding.registry import METHODS
from stretto.engine.params import SamplingParams
from stretto.errors import CheckpointError, OptionError, PromptError, UnknownNameError, UnsupportedError
from stretto.llm import LLM
from stretto.models.checkpoint import save
from tiny import model

evaluate_module = importlib.import_module("stretto.bench.evaluate")
tune_module = importlib.import_module("stretto.bench.tune")

TOKENIZER = Path(stretto.zoo.__file__).parent / "tokenizer"
KEYS = {
    "model", "method", "lossless", "task", "family", "n", "speedup", "speedup_low", "speedup_high", "notes",
    "tokens_per_forward", "equal", "quality", "acceptance", "forwards", "rows_per_forward", "seconds_per_token",
}


@dataclass
class FakeLLM:
    """Answers with letters of the prompt, ``per_forward[method]`` at a time; a forward takes ``cost`` on its clock."""

    per_forward: dict = field(default_factory=lambda: {"ar": 1})
    wrong: tuple = ()
    cost: float = 1.0
    attention: str = "causal"
    deterministic: bool = True
    calls: list = field(default_factory=list)
    now: float = 0.0

    def __post_init__(self):
        self.config = SimpleNamespace(attention=self.attention, block_size=1)
        self.runner = SimpleNamespace(backend="fake")
        self.model = torch.nn.Linear(1, 1)
        self.model_name = "fake"
        self.tokenizer = self

    def token_id(self, token):
        return 0

    def decoder(self, skip_special_tokens=True):
        return SimpleNamespace(push=lambda ids: "".join(map(chr, ids)), flush=lambda: "")

    def method(self, name, options=None):
        if name not in self.per_forward:
            raise UnsupportedError(f"{name} is not here")

    def generate(self, prompts, params, *, method, options):
        self.calls.append((method, list(prompts)))
        out = []
        for prompt, p in zip(prompts, params, strict=True):
            ids = [ord(c) for c in prompt[-12:]][: p.max_tokens]
            if method in self.wrong:
                ids[-1] = ord("?")
            each = self.per_forward[method]
            steps = [i // each for i in range(len(ids))]
            forwards = steps[-1] + 1
            self.now += self.cost * forwards
            metrics = SimpleNamespace(
                forwards=forwards, rows=len(prompt) - 1 + len(ids), tokens=len(ids), drafted=len(ids) - forwards,
                accepted=len(ids) - forwards, cached_tokens=0, notes=["a note"] if method == "ngram" else [],
            )
            choice = SimpleNamespace(token_ids=ids, text="".join(map(chr, ids)), step_map=steps)
            out.append(SimpleNamespace(outputs=[choice], metrics=metrics, prompt_token_ids=[0] * len(prompt)))
        return out


def items(n, task="t", family="f"):
    return [Item(task, family, f"prompt {i} of {task}", 16, lambda text: 1.0) for i in range(n)]


def fake_cells(llm, names, tasks=(("t", "f"), ("u", "g")), n=4):
    cells = {name: [] for name in names}
    runs = [Arm(llm, "fake", name) for name in names]
    for task, family in tasks:
        group = items(n, task, family)
        both = [*runs, Arm(llm, "fake", names[0])]
        *tracks, again = measure(both, [group[:2], group[2:]], clock=lambda: llm.now)
        for name, track in zip(names, tracks, strict=True):
            cells[name].append(Cell(track, (tracks[0], again), group))
    return [c for found in cells.values() for c in found]


def fake_result(names=("ar", "ngram", "suffix"), **changes):
    llm = FakeLLM({"ar": 1, "ngram": 2, "suffix": 4}, **changes)
    cells = fake_cells(llm, list(names))
    result = {
        "model": "fake", "baseline": {"model": "fake", "method": "ar"}, "rows": rows_by(cells, "task"),
        "families": rows_by(cells, "family"), "totals": rows_by(cells, "all"), "samples": sample_records(cells),
        "skipped": [{"model": "fake", "method": "draft", "reason": "no <draft> model"}], "noise": 0.01, "options": {},
        "provenance": {
            "version": "1", "cpu": "c", "date": "2026-01-01", "rounds": 2, "samples": 4, "batch": 1, "seed": 0,
            "tasks": ["t", "u"], "threads": 1,
        },
    }
    result["headline"] = runner_module.headline(result)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "m"
    save(model(vocab_size=2048, eos_token_id=4), path)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, path / file.name)
    return path


# ---- timing


def test_arms_take_turns_on_every_prompt_in_changing_order():
    llm = FakeLLM({"ar": 1, "ngram": 2, "suffix": 4})
    group = items(6)
    tracks = measure([Arm(llm, "fake", m) for m in ("ar", "ngram", "suffix")], [group[:3], group[3:]])
    order = [m for m, _ in llm.calls]
    for i, item in enumerate(group):
        turn = llm.calls[3 * i : 3 * i + 3]
        assert all(prompts == [item.prompt] for _, prompts in turn)
        assert sorted(m for m, _ in turn) == ["ar", "ngram", "suffix"]
    assert {order[3 * i] for i in range(6)} == {"ar", "ngram", "suffix"}
    assert all(len(t.rounds) == 2 and len(t.outputs) == len(t.seconds) == 6 for t in tracks)


def test_rounds_hold_the_seconds_of_the_clock():
    ticks = iter(range(0, 1000, 5))
    (track,) = measure([Arm(FakeLLM(), "fake", "ar")], [items(2), items(3)], batch=2, clock=lambda: next(ticks))
    assert track.rounds == [5, 10]
    assert track.seconds == [2.5, 2.5, 2.5, 2.5, 5.0]
    assert ratios([2.0, 3.0], [1.0, 6.0]) == [2.0, 0.5]
    assert geometric([2.0, 8.0]) == pytest.approx(4.0)


def test_drift_of_the_machine_cancels_in_the_ratios():
    """A machine that slows down by half during the run changes no ratio by more than a hundredth."""
    now = [0.0]

    class Slowing(FakeLLM):
        def generate(self, prompts, params, *, method, options):
            now[0] += (1 + now[0] / 400) * {"ar": 2.0, "ngram": 1.0}[method]
            return super().generate(prompts, params, method=method, options=options)

    llm = Slowing({"ar": 1, "ngram": 1})
    group = items(60)
    base, fast = measure(
        [Arm(llm, "fake", "ar"), Arm(llm, "fake", "ngram")], [group[i : i + 12] for i in range(0, 60, 12)],
        clock=lambda: now[0],
    )
    assert now[0] > 200
    assert all(abs(r - 2) < 0.02 for r in ratios(base.rounds, fast.rounds))


# ---- rows


def test_rows_are_complete_and_right():
    llm = FakeLLM({"ar": 1, "ngram": 2, "suffix": 4}, wrong=("suffix",))
    rows = rows_by(fake_cells(llm, ["ar", "ngram", "suffix"]), "task")
    assert [(r["method"], r["task"]) for r in rows] == [(m, t) for m in ("ar", "ngram", "suffix") for t in ("t", "u")]
    assert all(set(r) >= KEYS for r in rows)
    ar, ngram, suffix = rows[0], rows[2], rows[4]
    assert [(r["speedup"], r["speedup_low"], r["speedup_high"]) for r in (ar, ngram, suffix)] == [
        (1, 1, 1), (2, 2, 2), (4, 4, 4)
    ]
    assert (ar["equal"], ngram["equal"], suffix["equal"]) == (1, 1, 0)
    assert (ar["tokens_per_forward"], ngram["tokens_per_forward"]) == (1, 2)
    assert ar["rows_per_forward"] == 1 and ngram["rows_per_forward"] == 2
    assert ar["acceptance"] is None and ngram["acceptance"] == 1
    assert ar["quality"] == 1 and ngram["notes"] == ["in all of 4 outputs: a note"] and ar["notes"] == []


def test_families_and_totals_are_means_over_their_tasks():
    cells = fake_cells(FakeLLM({"ar": 1, "ngram": 3}), ["ar", "ngram"], (("t", "f"), ("u", "f"), ("w", "g")))
    assert [(r["method"], r["family"], r["n"]) for r in rows_by(cells, "family")] == [
        ("ar", "f", 8), ("ar", "g", 4), ("ngram", "f", 8), ("ngram", "g", 4),
    ]
    total = rows_by(cells, "all")[1]
    per_round = [geometric(r) for r in zip(*(c.ratios for c in cells[3:]), strict=True)]
    assert total["task"] == "all tasks" and total["n"] == 12
    assert total["speedup_low"] == min(per_round) and total["speedup_high"] == max(per_round)


def test_a_model_of_another_kind_has_quality_but_no_equality():
    cell = fake_cells(FakeLLM(), ["ar"])[0]
    twin = Cell(cell.track, cell.base, cell.items, twin=True)
    assert rows_by([twin], "task")[0]["equal"] is None


def test_samples_show_every_method_on_the_same_prompts():
    samples = fake_result()["samples"]
    assert [s["task"] for s in samples[:2]] == ["t", "u"]
    for s in samples:
        assert [r["method"] for r in s["runs"]] == ["ar", "ngram", "suffix"]
        for run in s["runs"]:
            assert len(run["tokens"]) == len(run["step_map"]) and max(run["step_map"]) < run["forwards"]
            assert "".join(run["tokens"]) == s["prompt"][-12:]


# ---- what people see


class Page(HTMLParser):
    """Every address that a browser would fetch, and the text of the page."""

    def __init__(self):
        super().__init__()
        self.addresses, self.ids, self.depth, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action", "data", "poster", "srcset")]
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_data(self, data):
        self.text += data


def test_report_is_self_contained_and_complete():
    result = fake_result()
    result["samples"][0]["prompt"] = "</script><b>&"
    page = Page()
    html = render(result)
    page.feed(html)
    assert page.addresses == ["data:,"]
    assert not re.search(r"https?://|@import|url\(", html.replace("http://www.w3.org/2000/svg", ""))
    assert len(page.ids) == len(set(page.ids))
    assert "{{" not in html
    assert html.count("</script>") == 2, "data must not close its element"
    data = json.loads(re.search(r'id="samples">(.*?)</script>', html, re.S)[1])
    assert data[0]["prompt"] == "</script><b>&"
    assert {r["method"] for s in data for r in s["runs"]} == {"ar", "ngram", "suffix"}
    for text in ("ngram", "suffix", "no <draft> model", "Speed against quality", "same text"):
        assert text in page.text
    assert result["headline"][0].startswith("suffix writes the same text")


def test_labels_of_the_plot_do_not_overlap():
    result = fake_result()
    rows = []
    for i in range(12):
        row = dict(result["totals"][1], method=f"method-{i}", speedup=1 + i % 4 * 0.05, quality=1.0 - i // 4 * 0.002)
        rows.append(row | {"speedup_low": row["speedup"] - 0.05, "speedup_high": row["speedup"] + 0.05})
    for width in (760, 360):
        svg = speed_quality(result | {"totals": rows}, width=width, height=420)
        boxes = []
        for x, y, text in re.findall(r'class="label \w+" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)<', svg):
            half = len(text) * 7.3 / 2
            boxes.append(Box(float(x) - half, float(y) - 10, float(x) + half, float(y) + 3))
        assert len(boxes) == 12
        assert not any(a.meets(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert all(b.left >= 0 and b.right <= width and b.top >= 0 for b in boxes)


def test_scales_of_the_plot_are_monotone():
    frame = Frame([Point("a", "same", 0.5, 0.4, 8.0, 0.3, "")], 760, 420)
    assert frame.x(0.5) < frame.x(1) < frame.x(4) and frame.y(1.0) < frame.y(0.3)
    assert 1 in frame.x_ticks and frame.y_ticks[0] == 1.0


def test_peers_are_shown_and_absent_ones_named():
    row = {
        "what": "one row", "shape": "125M", "unit": "tokens/s", "peer": "another engine", "stretto": 50.0, "theirs": 25.0,
        "ratio": 2.0, "ratio_low": 1.9, "ratio_high": 2.1,
    }
    gone = {"peer": "llama.cpp", "what": "all", "reason": "not installed: pip install llama-cpp-python"}
    result = fake_result() | {"peers": {"rows": [row], "absent": [gone], "provenance": {}}}
    out = io.StringIO()
    print_rows(result, Console(file=out, width=120))
    for text in (out.getvalue(), render(result)):
        assert all(word in text for word in ("another engine", "2.00×", "125M", "pip install llama-cpp-python"))


@pytest.mark.parametrize("width", [70, 160])
def test_table_prints_every_method_and_what_was_compared(width):
    out = io.StringIO()
    print_rows(fake_result(), Console(file=out, width=width))
    text = " ".join(out.getvalue().split())
    for word in ("ngram", "suffix", "★", "against plain decoding (ar) of fake", "2 rounds", "draft on fake was left"):
        assert word in text
    assert max(map(len, out.getvalue().splitlines())) <= width


# ---- the whole of it, on a random model


def test_bench_of_a_random_model(folder, tmp_path):
    seen = []
    result = bench(
        str(folder), ["ngram"], ["list_copy", "text_letter"], quick=True, samples=2, max_tokens=6, threads=1,
        html=tmp_path / "r.html", progress=lambda share, text: seen.append(share),
    )
    assert json.loads(json.dumps(result)) == result
    assert [(r["method"], r["task"]) for r in result["rows"]] == [
        (m, t) for m in ("ar", "ngram") for t in ("list_copy", "text_letter")
    ]
    assert all(set(r) >= KEYS and r["n"] == 2 for r in result["rows"])
    assert all(r["equal"] == 1.0 for r in result["rows"]), "a lossless method in deterministic mode"
    assert {"version", "commit", "cpu", "cores", "threads", "dtype", "backend", "seed", "samples", "date"} <= set(
        result["provenance"]
    )
    assert seen == sorted(seen) and seen[-1] == 1.0
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"methods": ["ngramm"]}, UnknownNameError), ({"tasks": ["lists", "nothing"]}, UnknownNameError),
        ({"samples": 0}, OptionError), ({"batch": -1}, OptionError), ({"max_tokens": 1.5}, OptionError),
        ({"methods": ["diffusion"]}, UnsupportedError), ({"methods": ["ngram"], "options": {"ar": {}}}, OptionError),
        ({"methods": ["ngram"], "options": {"ngram": {"nothing": 1}}}, UnknownNameError),
    ],
)
def test_bench_refuses_nonsense(folder, changes, error):
    with pytest.raises(error):
        bench(str(folder), quick=True, **changes)


def test_methods_that_cannot_run_are_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(arms_module, "open_llm", lambda model, **_: FakeLLM({"ar": 1, "ngram": 2}))
    fleet = arms_module.Fleet("fake")
    assert [a.method for a in fleet.arms()] == ["ar", "ngram"]
    fitting = {m.name for m in METHODS.values() if "causal" in m.kinds}
    assert {s["method"] for s in fleet.skipped} == fitting - {"ar", "ngram"}
    with pytest.raises(UnsupportedError):
        arms_module.Fleet("fake", ["suffix"]).arms()


def test_diffusion_twins_join_the_bench_of_tiny(monkeypatch):
    kinds = {"zoo:tiny": "causal", "zoo:tiny-diffusion": "full", "zoo:tiny-blocks": "block"}
    steps = {"ar": 1, "ngram": 2, "diffusion": 3}
    monkeypatch.setattr(arms_module, "open_llm", lambda model, **_: FakeLLM(steps, attention=kinds[model]))
    found = [(a.model, a.method) for a in arms_module.Fleet("zoo:tiny").arms()]
    assert found[0] == ("zoo:tiny", "ar")
    assert found[-2:] == [("zoo:tiny-diffusion", "diffusion"), ("zoo:tiny-blocks", "diffusion")]
    assert [a.method for a in arms_module.Fleet("zoo:tiny", ["ngram"]).arms()] == ["ar", "ngram"]
    slow, fast = arms_module.Fleet("zoo:tiny-blocks").arms()
    assert (slow.label, slow.options["unmask"], fast.label) == ("one-by-one", "fixed", "diffusion")


def test_samples_fit_the_time():
    plan = runner_module._plan
    assert plan(None, 1, False, 1000.0) == (5, 5) and plan(None, 1, False, 1e-9) == (32, 5)
    assert plan(None, 16, False, 1e-9) == (80, 5) and plan(3, 1, True, 1.0) == (3, 3)
    assert plan(4, 3, False, 1.0) == (4, 1)


# ---- tasks and evaluation


def test_workload_covers_families_and_leaves_room():
    assert {t.family for t in one_per_family()} == {t.family for t in pick_tasks([])}
    found = load_items(pick_tasks(["list_copy"]), 3, 5)
    assert len({i.prompt for i in found}) == 3 and [i.prompt for i in load_items(pick_tasks("list_copy"), 3, 5)] == [
        i.prompt for i in found
    ]
    assert all(i.max_tokens == answer_room("list_copy") and i.max_tokens % 8 == 0 for i in found)
    assert found[0].score("surely wrong") == 0.0


def test_evaluation_counts_right_answers(monkeypatch):
    def perfect(tasks, n, *rest):
        """Every answer is right, but for a quarter of those to list_sort."""
        return [
            Item(t.name, t.family, f"{i} {t.name}", 8, lambda text, i=i, t=t: float(t.name != "list_sort" or i % 4 > 0))
            for t in tasks for i in range(n)
        ]

    monkeypatch.setattr(evaluate_module, "load_items", perfect)
    llm = FakeLLM()
    result = evaluate(llm, ["lists", "text_letter"], samples=8, batch=3)
    rows = {r["task"]: r for r in result["rows"]}
    assert rows["list_copy"] == {"task": "list_copy", "family": "lists", "accuracy": 1.0, "n": 8, "stderr": 0.0}
    assert rows["list_sort"]["accuracy"] == 0.75
    assert rows["list_sort"]["stderr"] == pytest.approx((0.75 * 0.25 / 8) ** 0.5)
    lists = [r for r in result["rows"] if r["family"] == "lists"]
    mean = pytest.approx(sum(r["accuracy"] for r in lists) / len(lists))
    assert result["families"][0] == {"family": "lists", "accuracy": mean, "n": 8 * len(lists)}
    assert max(len(prompts) for _, prompts in llm.calls) == 3
    out = io.StringIO()
    print_evaluation(result, Console(file=out, width=100))
    assert "75.0%" in out.getvalue()
    other = evaluate(FakeLLM({"diffusion": 1}, attention="full"), ["list_copy"], samples=1)
    assert other["provenance"]["method"] == "diffusion"
    with pytest.raises(OptionError):
        evaluate(llm, samples=0)


# ---- tuning


@pytest.fixture
def fake_fleet(monkeypatch, folder):
    def install(**changes):
        llm = FakeLLM(**changes)
        monkeypatch.setattr(arms_module, "open_llm", lambda model, **_: llm)
        monkeypatch.setattr(tune_module, "measure", partial(measure, clock=lambda: llm.now))
        return llm

    return install


PROMPTS = [f"the same words again and again, {i}" for i in range(8)]


def test_tune_keeps_the_fastest_and_auto_uses_it(fake_fleet, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    fake_fleet(per_forward={"ar": 1, "ngram": 4})
    result = tune(str(folder), PROMPTS)
    assert result["method"] == "ngram" and result["speedup"] > 2
    assert Path(result["path"]) == profile_path(folder) and str(tmp_path) in result["path"]
    assert [p.name for p in profile_path(folder).parent.iterdir()] == [f"{fingerprint(folder)}.json"]
    profile = load_profile(folder)
    assert profile["method"] == "ngram" and profile["model"] == str(folder) and profile["provenance"]["prompts"] == 8
    method, options, note = resolve_auto(folder)
    assert method == "ngram" and options == result["options"] and "ngram by the profile" in note


def test_auto_in_python_is_what_the_profile_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    llm, params = LLM("zoo:tiny"), SamplingParams(max_tokens=5, temperature=0.0)
    plain = llm.generate("one two", params, method="auto")[0]
    assert llm.auto.method == "ar" and plain.metrics.notes == [llm.auto.note] and "no profile" in llm.auto.note
    data = {
        "format": 1, "model": "zoo:tiny", "fingerprint": fingerprint("zoo:tiny"), "method": "jacobi",
        "options": {"block": 3}, "speedup": 1.5, "provenance": {"date": "2026-11-24T00:00:00+00:00", "cpu": "another"},
    }
    write_json(profile_path("zoo:tiny"), data)
    llm = LLM("zoo:tiny", plan=False)
    tuned = llm.generate("one two", params, method="auto", options={"block": 2})[0]
    assert tuned.outputs[0].token_ids == plain.outputs[0].token_ids
    assert tuned.metrics.drafted > 0 and "jacobi by the profile of 2026-11-24" in tuned.metrics.notes[0]
    assert "another machine" in tuned.metrics.notes[0] and list(llm._methods) == ['["jacobi", {"block": 2}]']


def test_tune_stays_with_plain_decoding_when_nothing_pays(fake_fleet, folder, tmp_path):
    fake_fleet(per_forward={"ar": 1, "ngram": 1})
    path = tmp_path / "p.json"
    result = tune(str(folder), PROMPTS[:4], out=path)
    assert (result["method"], result["speedup"]) == ("ar", 1.0) and "stays" in result["reason"]
    assert json.loads(path.read_text())["method"] == "ar"


def test_tune_takes_no_other_text_unless_the_budget_allows(fake_fleet, folder, tmp_path):
    fake_fleet(per_forward={"ar": 1, "ngram": 4}, wrong=("ngram",))
    assert tune(str(folder), PROMPTS[:4], out=tmp_path / "p")["method"] == "ar"
    assert tune(str(folder), PROMPTS[:4], quality=0.2, out=tmp_path / "p")["method"] == "ngram"
    assert tune(str(folder), PROMPTS[:4], quality=0.01, out=tmp_path / "p")["method"] == "ar"


def test_tune_scores_answers_where_it_has_them(fake_fleet, folder, tmp_path):
    fake_fleet(per_forward={"ar": 1, "ngram": 4}, wrong=("ngram",))
    prompts = [{"prompt": p, "answer": p[-12:]} for p in PROMPTS[:4]]
    assert tune(str(folder), prompts, quality=0.9, out=tmp_path / "p")["method"] == "ar"
    assert tune(str(folder), prompts, quality=1.0, out=tmp_path / "p")["method"] == "ngram"


def test_tune_refuses_nonsense(folder):
    for bad in ([], "one string", [""], [{"answer": "x"}]):
        with pytest.raises(PromptError):
            tune(str(folder), bad)
    for bad in ("exact", 2, -0.1, float("nan")):
        with pytest.raises(OptionError):
            tune(str(folder), ["a"], quality=bad)


def test_variants_stay_in_range():
    llm = FakeLLM()
    for info in METHODS.values():
        found = variants(Arm(llm, "fake", info.name))
        assert len(found) <= 4
        ranges = {o.name: o for o in info.options}
        for arm in found:
            ((name, value),) = arm.options.items()
            assert ranges[name].low is None or value >= ranges[name].low
            assert ranges[name].high is None or value <= ranges[name].high
            assert value != ranges[name].default


def test_profiles_that_do_not_fit_are_not_used(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert resolve_auto(folder)[:2] == ("ar", {}) and "no profile" in resolve_auto(folder).note
    bad = tmp_path / "p.json"
    for text in ("{", "[]", '{"format": 99}'):
        bad.write_text(text)
        with pytest.raises(CheckpointError):
            resolve_auto(folder, bad)
    with pytest.raises(CheckpointError):
        resolve_auto(folder, tmp_path / "absent.json")
    profile_path(folder).parent.mkdir(parents=True)
    profile_path(folder).write_text("{")
    assert resolve_auto(folder).method == "ar"


def test_writing_leaves_nothing_half_written(tmp_path):
    write_atomically(tmp_path / "a" / "x.txt", "one")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "a" / "x.txt", 5)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.txt"]
    assert (tmp_path / "a" / "x.txt").read_text() == "one"
