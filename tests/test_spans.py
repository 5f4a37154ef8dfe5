"""Structured attention in training: the packed loss, its mask, and data that can be resumed."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stretto.errors import InputError, OptionError
from stretto.models.context import PackedContext
from stretto.training import parallel_units as units
from stretto.training.nets import PackedNet
from stretto.training.recipes import find_recipe
from stretto.training.spans import StructuredAttention, checked, pack_spans
from stretto.zoo import workbook
from test_training import tiny_model


@pytest.fixture(scope="module")
def g():
    return units.grammar_of()


@pytest.fixture(scope="module")
def model():
    return tiny_model(2048)


def documents(g, n=4, modes=("parallel", "sequential", "auto")):
    rng = random.Random(3)
    return checked(g, [units.pair_of(c, rng.choice(modes), g) for c in units.cases("train", n, 1)])


def alone(model, doc):
    """Logits [n, V] of one document by one dense forward."""
    n = len(doc.tokens)
    mask = torch.from_numpy(doc.layout.mask())
    ctx = PackedContext([n], kind=mask)
    return model.logits(model.hidden(torch.tensor(doc.tokens), torch.from_numpy(doc.layout.positions), ctx))


def test_packed_loss_and_gradients_equal_separate_texts(g, model):
    docs = documents(g)
    batch = pack_spans(docs, 900, pad_id=1)
    loss = StructuredAttention()(PackedNet(model), batch, torch.Generator())
    total = count = 0
    for doc in docs:
        judged = ~doc.layout.forced
        judged[: doc.prompt] = False
        at = torch.from_numpy(np.flatnonzero(judged))
        total = total + F.cross_entropy(alone(model, doc)[at - 1], torch.tensor(doc.tokens)[at], reduction="sum")
        count += len(at)
    assert loss.labels == count
    torch.testing.assert_close(loss.value, total / count, atol=1e-5, rtol=1e-5)
    got = torch.autograd.grad(loss.value, list(model.parameters()))
    want = torch.autograd.grad(total / count, list(model.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_paths_are_blind_to_siblings_and_the_conclusion_sees_all(g, model):
    doc = next(d for d in documents(g, 30, ("parallel",)) if d.layout.forced.any())
    tree = g.parse(doc.tokens, start=doc.prompt)
    block = tree.blocks[0]
    first, second = block.paths[:2]
    changed = list(doc.tokens)
    changed[first.body] = changed[first.body] + 1
    with torch.no_grad():
        a, b = alone(model, doc), alone(model, replace(doc, tokens=changed))
    assert torch.equal(a[second.start : second.stop], b[second.start : second.stop])
    assert not torch.equal(a[first.body], b[first.body])
    assert not torch.equal(a[block.conclusion.start], b[block.conclusion.start])


def test_judged_are_the_tokens_that_the_model_writes(g):
    for doc in documents(g, 12):
        batch = pack_spans([doc], len(doc.tokens) + 3, pad_id=1)
        judged = batch.judged[0]
        assert not judged[: doc.prompt].any() and judged[len(doc.tokens) - 1] and not judged[len(doc.tokens) :].any()
        for i, token in enumerate(doc.tokens):
            role = g.roles.get(token)
            if role in ("path_open", "conclusion_open"):
                assert not judged[i]
            elif role is not None:
                assert judged[i]
        assert (batch.mask()[0, : len(doc.tokens), : len(doc.tokens)].numpy() == doc.layout.mask()).all()


def test_malformed_samples_are_rejected_with_index_and_reason(g):
    good = units.pair_of(units.cases("train", 1, 1)[0], "parallel", g)
    bad = (good[0], [*good[1][:-1], g.ids["path_close"]])
    with pytest.raises(InputError, match=r"example 1: token \d+: </Path> outside a path"):
        checked(g, [good, bad])
    with pytest.raises(OptionError, match="longest example"):
        pack_spans(checked(g, [good]), 20, pad_id=1)


def test_the_curriculum_goes_from_flat_to_parallel_and_resumes(g):
    recipe = replace(find_recipe("tiny-multiverse"), seed=4)
    now = [0.0]
    data = units.parallel_data(recipe, lambda: now[0], pad_id=1)
    open_id = g.ids["open"]
    it, seen = iter(data), {}
    first = next(it)
    assert not (first.tokens == open_id).any()
    now[0] = 0.95
    while data.position[0] < 7_000_000:
        batch = next(it)
    place = data.position
    again = units.parallel_data(recipe, lambda: 0.0, pad_id=1)
    again.position = (place[0], place[1] - 1)
    assert torch.equal(next(iter(again)).tokens, batch.tokens)
    seen = {k: sum(int((b.tokens == open_id).any()) for b in data._batches(k * 1_000_000 + 1)) for k in (1, 7)}
    assert seen[1] == 0 and seen[7] > 0


def test_splits_are_disjoint_and_tags_start_as_their_words(g):
    train = {c.prompt for c in units.cases("train", 200, 1)}
    assert not train & {c.prompt for c in units.cases("test", 50, 1)}
    assert all(workbook._split(p) == "train" for p in train)
    net = tiny_model(2048)
    want = net.model.embed_tokens.weight[g.encode("/Path")].mean(0).clone()
    units.initialise_tags(net, g)
    assert torch.equal(net.model.embed_tokens.weight[g.ids["path_close"]], want)
