"""Chains over two models: what the card "ATTS" lists under *Show it works*, on models of the zoo."""

import asyncio
import json
import math
import shutil

import pytest
import torch

from stretto import LLM
from stretto.errors import CapacityError, InputError, OptionError, PromptError, UnknownNameError
from stretto.threads import atts as program
from stretto.threads.atts import Line, aatts, atts, calibrate, fingerprint
from stretto.threads.chains import Setting, Turn, answer_in, wilson
from stretto.threads.conformal import Calibration
from stretto.threads.homes import Home, at_home
from stretto.threads.row_prices import Replayed, best_gain, prices, replayed
from stretto.zoo.models import resolve

ASK = "<|im_start|>user\n{} has {} plums. Ben brings {} more. How many?<|im_end|>\n<|im_start|>assistant\n"
QUESTIONS = [ASK.format("Mia", 12, 30), ASK.format("Ada", 7, 9)]
SMALL = Setting(k=3, alpha=0.5, turns=4, chunk=6, seed=3, temperature=1.5)


@pytest.fixture(scope="module")
def pair():
    make = lambda name: LLM(name, dtype="float32", deterministic=True, enable_prefix_caching=False)
    return make("zoo:tiny-draft"), make("zoo:tiny")


@pytest.fixture(autouse=True)
def every_slot_is_free_again(pair):
    yield
    for llm in pair:
        assert llm.runner.alloc.used == 0 and not llm.engine.busy


def fixed(alpha=0.5, n=9):
    """A calibration that is none of the data's: scores 1.5, 3, 6, ..."""
    return Calibration({0: [1.5 * 2**i for i in range(n)]}, alpha, firsts=True)


def histories(scaled):
    return [(c.token_ids, c.answer, c.ended, c.turns) for q in scaled.questions for c in q.chains]


def test_alpha_zero_is_the_draft_alone_and_the_target_writes_nothing(pair):
    none = atts(*pair, QUESTIONS, setting=SMALL, alpha=0.0)
    alone = atts(*pair, QUESTIONS, setting=SMALL, variant="draft")
    assert [h[0] for h in histories(none)] == [h[0] for h in histories(alone)]
    assert none.tokens["target"] == 0 and none.tokens["draft"] == none.tokens["scored"] == alone.tokens["draft"]
    assert len({tuple(h[0]) for h in histories(none)}) > 3


@pytest.mark.parametrize("on_reject", ["continue", "replace"])
@pytest.mark.parametrize("calibration", ["online", fixed(1.0)])
def test_alpha_one_lets_the_target_write_every_turn(pair, on_reject, calibration):
    out = atts(*pair, QUESTIONS, setting=SMALL, alpha=1.0, on_reject=on_reject, calibration=calibration)
    turns = [t for q in out.questions for c in q.chains for t in c.turns]
    assert all(t.rejected and t.target > 0 for t in turns) and turns
    assert [r["rate"] for r in out.rates()] == [1.0] * len(out.rates())
    if on_reject == "replace":
        assert all(len(c.token_ids) == sum(t.target for t in c.turns) for q in out.questions for c in q.chains)


def test_the_cached_score_is_that_of_a_full_forward(pair):
    llm = pair[1]
    ids = llm.tokenizer.encode(QUESTIONS[0])
    chunks = [llm.tokenizer.encode(t) for t in ("Mia starts with 12", " plums.\n12 + 30 = 42.", " x")]

    async def go(home):
        session = await home.open(ids, 2)
        thread = (await home.call(lambda: session.fork(1)))[0]
        rows, out = home.llm.runner.alloc.used, []
        for chunk in chunks:
            out.append(await home.score(thread, chunk))
            assert thread.tokens[-len(chunk) :] == chunk and len(thread.view) == len(thread.tokens)
        assert home.llm.runner.alloc.used <= rows + sum(map(len, chunks)) + 1
        await home.end(session)
        return out

    with at_home((llm, 4)) as (home,):
        got = asyncio.run(go(home))
    before = list(ids)
    for chunk, laws in zip(chunks, got, strict=True):
        whole = torch.log_softmax(llm.logits([*before, *chunk]).double(), -1)[len(before) - 1 : -1]
        want = whole[torch.arange(len(chunk)), torch.tensor(chunk)]
        assert torch.allclose(torch.tensor(laws, dtype=torch.float64), want, atol=1e-4)
        before += chunk


def test_histories_do_not_depend_on_who_else_runs_nor_on_who_is_first(pair):
    ways = [
        dict(draft_limit=1, target_limit=1, at_once=1), dict(draft_limit=16, target_limit=16),
        dict(draft_limit=2, target_limit=1),
    ]
    runs = [atts(*pair, QUESTIONS, setting=SMALL, k=6, calibration=fixed(), **w) for w in ways]
    first = histories(runs[0])
    assert all(histories(r) == first for r in runs[1:])
    turned = atts(*pair, QUESTIONS[::-1], setting=SMALL, k=6, calibration=fixed())
    assert histories(turned) == first[6:] + first[:6]
    alone = atts(*pair, QUESTIONS[:1], setting=SMALL, k=2, calibration=fixed())
    assert histories(alone) == first[:2]
    rejected = [t.rejected for h in first for t in h[3]]
    assert any(rejected) and not all(rejected)


def test_a_fork_copies_nothing_and_a_dropped_chunk_gives_back_its_own_slots(pair):
    alloc = [llm.runner.alloc for llm in pair]

    async def go(homes):
        run = program.Run(*homes, SMALL, fixed(), answer_in)
        sessions = [(h, await h.open(QUESTIONS[0], 3)) for h in homes]
        prompt = len(sessions[0][1].tokens)
        lines = await run.lines(QUESTIONS[0], sessions, 3)
        assert [a.used for a in alloc] == [prompt, prompt]
        before = [(list(lines[0].mine.tokens)), list(lines[0].theirs.tokens)]
        chunk = await lines[0].draw()
        await lines[0].score(chunk)
        n = len(chunk.ids)
        used = [a.used for a in alloc]  # the last row of the prompt is evaluated again by its fork; the last token is not
        assert used == [prompt + n, prompt + n + 1]
        await lines[0].drop(chunk)
        assert [lines[0].mine.tokens, lines[0].theirs.tokens] == before
        assert alloc[1].used == used[1] - n and alloc[0].used == used[0] - (n - 1)
        again = await lines[0].draw()
        assert again.ids != chunk.ids  # other random numbers: it would be rejected for ever
        for home, session in sessions:
            await home.end(session)

    with at_home(*[(llm, 4) for llm in pair]) as homes:
        asyncio.run(go(homes))


def test_nobody_waits_for_a_slow_peer(pair, monkeypatch):
    plain, held, over = Line.score, asyncio.Event(), []

    async def slow(self, chunk):
        if self.index == 0:
            await held.wait()
        return await plain(self, chunk)

    plain_close = Line.close

    def close(self):
        over.append(self.index)
        if len(over) == SMALL.k - 1:
            held.set()
        return plain_close(self)

    monkeypatch.setattr(Line, "score", slow)
    monkeypatch.setattr(Line, "close", close)
    atts(*pair, QUESTIONS[:1], setting=SMALL, calibration=fixed())
    assert over[-1] == 0 and len(over) == 3


def test_cancelling_a_run_gives_everything_back(pair):
    async def go(after):
        work = asyncio.ensure_future(aatts(*pair, QUESTIONS, setting=SMALL, k=6, chunk=40, turns=10))
        await asyncio.sleep(after)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        for llm in pair:
            assert llm.runner.alloc.used == 0 and not llm.engine.busy

    for after in (0.0, 0.01, 0.1):
        asyncio.run(go(after))


def test_an_error_in_one_chain_ends_the_run_and_gives_everything_back(pair, monkeypatch):
    async def broken(self, chunk):
        raise InputError("no score today")

    monkeypatch.setattr(Line, "score", broken)
    with pytest.raises(InputError, match="today"):
        atts(*pair, QUESTIONS, setting=SMALL)


def test_in_step_the_worst_share_is_taken_over_every_turn(pair):
    out = atts(*pair, QUESTIONS[:1], setting=SMALL, k=4, variant="sync")
    (question,) = out.questions
    for number in range(SMALL.turns):
        found = [t for c in question.chains for t in c.turns if t.number == number]
        worst = sorted(found, key=lambda t: -t.score)[: round(0.5 * len(found))]
        assert {id(t) for t in found if t.rejected} == {id(t) for t in worst}
        assert all((t.target > 0) == t.rejected for t in found)
    none = atts(*pair, QUESTIONS, setting=SMALL, variant="sync", alpha=0.0)
    alone = atts(*pair, QUESTIONS, setting=SMALL, variant="draft")
    assert [h[0] for h in histories(none)] == [h[0] for h in histories(alone)]


def test_conditional_coverage_draws_chunks_of_its_own(pair):
    out = atts(*pair, QUESTIONS, setting=SMALL, k=5, coverage="conditional")
    turns = [t for q in out.questions for c in q.chains for t in c.turns]
    assert {round(t.p * 6, 9) % 1 for t in turns} == {0.0} and all(t.calibrated for t in turns)
    written = sum(t.draft for t in turns)
    assert 2 * 5 <= out.tokens["draft"] - written <= 2 * 5 * SMALL.chunk
    plain = atts(*pair, QUESTIONS, setting=SMALL, k=5, variant="draft")
    same = [a.turns[0].draft == b.turns[0].draft for q, r in zip(out.questions, plain.questions, strict=True)
            for a, b in zip(q.chains, r.chains, strict=True)]
    assert all(same)  # the extra chunks do not move the chains' random numbers


def test_one_model_draws_again_or_forks(pair):
    again = atts(*pair, QUESTIONS, setting=SMALL, variant="reject", calibration=fixed(0.9))
    turns = [t for q in again.questions for c in q.chains for t in c.turns]
    assert max(t.tries for t in turns) == 4 and all(t.rejected or t.tries == 1 for t in turns)
    assert again.tokens["target"] == again.tokens["scored"] == 0
    never = atts(*pair, QUESTIONS, setting=SMALL, variant="reject", alpha=0.0)
    alone = atts(*pair, QUESTIONS, setting=SMALL, variant="draft")
    assert [h[0] for h in histories(never)] == [h[0] for h in histories(alone)]
    forked = atts(*pair, QUESTIONS[:1], setting=SMALL, k=5, turns=8, variant="fork", calibration=fixed(0.8))
    chains = forked.questions[0].chains
    heads = [tuple(c.token_ids[:6]) for c in chains]
    assert len(set(heads)) < len({tuple(c.token_ids) for c in chains})  # some share a beginning they did not draw
    assert any(t.rejected for c in chains for t in c.turns)


def test_other_tokenizers_hand_over_text(pair, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(resolve("zoo:tiny-draft"), folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["\u0120plums"], vocabulary["\u0120more"] = vocabulary["\u0120more"], vocabulary["\u0120plums"]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    other = LLM(folder, dtype="float32", deterministic=True, enable_prefix_caching=False)
    out = atts(other, pair[1], QUESTIONS, setting=SMALL, calibration=fixed())
    assert any("different tokenizers" in n for n in out.notes)
    assert other.runner.alloc.used == 0 and any(t.score for q in out.questions for c in q.chains for t in c.turns)
    assert fingerprint(other, pair[1], SMALL)["draft"] == fingerprint(*pair, SMALL)["draft"]


def test_calibrations_are_made_kept_and_refused(pair, tmp_path):
    made = calibrate(*pair, QUESTIONS, setting=SMALL, template="t")
    assert list(made.scores) == [0] and len(made.scores[0]) == 2 * SMALL.k
    assert all(s >= 1 for s in made.scores[0])
    path = tmp_path / "scores.json"
    made.save(path)
    out = atts(*pair, QUESTIONS, setting=SMALL, calibration=path, template="t")
    assert all(t.p is not None for q in out.questions for c in q.chains for t in c.turns)
    for changed in (dict(chunk=7), dict(temperature=0.5), dict(template="u")):
        with pytest.raises(InputError, match=next(iter(changed))):
            atts(*pair, QUESTIONS, calibration=path, **{"setting": SMALL, "template": "t"} | changed)
    with pytest.raises(InputError, match="draft"):
        atts(pair[1], pair[1], QUESTIONS, setting=SMALL, calibration=path, template="t")


def test_bad_input_is_refused_by_name(pair):
    for bad, error in (
        (dict(alpha=1.2), OptionError), (dict(k=0), OptionError), (dict(turns=0), OptionError),
        (dict(chunk=0), OptionError), (dict(coverage="x"), OptionError), (dict(on_reject="x"), OptionError),
        (dict(target_limit=0), OptionError), (dict(variant="sinc"), UnknownNameError),
        (dict(k=16, alpha=0.05, coverage="conditional"), InputError),
        (dict(coverage="conditional", calibration="x.json"), OptionError),
        (dict(calibration="/nothing/here.json"), InputError), (dict(chunk=600), PromptError),
        (dict(k=5000, chunk=60), CapacityError),
    ):
        with pytest.raises(error):
            atts(*pair, QUESTIONS, **{"setting": SMALL} | bad)
    with pytest.raises(PromptError):
        atts(*pair, [], setting=SMALL)
    with pytest.raises(PromptError):
        atts(*pair, "one question", setting=SMALL)


def test_a_chunk_without_text_ends_its_chain_and_an_impossible_one_is_never_accepted(pair, monkeypatch):
    async def impossible(self, chunk):
        return math.inf

    monkeypatch.setattr(Line, "score", impossible)
    out = atts(*pair, QUESTIONS[:1], setting=SMALL, alpha=0.2, calibration=fixed(0.2))
    assert all(t.rejected for c in out.questions[0].chains for t in c.turns)
    assert all(c.ended in ("answer", "end", "turns", "empty") for c in out.questions[0].chains)


def test_answers():
    assert answer_in("so \\boxed{\\frac{1}{2}} and \\boxed{3") == "\\frac{1}{2}"
    assert answer_in("The answer is (B)\n") == "B" and answer_in("Answer: 42\n") == "42"
    assert answer_in("Answer: 4") is None and answer_in("no more") is None
    assert answer_in("Answer: 4 then Answer: 5.\n") == "5"


def test_rates_take_the_question_as_the_unit():
    from stretto.threads.chains import _rate

    same = [[Turn(0, 1, score=1.0, rejected=i % 2 == 0)] * 10 for i in range(20)]
    mixed = [[Turn(0, 1, score=1.0, rejected=j % 2 == 0) for j in range(10)] for _ in range(20)]
    a, b = _rate(0, same), _rate(0, mixed)
    assert a["rate"] == b["rate"] == 0.5 and a["high"] - a["low"] > 2.5 * (b["high"] - b["low"])
    assert (b["low"], b["high"]) == wilson(100, 200)


def test_a_home_passes_on_what_its_engine_raises(pair, monkeypatch):
    monkeypatch.setattr(pair[0].engine, "step", lambda: 1 / 0)
    home = Home(pair[0], 2)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(home.open(QUESTIONS[0], 2))
    monkeypatch.undo()
    home.close()


def test_the_verb_answers_and_calibrates(tmp_path):
    from typer.testing import CliRunner

    from stretto.cli import app

    small = ["--draft", "zoo:tiny-draft", "--target", "zoo:tiny", "-k", "3", "--turns", "2", "--chunk", "4", "--json"]
    file = str(tmp_path / "c.json")
    (tmp_path / "q.jsonl").write_text('{"prompt": "One box holds 3 figs.", "answer": 3}\n{"prompt": "And 4?", "answer": 4}\n')
    asked = ["--questions", str(tmp_path / "q.jsonl"), "--alpha", "0.5"]
    made = CliRunner().invoke(app, ["scale", *asked, *small, "--calibrate", file])
    assert made.exit_code == 0 and json.loads(made.stdout)["scores"] == 6
    done = CliRunner().invoke(app, ["scale", *asked, *small, "--calibration", file])
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and len(found["questions"]) == 2 and set(found["grade"]) == {"vote", "pass_at_k", "mean"}
    assert found["rates"][0]["n"] == 6 and found["tokens"]["scored"] == found["tokens"]["draft"]
    other = CliRunner().invoke(app, ["scale", *asked, *small, "--calibration", file, "--raw"])
    assert other.exit_code == 2 and "template" in json.loads(other.stdout)["error"]["message"]


def test_the_possible_gain_by_hand():
    same = {"written": 1.0, "scored": 1.0}
    assert best_gain({"written": 0.0, "scored": 0.0}, same, 0.375) == 1.0, "a scored token as dear as a written one"
    free = {"written": 2.0, "scored": 0.0}
    assert best_gain({"written": 0.5, "scored": 0.0}, free, 0.25) == 2.5 / 0.5, "both sides are busy all the time"
    assert best_gain({"written": 4.0, "scored": 0.0}, free, 0.25) == 2.5 / 4, "the draft is what takes long"


def test_replayed_decisions_take_over_their_share_of_every_turn():
    tester = Replayed(3, 8)
    for turn in (0, 1, 0):
        assert sum(tester.test(1.0, turn).reject for _ in range(8)) == 3


def test_prices_and_replayed_runs_are_of_real_runs(pair):
    found = prices(pair[0], k=2, chunk=3, prompt=9, turns=1)
    assert found["scored"] > 0 and found["written"] > 0
    out = replayed(*pair, QUESTIONS[0], rounds=1, turns=1)
    assert set(out["tokens a second"]) == {"atts", "in step", "target"} and out["atts / target"] > 0
