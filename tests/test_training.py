"""The trainer and its objectives against brute force, on models of a few thousand parameters."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from stretto.errors import CheckpointError, OptionError, UnknownNameError
from stretto.models.config import ModelConfig, MoEConfig
from stretto.models.context import PackedContext
from stretto.models.transformer import Transformer
from stretto.training.data import Document, PackedData, pack
from stretto.training.nets import PackedNet, balance_loss, initialise, upcycle
from stretto.training.noise import hide, stratified
from stretto.training.objectives import (
    Autoregressive,
    Balanced,
    BlockDiffusion,
    MaskedDiffusion,
    causal_mask,
    two_stream,
)
from stretto.training.optim import orthogonalise, schedule
from stretto.training.parts import KINDS
from stretto.training.probe import match_autoregressive, match_diffusion
from stretto.training.recipes import RECIPES, PartRecipe, Recipe, find_recipe
from stretto.training.trainer import TrainConfig, Trainer
from stretto.zoo.models import MODELS, PARTS, resolve

PAD, MASK, EOS = 0, 1, 2


def tiny_model(vocabulary: int = 20, *, layers: int = 2, moe: int = 0, seed: int = 0) -> Transformer:
    routed = MoEConfig(moe, 2, 16, renormalize=True, cast=True, sparse=(True,) * layers) if moe else None
    config = ModelConfig(
        "qwen3_moe" if moe else "qwen3", vocabulary, 16, 32, layers, 2, 1, 8, tie_word_embeddings=True, qk_norm=True,
        moe=routed,
    )
    model = Transformer(config)
    initialise(model, seed, layers=layers)
    return model


def some_documents(n: int, *, seed: int = 0, low: int = 3, high: int = 20) -> list[Document]:
    rng = random.Random(seed)
    out = []
    for _ in range(n):
        length = rng.randint(low, high)
        out.append(Document([rng.randrange(3, 20) for _ in range(length)], rng.randint(1, length - 2)))
    return out


class Spy(PackedNet):
    """Keeps what the objective asked and what it got."""

    def hidden(self, tokens_bt, positions_bt, mask_btt):
        self.asked = (tokens_bt, positions_bt)
        self.states = super().hidden(tokens_bt, positions_bt, mask_btt)
        return self.states


def test_pack_holds_every_document_once():
    docs = some_documents(50)
    batch = pack(docs, 24, pad_id=PAD)
    found = []
    for r in range(len(batch.tokens)):
        for k in range(int(batch.docs[r].max()) + 1):
            at = batch.docs[r] == k
            assert batch.positions[r][at].tolist() == list(range(int(at.sum())))
            found.append(Document(batch.tokens[r][at].tolist(), int((~batch.answer[r][at]).sum())))
    assert sorted((d.tokens, d.prompt) for d in found) == sorted((d.tokens, d.prompt) for d in docs)
    assert not batch.answer[batch.docs < 0].any()
    with pytest.raises(ValueError, match="longer rows"):
        pack(docs, 8, pad_id=PAD)


def test_autoregressive_packed_equals_one_by_one():
    model, docs = tiny_model(), some_documents(9)
    loss = Autoregressive()(PackedNet(model), pack(docs, 32, pad_id=PAD), torch.Generator())
    losses = []
    for doc in docs:
        ids = torch.tensor(doc.tokens)
        logits = model(ids, torch.arange(len(ids)), PackedContext([len(ids)]))
        losses.append(F.cross_entropy(logits[doc.prompt - 1 : -1], ids[doc.prompt :], reduction="none"))
    together = torch.cat(losses)
    assert loss.labels == len(together)
    torch.testing.assert_close(loss.value, together.mean(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("block", [1, 3, 4, 8])
def test_two_streams_equal_inference(block):
    """Every noisy block = a forward of the clean blocks before it and of itself, under the block-causal mask."""
    model = tiny_model()
    batch = pack(some_documents(7), 30, pad_id=PAD)
    spy = Spy(model)
    BlockDiffusion(MASK, block)(spy, batch, torch.Generator().manual_seed(1))
    tokens = spy.asked[0]
    place = two_stream(batch, block)
    checked = 0
    for r, k in itertools.product(range(len(tokens)), range(int(batch.docs.max()) + 1)):
        at = (batch.docs[r] == k).nonzero()[:, 0]
        for start in range(0, len(at), block):
            places = at[start : start + block]
            rows = torch.isin(place[r], places).nonzero()[:, 0]
            if not batch.answer[r, places].any():
                assert len(rows) == 0
                continue
            assert place[r, rows].tolist() == places.tolist()
            noisy = tokens[r, rows]
            assert ((noisy == batch.tokens[r, places]) | batch.answer[r, places]).all()
            text = torch.cat([batch.tokens[r, at[:start]], noisy])
            states = model.hidden(text, torch.arange(len(text)), PackedContext([len(text)], ("block", block)))
            torch.testing.assert_close(spy.states[r, rows], states[start:], atol=1e-5, rtol=0)
            checked += 1
    assert checked >= 7


def all_texts(length: int = 4, symbols: int = 3) -> list[list[int]]:
    return [[3 + s for s in text] for text in itertools.product(range(symbols), repeat=length)]


def enumerated_loss(model: Transformer, kind: str | tuple[str, int]) -> float:
    """The bound of all texts of length 4: sum over hidden sets S of 1/|S| * mean over sets of that size of the CE."""
    texts = torch.tensor(all_texts())
    n, t = texts.shape
    total = 0.0
    for size in range(1, t + 1):
        sets = list(itertools.combinations(range(t), size))
        for chosen in sets:
            noisy = texts.clone()
            noisy[:, chosen] = MASK
            logits = model(noisy.flatten(), torch.arange(t).repeat(n), PackedContext([t] * n, kind)).view(n, t, -1)
            ce = F.cross_entropy(logits[:, chosen].flatten(0, 1), texts[:, chosen].flatten(), reduction="sum")
            total += float(ce) / (n * size * len(sets))
    return total / t


@pytest.mark.parametrize("law", ["bernoulli", "count"])
@torch.no_grad()
def test_masked_diffusion_has_the_enumerated_expectation(law):
    model = tiny_model(6, layers=1)
    batch = pack([Document(text, 0) for text in all_texts()] * 40, 4, pad_id=PAD)
    objective, net = MaskedDiffusion(MASK, law=law), PackedNet(model)
    losses = torch.tensor([float(objective(net, batch, torch.Generator().manual_seed(i)).value) for i in range(12)])
    error = losses.std() / math.sqrt(len(losses))
    exact = enumerated_loss(model, "full")
    assert abs(losses.mean() - exact) < 4 * error + 2e-3 * exact
    assert error < 0.02 * exact


@torch.no_grad()
def test_block_diffusion_of_one_block_is_masked_diffusion():
    model = tiny_model(6, layers=1)
    batch = pack([Document(text, 0) for text in all_texts()] * 10, 4, pad_id=PAD)
    one, other = (
        objective(PackedNet(model), batch, torch.Generator().manual_seed(3)).value
        for objective in (BlockDiffusion(MASK, 4), MaskedDiffusion(MASK, law="count"))
    )
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_shift_reads_the_state_before():
    """A shifted model whose states are those of the next place gives the unshifted loss."""
    model, batch = tiny_model(), pack(some_documents(6), 24, pad_id=PAD)

    class Ahead(PackedNet):
        def hidden(self, *args):
            return super().hidden(*args).roll(-1, 1)

    plain, shifted = (
        MaskedDiffusion(MASK, shift=shift)(net(model), batch, torch.Generator().manual_seed(0)).value
        for shift, net in ((False, PackedNet), (True, Ahead))
    )
    torch.testing.assert_close(plain, shifted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("law", ["bernoulli", "count"])
def test_weights_are_unbiased_per_place(law):
    """E[hidden * weight] = 1 at every place, whatever the sizes of the groups."""
    group = torch.repeat_interleave(torch.arange(3000), torch.tensor([1, 3, 8] * 1000))
    total = torch.zeros(len(group))
    for seed in range(20):
        hidden, weight = hide(group, torch.Generator().manual_seed(seed), law)
        total += hidden * weight.clamp(max=50)
    sizes = group.bincount()[group]
    for size in (1, 3, 8):
        assert abs(float(total[sizes == size].mean()) / 20 - 1) < 0.04
    u = stratified(64, torch.Generator().manual_seed(0))
    assert sorted((u * 64).long().tolist()) == list(range(64))


def make_trainer(folder, *, steps, objective=None, model=None, **options):
    model = model or tiny_model()
    data = PackedData(lambda k: some_documents(24, seed=k), rows=4, length=24, pad_id=PAD)
    config = TrainConfig(steps=steps, warmup=4, log_every=5, **options)
    return Trainer(model, PackedNet(model), objective or Autoregressive(), data, config, folder=folder)


@pytest.mark.parametrize("objective", [Autoregressive(), MaskedDiffusion(MASK), BlockDiffusion(MASK, 4)], ids=repr)
def test_resumed_run_repeats_the_uninterrupted_one(tmp_path, objective):
    often = {"average": 0.9, "checkpoint_minutes": 1e-9}
    whole = make_trainer(tmp_path / "whole", steps=14, objective=objective, **often)
    losses = list(whole.run().history)

    class Stop(Exception):
        pass

    def stop(record):
        if record.step == 8:
            raise Stop

    first = make_trainer(tmp_path / "cut", steps=14, objective=objective, **often)
    with pytest.raises(Stop):
        first.run(stop)
    second = make_trainer(tmp_path / "cut", steps=14, objective=objective, **often, model=tiny_model(seed=5))
    assert second.resume()
    done = second.record.step
    assert 0 < done <= 8
    assert second.run().history == losses[done:]
    for name, weight in whole.final_weights().items():
        assert torch.equal(weight, second.final_weights()[name])
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert {"step", "loss", "tokens_per_second", "factor", "seconds"} <= lines[0].keys()


@pytest.mark.parametrize("muon", [True, False])
def test_loss_falls(tmp_path, muon):
    trainer = make_trainer(tmp_path, steps=20, muon=muon, lr=0.03, adam_lr=0.02)
    trainer.data._pool = lambda k: [Document([3, 4, 5, 6, 7, 8, 9, 10], 1)] * 12
    history = trainer.run().history
    assert len(history) == 20
    assert sum(history[-3:]) < 0.7 * sum(history[:3])


def test_budget_is_checked(tmp_path):
    with pytest.raises(OptionError, match="steps, minutes, or both"):
        TrainConfig()
    with pytest.raises(OptionError, match="minutes=-1"):
        TrainConfig(minutes=-1)
    assert not make_trainer(tmp_path / "none", steps=1).resume()


def test_schedule_and_muon():
    assert schedule(0.0, 0, warmup=10, decay=0.5) == pytest.approx(0.1)
    assert schedule(0.5, 99, warmup=10, decay=0.5) == 1.0
    assert schedule(0.75, 99, warmup=10, decay=0.5) == pytest.approx(0.5)
    assert schedule(1.0, 99, warmup=10, decay=0.5) == 0.0
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(0))))
    assert float(values.min()) > 0.5 and float(values.max()) < 1.3


def test_upcycling_and_balance():
    dense, routed = tiny_model(), tiny_model(moe=4, seed=1)
    upcycle(dense, routed, seed=0)
    assert torch.equal(dense.layers[0].self_attn.q_proj.weight, routed.layers[0].self_attn.q_proj.weight)
    mean = routed.layers[0].mlp.experts.down_proj.mean(0)
    assert mean.isfinite().all()
    net, batch = PackedNet(routed, balance=True), pack(some_documents(8), 24, pad_id=PAD)
    plain = Autoregressive()(net, batch, torch.Generator()).value
    assert 0.9 < balance_loss(routed).item() < 4.0
    both = Balanced(Autoregressive(), 0.5)(net, batch, torch.Generator()).value
    torch.testing.assert_close(both, plain + 0.5 * balance_loss(routed))


def test_hidden_suffixes():
    """Share 1: the hidden places of every group are its last ones, with the weight of their number, n / l."""
    group = torch.tensor([0] * 7 + [3] * 5 + [9])
    for seed in range(5):
        hidden, weight = hide(group, torch.Generator().manual_seed(seed), "count", 1.0)
        for g in (0, 3, 9):
            mine = hidden[group == g]
            assert mine.any() and mine.tolist() == sorted(mine.tolist())
            assert torch.allclose(weight[group == g], len(mine) / mine.sum())
    mixed, _ = hide(torch.arange(400) // 8, torch.Generator().manual_seed(0), "count", 0.5)
    last = sum(g.tolist() == sorted(g.tolist()) for g in mixed.view(50, 8))
    assert 20 <= last <= 45, "about half, and what random places give by chance"
    with pytest.raises(ValueError, match="by the law 'count' only"):
        hide(group, torch.Generator(), "bernoulli", 0.5)


def test_probes_find_what_was_learnt(tmp_path):
    """A model that has learnt one text finds it greedily and by unmasking; an untrained one does not."""
    doc = Document([3, 4, 5, 6, 7, 8, 9, EOS], 2)
    batch = pack([doc] * 3, 16, pad_id=PAD)
    options = {"mask_id": MASK, "block": 4, "block_causal": True, "eos_id": EOS}
    assert not any(match_autoregressive(PackedNet(tiny_model()), batch))
    for objective in (Autoregressive(), BlockDiffusion(MASK, 4)):
        trainer = make_trainer(tmp_path / type(objective).__name__, steps=120, objective=objective)
        trainer.data._pool = lambda k: [doc] * 12
        trainer.run()
        net = PackedNet(trainer.model)
        found = (
            match_autoregressive(net, batch) if isinstance(objective, Autoregressive)
            else match_diffusion(net, batch, **options)
        )
        assert found == [True] * 3


def test_causal_mask_keeps_documents_apart():
    batch = pack(some_documents(4), 24, pad_id=PAD)
    mask = causal_mask(batch)
    for r, i, j in itertools.product(range(len(mask)), range(24), range(24)):
        assert bool(mask[r, i, j]) == (j <= i and bool(batch.docs[r, i] == batch.docs[r, j]))


def test_recipes_import_no_torch():
    code = (
        "import sys, stretto.training.recipes as r, stretto.zoo.models as m;"
        "assert 'torch' not in sys.modules; print(len(r.RECIPES) + len(m.PARTS))"
    )
    paths = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | paths)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 5


def test_names_are_checked():
    assert find_recipe("tiny") is RECIPES["zoo-tiny"]
    with pytest.raises(UnknownNameError, match="zoo-tiny-moe"):
        find_recipe("zoo-tiny-mo")
    with pytest.raises(UnknownNameError, match="did you mean 'zoo:tiny"):
        resolve("zoo:tinny")
    assert {m.recipe for m in MODELS.values()} | {f"zoo-{p}" for p in PARTS} == set(RECIPES)
    parts = {n: r for n, r in RECIPES.items() if isinstance(r, PartRecipe)}
    assert all(r.kind == PARTS[r.model].kind and r.kind in KINDS for r in parts.values())


def test_missing_weights_say_how_to_make_them(monkeypatch, tmp_path):
    monkeypatch.setattr("stretto.zoo.models._HERE", tmp_path)
    with pytest.raises(CheckpointError, match="stretto train zoo-tiny"):
        resolve("zoo:tiny")


MADE = sorted(m.recipe for m in MODELS.values() if isinstance(RECIPES[m.recipe], Recipe))  # threads: test_thread_units.py


@pytest.mark.parametrize("name", MADE)
def test_a_recipe_ships_a_loadable_model(name, tmp_path, monkeypatch):
    from stretto.models.checkpoint import load
    from stretto.training import recorded, run
    from stretto.training.recipes import run_recipe

    monkeypatch.setattr(run, "POOL", 24)
    monkeypatch.setattr(recorded, "LONGEST", 16)
    monkeypatch.setattr(recorded.Pools, "_right", lambda self, example, t: True)  # untrained models are never right
    monkeypatch.setattr(run, "test_batches", lambda recipe, n: {})
    monkeypatch.setattr(run, "fast_dtype", lambda device: None)
    small = {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn": 16, "rows": 2, "base": None}
    small["examples"] = 8
    record = run_recipe(name, out=tmp_path / "m", steps=2, changes=small, report=lambda r: None)
    model = load(tmp_path / "m", dtype="float32")
    kind = {"zoo-tiny-blocks": "block", "zoo-tiny-blocks-moe": "block", "zoo-tiny-diffusion": "full"}.get(name, "causal")
    assert (model.config.attention, model.config.shift) == (kind, False)
    assert model.config.block_size == (8 if kind == "block" else 1)
    recovers = kind != "causal" or name == "zoo-tiny-wedlm"
    assert (model.config.mask_token_id is None) == (not recovers)
    assert record == json.loads((tmp_path / "m" / "training.json").read_text())
    assert record["steps"] == 2 and record["parameters"] == sum(p.numel() for p in model.parameters())
    assert (tmp_path / "m" / "tokenizer.json").exists() and (tmp_path / "m.training" / "log.jsonl").exists()
    again = run_recipe(name, out=tmp_path / "m", steps=2, changes=small, report=lambda r: None)
    assert again["steps"] == 2


@pytest.fixture(scope="module")
def small_base(tmp_path_factory):
    """A random model of width 16 that reads the workbook's tokens."""
    model = tiny_model(2048, layers=3)
    folder = tmp_path_factory.mktemp("base") / "base"
    model.save(folder)
    return folder


@pytest.mark.parametrize("name", sorted(n for n, r in RECIPES.items() if isinstance(r, PartRecipe)))
def test_a_recipe_ships_a_loadable_part(name, tmp_path, monkeypatch, small_base):
    from stretto.models.adapter import open_adapter
    from stretto.models.checkpoint import load
    from stretto.training import parts
    from stretto.training.recipes import run_recipe

    monkeypatch.setattr(parts, "POOL", 12)
    monkeypatch.setattr(parts, "TEST_EXAMPLES", 1)
    monkeypatch.setattr(parts, "fast_dtype", lambda device: None)
    recipe = RECIPES[name]
    about = run_recipe(name, out=tmp_path / "p", base=small_base, steps=2, changes={"rows": 2}, report=lambda r: None)
    base = load(small_base, dtype="float32")
    adapter = open_adapter(recipe.kind, str(tmp_path / "p"), base)  # so the base's weights are what they were
    net = parts.FrozenNet(base)
    adapter.into(parts.make_part(recipe.kind, net, **adapter.config).module)
    assert about["steps"] == 2 and (tmp_path / "p.training" / "log.jsonl").exists()
    again = run_recipe(name, out=tmp_path / "p", base=small_base, steps=2, changes={"rows": 2}, report=lambda r: None)
    assert again["steps"] == 2 and open_adapter(recipe.kind, str(tmp_path / "p"), base).tensors.keys() == adapter.tensors.keys()
