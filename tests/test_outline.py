"""The grammar of parallel blocks, its positions and visibility, and the data made for it."""

import random

import numpy as np
import pytest

from stretto.errors import InputError, UnsupportedError
from stretto.outline import Grammar, StructureError
from stretto.tags import MULTIVERSE, THREADWEAVER, Tags, read_tags, write_tags
from stretto.training.curator import Curator, distance, extract, flat_of, render
from stretto.zoo import workbook
from stretto.zoo.pages.reasoning import INDEPENDENT, TASKS, final


@pytest.fixture(scope="module")
def g():
    return Grammar(MULTIVERSE, workbook._tokenizer())


@pytest.fixture(scope="module")
def tw():
    return Grammar(THREADWEAVER, workbook._tokenizer())


def enc(g, text):
    return g.encode(text)


HEAD = "<Parallel><Goal><Outline>1: x</Outline><Outline>2: y</Outline></Goal>"
GOOD = HEAD + "<Path>1: 3</Path><Path>2: 4 5</Path><Conclusion>7</Conclusion></Parallel>"


class Words:
    """A tokenizer of words, so that an example can be read token by token."""

    def __init__(self):
        self.words = []

    def encode(self, text, add_special_tokens=False):
        ids = []
        for w in text.split():
            if w not in self.words:
                self.words.append(w)
            ids.append(self.words.index(w))
        return type("Encoding", (), {"ids": ids})

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(self.words[i] for i in ids)


def test_positions_and_visible_keys_of_the_published_rule():
    """Paths restart behind the goal, the conclusion goes on behind the longest path; afterwards all is seen."""
    g = Grammar(MULTIVERSE, Words())
    text = (
        "a b <Parallel> <Goal> <Outline> 1: </Outline> <Outline> 2: </Outline> </Goal> "
        "<Path> 1: p1 p2 </Path> <Path> 2: </Path> <Conclusion> c </Conclusion> </Parallel> d"
    )
    lay = g.layout(g.encode(text))
    assert lay.positions.tolist() == [*range(11), 11, 12, 13, 14, 15, 11, 12, 13, 16, 17, 18, 19, 20]
    assert lay.mask().sum(1).tolist() == [*range(1, 17), 12, 13, 14, 20, 21, 22, 23, 24]
    assert [i for i, f in enumerate(lay.forced) if f] == [11, 12, 16, 17, 19]


def reference(g, ids):
    """(positions, visible) token by token, from the words of the rule."""
    tree = g.parse(ids)
    n = len(ids)
    positions, sees = [0] * n, np.tri(n, dtype=bool)

    def walk(segment, start, at):
        """Positions of tokens from index ``start`` to the segment's end, the first of them at ``at``."""
        i = start
        for block in [*segment.blocks, None]:
            stop = block.start if block else segment.stop
            until = block.goal + 1 if block else stop
            for k in range(i, until):
                positions[k], at = at, at + 1
            if block:
                ends = [walk(p, p.start, at) for p in block.paths]
                at = walk(block.conclusion, block.conclusion.start, max(ends))
                positions[block.stop - 1], at = at, at + 1
                i = block.stop
                for a in block.paths:
                    for b in block.paths:
                        if a is not b:
                            sees[a.start : a.stop, b.start : b.stop] = False
        return at

    walk(tree, 0, 0)
    return positions, sees


def test_layout_equals_the_rule_on_nested_texts(g):
    rng = random.Random(2)
    for name in ("nested", "nested", "rows", "tree"):
        ids = render(TASKS[name](rng).parts, g)
        lay = g.layout(ids)
        positions, sees = reference(g, ids)
        assert lay.positions.tolist() == positions and (lay.mask() == sees).all()
        assert g.lengths(ids).longest == positions[-1] + 1 and g.lengths(ids).total == len(ids)


def test_a_text_without_tags_and_a_single_path_are_plain_causal(g):
    one = "a<Parallel><Goal><Outline>1: x</Outline></Goal><Path>1: 3</Path><Conclusion>7</Conclusion></Parallel>b"
    for text in ("Copy this.", one):
        lay = g.layout(enc(g, text))
        n = len(lay.positions)
        assert lay.positions.tolist() == list(range(n)) and (lay.mask() == np.tri(n, dtype=bool)).all()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (HEAD, "must come here, not the end"),
        (HEAD + "<Path>1: 3</Path><Conclusion>", "<Path> must come here, not '<Conclusion>'"),
        (HEAD + "<Path>2: 3</Path>", "path 1 must begin with '<Path>1:'"),
        (HEAD + "x<Path>1: 3</Path>", "<Path> must come here"),
        (HEAD + "<Path>1: 3</Path> <Path>2: 4</Path>", "<Path> must come here, not ' '"),
        ("3</Path>", "</Path> outside a path"),
        ("<Path>1: 3</Path>", "<Path> outside a block"),
        ("<Parallel><Goal></Goal>", "<Goal> without an outline"),
        ("<Parallel><Goal><Outline>x</Outline></Goal>", "has no number"),
        ("<Parallel><Goal><Outline>1: x</Outline><Outline>1: y</Outline></Goal>", "two outlines have the number 1"),
        ("<Goal><Outline>1: x</Outline></Goal>", "<Goal> outside the start of a block"),
        (HEAD + "<Path>1: 3", "ends before </Path>"),
        (HEAD + "<Path>1:" + HEAD, "outline 1 inside path 1: it must begin with 1."),
    ],
)
def test_malformed_texts_are_refused_with_index_and_reason(g, text, reason):
    ids = enc(g, text)
    with pytest.raises(StructureError, match="token") as e:
        g.parse(ids)
    assert reason in str(e.value) and 0 <= e.value.index <= len(ids)


def test_what_serving_reads_at_the_end_of_a_goal(g):
    assert g.outlines(enc(g, "some text " + HEAD)) == ("1", "2")
    with pytest.raises(StructureError, match="outside a block"):
        g.outlines(enc(g, "text</Goal>"))
    with pytest.raises(StructureError, match="outside a block"):
        g.outlines(enc(g, "<Goal><Outline>1: x</Outline></Goal>"))
    with pytest.raises(StructureError, match="two outlines"):
        g.outlines(enc(g, "<Parallel><Goal><Outline>1: x</Outline><Outline>1: x</Outline></Goal>"))


def test_tags_must_be_single_tokens_and_are_kept_beside_the_weights(tmp_path):
    with pytest.raises(InputError, match=r"'<Outlines>' \(goal_open\) is \d+ tokens"):
        Grammar(Tags(goal_open="<Outlines>"), workbook._tokenizer())
    with pytest.raises(UnsupportedError, match="not trained"):
        read_tags(tmp_path)
    write_tags(tmp_path, THREADWEAVER, modes={"parallel": "x"})
    assert read_tags(tmp_path) == (THREADWEAVER, {"modes": {"parallel": "x"}})


def test_lengths_of_the_published_example_and_of_broken_texts(tw, g):
    ids = tw.ids
    thread = [ids["path_open"], *[900] * 50, ids["path_close"]]
    text = [900, ids["open"], *thread, *thread, ids["close"]]
    got = tw.lengths(text, tags_serial=True)
    assert (got.total, got.longest) == (107, 57) and 1 - got.longest / got.total == pytest.approx(0.467, abs=1e-3)
    assert tw.lengths(text).longest == 55
    assert tw.lengths(text[:-1], tags_serial=True).longest == 56  # closed where the text ends
    assert tw.lengths([ids["path_close"], ids["close"], 900]).longest == 3
    inner = [ids["open"], ids["path_open"], 900, ids["close"], ids["path_close"]]
    assert tw.lengths(inner).longest == 5  # a closing tag inside a thread is literal


def test_the_curator_finds_every_group_again(g, tw):
    rng, curator = random.Random(5), Curator()
    for name, make in TASKS.items():
        for case in (make(rng) for _ in range(25)):
            got = curator.curate(case.prompt, case.flat, g)
            assert got.parts == case.parts and (got.blocks > 0) == (name in INDEPENDENT)
            assert distance(case.flat.split(), flat_of(case.parts).split()) == 0
            assert final(case.flat) == final(g.decode(render(case.parts, g))) == case.answer
            tree = tw.parse(render(case.parts, tw))
            assert all(not p.blocks for b in tree.blocks for p in b.paths)
            assert workbook.exact("", case.answer, case.answer)


def test_the_curator_rejects_with_a_reason(g):
    case = TASKS["rows"](random.Random(1))
    harsh = Curator(rewrite=lambda text, prompt: "c: nothing is left of it")
    done, rejected = harsh.curate_all([(case.prompt, case.flat)], g)
    assert done[0].parts is None and "of the words differ" in rejected[0]
    broken = Curator(title=lambda title, prompt: title + "</Outline>")
    assert "token" in broken.curate(case.prompt, case.flat, g).reason
    steps = extract("a: 1 + 2 = 3.\nNext, b: 4 + 5 = 9.\n- c: 3 + 9 = 12.")
    assert [s.title for s in steps] == ["a", "b"] and steps[1].subs[0].title == "c"
    got = Curator(most=0.5).curate("a: 1, 2\nb: 4, 5", "a: 1 + 2 = 3.\nNext, b: 4 + 5 = 9.\nSum: 3 + 9 = 12.")
    assert got.parts[0].branches[1].parts == ("4 + 5 = 9.",) and got.parts[0].conclusion == "Sum: 3 + 9 = 12."
    chain = Curator().curate("a: 1, 2\nb: 4", "a: 1 + 2 = 3.\nb: 3 + 4 = 7.")
    assert chain.parts == ("a: 1 + 2 = 3.", "b: 3 + 4 = 7.") and chain.blocks == 0
