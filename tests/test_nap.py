"""Streams of one answer: quotas, tags, layouts; ARness; data with several paths."""

import random

import pytest

from stretto.bench.arness import global_arness, local_arness, order_of, set_arness
from stretto.decoding.registry import make
from stretto.decoding.streams import quotas
from stretto.errors import OptionError, PromptError, UnsupportedError
from stretto.training.paths import PathLayout, orders_of, pick_paths, sample_paths, vote
from tiny import EOS, MASK, engine, greedy, model, run, tokens

TEXT = [5, 9, 7, 5, 9, 7, 11]
OPEN, CLOSE, SUM = 20, 21, 22
TAGS = {"open": OPEN, "close": CLOSE, "summary": SUM}


@pytest.fixture(scope="module")
def net():
    return model(stretto={"attention": "full", "mask_token_id": MASK})


def decode(net, options, n=40, **params):
    return run(engine(net), [(TEXT, greedy(n, ignore_eos=True) if not params else greedy(n, **params), "streams", options)])[0][0]


def test_quotas_differ_by_one_and_take_turns():
    for k in range(1, 9):
        for m in range(1, 5):
            shares = [quotas(k, m, turn) for turn in range(m)]
            assert all(sum(s) == k and max(s) - min(s) <= 1 for s in shares)
            assert [sum(s[i] for s in shares) for i in range(m)] == [k] * m, "over m turns all get the same"


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("layout", ["shared", "isolated"])
def test_streams_grow_together_and_tags_stay(net, k, layout):
    options = {**TAGS, "streams": 3, "stream_length": 9, "tokens_per_step": k, "layout": layout}
    stream = decode(net, options)
    text, steps = tokens(stream), stream.seq.step_map
    assert len(text) == 40
    regions = [(1 + 11 * j, 10 + 11 * j) for j in range(3)]
    for a, b in regions:
        assert text[a - 1] == OPEN and text[b] == CLOSE and steps[a - 1] == steps[b] == 0
    assert text[33] == SUM
    last = max(steps[i] for a, b in regions for i in range(a, b))
    assert all(s > last for s in steps[34:]), "the summary begins when all streams are finished"
    open_until = [max(steps[a:b]) for a, b in regions]
    for turn in range(min(open_until)):  # while all are open
        made = [sum(s == turn for s in steps[a:b]) for a, b in regions]
        assert sum(made) == k and max(made) - min(made) <= 1


def test_one_stream_without_a_summary_is_ordinary_diffusion(net):
    """Inside the only region the most confident mask is taken, as diffusion does with one window."""
    ours = decode(net, {"streams": 1, "stream_length": 24, "tokens_per_step": 1}, n=24)
    plain = run(
        engine(net),
        [(TEXT, greedy(24, ignore_eos=True), "diffusion", {"unmask": "fixed", "cache": "none", "block_length": 24})],
    )[0][0]
    assert tokens(ours) == tokens(plain) and ours.seq.step_map == plain.seq.step_map


def test_an_isolated_stream_is_the_stream_alone(net):
    """Every stream of the isolated layout sees the prompt and itself: the first equals a canvas of one stream."""
    options = {**TAGS, "stream_length": 8, "layout": "isolated", "tokens_per_step": 3}
    three = tokens(decode(net, {**options, "streams": 3}, n=31))
    one = tokens(decode(net, {**options, "streams": 1, "tokens_per_step": 1}, n=11))
    assert three[:10] == one[:10]


def test_a_closing_tag_ends_its_stream(net):
    """Slots behind an early tag are not handed out, the others go on; without end-of-text rules nothing is cut."""
    whole = tokens(decode(net, {"streams": 2, "stream_length": 12, "tokens_per_step": 2}, n=30))
    close = next(t for t in whole[2:11] if whole[:12].count(t) and t != EOS)
    stream = decode(net, {"streams": 2, "stream_length": 12, "tokens_per_step": 2, "close": close}, n=32, ignore_eos=False)
    text = tokens(stream)
    assert len(text) < 32 and stream.finish_reason == "stop"
    assert text.count(close) >= 2
    assert stream.seq.metrics.tokens == len(text) == len(stream.seq.step_map), "closed slots are not counted"


def test_bad_input(net):
    eng = engine(net)
    with pytest.raises(OptionError, match="stream_length.*at most 8 for 3 streams"):
        eng.add(TEXT, greedy(31), make("streams", eng.host, {**TAGS, "stream_length": 9}))
    with pytest.raises(OptionError, match="open"):
        make("streams", eng.host, {"open": 4096})
    with pytest.raises(PromptError, match="mask token"):
        eng.add([5, MASK], greedy(31), make("streams", eng.host))
    with pytest.raises(UnsupportedError, match="full attention"):
        make("streams", engine(model()).host)


def test_arness():
    rng = random.Random(0)
    assert global_arness(range(9)) == local_arness(range(9)) == set_arness(range(9)) == 1.0
    assert global_arness([8, 7, 6, 5, 4, 3, 2, 1, 0]) == pytest.approx(1 / 9)  # the last has no choice
    assert local_arness([8, 7, 6, 5, 4, 3, 2, 1, 0]) == 0.0
    n = 24
    drawn = [global_arness(rng.sample(range(n), n)) for _ in range(400)]
    assert sum(drawn) / 400 == pytest.approx(sum(1 / i for i in range(1, n + 1)) / n, abs=0.01)
    assert global_arness([1, 0, 2], k=2) == 1.0 and global_arness([2, 0, 1], k=2) == pytest.approx(2 / 3)
    assert local_arness([0, 1, 2, 5, 3, 4], k=2) == pytest.approx(1 / 4)  # of 2, 5, 3 and 4 only the first
    assert order_of([1, 0, 1], [0.2, 0.5, 0.9]) == [1, 2, 0]
    assert set_arness([0, 0, 1, 1]) == 1.0 and set_arness([0, 1, 0, 1]) == pytest.approx(3 / 4)
    for bad in ([], [0, 0], [1, 2]):
        with pytest.raises(ValueError, match="order"):
            global_arness(bad)


def test_plain_decoding_has_arness_one():
    (stream,) = run(engine(model()), [(TEXT, greedy(12, ignore_eos=True), "ar", {})])[0]
    assert global_arness(order_of(stream.seq.step_map)) == 1.0


def test_paths_are_different_right_and_shuffled():
    judge = lambda a: a.startswith("r")
    picked = [pick_paths(["r1", "x", "r2", "r1", "r3"], judge, 3, random.Random(s)) for s in range(20)]
    assert all(sorted(p) == ["r1", "r2", "r3"] for p in picked) and len({tuple(p) for p in picked}) > 1
    assert pick_paths(["r1", "r1", "x"], judge, 2, random.Random(0)) is None
    asked = []
    out = sample_paths(lambda p, n: asked.append(n) or [["r1", "r2"], ["x", "y"]], ["a", "b"], [judge, judge], n=5, keep=2)
    assert asked == [5] and sorted(out[0]) == ["r1", "r2"] and out[1] is None
    assert vote(["4", None, "5", "4"]) == "4" and vote([None]) is None and vote(["5", "4"]) == "5"


def test_orders_of_a_sum():
    assert orders_of([5, 3, 4], [1, 1, -1]) == [
        "5 + 3 = 8.\n8 - 4 = 4.", "5 - 4 = 1.\n1 + 3 = 4.", "3 + 5 = 8.\n8 - 4 = 4.",
    ]  # 3 - 4 is below zero
    assert len(orders_of([1, 2, 3], [1, 1, 1])) == 6 and orders_of([4, 4], [1, 1]) == ["4 + 4 = 8."]


def test_the_layout_of_training_is_the_canvas_of_decoding(net):
    layout = PathLayout(**TAGS, end=EOS, streams=2, length=5, summary_length=4)
    doc = layout.document([7, 8], [[30, 31], [32]], [33])
    assert doc.prompt == 2 and len(doc.tokens) == 2 + layout.places
    assert doc.tokens[2:9] == [OPEN, 30, 31, CLOSE, CLOSE, CLOSE, CLOSE] and doc.tokens[-5:] == [SUM, 33, EOS, EOS, EOS]
    text = tokens(decode(net, {**TAGS, "streams": 2, "stream_length": 5}, n=layout.places))
    tags = [i for i, t in enumerate(doc.tokens[2:]) if t in (OPEN, SUM)]
    assert [text[i] for i in tags] == [doc.tokens[2 + i] for i in tags]
    with pytest.raises(OptionError, match="at most 5"):
        layout.document([7], [[30] * 6, [31]], [33])
    with pytest.raises(OptionError, match="exactly 2"):
        layout.document([7], [[30]], [33])
