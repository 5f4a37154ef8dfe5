"""ThreadWeaver: the state machine is exact on any weights, here zoo:tiny with ordinary tokens in the tags' places."""

import asyncio
import http.server
import itertools
import json
import threading
from dataclasses import replace

import pytest

from serving import Server
from stretto import LLM, SamplingParams
from stretto.errors import CapacityError, InputError, OptionError, UnsupportedError
from stretto.machine import Reply, Script, Spec, drive, machine
from stretto.models.tokenizer import Tokenizer
from stretto.outline import Grammar
from stretto.tags import THREADWEAVER
from stretto.threads import threadweaver
from stretto.threads.threadweaver import aweave, weave
from stretto.training import thread_units
from stretto.training.parallel_units import grammar_of

QUESTION = "One box holds 3 nails, 4 bolts and 5 figs. How many things are in the box?"
OUTLINES = "<Parallel><Goal><Outline>1: one</Outline><Outline>2: two</Outline><Outline>4.1: three</Outline>"
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def llm():
    return LLM("zoo:tiny", dtype="float32", deterministic=True)


def tags(llm, outlines, thread):
    """The real tags, but for what closes a list of outlines and a thread."""
    return Grammar(replace(THREADWEAVER, goal_close=outlines, path_close=thread), llm.tokenizer.inner)


@pytest.fixture(scope="module")
def form(llm):
    """A list of outlines stands in the prompt and every line's end "closes" it, a thread ends at a 5: so zoo:tiny, which
    was never trained for threads, opens blocks, joins them and goes on."""
    return tags(llm, "\n", "5")


@pytest.fixture(scope="module")
def prompt(llm):
    return llm.tokenizer.encode(OUTLINES + llm.chat_prompt([{"role": "user", "content": QUESTION}]))


def by_hand(llm, ids, f, limit, rounds):
    """The card's loop, written out with plain completions, one after the other."""
    line, blocks, ends = list(ids), 0, llm.host.stop_ids
    goal, close = f.ids["goal_close"], f.ids["path_close"]
    def ask(context, stop, room):
        params = SamplingParams(temperature=0.0, max_tokens=room, stop_token_ids=[stop])
        return llm.generate([context], params)[0].outputs[0].token_ids
    for _ in range(rounds):
        line += ask(line, goal, limit - len(line))
        if line[-1] != goal:
            return line[len(ids) :], blocks
        heads = [f.header(n) for n in ("1", "2", "4.1")]
        room = (limit - len(line) - sum(map(len, heads)) - 1) // 3 - 1
        if room < 1:
            return line[len(ids) :], blocks
        texts = [ask([*line, *h], close, room) for h in heads]
        blocks += 1
        for head, text in zip(heads, texts, strict=True):
            line += head + (text if text[-1] == close else [t for t in text if t not in ends] + [close])
        if any(t[-1] != close for t in texts):
            return [*line, f.ids["close"]][len(ids) :], blocks
    return line[len(ids) :], blocks


def spec(llm, f, limit, **more):
    return Spec(f, tuple(llm.host.stop_ids), limit, **more)


@pytest.fixture(scope="module")
def server():
    found = Server("--dtype", "float32", "--deterministic")
    yield found
    found.stop()


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_in_engine_equals_the_hand_written_loop(prompt, backend):
    llm = LLM("zoo:tiny", dtype="float32", deterministic=True, backend=backend, enable_prefix_caching=False)
    ends, cases = set(), [
        ("\n", "5", 120, 32), ("\n", "5", 120, 1), ("\n", " +", 55, 32), ("\n", " =", 120, 32), ("\n", "5", 60, 9),
    ]  # fmt: skip
    for outlines, thread, most, rounds in cases if backend == "native" else cases[:1]:
        form = tags(llm, outlines, thread)
        got = weave(llm, prompt, grammar=form, max_tokens=most, max_blocks=rounds)
        want, blocks = by_hand(llm, prompt, form, len(prompt) + most, rounds)
        assert got.tokens == want and len(got.blocks) == blocks >= 1, (outlines, thread)
        assert len(got.tokens) <= most and set(got.blocks) == {3}
        ends.add((got.finish_reason, *got.notes))
    assert len(ends) == 5 or backend == "torch", "the text's end, max_blocks, a thread cut by its room or by the text's end, the answer cut"
    assert llm.runner.alloc.used == 0 and not llm.engine.busy


def test_http_equals_in_engine_token_by_token(llm, form, prompt, server):
    for most in (40, 120):
        here = weave(llm, prompt, grammar=form, max_tokens=most)
        there = weave(llm.tokenizer, prompt, grammar=form, max_tokens=most, backend=server.url)
        assert here.tokens == there.tokens and here.pieces == there.pieces and here.blocks == there.blocks
    real = Grammar(THREADWEAVER, llm.tokenizer.inner)  # tiny writes none of its tags
    plainly = weave(llm.tokenizer, QUESTION, grammar=real, backend=server.url + "/v1", max_tokens=12)
    alone = llm.generate([QUESTION], SamplingParams(temperature=0.0, max_tokens=12))[0].outputs[0]
    assert plainly.tokens == alone.token_ids and plainly.blocks == []


def test_a_thread_sees_what_stands_before_its_block_and_no_sibling(llm, form, prompt):
    """Threads that are given other texts leave their siblings' tokens as they are, and the pieces say what each saw."""
    got = weave(llm, prompt, grammar=form, max_tokens=120)
    block = got.pieces[1:4]
    stem = block[0].context[: -len(form.header("1"))]
    for piece, number in zip(block, ("1", "2", "4.1"), strict=True):
        assert piece.context == [*stem, *form.header(number)]
        params = SamplingParams(temperature=0.0, max_tokens=len(piece.ids), stop_token_ids=[form.ids["path_close"]])
        assert llm.generate([piece.context], params)[0].outputs[0].token_ids == piece.ids
    assert got.pieces[4].context[: len(stem)] == stem
    assert got.pieces[4].context[len(stem) :] == [t for p, n in zip(block, ("1", "2", "4.1"), strict=True)
                                                   for t in [*form.header(n), *p.ids]]  # fmt: skip


def test_the_threads_of_a_block_share_forwards_and_their_text(llm, form, prompt):
    quiet = LLM("zoo:tiny", dtype="float32", deterministic=True, enable_prefix_caching=False)
    got = weave(quiet, prompt, grammar=form, max_tokens=120, max_blocks=1)
    line, *threads = got.pieces
    u = got.usage
    assert u.forwards <= 1 + len(line.ids) + 1 + max(len(t.ids) for t in threads)
    heads = sum(len(t.context) - len(prompt) - len(line.ids) for t in threads)
    assert u.evaluated <= len(prompt) + len(line.ids) + heads + sum(len(t.ids) for t in threads) + len(threads)
    assert u.critical_path == len(line.ids) + max(len(t.ids) for t in threads)


def test_answers_of_several_tasks_share_forwards(llm, form, prompt):
    quiet = LLM("zoo:tiny", dtype="float32", deterministic=True, enable_prefix_caching=False)
    alone = [weave(quiet, p, grammar=form, max_tokens=most) for p, most in ((prompt, 120), (prompt, 60))]
    before = quiet.engine.forwards

    async def both():
        return await asyncio.gather(*(aweave(quiet, prompt, grammar=form, max_tokens=most) for most in (120, 60)))

    got = asyncio.run(both())
    assert [g.tokens for g in got] == [a.tokens for a in alone] and quiet.runner.alloc.used == 0
    assert quiet.engine.forwards - before <= 1 + max(a.usage.forwards for a in alone)


def test_samples_repeat_by_seed_and_siblings_draw_their_own(llm, form, prompt):
    draw = lambda seed: weave(llm, prompt, SamplingParams(temperature=1.5, seed=seed), grammar=form, max_tokens=100)
    a, b, c = draw(1), draw(1), draw(2)
    assert a.tokens == b.tokens != c.tokens
    a, b = c.pieces[1].ids, c.pieces[2].ids
    assert a[: len(b)] != b[: len(a)], "heads 1 and 2 alone hardly tell the texts apart at this temperature"


def test_the_share_join_forces_the_end_of_the_block(llm, form, prompt):
    shared = weave(llm, prompt, grammar=form, max_tokens=120, join="share", max_blocks=2)
    usual = weave(llm, prompt, grammar=form, max_tokens=120, max_blocks=2)
    n = len(usual.pieces[0].ids) + sum(len(p.context) - len(prompt) - len(usual.pieces[0].ids) + len(p.ids)
                                       for p in usual.pieces[1:4])  # fmt: skip
    assert shared.tokens[:n] == usual.tokens[:n] and shared.tokens[n] == form.ids["close"]


def ids_of(llm, text):
    return llm.tokenizer.encode(text)


def scripted(llm, replies, **more):
    """What the machine makes of given replies (texts, lists of texts for a block)."""
    real = Grammar(THREADWEAVER, llm.tokenizer.inner)
    work = machine(ids_of(llm, "Q"), Spec(real, tuple(llm.host.stop_ids), **{"limit": 500} | more))
    asks = []
    try:
        ask = next(work)
        for texts in replies:
            asks.append(ask)
            made = [ids_of(llm, t) for t in ([texts] if isinstance(texts, str) else texts)]
            ends = {*llm.host.stop_ids, *ask.stops}
            ask = work.send([Reply(i, "stop" if i[-1] in ends else "length") for i in made])
    except StopIteration as end:
        return end.value, asks
    raise AssertionError("the machine wants more")


def test_states_by_hand(llm):
    got, asks = scripted(llm, [
        "a<Parallel><Goal><Outline>1: x</Outline><Outline>2.1: y</Outline></Goal>", [" b<|/thread|>", " c <Goal><|/thread|>"],
        "</Parallel> d<|im_end|>",
    ])  # fmt: skip
    text = llm.tokenizer.decode(got.tokens, skip_special_tokens=False)
    assert text == ("a<Parallel><Goal><Outline>1: x</Outline><Outline>2.1: y</Outline></Goal><|thread|>1: b<|/thread|>"
                    "<|thread|>2.1: c <Goal><|/thread|></Parallel> d<|im_end|>")  # fmt: skip
    assert (got.finish_reason, got.blocks, got.notes) == ("stop", [2], [])
    assert [len(a.heads) for a in asks] == [1, 2, 1] and [a.joined for a in asks] == [False, False, True]
    one = "<Parallel><Goal><Outline>1: x</Outline></Goal>"
    cut, _ = scripted(llm, [one, [" b<|im_end|>"]])
    assert llm.tokenizer.decode(cut.tokens, skip_special_tokens=False).endswith("<|thread|>1: b<|/thread|></Parallel>")
    assert cut.finish_reason == "stop" and "did not end by itself" in cut.notes[0]
    long, _ = scripted(llm, [one, [" b b b"]])
    assert long.finish_reason == "length" and long.tokens[-1] == llm.tokenizer.token_id("</Parallel>")


def test_lists_that_cannot_be_followed_stay_in_sequence_and_say_so(llm):
    three = "<Parallel><Goal>" + "".join(f"<Outline>{i}: x</Outline>" for i in range(3)) + "</Goal>"
    for texts, words, more in [
        ("<Parallel><Goal><Outline>1: x</Outline><Outline>1: x</Outline></Goal>", "two outlines have the number 1", {}),
        ("<Parallel><Goal><Outline>x</Outline></Goal>", "no number", {}),
        ("<Parallel><Goal>1: x</Goal>", "without an outline", {}),
        ("</Goal>", "outside a block", {}),
        (three, "at most 2 threads", {"max_threads": 2}),
    ]:
        got, asks = scripted(llm, [texts, "<|im_end|>"], **more)
        assert got.blocks == [] and words in got.notes[0] and len(asks) == 2 and got.finish_reason == "stop"
    full, _ = scripted(llm, ["a" * 8 + three], limit=25)
    assert full.finish_reason == "length"
    for bad in ({"max_threads": 0}, {"max_blocks": 0}, {"max_threads": True}):
        with pytest.raises(OptionError, match=next(iter(bad))):
            scripted(llm, [], **bad)


def test_an_answer_read_back_gives_its_own_pieces(llm, form, prompt):
    """The units of training are what the machine generated, whichever way they are got."""
    got = weave(llm, prompt, grammar=form, max_tokens=120)
    again = drive(machine(prompt, spec(llm, form, len(prompt) + 120)), Script(prompt, got.tokens, llm.host.stop_ids))
    assert got.finish_reason == "stop" and again.tokens == got.tokens and again.pieces == got.pieces
    broken = [t for t in got.tokens if t != form.ids["path_open"]]
    with pytest.raises(InputError, match="no thread with head"):
        drive(machine(prompt, spec(llm, form, len(prompt) + 120)), Script(prompt, broken, llm.host.stop_ids))


def test_a_failure_under_way_is_answered_by_one_plain_completion(llm, form, prompt, monkeypatch):
    real, calls = threadweaver.Local.ask, itertools.count()
    def failing(self, ask):
        if next(calls) == 1:
            raise CapacityError("no room")
        return real(self, ask)
    monkeypatch.setattr(threadweaver.Local, "ask", failing)
    got = weave(llm, prompt, grammar=form, max_tokens=30)
    alone = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=30))[0].outputs[0].token_ids
    assert got.tokens == alone and got.blocks == [] and "no room" in got.notes[0]
    assert llm.runner.alloc.used <= (llm.engine.prefix.slots if llm.engine.prefix else 0)


class Fake(http.server.BaseHTTPRequestHandler):
    """An endpoint that answers with ``choice``."""

    choice: dict = {}

    def do_GET(self):
        self._say({"data": [{"id": "m", "max_model_len": 400}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        made = {k: v(body) if callable(v) else v for k, v in self.choice.items()}
        self._say({"choices": [{"index": 0, "text": "x", **made}]})

    def _say(self, what):
        data = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(("choice", "words"), [
    ({"finish_reason": "stop"}, "text only"),
    ({"finish_reason": "stop", "token_ids": [9, 9]}, "strips them"),
    ({"finish_reason": "stop", "token_ids": lambda b: [b["stop_token_ids"][0], 9, b["stop_token_ids"][0]]}, "stop_token_ids"),
    ({"finish_reason": "length", "token_ids": [9], "prompt_token_ids": [1]}, "tokenized the prompt again"),
])  # fmt: skip
def test_endpoints_of_texts_are_refused_with_advice(llm, form, choice, words):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("F", (Fake,), {"choice": choice})) as fake:
        threading.Thread(target=fake.serve_forever, daemon=True).start()
        with pytest.raises(UnsupportedError, match=words) as error:
            weave(llm.tokenizer, QUESTION, grammar=form, backend=f"http://127.0.0.1:{fake.server_address[1]}")
        assert "return_token_ids" in str(error.value)
        fake.shutdown()


def test_wrong_requests_are_named(llm, form, tmp_path):
    with pytest.raises(OptionError, match="join"):
        weave(llm, "x", join="rotate")
    with pytest.raises(OptionError, match="join"):
        weave(llm, "x", join="share", backend="http://127.0.0.1:9")
    with pytest.raises(OptionError, match="backend"):
        weave(llm, "x", grammar=form, backend="ftp://somewhere")
    with pytest.raises(OptionError, match="timeout"):
        weave(llm, "x", timeout=3)
    with pytest.raises(OSError, match="refused"):
        weave(llm.tokenizer, "x", grammar=form, backend="http://127.0.0.1:9")
    for file in llm.tokenizer.path.glob("*token*.json"):
        (tmp_path / file.name).write_text(file.read_text().replace("</Goal>", "</Gaol>"))
    with pytest.raises(InputError, match="'</Goal>'.*add it as a special token"):
        Grammar(THREADWEAVER, Tokenizer(tmp_path).inner)
    with pytest.raises(UnsupportedError, match=r"parallel_tags\.json"):
        weave(llm, "x")
    with pytest.raises(UnsupportedError, match="EOS"):
        Spec(form, (), 100)


def test_the_model_that_ships_opens_threads_where_parts_are_independent():
    """Held-out tables and chains: blocks for the first, none for the second; well formed; in fewer forwards than flat."""
    llm, grammar = LLM("zoo:tiny-threads", enable_prefix_caching=False), grammar_of(THREADWEAVER)
    right = []
    for case in thread_units.cases("test", 6, 21, "rows"):
        prompt = thread_units.prompt_of(case)
        got = weave(llm, prompt, max_tokens=400)
        block = grammar.parse(got.tokens).blocks[0]
        assert got.blocks == [len(block.paths)] and got.finish_reason == "stop" and not got.notes
        assert block.titles == tuple(line.split(":")[0] for line in case.prompt.splitlines()[:-1])
        assert got.usage.forwards < 0.75 * len(got.tokens)
        right.append(thread_units.right(case, got.tokens))
    assert sum(right) >= 2
    for case in thread_units.cases("test", 2, 21, "serial"):
        assert weave(llm, thread_units.prompt_of(case), max_tokens=200).blocks == []
