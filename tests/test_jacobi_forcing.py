"""Jacobi Forcing: trajectories, packed training and multi-block decoding against slow definitions."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stretto.decoding.registry import make
from stretto.errors import CheckpointError, OptionError, StrettoError, UnsupportedError
from stretto.models.context import plain_logits
from stretto.training.jacobi import JacobiForcing, TrajectoryData, noise_targets, pack
from stretto.training.nets import PackedNet
from stretto.training.recipes import Recipe, find_recipe
from stretto.training.recorded import Pools
from stretto.training.trainer import TrainConfig, Trainer
from stretto.training.trajectories import Block, Trajectory, collect, read, write
from tiny import EOS, MASK, V, engine, greedy, model, run, tokens

N = 5


def prompts(n: int):
    rng = random.Random(3)
    return [[rng.randrange(5, V) for _ in range(rng.randint(3, 12))] for _ in range(n)]


@pytest.fixture(scope="module")
def net():
    return model()


@pytest.fixture(scope="module")
def recorded(net):
    return collect(net, prompts(6), n=N, seed=1, stop_ids=[EOS], banned=range(5), max_tokens=23)


def test_trajectories_end_in_the_greedy_text(net, recorded):
    found, sums = recorded
    want = run(engine(net), [(p, greedy(23), "ar", {}) for p in prompts(6)])
    assert [t.tokens[t.prompt :] for t in found] == [tokens(s) for (s,) in want]
    assert 0 < sums["forwards"] <= sums["tokens"] + 2 * len(found)
    for t in found:
        at = t.prompt
        for block in t.blocks:
            m = block.states.shape[1]
            assert block.start == at and 2 <= m <= N and block.states.dtype == np.int32
            assert block.states[-1].tolist() == t.tokens[at : at + m]
            assert (block.states[:, 0] == t.tokens[at]).all(), "the seed is known right"
            assert not set(block.states[0, 1:].tolist()) & set(range(5)), "no banned token in a random start"
            noise = block.noise()
            assert (np.diff(noise) <= 0).all() and noise[-1] == 0 and len(noise) <= m
            at += m
        assert len(t.tokens) - at <= 1


def test_states_are_the_models_own_answers(net, recorded):
    for t in recorded[0][:2]:
        for block in t.blocks:
            for before, after in zip(block.states, block.states[1:], strict=False):
                text = t.tokens[: block.start] + before.tolist()
                answers = plain_logits(net, text).argmax(-1).tolist()[block.start :]
                fixed = int(np.argmax([*(before != block.states[-1]), True]))
                assert after[fixed:].tolist() == answers[fixed - 1 : -1]


def test_noise_targets():
    rng = random.Random(0)
    assert noise_targets(6, 4, "progressive", 0, rng) == pytest.approx([0, 1 / 3, 2 / 3, 1, 0, 1 / 3])
    assert noise_targets(3, 4, "progressive", 3, rng) == pytest.approx([1, 0, 1 / 3])
    assert noise_targets(5, 4, "reversed", 0, rng) == pytest.approx([1, 2 / 3, 1 / 3, 0, 1])
    assert set(np.round(noise_targets(99, 3, "random", 0, rng), 3)) == {0.0, 0.5, 1.0}
    assert noise_targets(2, 1, "progressive", 0, rng) == [1.0, 1.0]
    with pytest.raises(OptionError, match="linear"):
        noise_targets(2, 2, "linear", 0, rng)


def test_packed_forward_equals_one_by_one(net, recorded):
    batch = pack(recorded[0], window=2, schedule="progressive", length=90, pad_id=0, rng=random.Random(2))
    hidden = PackedNet(net).hidden(batch.tokens, batch.positions, batch.mask())
    logits, checked = net.logits(hidden), 0
    for r in range(len(batch.tokens)):
        for d in range(int(batch.docs[r].max()) + 1):
            inside, noisy = batch.docs[r] == d, batch.blocks[r] >= 0
            clean = (inside & ~noisy).nonzero()[:, 0]
            text = batch.tokens[r, clean].tolist()
            assert torch.allclose(logits[r, clean], plain_logits(net, text), atol=1e-4)
            for begin in batch.window[r, inside & noisy].unique().tolist():
                places = (inside & noisy & (batch.window[r] == begin)).nonzero()[:, 0]
                want = plain_logits(net, text[:begin] + batch.tokens[r, places].tolist())[begin:]
                assert torch.allclose(logits[r, places], want, atol=1e-4)
                checked += 1
    assert checked > 8


def test_learnt_places_are_those_with_noise_before_them(net, recorded):
    batch = pack(recorded[0], window=2, schedule="progressive", length=90, pad_id=0, rng=random.Random(2))
    learnt = 0
    for r, i in (batch.blocks >= 0).nonzero().tolist():
        twin = int(batch.teacher[r, i])
        same = (batch.docs[r] == batch.docs[r, i]) & (batch.window[r] == batch.window[r, i])
        same &= (batch.blocks[r] >= 0) & (batch.positions[r] <= batch.positions[r, i])
        text = batch.tokens[r][(batch.docs[r] == batch.docs[r, i]) & (batch.blocks[r] < 0)]
        noise = (batch.tokens[r][same] != text[batch.positions[r][same]]).any()
        assert (twin >= 0) == bool(noise and batch.positions[r, i] + 1 < len(text))
        if twin >= 0:
            learnt += 1
            assert batch.blocks[r, twin] < 0 and batch.docs[r, twin] == batch.docs[r, i]
            assert batch.positions[r, twin] == batch.positions[r, i]
    assert learnt > 10 and not (batch.teacher[batch.blocks < 0] >= 0).any()


def test_loss_is_the_papers(net, recorded):
    batch = pack(recorded[0], window=2, schedule="progressive", length=90, pad_id=0, rng=random.Random(2))

    class Net(PackedNet):
        def hidden(self, *args):
            self.states = super().hidden(*args).detach().requires_grad_()
            return self.states

    spy = Net(net)
    loss = JacobiForcing(ar_weight=0.0)(spy, batch, torch.Generator())
    loss.value.backward()
    learnt = batch.teacher >= 0
    assert (spy.states.grad[~learnt] == 0).all(), "no gradient reaches the teacher's rows"
    assert (spy.states.grad[learnt].abs().sum(-1) > 0).all()
    logits, blocks = net.logits(spy.states).detach(), {}
    for r, i in learnt.nonzero().tolist():
        law = logits[r, batch.teacher[r, i]].softmax(-1)
        blocks.setdefault((r, int(batch.blocks[r, i])), []).append(-(law * logits[r, i].log_softmax(-1)).sum())
    want = torch.stack([torch.stack(b).mean() for b in blocks.values()]).mean()
    assert torch.allclose(loss.value, want, atol=1e-5)
    whole = JacobiForcing(ar_weight=10.0)(spy, batch, torch.Generator()).value
    following = (batch.answer[:, 1:] & (batch.docs[:, 1:] == batch.docs[:, :-1])).nonzero().tolist()
    ar = torch.stack([F.cross_entropy(logits[r, i], batch.tokens[r, i + 1]) for r, i in following]).mean()
    assert torch.allclose(whole, want + 10 * ar, atol=1e-4)


def test_files_of_trajectories(tmp_path, recorded):
    found, path = recorded[0], tmp_path / "pool.safetensors"
    write(path, found, {"n": N, "base": "abc"})
    back, about = read(path, {"base": "abc"})
    assert about["n"] == N and [t.tokens for t in back] == [t.tokens for t in found]
    for a, b in zip(back, found, strict=True):
        assert [(x.start, x.states.tolist()) for x in a.blocks] == [(x.start, x.states.tolist()) for x in b.blocks]
    with pytest.raises(CheckpointError, match="'abc'.*'other'"):
        read(path, {"base": "other"})
    path.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="not a file of trajectories"):
        read(path, {})


def test_training_resumes_bit_for_bit(tmp_path, recorded):
    def trainer(folder, steps):
        net = model(seed=2, scale=1.0).train()
        data = TrajectoryData(
            lambda k: recorded[0][k % 3 :], rows=2, length=90, pad_id=0, seed=0, window=2, epochs=2
        )
        config = TrainConfig(steps=steps, seed=0, warmup=1, average=0.5)
        t = Trainer(net, PackedNet(net), JacobiForcing(), data, config, folder=folder)
        t.resume()
        return t

    whole = trainer(None, 5)
    whole.run()
    first = trainer(tmp_path, 5)
    batches = iter(first.data)
    for _ in range(3):
        first._step(batches)
    first.save()
    second = trainer(tmp_path, 5)
    second.run()
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_pools_keep_right_answers_and_grow(tmp_path):
    recipe = find_recipe("tiny-jacobi")
    assert isinstance(recipe, Recipe)
    from stretto.training.run import build_model

    base = build_model(recipe)
    pools = Pools(recipe, base, tmp_path, examples=8)
    first = pools(0)
    assert 0 < len(first) <= 8 and (tmp_path / "pool-00000.safetensors").exists()
    _, about = read(tmp_path / "pool-00000.safetensors", pools.expect)
    assert about["n"] == recipe.trajectories[0] and about["right"] == len(first)
    pools.progress = lambda: 0.99
    pools(1)
    assert read(tmp_path / "pool-00001.safetensors", {})[1]["n"] == recipe.trajectories[-1]
    assert [t.tokens for t in pools(0)] == [t.tokens for t in first], "the file is read again"
    with torch.no_grad():
        for p in base.parameters():
            p.zero_()
    with pytest.raises(StrettoError, match="none of 8 answers is right"):
        pools(2)
    with pytest.raises(CheckpointError, match="base"):
        Pools(recipe, base, tmp_path, examples=8)(0)


def naive(net, prompt, n, count):
    """Block after block by plain forwards: the text, and the number of forwards."""
    text, forwards = list(prompt), 0
    while len(text) - len(prompt) < count:
        root = len(text) - 1
        guesses = [text[(root + 1 + i) * 2654435761 % (root + 1)] for i in range(n - 1)]
        end = root + n
        while len(text) - 1 < end and len(text) - len(prompt) < count:
            guesses = guesses[: min(end - len(text), count - (len(text) - len(prompt)) - 1)]
            answers = plain_logits(net, text + guesses).argmax(-1).tolist()[len(text) - 1 :]
            forwards += 1
            hits = 0
            while hits < len(guesses) and guesses[hits] == answers[hits]:
                hits += 1
            text += answers[: hits + 1]
            guesses = answers[hits + 1 :]
    return text[len(prompt) :], forwards


def test_one_block_without_pool_is_plain_jacobi(net):
    for prompt in prompts(3):
        options = {"block_size": 4, "num_blocks": 1, "pool_size": 0}
        (stream,) = run(engine(net), [(prompt, greedy(20, ignore_eos=True), "jacobi_forcing", options)])[0]
        text, forwards = naive(net, prompt, 4, 20)
        assert tokens(stream) == text and stream.seq.metrics.forwards == forwards


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_blocks_and_branches_raise_tokens_per_forward(backend):
    """On a text that repeats, guesses come true; every forward gives at least one token and no more than its rows."""
    net = model(seed=4)
    text = [7, 8, 9, 10] * 6
    eng = engine(net, backend=backend)
    for options in ({}, {"num_blocks": 4, "spawn_ratio": 0.1}, {"pool_size": 16, "max_candidates": 3}):
        (got,) = run(eng, [(text, greedy(40, ignore_eos=True), "jacobi_forcing", options)])[0]
        (want,) = run(eng, [(text, greedy(40, ignore_eos=True), "ar", {})])[0]
        assert tokens(got) == tokens(want)
        m = got.seq.metrics
        assert m.forwards <= 40 and m.accepted + m.forwards == m.tokens


def test_a_spawned_block_waits_for_its_share(net):
    eng = engine(net)
    method = make("jacobi_forcing", eng.host, {"block_size": 4, "num_blocks": 2, "spawn_ratio": 1.0})
    (stream,) = eng.add(prompts(1)[0], greedy(40, ignore_eos=True), method)
    widest = 0
    while eng.busy:
        rows, before = eng.rows, len(stream.seq.tokens)
        eng.step()
        widest = max(widest, eng.rows - rows) if before > 20 else widest
    assert widest <= 2 * 4 + 3, "at most two blocks and one branch"


def test_refusals(net, recorded):
    with pytest.raises(OptionError, match="length=4"):
        pack(recorded[0], window=2, schedule="random", length=4, pad_id=0, rng=random.Random(0))
    with pytest.raises(OptionError, match="block_size"):
        make("jacobi_forcing", engine(net).host, {"block_size": 1})
    with pytest.raises(OptionError, match="spawn_ratio"):
        make("jacobi_forcing", engine(net).host, {"spawn_ratio": 0})
    full = model(stretto={"attention": "full", "mask_token_id": MASK})
    with pytest.raises(UnsupportedError, match="causal"):
        run(engine(full), [([5, 6], greedy(4), "jacobi_forcing", {})])
    with pytest.raises(UnsupportedError, match="temperature 0"):
        from stretto.engine.params import SamplingParams
        from stretto.training.trajectories import Recorder

        eng = engine(net)
        eng.add([5, 6], SamplingParams(max_tokens=3, temperature=1.0), Recorder(4, 0, ()))


def test_choosing_states_takes_the_nearest_noise():
    from stretto.training.jacobi import choose_states

    states = np.array([[1, 9, 9, 9], [1, 2, 9, 9], [1, 2, 3, 4]], np.int32)
    t = Trajectory([5, 1, 2, 3, 4], 1, [Block(1, states)] * 2)
    assert t.blocks[0].noise().tolist() == [0.75, 0.5, 0.0]
    assert [s.tolist() for s in choose_states(t, [1.0, 0.4])] == [states[0].tolist(), states[1].tolist()]
