"""Multiverse: what the card lists as exact, on a tiny random model whose tokens are dictated.

A dictated text is what the model would have to write; the engine forks, joins and evaluates it as if it were its own.
"""

import random
import shutil

import pytest
import torch

from stretto import LLM, SamplingParams
from stretto.engine.types import Commit
from stretto.errors import CapacityError, InputError, OptionError, UnsupportedError
from stretto.models import checkpoint
from stretto.models.context import PackedContext
from stretto.tags import MULTIVERSE, THREADWEAVER
from stretto.threads import multiverse
from stretto.training.parallel_units import cases, grammar_of, pair_of
from stretto.training.run import TOKENIZER
from stretto.zoo.pages.reasoning import TASKS
from tiny import model

END = 4  # <|im_end|>
HEAD = "<Parallel><Goal><Outline>1: x</Outline><Outline>2: y</Outline></Goal>"
TWO = HEAD + "<Path>1: 3 4 5</Path><Path>2: 6</Path><Conclusion>7 8</Conclusion></Parallel>"
ONE = "<Parallel><Goal><Outline>1: x</Outline></Goal><Path>1: 3 4</Path><Conclusion>5</Conclusion></Parallel>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    checkpoint.save(model(vocab_size=2048, max_position_embeddings=1024, eos_token_id=END), out, dtype=torch.float32)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, out / file.name)
    return out


@pytest.fixture(scope="module", params=["native", "torch"])
def llm(folder, request):
    return LLM(folder, dtype="float32", deterministic=True, enable_prefix_caching=False, backend=request.param)


@pytest.fixture(autouse=True)
def every_slot_is_free_again(request):
    yield
    if "llm" in request.fixturenames:
        made = request.getfixturevalue("llm")
        assert made.runner.alloc.used == 0 and not made.engine.busy


@pytest.fixture(scope="module")
def g():
    return grammar_of()


class Dictated:
    """Plain decoding whose choices are overruled: ``next`` holds the token behind each line."""

    name, lossless = "dictated", True

    def __init__(self, inner):
        self.inner, self.next, self.free = inner, {}, False  # free: what is not dictated is the model's

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def commit(self, seqs, steps, outcomes):
        done = self.inner.commit(seqs, steps, outcomes)
        return [
            Commit([self.next.get(tuple(s.tokens), c.tokens[0] if self.free else END)], keep=c.keep, logprob_rows=c.logprob_rows)
            for s, c in zip(seqs, done, strict=True)
        ]


def lines(g, ids, begin, out):
    """line -> next token, for every thread of the linear text ``ids``."""

    def walk(start, stop, blocks, line):
        i = start
        for block in [*blocks, None]:
            for k in range(i, block.goal + 1 if block else stop):
                out[tuple(line)] = ids[k]
                line.append(ids[k])
            if block is None:
                return
            for p in block.paths:
                walk(p.body, p.stop, p.blocks, [*line, *ids[p.start : p.body]])
            line += ids[block.paths[0].start : block.conclusion.start + 1]
            walk(block.conclusion.start + 1, block.conclusion.stop, block.conclusion.blocks, line)
            i = block.conclusion.stop

    tree = g.parse(ids, start=begin)
    walk(tree.start, tree.stop, tree.blocks, list(ids[:begin]))
    return out


def dictate(llm, g, monkeypatch, *texts):
    """The engine will write these (prompt ids, answer ids)."""
    script = Dictated(llm.method("ar"))
    for prompt, answer in texts:
        lines(g, [*prompt, *answer], len(prompt), script.next)
    monkeypatch.setattr(llm, "method", lambda name, options=None: script)
    return script


def text_of(g, text, prompt="Sum?"):
    return g.encode(prompt), [*g.encode(text), END]


def write(llm, prompt, **more):
    params = SamplingParams(max_tokens=900, temperature=0.0, logprobs=1)
    return multiverse.run(llm, prompt, params, tags=MULTIVERSE, **more)


def dense(llm, ids, layout):
    """float64 log-law [n, V] of one teacher-forced forward with the training's mask and positions."""
    mask = torch.from_numpy(layout.mask())
    with torch.inference_mode():
        net = llm.model
        hidden = net.hidden(
            torch.tensor(ids), torch.from_numpy(layout.positions), PackedContext([len(ids)], kind=mask)
        )
        return torch.log_softmax(net.logits(hidden).double(), -1)


def some_texts(g):
    rng = random.Random(4)
    out = [text_of(g, t) for t in (TWO, ONE, "a" + TWO + "b" + ONE + TWO)]
    inside = HEAD + "<Path>1: 3</Path><Path>2: 4</Path><Conclusion>" + TWO + "5</Conclusion></Parallel>c"
    out.append(text_of(g, inside))
    out += [pair_of(TASKS[t](rng), "parallel", g) for t in ("nested", "rows", "serial")]
    return out


def test_served_log_probs_are_those_of_training(llm, g, monkeypatch):
    """Train/serve parity, and zero copy: what is evaluated are the tokens of the text, each once."""
    for prompt, answer in some_texts(g):
        ids = [*prompt, *answer]
        dictate(llm, g, monkeypatch, (prompt, answer))
        got = write(llm, prompt)
        assert got.token_ids == answer and got.malformed is None and not got.notes and got.finish_reason == "stop"
        layout = g.layout(ids, start=len(prompt))
        law = dense(llm, ids, layout)
        for i, seen in enumerate(got.logprobs, len(prompt)):
            assert (seen is None) == bool(layout.forced[i])
            if seen is not None:
                assert seen[ids[i]] == pytest.approx(float(law[i - 1, ids[i]]), abs=1e-4)
        assert got.usage.evaluated == len(ids) - 1
        assert got.usage.generated == len(answer) - int(layout.forced.sum())
        tree = g.parse(ids, start=len(prompt))
        blocks = sum(1 for b in tree.blocks for _ in b.inside())
        assert got.blocks == blocks and got.lengths.longest == layout.positions[-1] + 1 - len(prompt)
        assert got.usage.forwards <= got.usage.critical_path + 2 * blocks
        assert got.usage.critical_path <= got.lengths.longest


def test_positions_in_the_cache_are_those_of_the_layout(llm, g, monkeypatch):
    prompt, answer = some_texts(g)[4]
    dictate(llm, g, monkeypatch, (prompt, answer))
    seen = []
    end = multiverse.Session.end
    monkeypatch.setattr(multiverse.Session, "end", lambda s: (
        seen.extend(int(p) for p in llm.runner.pool.positions[s.view.slots]) if s.parent is None else None, end(s)))
    write(llm, prompt)
    assert seen == g.layout([*prompt, *answer], start=len(prompt)).positions[:-1].tolist()


def test_a_path_is_blind_to_its_siblings(llm, g, monkeypatch):
    other = TWO.replace("3 4 5", "3 9 5")
    got = []
    for text in (TWO, other):
        dictate(llm, g, monkeypatch, text_of(g, text))
        got.append(write(llm, g.encode("Sum?")))
    tree = g.parse(got[0].token_ids)
    first, second = tree.blocks[0].paths
    a, b = (x.logprobs for x in got)
    assert a[second.start : second.stop] == b[second.start : second.stop]  # bit for bit
    assert a[first.body : first.stop] != b[first.body : first.stop]
    assert a[second.stop + 1] != b[second.stop + 1]


def test_the_order_of_siblings_in_the_cache_is_irrelevant(llm, g):
    laws = []
    for order in ([0, 1, 2], [2, 0, 1]):
        with llm.session(g.encode("Sum?" + HEAD)) as s:
            kids = s.fork(prefixes=[g.encode(t) for t in ("<Path>1: 3 4 5</Path>", "<Path>2: 6</Path>", "<Path>3: 7</Path>")])
            s.join(kids, "share", order=order, separator=[g.ids["conclusion_open"]])
            laws.append(s.gen(max_tokens=1, logprobs=8).logprobs[0])
    assert laws[0].keys() == laws[1].keys()
    for token, value in laws[0].items():
        assert value == pytest.approx(laws[1][token], abs=1e-5)


def test_one_path_is_plain_causal_text(llm, g, monkeypatch):
    prompt, answer = text_of(g, ONE)
    dictate(llm, g, monkeypatch, (prompt, answer))
    got = write(llm, prompt)
    law = torch.log_softmax(llm.logits([*prompt, *answer]).double(), -1)
    for i, seen in enumerate(got.logprobs, len(prompt)):
        if seen is not None:
            token = [*prompt, *answer][i]
            assert seen[token] == pytest.approx(float(law[i - 1, token]), abs=1e-4)


def test_without_tags_it_is_plain_decoding_bit_for_bit(llm, g):
    prompt = g.encode("How many?")
    params = SamplingParams(max_tokens=40, temperature=0.0, logprobs=1, logit_bias=dict.fromkeys(g.roles, -100.0))
    want = llm.generate([prompt], params)[0].outputs[0]
    for mode in ("auto", "sequential"):
        got = multiverse.run(llm, prompt, params, tags=MULTIVERSE, mode=mode)
        assert got.token_ids == want.token_ids and got.logprobs == want.logprobs and got.malformed is None


def test_prompts_together_are_as_alone_and_share_forwards(llm, g, monkeypatch):
    texts = [pair_of(c, "parallel", g) for c in cases("test", 5, 3)]
    dictate(llm, g, monkeypatch, *texts)
    params = SamplingParams(max_tokens=900, temperature=0.0, logprobs=1)
    alone = [write(llm, p) for p, _ in texts]
    before = llm.engine.forwards
    together = multiverse.run_all(llm, [p for p, _ in texts], params, tags=MULTIVERSE)
    assert [(x.token_ids, x.logprobs) for x in together] == [(x.token_ids, x.logprobs) for x in alone]
    assert [x.usage.critical_path for x in together] == [x.usage.critical_path for x in alone]
    assert llm.engine.forwards - before <= 5 + max(x.usage.forwards for x in alone)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"max_paths": 1}, "2 paths (max_paths=1)"), ({"max_depth": 0}, "max_depth=0"), ({"max_threads": 2}, "beside 1"),
     ({"min_budget_to_fork": 900}, "positions are left")],
    ids=str,
)
def test_blocks_beyond_the_limits_are_decoded_in_line(llm, g, monkeypatch, options, reason):
    prompt, answer = text_of(g, TWO)
    script = Dictated(llm.method("ar"))
    ids = [*prompt, *answer]
    script.next = {tuple(ids[:i]): ids[i] for i in range(len(prompt), len(ids))}
    monkeypatch.setattr(llm, "method", lambda name, options=None: script)
    got = write(llm, prompt, **options)
    assert got.token_ids == answer and got.blocks == 0 and reason in got.notes[0] and got.malformed is None
    law = torch.log_softmax(llm.logits(ids).double(), -1)
    seen = got.logprobs[-2]
    assert seen[ids[-2]] == pytest.approx(float(law[len(ids) - 3, ids[-2]]), abs=1e-4)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("a</Goal>b", "</Goal> outside a goal"), ("<Goal><Outline>1: x</Outline></Goal>", "outside the start of"),
     ("<Parallel><Goal><Outline>x</Outline></Goal>c", "has no number"), ("a</Path>b", "</Path> outside a path"),
     ("<Parallel><Goal><Outline>1: x</Outline><Outline>1: y</Outline></Goal>", "two outlines have the number 1"),
     ("<Parallel>a", "<Goal> must come here")],
)
def test_malformed_structures_go_on_in_line_and_are_flagged(llm, g, monkeypatch, text, reason):
    prompt, answer = text_of(g, text)
    ids = [*prompt, *answer]
    script = Dictated(llm.method("ar"))
    script.next = {tuple(ids[:i]): ids[i] for i in range(len(prompt), len(ids))}
    monkeypatch.setattr(llm, "method", lambda name, options=None: script)
    got = write(llm, prompt)
    assert got.token_ids == answer and reason in got.malformed and got.finish_reason == "stop" and got.blocks == 0


def test_an_end_inside_a_path_closes_it_and_a_small_budget_ends_the_answer(llm, g, monkeypatch):
    prompt, answer = text_of(g, TWO)
    script = dictate(llm, g, monkeypatch, (prompt, answer))
    for line, token in list(script.next.items()):
        if token == g.ids["path_close"] and g.decode(line).endswith("3 4 5"):
            script.next[line] = END
    got = write(llm, prompt)
    assert got.token_ids == answer and got.notes == ["path 1 ended the text: closed there"]
    positions = g.layout(answer).positions
    for room in range(1, int(positions[-1]) + 1):
        params = SamplingParams(max_tokens=room, temperature=0.0)
        got = multiverse.run(llm, prompt, params, tags=MULTIVERSE, min_budget_to_fork=1)
        assert got.finish_reason == "length" and (got.malformed or room == positions[-1])
        assert got.lengths.longest <= room + 3 and got.usage.critical_path <= room


def test_errors_and_time_leave_nothing_behind(llm, g, monkeypatch):
    prompt, answer = text_of(g, TWO)
    script = dictate(llm, g, monkeypatch, (prompt, answer))
    assert write(llm, prompt, max_seconds=1e-9).finish_reason == "time"
    count = []

    def broken(seqs):
        count.append(len(seqs))
        if len(seqs) == 2:
            raise RuntimeError("lost")
        return script.inner.propose(seqs)

    script.propose = broken
    engine = llm.engine
    with pytest.raises(RuntimeError, match="lost"):
        write(llm, prompt)
    assert llm.runner.alloc.used == 0 and not engine.busy


def test_a_full_cache_is_an_error_that_leaves_the_engine_usable(folder, g, monkeypatch):
    prompt, answer = pair_of(TASKS["rows"](random.Random(1)), "parallel", g)
    small = LLM(folder, dtype="float32", enable_prefix_caching=False, kv_cache_tokens=len(prompt) + 194)
    params = SamplingParams(max_tokens=130, temperature=0.0)
    dictate(small, g, monkeypatch, (prompt, answer))
    with pytest.raises(CapacityError, match="raise kv_cache_tokens"):
        multiverse.run(small, prompt, params, tags=MULTIVERSE)
    assert small.runner.alloc.used == 0 and not small.engine.busy
    got = multiverse.run(small, prompt, params, tags=MULTIVERSE, min_budget_to_fork=60)
    assert "cache slots are free" in got.notes[0] and got.blocks == 0


def test_a_cached_prompt_changes_nothing_and_joined_rows_are_never_a_prefix(folder, g, monkeypatch):
    warm = LLM(folder, dtype="float32", deterministic=True, backend="native")
    prompt, answer = pair_of(TASKS["nested"](random.Random(1)), "parallel", g)
    dictate(warm, g, monkeypatch, (prompt, answer))
    first, second = write(warm, prompt), write(warm, prompt)
    assert first.logprobs == second.logprobs and second.usage.evaluated < first.usage.evaluated == len(prompt + answer) - 1
    prefix = warm.engine.prefix
    assert warm.runner.alloc.used == prefix.slots
    block = g.parse([*prompt, *answer], start=len(prompt)).blocks[0]
    with warm.session([*prompt, *answer]) as s:
        s.evaluate(s)
        assert s.usage.evaluated >= len(prompt + answer) - block.paths[0].stop  # behind path 1 all is evaluated anew


def test_wrong_use_is_named(llm, folder):
    with pytest.raises(UnsupportedError, match="not trained"):
        multiverse.run(llm, "x", mode="parallel")
    with pytest.raises(UnsupportedError, match="threadweaver"):
        multiverse.run(llm, "x", tags=THREADWEAVER)
    with pytest.raises(OptionError, match="max_path=3"):
        multiverse.run(llm, "x", max_path=3)
    with pytest.raises(OptionError, match="auto, parallel"):
        multiverse.run(llm, "x", mode="both")
    with pytest.raises(OptionError, match="max_paths"):
        multiverse.run(llm, "x", max_paths=0)
    with pytest.raises(InputError, match="empty"):
        multiverse.run(llm, [])
    with pytest.raises(OptionError, match="no stop strings"):
        multiverse.run(llm, "x", SamplingParams(stop=["a"]))
    plain = multiverse.run(llm, "x", SamplingParams(max_tokens=3, temperature=0.0))
    assert "not trained" in plain.notes[0]


def test_siblings_draw_their_own_numbers_and_repeat(llm, g, monkeypatch):
    script = dictate(llm, g, monkeypatch, text_of(g, TWO))
    script.next = {line: t for line, t in script.next.items() if g.ids["path_open"] not in line}
    script.free = True
    params = SamplingParams(max_tokens=60, temperature=5.0, seed=3, ignore_eos=True, logit_bias={12: -100, 16: -100})
    a, b = (multiverse.run(llm, g.encode("Sum?"), params, tags=MULTIVERSE) for _ in range(2))
    assert a.token_ids == b.token_ids and a.blocks == 1 and a.finish_reason == "length"
    first, second = [i for i, t in enumerate(a.token_ids) if t == g.ids["path_open"]][:2]
    assert a.token_ids[first + 3 : first + 13] != a.token_ids[second + 3 : second + 13]
