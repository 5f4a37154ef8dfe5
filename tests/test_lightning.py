"""LightningRL: rewards, advantages and loss by hand; rollouts whose recorded law the training forward repeats."""

import copy
import json

import numpy as np
import pytest
import torch

from stretto.errors import OptionError, UnsupportedError
from stretto.models import checkpoint
from stretto.training import lightning_run
from stretto.training.lightning import Lightning, advantages, keep_group, lightning, policy_loss
from stretto.training.nets import PackedNet
from stretto.training.policy import rollout_engine
from stretto.training.recipes import run_recipe
from stretto.training.rollouts import logps, path_rows, roll_out
from stretto.zoo import workbook
from tiny import EOS, MASK, model

B = 4
PROMPTS = [[5, 9, 7, 5, 9, 7], [6, 11, 13, 9, 7], [13, 13, 5, 6]]


@pytest.fixture(scope="module")
def net():
    return model(scale=1.6, stretto={"attention": "block", "block_size": B, "mask_token_id": MASK})


@pytest.fixture(scope="module")
def groups(net):
    engine = rollout_engine(net, [EOS], seqs=12)
    return roll_out(engine, PROMPTS, 4, max_tokens=18, seed=3, threshold=0.25, record=True)


def test_rollouts_differ_and_know_their_path(groups):
    paths = [p for g in groups for p in g]
    assert len({tuple(p.ids) for p in paths}) == len(paths), "sampled: a greedy group would be one response four times"
    assert any(p.tokens_per_forward > 1 for p in paths)
    for p in paths:
        assert p.tokens.count(EOS) <= 1 and MASK not in p.tokens
        assert p.complete == (p.tokens[-1] == EOS)
        assert len(set(p.steps)) <= p.forwards <= len(p.decided)
        everything = set(p.decided.values())
        assert everything == set(range(p.forwards)), "every forward decided something: no commit pass is counted"


@pytest.mark.parametrize("kind", ["trace", "one_step"])
def test_the_trace_has_the_recorded_probabilities(net, groups, kind):
    """Sum of the training forward's log-probabilities = what the decoder saw; one_step sees less and differs."""
    paths = [p for g in groups for p in g]
    rows = path_rows(paths, B, MASK, kind)
    with torch.no_grad():
        got = logps(PackedNet(net), rows)
    by_row = rows.labels.nonzero()[:, 0]
    assert len(got) == sum(p.length for p in paths), "every returned token once; none of the prompt, none behind the end"
    for i, p in enumerate(paths):
        labels = rows.labels[i]
        order = dict(zip(rows.positions[i][labels].tolist(), got[by_row == i].tolist(), strict=True))
        mine = [order[at] for at in range(p.prompt, p.prompt + p.length)]
        same = mine == pytest.approx(p.recorded, abs=1e-4)
        one_by_block = len(set(p.steps)) == len({at // B for at in order})  # then both see the same
        assert same == (kind == "trace") or one_by_block


def test_shrinking_merges_states(groups):
    paths = groups[0]
    full, half = (path_rows(paths, B, MASK, "trace", s) for s in (1, 2))
    single = path_rows(paths, B, MASK, "trace", 99)
    one = path_rows(paths, B, MASK, "one_step")
    assert full.noisy.shape[1] > half.noisy.shape[1] > single.noisy.shape[1]
    assert torch.equal(single.target, one.target)
    places = {(i, int(at)) for i, p in enumerate(paths) for at in single.positions[i] if at < p.prompt + p.length}
    for i, p in enumerate(paths):  # only places behind the end may have been decided before the first returned token
        odd = single.positions[i][single.noisy[i] != one.noisy[i]]
        assert places and (odd >= p.prompt + p.length).all()
    assert full.labels.sum() == half.labels.sum() == one.labels.sum()


def test_groups_by_hand():
    """The hazard of the card: a slow right answer is punished, a fast wrong one rewarded; the safer option is not so."""
    r1, r2 = [1, 1, 0, 0], [2, 4, 4, 6]
    sums = np.array([-0.41421356, 1.0, -1.0, 0.41421356])
    want = sums / np.sqrt((sums**2).mean())
    assert advantages([(r1, r2)]) == pytest.approx(want, abs=1e-6)
    safe = advantages([(r1, r2)], speed_only_if_correct=True)
    assert safe[1] > safe[0] > safe[2] == safe[3]
    only = advantages([(r1, r2)], tpf_weight=0.0)
    assert only == pytest.approx([1, 1, -1, -1])
    total = advantages([(r1, [20, 40, 40, 60])], normalise="sum")
    assert total[3] > total[1] > 0 > total[0], "the larger scale hides correctness"
    both = advantages([(r1, r2), ([1, 0], [3, 3])])
    assert both.mean() == pytest.approx(0, abs=1e-12) and both.std() == pytest.approx(1)
    assert advantages([([1, 1], [2, 2])]).tolist() == [0, 0]
    with pytest.raises(OptionError, match="decoupled or sum"):
        advantages([(r1, r2)], normalise="joint")


def test_filters():
    assert keep_group([0, 1], [2.0, 3.0], 0.01)
    assert not keep_group([0, 0], [2.0, 3.0], 0.01)
    assert not keep_group([1, 1], [2.0, 2.005], 0.01)


def test_the_loss_by_hand():
    """Ratio 1 before the first update: nothing clipped, no distance, the policy term is minus the mean advantage."""
    s = Lightning()
    logp = torch.tensor([-1.0, -2.0, -0.5])
    a, right, row = torch.tensor([0.6, 0.6, -1.0]), torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0, 0, 1])
    loss, clipped, kl = policy_loss(logp, logp, logp, a, right, row, s)
    assert (float(clipped), float(kl)) == (0.0, 0.0)
    assert float(loss) == pytest.approx((-0.6 + 1.0) / 2 + 0.1 * 1.5)
    moved = logp + torch.tensor([1.0, 0.0, -1.0])
    loss, clipped, kl = policy_loss(moved, logp, logp, a, right, row, s)
    gaps = np.array([1.0, 0.0, -1.0])
    distance = (np.exp(-gaps) - 1 + gaps).mean()
    policy = (-(1.2 * 0.6 + 0.6) / 2 + max(np.exp(-1.0), 0.8)) / 2
    assert float(kl) == pytest.approx(distance, rel=1e-5) and float(clipped) == pytest.approx(2 / 3)
    assert float(loss) == pytest.approx(policy + 0.1 * (0.0 + 2.0) / 2 + 0.01 * distance, rel=1e-5)


def test_a_run_learns_what_is_rewarded(net):
    """A few steps towards answers that contain token 9: the share of them rises, weights move, the filters are told."""
    student = copy.deepcopy(net)
    settings = Lightning(
        group_size=8, prompts_per_step=3, max_tokens=8, lr=5e-3, threshold=0.25, tpf_weight=0.0, tpf_gap=0.0, micro_batch=8
    )

    def verify(tokens):
        if len(tokens) == 1:
            raise ValueError("an empty answer")
        return tokens.count(9) > 0

    prompts = [(p, verify) for p in PROMPTS]
    steps = list(lightning(student, prompts, settings, steps=8, stop_ids=[EOS]))
    done = [s for s in steps if not s.skipped]
    assert len(done) >= 4 and all(s.clip_fraction == 0.0 for s in steps), "one update a batch of rollouts"
    assert done[0].kl == pytest.approx(0.0, abs=1e-6) and done[-1].kl > 0
    assert not torch.equal(student.model.norm.weight, net.model.norm.weight)
    late, early = (np.mean([s.accuracy for s in part]) for part in (steps[-3:], steps[:2]))
    assert late > early


def test_nothing_to_learn_is_said(net):
    steps = list(lightning(copy.deepcopy(net), [(PROMPTS[0], lambda t: False)], Lightning(
        group_size=2, prompts_per_step=1, max_tokens=4), steps=1, stop_ids=[EOS]))  # fmt: skip
    assert steps[0].skipped and steps[0].loss == 0.0


def test_bad_input(net):
    engine = rollout_engine(net, [EOS], seqs=4)
    with pytest.raises(OptionError, match="group_size"):
        roll_out(engine, PROMPTS, 1, max_tokens=4, seed=0)
    with pytest.raises(OptionError, match="temperature"):
        roll_out(engine, PROMPTS, 2, max_tokens=4, seed=0, temperature=0.0)
    with pytest.raises(UnsupportedError, match="block diffusion"):
        next(lightning(model(), [(PROMPTS[0], bool)], Lightning(), steps=1, stop_ids=[EOS]))


def test_the_recipe_ships_a_model_and_resumes(tmp_path, monkeypatch):
    """Two steps and two more are the four of an uninterrupted run, weights and log; wrong answers teach nothing."""
    section = {"attention": "block", "block_size": 8, "mask_token_id": 2}
    ends = list(range(4, 400))  # so that random answers end by themselves
    checkpoint.save(model(stretto=section, vocab_size=2048, eos_token_id=ends), tmp_path / "base")
    prompts = lightning_run.prompts_of(("list_copy", "json_call"), 0, (4,))
    (ids, verify), example = prompts[0], workbook.examples("list_copy", "train", 1, 77)[0]
    assert len(prompts) == 2 * lightning_run.EACH and ids == workbook.encode(example)[0]
    assert verify(workbook.encode(example)[1]) == 1.0 and verify([9, 4]) == 0.0
    some = [(p[-6:], lambda out: float(sum(out) % 2)) for p, _ in prompts[:6]]
    monkeypatch.setattr(lightning_run, "prompts_of", lambda tasks, seed, stops: some)
    options = {"prompts_per_step": 2, "group_size": 4, "max_tokens": 9, "threshold": 0.0005, "temperature": 3.0}

    def go(out, steps):
        how = {"base": tmp_path / "base", "changes": {"options": options}, "report": lambda r: None}
        return run_recipe("tiny-lightningrl", out=tmp_path / out, steps=steps, **how)

    assert go("parts", 2)["steps"] == 2
    parts, whole = go("parts", 4), go("whole", 4)
    assert parts["steps"] == 4 and parts["curve"] == whole["curve"]
    a, b, base = (checkpoint.load(tmp_path / f, dtype="float32") for f in ("parts", "whole", "base"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert a.config.block_size == 8 and a.config.attention == "block"
    log = [json.loads(line) for line in (tmp_path / "parts.training" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 1, 2, 3] and not all(line["skipped"] for line in log)
    assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), base.parameters(), strict=True))
