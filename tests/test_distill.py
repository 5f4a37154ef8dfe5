"""Objectives of distillation against hand computations; adapters that load like models."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from stretto.decoding.filter import Filter
from stretto.errors import CheckpointError, UnsupportedError
from stretto.models import checkpoint
from stretto.models.adapter import fingerprint, load_adapter
from stretto.models.lora import LoRALinear, add_lora, merge_lora, save_lora
from stretto.training import self_distill
from stretto.training.data import Document, pack
from stretto.training.distill import CertaintyForcing, Dscd, FrozenBase, nested_counts, segments, spread, views_of
from stretto.training.nets import PackedNet
from stretto.training.recipes import RECIPES, DistillRecipe, find_recipe, run_recipe
from stretto.training.self_distill import objective_of, own_right_answers
from stretto.zoo import workbook
from tiny import MASK, engine, greedy, model, run, tokens

KINDS = {
    "full": {"attention": "full", "mask_token_id": MASK},
    "block": {"attention": "block", "block_size": 4, "mask_token_id": MASK},
}


def batch(seed=0, n=6):
    rng = random.Random(seed)
    docs = []
    for _ in range(n):
        length = rng.randint(8, 20)
        docs.append(Document([rng.randint(5, 40) for _ in range(length)], rng.randint(1, length - 4)))
    return pack(docs, 32, pad_id=0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Spy:
    """A net that keeps what it was asked and answers with laws of its own."""

    def __init__(self, net, logits=None):
        self.net, self.asked, self._logits = net, [], logits

    def hidden(self, tokens, positions, see):
        self.asked.append(tokens)
        return self.net.hidden(tokens, positions, see)

    def logits(self, hidden):
        return self.net.logits(hidden) if self._logits is None else self._logits(hidden)

    def balance(self):
        return torch.zeros(())


@pytest.mark.parametrize("kind", KINDS)
def test_halves_are_complementary_inside_the_segment_and_equal_elsewhere(kind):
    data, net = batch(), Spy(PackedNet(model(stretto=KINDS[kind])))
    objective = CertaintyForcing(MASK, kind, block=4)
    loss = objective(net, data, generator(3))
    views = views_of(kind, data, MASK, 4)
    active, future = segments(views, kind, generator(3))
    one, two = (tokens[:, : views.targets.shape[1]] == MASK for tokens in net.asked)
    inside, later = spread(active, views.maskable), spread(future, views.maskable)
    assert (one ^ two)[inside].all() and (one & two)[later].all() and not (one | two)[~inside & ~later].any()
    assert loss.labels == int(inside.sum()) and len({t.item() for t in views.text}) == 6
    if kind == "block":
        assert inside.sum() == data.answer.sum()
    else:
        for text in views.text.unique():
            mine = views.text == text
            chosen = views.block[mine & active]
            assert len(chosen.unique()) == 1 and (views.block[mine & future] > chosen[0]).all()


def test_certainty_is_the_entropy_of_right_predictions_alone():
    z = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.5, 0.0], [0.0, 0.0, 3.0]], requires_grad=True)
    targets = torch.tensor([0, 0, 2])  # the second is wrong
    objective = CertaintyForcing(MASK, "full")
    value = objective.certainty(z, targets)
    by_hand = 0.0
    for row in (0, 2):
        p = [math.exp(2 * v) for v in z[row].tolist()]  # T = 0.5
        p = [x / sum(p) for x in p]
        by_hand -= sum(x * math.log(x) for x in p) / 2
    assert value.item() == pytest.approx(by_hand, abs=1e-6)
    value.backward()
    assert z.grad[1].abs().max() == 0 and z.grad[0].abs().max() > 0
    wrong = objective.certainty(z, torch.tensor([1, 0, 0]))
    assert wrong.item() == 0.0 and wrong.requires_grad
    assert CertaintyForcing(MASK, "full", everywhere=True).certainty(z, targets).item() != pytest.approx(by_hand)


@pytest.mark.parametrize("kind", KINDS)
def test_certainty_forcing_is_the_sum_of_its_terms(kind):
    data, net = batch(1), PackedNet(model(stretto=KINDS[kind]))
    objective = CertaintyForcing(MASK, kind, block=4, beta=1.5)
    got = objective(net, data, generator(5)).value
    views = views_of(kind, data, MASK, 4)
    g = generator(5)
    active, future = segments(views, kind, g)
    half = active & (torch.rand(len(active), generator=g, dtype=torch.float64) < 0.5)
    want = 0.0
    for chosen in (half, active & ~half):
        at = spread(chosen, views.maskable)
        z = net.logits(views.states(net, spread(chosen | future, views.maskable))[at])
        want += F.cross_entropy(z, views.targets[at]) + 1.5 * objective.certainty(z, views.targets[at])
    torch.testing.assert_close(got, want)


def test_counts_of_student_and_teacher():
    for length in range(1, 65):
        n = torch.tensor([length])
        for a, b in ((0.4, 0.3), (0.9, 0.7), (0.65, 0.5)):
            r_s, r_t = (torch.tensor([x], dtype=torch.float64) for x in (a, min(max(a * b, 0.1), 0.6)))
            m_s, m_t = (int(x) for x in nested_counts(n, r_s, r_t))
            assert 0 <= m_t <= m_s <= length and m_s >= min(length, max(2, math.ceil(length * 0.1)))
            if length <= 10:
                assert (m_s, m_t) == (min(2, length), 1)
            elif length < 20:
                assert m_s <= max(2, length * 0.5)
            else:
                assert m_s == max(int(length * r_s.item()), 2, math.ceil(length * 0.1))
                assert m_t == min(int(length * r_t.item()), m_s)
    assert [int(x) for x in nested_counts(torch.tensor([8]), torch.tensor([1.1]), torch.tensor([0.6]), short=False)] == [8, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_masks_nest(kind):
    data = batch(2)
    views = views_of(kind, data, MASK, 4)
    student, teacher = Dscd(MASK, kind, None, block=4).masks(views, generator(1))
    assert (student | ~teacher).all() and student.sum() > teacher.sum() > 0
    free, other = Dscd(MASK, kind, None, block=4, nested=False).masks(views, generator(1))
    assert not (free | ~other).all()


def test_weight_falls_along_a_cosine():
    d, now = Dscd(MASK, "full", None), [0.0]
    d.progress = lambda: now[0]
    for now[0], want in ((0.0, 0.9), (0.1, 0.9), (0.55, 0.7), (1.0, 0.5)):
        assert d.weight() == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("positions", ["student", "both", "truth"])
def test_dscd_is_its_formula(positions):
    data = batch(3)
    student, teacher = PackedNet(model(stretto=KINDS["block"])), PackedNet(model(seed=1, stretto=KINDS["block"]))
    d = Dscd(MASK, "block", teacher, block=4, positions=positions)
    got = d(student, data, generator(2))
    views = views_of("block", data, MASK, 4)
    s, t = d.masks(views, generator(2))
    hide_s, hide_t = spread(s, views.maskable), spread(t, views.maskable)
    z_s = student.logits(views.states(student, hide_s)[hide_s])
    p = torch.softmax(teacher.logits(views.states(teacher, hide_t)[hide_s]) / 2, -1)
    targets, blind = views.targets[hide_s], hide_t[hide_s]
    if positions == "truth":
        p = torch.where(blind[:, None], p, F.one_hot(targets, p.shape[1]).float())
    kl = (torch.special.xlogy(p, p) - p * torch.log_softmax(z_s / 2, -1)).sum(-1)
    kl = 4 * (kl[blind] if positions == "both" else kl).mean()
    want = 0.9 * kl.clamp(max=5) + 0.1 * F.cross_entropy(z_s, targets).clamp(max=5)
    torch.testing.assert_close(got.value, want, atol=1e-5, rtol=1e-5)
    assert got.labels == int(hide_s.sum())


def test_nothing_to_learn_from_a_twin_that_sees_the_same():
    net = PackedNet(model(stretto=KINDS["block"]))
    d = Dscd(MASK, "block", net, block=4)
    views = views_of("block", batch(4), MASK, 4)
    hide = spread(d.masks(views, generator(1))[0], views.maskable)
    z = net.logits(views.states(net, hide)[hide])
    assert d._consistency(views, z, views.targets[hide], hide, hide).abs() < 1e-6


def test_the_frozen_base_is_the_model_without_its_paths_and_stays_as_it_was():
    net = model(scale=0.5, stretto=KINDS["block"])
    before = {n: p.clone() for n, p in net.named_parameters()}
    data, plain = batch(5), PackedNet(net)
    args = (data.tokens, data.positions, views_of("block", data, MASK, 4)._see[:, -32:, -32:])
    want = plain.hidden(*args)
    add_lora(net, rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
    paths = [m for m in net.modules() if isinstance(m, LoRALinear)]
    for m in paths:
        torch.nn.init.normal_(m.lora_B.weight, std=0.02)
    base = FrozenBase(net)
    torch.testing.assert_close(base.hidden(*args), want)
    assert not torch.allclose(plain.hidden(*args), want) and all(m.scale == 2.0 for m in paths)
    loss = Dscd(MASK, "block", base, block=4)(plain, data, generator(1)).value
    loss.backward()
    assert all(p.grad is None for n, p in net.named_parameters() if ".lora_" not in n)
    assert any(m.lora_A.weight.grad.abs().max() > 0 for m in paths)
    for n, p in net.named_parameters():
        if ".lora_" not in n:
            assert torch.equal(p, before[n])


def test_an_adapter_folder_loads_like_a_model_and_knows_its_base(tmp_path):
    net = model(stretto=KINDS["block"])
    checkpoint.save(net, tmp_path / "base")
    known = fingerprint(net)
    add_lora(net, rank=2, alpha=4.0, targets=("q_proj", "up_proj"))
    for m in net.modules():
        if isinstance(m, LoRALinear):
            torch.nn.init.normal_(m.lora_B.weight, std=0.1)
    save_lora(net, tmp_path / "part", base=str(tmp_path / "base"), fingerprint=known)
    loaded = checkpoint.load(tmp_path / "part", dtype="float32")
    assert checkpoint.load_config(tmp_path / "part") == checkpoint.load_config(tmp_path / "base")
    merged = merge_lora(net)
    for (n, a), (_, b) in zip(loaded.named_parameters(), merged.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=n)
    checkpoint.save(model(seed=9, stretto=KINDS["block"]), tmp_path / "base")
    with pytest.raises(UnsupportedError, match="another model"):
        checkpoint.load(tmp_path / "part")
    (tmp_path / "part" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="base_model_name_or_path"):
        checkpoint.load(tmp_path / "part")


def test_only_right_answers_that_end_are_kept():
    examples = workbook.examples("list_copy", "train", 4, 0)
    truth = [workbook.encode(e)[1] for e in examples]
    wrong = workbook.encode(examples[1])[1]

    def answers(prompts, rooms):
        return [truth[0], wrong[:2] + truth[2], truth[2][:-1], truth[3]]

    docs = own_right_answers(examples, answers, 400, truth[0][-1], 8)
    assert [list(d.tokens[d.prompt :][: len(t)]) for d, t in zip(docs, (truth[0], truth[3]), strict=True)] == [truth[0], truth[3]]
    assert all(len(d.tokens) % 8 == 0 and d.tokens[-1] == truth[0][-1] for d in docs)


@pytest.fixture(scope="module")
def small_base(tmp_path_factory):
    """A random block diffusion model that reads the workbook's tokens."""
    folder = tmp_path_factory.mktemp("base") / "base"
    section = {"attention": "block", "block_size": 8, "mask_token_id": 2}
    checkpoint.save(model(stretto=section, vocab_size=2048, eos_token_id=4), folder)
    return folder


@pytest.mark.parametrize("name", sorted(n for n, r in RECIPES.items() if isinstance(r, DistillRecipe)))
def test_a_recipe_ships_an_adapter_that_loads(name, tmp_path, monkeypatch, small_base):
    monkeypatch.setattr(self_distill, "POOL", 12)
    monkeypatch.setattr(self_distill, "fast_dtype", lambda device: None)

    def truths(examples, answers, length, eos, multiple):  # an untrained model is never right
        pairs = [workbook.encode(e) for e in examples]
        return [Document([*p, *a], len(p)) for p, a in pairs if len(p) + len(a) <= length]

    monkeypatch.setattr(self_distill, "own_right_answers", truths)
    changes: dict = {"rows": 2}
    if RECIPES[name].objective == "dscd":  # against the truth an untrained model is beyond the clip: no gradient
        changes["options"] = {"positions": "both"}
    how = {"base": small_base, "steps": 2, "changes": changes, "report": lambda r: None}
    about = run_recipe(name, out=tmp_path / "p", **how)
    assert about["steps"] == 2 and about["own_answers"]["right"] > 0
    adapted, base = (checkpoint.load(f, dtype="float32") for f in (tmp_path / "p", small_base))
    assert adapted.config == base.config
    assert any(not torch.equal(a, b) for a, b in zip(adapted.parameters(), base.parameters(), strict=True))
    assert run_recipe(name, out=tmp_path / "p", **how)["steps"] == 2


def test_a_recipe_ships_a_filter_that_decodes(tmp_path, small_base):
    how = {"base": small_base, "steps": 30, "changes": {"prompts": 3, "held_out": 2}, "report": lambda r: None}
    about = run_recipe("tiny-blocks-filter", out=tmp_path / "f", **how)
    net = checkpoint.load(small_base, dtype="float32")
    assert Filter(load_adapter(tmp_path / "f").check(net, "learn2pd")).block == 8 == about["block"]
    job = ([7, 8, 9], greedy(9, ignore_eos=True), "diffusion", {"unmask": "filter", "filter": str(tmp_path / "f")})
    eng = engine(net, stop=(4,))
    eng.host.parts = None  # from the disk
    assert len(tokens(run(eng, [job])[0][0])) == 9


def test_recipes_build_their_objectives():
    net = model(stretto=KINDS["block"])
    for name, kind in (("tiny-dparallel", CertaintyForcing), ("tiny-cd4lm", Dscd)):
        made = objective_of(find_recipe(name), net)
        assert isinstance(made, kind) and made.block == 4 and made.attention == "block"
        assert torch.isfinite(made(PackedNet(net), batch(6), generator(0)).value)
