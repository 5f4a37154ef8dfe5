"""Trie packs equal separate samples in loss and gradients."""

import random

import torch
import torch.nn.functional as F

from stretto.models.context import PackedContext
from stretto.training.nets import PackedNet
from stretto.training.tool_units import case_units, cases
from stretto.training.trie import TrieData, TrieLoss, Unit, flatten, pack_tries
from test_training import tiny_model


def some_units(rng, n=4):
    stem = [rng.randrange(3, 20) for _ in range(rng.randint(1, 6))]
    units = []
    for _ in range(rng.randint(1, n)):
        tail = [rng.randrange(3, 6) for _ in range(rng.randint(1, 5))]  # few tokens, so that tails share a start
        units.append(Unit([*stem, *tail], rng.randint(1, len(stem)), rng.choice([0.15, 1.0, 2.0])))
    return units


def separate(model, examples):
    """The same loss from one plain causal pass a unit."""
    total, weights = 0.0, 0.0
    for units in examples:
        for unit in units:
            ids = torch.tensor(unit.tokens)
            hidden = model.hidden(ids, torch.arange(len(ids)), PackedContext([len(ids)], device=ids.device))
            loss = F.cross_entropy(model.logits(hidden[:-1]), ids[1:], reduction="none")
            total = total + unit.weight * loss[max(unit.learnt, 1) - 1 :].sum()
            weights += unit.weight * (len(ids) - max(unit.learnt, 1))
    return total / weights


def test_packed_loss_and_gradients_equal_separate_samples():
    rng = random.Random(1)
    model = tiny_model().double()
    examples = [some_units(rng) for _ in range(6)]
    batch = pack_tries(examples, 40, pad_id=0)
    loss = TrieLoss()(PackedNet(model), batch, torch.Generator()).value
    want = separate(model, examples)
    torch.testing.assert_close(loss, want, atol=1e-6, rtol=1e-6)
    got = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    ref = torch.autograd.grad(want, list(model.parameters()), allow_unused=True)
    for a, b in zip(got, ref, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-6))


def test_a_shared_token_is_laid_out_once_and_counts_for_all():
    units = [Unit([5, 6, 7, 8], 2), Unit([5, 6, 7, 9], 2, 0.5), Unit([5, 6, 4], 3)]
    flat = flatten(units)
    assert flat.tokens == [5, 6, 7, 8, 9, 4] and flat.positions == [0, 1, 2, 3, 3, 2]
    assert flat.parent == [-1, 0, 1, 2, 2, 1] and flat.leave == [6, 6, 5, 4, 5, 6]
    assert flat.weight == [0, 0, 1.5, 1.0, 0.5, 0.0]


def test_a_place_sees_its_ancestors_and_nobody_else():
    rng = random.Random(3)
    batch = pack_tries([some_units(rng, 5) for _ in range(5)], 48, pad_id=0)
    mask = batch.mask()
    for r in range(len(mask)):
        for i in range(48):
            if batch.docs[r, i] < 0:
                continue
            line, at = set(), i
            while at >= 0:
                line.add(at)
                at = int(batch.parent[r, at])
            assert set(mask[r, i].nonzero().flatten().tolist()) == line


def test_streams_of_a_call_share_the_prompt_and_resume():
    made = cases("train", 30, 5)
    for case in made:
        units = case_units(case)
        assert len(flatten(units).tokens) < sum(len(u.tokens) for u in units) / 2
    data = TrieData(lambda k: [case_units(c) for c in cases("train", 20, k)], rows=4, length=288, pad_id=1)
    first = [next(iter(data)) for _ in range(1)]
    place = data.position
    again = TrieData(lambda k: [case_units(c) for c in cases("train", 20, k)], rows=4, length=288, pad_id=1)
    it = iter(again)
    next(it)
    assert again.position == place and torch.equal(first[0].tokens, next(iter(TrieData(
        lambda k: [case_units(c) for c in cases("train", 20, k)], rows=4, length=288, pad_id=1))).tokens)
