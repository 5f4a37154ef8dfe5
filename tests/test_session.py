"""Threads of one prompt: what the card "fork/join core" lists under *Show it works*, on zoo:tiny."""

import asyncio

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stretto import LLM, SamplingParams
from stretto.errors import CapacityError, InputError, OptionError, UnknownNameError
from stretto.joins import turn_keys
from stretto.models.context import PackedContext
from stretto.session import Children

PROMPT = "<|im_start|>user\nCopy this list: cat, dog, owl, fox, bear, 17, 4<|im_end|>\n<|im_start|>assistant\n"
GREEDY = dict(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    return LLM("zoo:tiny", dtype="float32", deterministic=True, enable_prefix_caching=False)


@pytest.fixture(autouse=True)
def every_slot_is_free_again(llm):
    yield
    assert llm.runner.alloc.used == 0 and not llm.engine.busy


def plain(llm, ids, **more):
    return llm.generate([list(ids)], SamplingParams(**GREEDY | more))[0].outputs[0].token_ids


def test_forks_cost_one_prefill_and_equal_requests(llm):
    ids = llm.tokenizer.encode(PROMPT)
    with llm.session(PROMPT) as s:
        kids = s.fork(prefixes=["cat", " dog, ", "owl, fox", "bear"])
        outs = kids.gen(**GREEDY)
        forced = sum(len(s.encode(p)) for p in ["cat", " dog, ", "owl, fox", "bear"])
        assert s.usage.evaluated == len(ids) + forced + sum(len(o.token_ids) for o in outs) - len(outs)
        assert s.usage.critical_path == 12 and s.usage.generated == 48
        assert s.usage.forwards <= 2 + 12
        used = llm.runner.alloc.used
        assert used <= len(ids) + forced + 48
        for kid, out in zip(kids, outs, strict=True):
            assert out.token_ids == plain(llm, kid.tokens[: len(kid.tokens) - 12])


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("rows", [512, 40, 24])
def test_a_line_is_evaluated_once_with_the_first_forward_of_its_children(backend, rows):
    """Where all has room (512) no forward is spent on the line alone; in chunks of 24 or 40 rows the children wait for it.
    A fork without prefixes shares the line too."""
    few = LLM(
        "zoo:tiny", dtype="float32", deterministic=True, enable_prefix_caching=False, backend=backend,
        max_num_batched_tokens=rows,
    )  # fmt: skip
    ids, heads = few.tokenizer.encode(PROMPT), ["cat", " dog, ", "owl, fox"]
    forced = sum(len(few.tokenizer.encode(h)) for h in heads)
    with few.session(PROMPT) as s:
        kids = s.fork(prefixes=heads, late=True)
        other = few.engine.add(ids[3:], SamplingParams(**GREEDY), few.method("ar"))[0]  # somebody else in the forwards
        outs = kids.gen(**GREEDY)
        assert s.usage.evaluated == len(ids) + forced + 3 * 11
        assert s.usage.forwards == 12 if rows == 512 else s.usage.forwards > 12
        for kid, out in zip(kids, outs, strict=True):
            assert out.token_ids == plain(few, kid.tokens[:-12])
        few.engine.abort(other)
        before = s.usage.evaluated
        assert [len(k.view) - k.view.shared for k in kids] == [len(k.own) - 1 for k in kids]  # the line is not theirs
        assert kids.gen(**GREEDY)[2].token_ids == plain(few, kids[2].tokens[:-12])
        assert s.usage.evaluated == before + 3 * 12
    with few.session(PROMPT) as s:
        outs = s.fork(4).gen(**GREEDY)
        assert [o.token_ids for o in outs] == [plain(few, ids)] * 4
        assert s.usage.evaluated == len(ids) + 4 * 12
    assert few.runner.alloc.used == 0


def test_the_last_token_of_a_line_goes_with_its_children_too(llm):
    """After a ``gen`` one token of the line is not cached: it costs one row, no forward, and is no child's own."""
    with llm.session(PROMPT) as s:
        s.gen(**GREEDY | {"max_tokens": 3})
        before = s.usage.forwards, s.usage.evaluated
        kids = s.fork(prefixes=["cat and dog", " owl is"], late=True)
        kids.gen(**GREEDY | {"max_tokens": 4})
        assert (s.usage.forwards, s.usage.evaluated) == (before[0] + 4, before[1] + 1 + sum(len(k.own) - 1 for k in kids))
        assert len(s.view) == len(s.tokens) and kids[0].view.shared == len(s.tokens)
        both = [*s.tokens, *kids[0].own, *kids[1].own]
        s.join(kids, "share")
        assert s.tokens == both and len(s.view) == len(both)


def test_children_of_a_line_that_waits_go_each_their_own_way(llm):
    ids = llm.tokenizer.encode(PROMPT)
    with llm.session(PROMPT) as s:
        one, two, three, four = s.fork(prefixes=["cat", "dog", "owl", "fox"], late=True)
        assert one.gen(**GREEDY).token_ids == plain(llm, one.tokens[:-12])  # evaluates the line
        spent = s.usage.evaluated
        assert two.gen(**GREEDY).token_ids == plain(llm, two.tokens[:-12])  # finds it there
        assert s.usage.evaluated == spent + len(two.own) - 1
        s.gen(**GREEDY | {"max_tokens": 3})  # the line goes on: the rows up to the fork are still the same
        assert three.gen(**GREEDY, method="ngram").token_ids == plain(llm, three.tokens[:-12])
        assert four.score(" cat") == pytest.approx(llm_score(llm, four.tokens, " cat"), abs=1e-4)
    for mode in ("reencode", "share", "rotate"):
        with llm.session(PROMPT) as s:
            kids = s.fork(prefixes=["cat", "dog"], late=True)
            s.join(kids, mode, separator=".")  # nothing of it was evaluated before
            got = s.gen(**GREEDY).token_ids
            if mode == "reencode":
                assert got == plain(llm, [*ids, *s.encode("cat"), *s.encode("."), *s.encode("dog"), *s.encode(".")])
    with llm.session(PROMPT) as s:
        kids = s.fork(prefixes=["cat", "dog"], late=True)
        jobs = [(k, llm.method("ar"), SamplingParams(**GREEDY)) for k in kids]
        streams = s.submit(jobs)
        with pytest.raises(InputError, match="is generating"):
            s.append("x")
        s.abandon(jobs, streams)  # nothing of it ran
        assert not llm.engine.busy
        s.append("x")
        assert s.gen(**GREEDY).token_ids == plain(llm, [*ids, *s.encode("x")])


def llm_score(llm, before, text):
    more = llm.tokenizer.encode(text)
    law = torch.log_softmax(llm.logits([*before, *more])[len(before) - 1 : -1].double(), -1)
    return law[torch.arange(len(more)), torch.tensor(more)].tolist()


@pytest.mark.parametrize("method", ["ar", "ngram", "suffix", "jacobi"])
def test_a_thread_goes_on_as_one_text(llm, method):
    ids = llm.tokenizer.encode(PROMPT)
    with llm.session(PROMPT) as s:
        first = s.gen(**GREEDY | {"max_tokens": 5}, method=method)
        second = s.gen(**GREEDY | {"max_tokens": 7}, method=method)
        assert first.token_ids + second.token_ids == plain(llm, ids)
        s.truncate(len(ids) + 3)
        assert s.gen(**GREEDY | {"max_tokens": 9}, method=method).token_ids == plain(llm, ids)[3:]


def test_siblings_draw_their_own_numbers_and_repeat(llm):
    def draw():
        with llm.session(PROMPT) as s:
            s.append("cat")
            return [o.token_ids for o in s.fork(4).gen(max_tokens=12, temperature=6.0, seed=7, ignore_eos=True)]

    a, b = draw(), draw()
    assert a == b and len({tuple(x) for x in a}) == 4


def test_reencode_equals_the_joined_text(llm):
    with llm.session(PROMPT) as s:
        kids = s.fork(prefixes=["cat", "owl", "bear"])
        kids.gen(**GREEDY | {"max_tokens": 4})
        texts = s.join(kids, "reencode", separator=" | ")
        assert len(texts) == 3 and s.text.endswith("assistant\n" + "".join(t + " | " for t in texts))
        joined = list(s.tokens)
        assert s.gen(**GREEDY).token_ids == plain(llm, joined)


def test_share_with_one_child_is_no_fork(llm):
    with llm.session(PROMPT) as s:
        kids = s.fork(prefixes=["cat"])
        kids.gen(**GREEDY | {"max_tokens": 4})
        s.join(kids, "share", separator=" x")
        joined = list(s.tokens)
        assert s.shift == 0 and s.gen(**GREEDY).token_ids == plain(llm, joined)


def dense(llm, tokens, positions, sees):
    """Logits of the last row: every row with the rows it saw, without a cache."""
    n = len(tokens)
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i, seen in enumerate(sees):
        mask[i, seen] = True
    with torch.inference_mode():
        net = llm.model
        hidden = net.hidden(torch.tensor(tokens), torch.tensor(positions), PackedContext([n], kind=mask))
        return net.logits(hidden[-1:])[0]


def shared_rows(parent, kids, parting):
    """(tokens, positions, sees) of a line joined by "share", from the definition."""
    n = len(parent)
    tokens, positions, sees = list(parent), list(range(n)), [list(range(i + 1)) for i in range(n)]
    for kid in kids:
        first = len(tokens)
        for j, token in enumerate(kid):
            tokens.append(token)
            positions.append(n + j)
            sees.append([*range(n), *range(first, first + j + 1)])
    start = n + max(map(len, kids))
    for j, token in enumerate(parting):
        tokens.append(token)
        positions.append(start + j)
        sees.append(list(range(len(tokens))))
    return tokens, positions, sees


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(20, 1900), min_size=1, max_size=5), min_size=1, max_size=3))
def test_share_equals_the_dense_definition(llm, bodies):
    parting = llm.tokenizer.encode(" and then")
    with llm.session(PROMPT) as s:
        parent = list(s.tokens)
        kids = s.fork(prefixes=bodies)
        s.join(kids, "share", separator=parting)
        got = s.gen(max_tokens=1, temperature=0.0, logprobs=5, ignore_eos=True)
        logits = dense(llm, *shared_rows(parent, bodies, parting))
        law = torch.log_softmax(logits.double(), -1)
        for token, logprob in got.logprobs[0].items():
            assert logprob == pytest.approx(float(law[token]), abs=2e-4)


def test_rotate_turns_keys_to_where_they_are_read(llm):
    ids = llm.tokenizer.encode(PROMPT)
    with llm.session(PROMPT) as s:
        kids = s.fork(prefixes=["cat", "owl, fox"])
        s.join(kids, "rotate", separator=" .")
        n, a = len(ids), len(llm.tokenizer.encode("cat")) + len(llm.tokenizer.encode(" ."))
        k = llm.runner.pool.k[:, s.view.slots[n + a :].copy()]
        with llm.session(s.tokens[: n + a]) as other:  # the same keys at these positions, but seeing "cat" too
            other.append("owl, fox")
            other.session.evaluate(other)
            first = llm.runner.pool.k[0, other.view.slots[n + a :].copy()]
        assert torch.allclose(k[0, : len(first)], first, atol=1e-4)  # layer 0 has seen nothing but its own token
        assert [int(p) for p in llm.runner.pool.positions[s.view.slots]] == list(range(len(s.view)))
        assert len(s.gen(**GREEDY).token_ids) == 12


@pytest.mark.parametrize("delta", [-10, 0, 3, 700])
def test_turning_is_a_pure_rotation(llm, delta):
    alloc = llm.runner.alloc
    old, new, back = alloc.alloc(3), alloc.alloc(3), alloc.alloc(3)
    pool = llm.runner.pool
    pool.k[:, old.copy()] = torch.randn_like(pool.k[:, old.copy()])
    turn_keys(llm.runner, old, new, delta)
    turn_keys(llm.runner, new, back, -delta)
    assert torch.allclose(pool.k[:, back.copy()], pool.k[:, old.copy()], atol=1e-5)
    assert torch.equal(pool.v[:, back.copy()], pool.v[:, old.copy()])
    for slots in (old, new, back):
        alloc.release(slots)


def test_gather_and_select(llm):
    with llm.session(PROMPT) as s:
        before = list(s.tokens)
        kids = s.fork(prefixes=["cat", "owl"])
        outs = kids.gen(**GREEDY | {"max_tokens": 3})
        assert s.join(kids, "gather") == [p + o.text for p, o in zip(["cat", "owl"], outs, strict=True)]
        assert s.tokens == before
        kids = s.fork(prefixes=["cat", "owl"])
        kids.gen(**GREEDY | {"max_tokens": 3})
        line = list(kids[1].tokens)
        s.join(kids, "select", select=1)
        assert s.tokens == line and s.gen(**GREEDY).token_ids == plain(llm, line)


def test_score_is_the_law_and_leaves_no_trace(llm):
    ids = llm.tokenizer.encode(PROMPT)
    with llm.session(PROMPT) as s:
        s.gen(**GREEDY | {"max_tokens": 2})
        line = list(s.tokens)
        got = s.score("cat, dog")
        more = llm.tokenizer.encode("cat, dog")
        law = torch.log_softmax(llm.logits([*line, *more]).double(), -1)
        want = [float(law[len(line) - 1 + i, t]) for i, t in enumerate(more)]
        assert np.allclose(got, want, atol=1e-4) and s.tokens == line
        assert s.score("") == []
        assert s.gen(**GREEDY | {"max_tokens": 4}).token_ids == plain(llm, ids)[2:6]


def test_async_twins_share_forwards(llm):
    async def both():
        with llm.session(PROMPT) as a, llm.session(PROMPT + "cat") as b:
            before = llm.engine.forwards
            x, y = await asyncio.gather(a.agen(**GREEDY), b.agen(**GREEDY))
            return x.token_ids, y.token_ids, llm.engine.forwards - before

    x, y, forwards = asyncio.run(both())
    ids = llm.tokenizer.encode(PROMPT)
    assert x == plain(llm, ids) and y == plain(llm, llm.tokenizer.encode(PROMPT + "cat")) and forwards <= 14


def test_events_add_up_and_leaving_early_frees(llm):
    with llm.session(PROMPT) as s:
        kids = s.fork(2)
        got = {k.id: [] for k in kids}
        for event in kids.stream(**GREEDY):
            got[event.thread] += event.token_ids
        assert [got[k.id] for k in kids] == [k.own for k in kids]
        s.join(kids, "gather")
        for _ in s.fork(2).stream(**GREEDY):
            break
        assert not llm.engine.busy


def test_budgets(llm):
    most = len(llm.tokenizer.encode(PROMPT)) + 25
    with llm.session(PROMPT, max_threads=3, max_path=10, max_evaluated=most) as s:
        with pytest.raises(CapacityError, match="max_threads"):
            s.fork(3)
        kids = s.fork(2)
        assert [len(o.token_ids) for o in kids.gen(**GREEDY)] == [10, 10]
        with pytest.raises(CapacityError, match="max_path=10"):
            kids[0].gen(**GREEDY)
        s.gen(**GREEDY)
        with pytest.raises(CapacityError, match=f"max_evaluated={most}"):
            s.gen(**GREEDY)


def test_wrong_use_is_named(llm):
    with llm.session(PROMPT) as s, llm.session("cat") as other:
        kids = s.fork(2)
        with pytest.raises(UnknownNameError, match="reencode"):
            s.join(kids, "reencod")
        with pytest.raises(InputError, match="another session"):
            other.join(kids)
        with pytest.raises(InputError, match="forked at"):
            s.truncate(2)
        with pytest.raises(OptionError, match="fork instead"):
            s.gen(n=2)
        with pytest.raises(OptionError, match="order"):
            s.join(kids, order=[0, 0])
        with pytest.raises(OptionError, match="either n or prefixes"):
            s.fork()
        with pytest.raises(InputError, match="no thread"):
            Children().gen()
        grandchild = kids[0].fork(1)
        with pytest.raises(InputError, match="living children"):
            s.join(kids)
        grandchild[0].end()
        s.join(kids, "gather")
        with pytest.raises(InputError, match="has ended"):
            kids[0].gen(**GREEDY)
        s.append("x")
        late = s.fork(2)
        s.append("y")
        with pytest.raises(InputError, match="went on"):
            s.join(late)
        late[0].end()
        late[1].end()
    with pytest.raises(InputError, match="has ended"):
        s.gen(**GREEDY)


def test_positions_of_their_own(llm):
    with llm.session(PROMPT) as s:
        (kid,) = s.fork(prefixes=["cat"], positions=100)
        kid.gen(**GREEDY | {"max_tokens": 2})
        n = len(llm.tokenizer.encode("cat"))
        assert [int(p) for p in llm.runner.pool.positions[kid.view.slots[kid.start :]]] == list(range(100, 101 + n))
