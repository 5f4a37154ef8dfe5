"""P-GRPO by hand: rewards, advantages, the loss on shared tries against separate forwards, and that it learns."""

import copy

import numpy as np
import pytest
import torch

from stretto.decoding.registry import make
from stretto.engine.params import SamplingParams
from stretto.errors import OptionError
from stretto.models.context import plain_logits
from stretto.training import p_grpo as pg
from stretto.training.p_grpo import PGRPO, Rollout, advantages, p_grpo, policy_loss, reward
from stretto.training.policy import rollout_engine
from stretto.training.trie import Unit
from tiny import EOS, model

PROMPTS = [[5, 9, 7], [6, 11, 13, 9]]


def test_speed_is_paid_for_right_answers_only_and_up_to_a_limit():
    assert reward(0.0, 0.9) == 0 and reward(1.0, 0.0) == 1
    assert reward(1.0, 1 - 57 / 107) == pytest.approx(1.1), "eta 0.467 of the card's example, capped at 0.2"
    assert reward(1.0, 0.1) == pytest.approx(1.05)
    assert reward(1.0, 0.9, rho=1.0, eta_max=1.0) == pytest.approx(1.9)


def test_advantages_are_centred_and_only_std_divides():
    r = [1.1, 1.1, 1.05, 0.0]
    assert advantages(r).sum() == pytest.approx(0, abs=1e-12)
    assert advantages(r) == pytest.approx(np.array(r) - np.mean(r))
    close = [1.1, 1.1, 1.1, 1.05]  # all right: the mean-centred advantage stays small, divided it does not
    assert np.abs(advantages(close)).max() < 0.04 and np.abs(advantages(close, "std")).max() > 1.7
    assert not advantages([1.1] * 5).any() and not advantages([0.0] * 5, "std").any()
    with pytest.raises(OptionError, match="normalise"):
        PGRPO(normalise="var")  # type: ignore[arg-type]


def test_the_clipped_loss_of_tokens_that_rollouts_share():
    s, old = PGRPO(), torch.zeros(5)
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5])
    gain, against = torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0]), torch.tensor([0.5, 0.0, 0.0, 1.0, 1.0])
    loss, share = policy_loss(ratio.log(), old, gain, against, s)
    separate = [  # -min(rho A, clip(rho) A) of each advantage
        -(1.0 - 0.5), -1.28, -0.5, 1.5, -(2 * 0.5 - 0.8),
    ]  # fmt: skip
    assert float(loss) == pytest.approx(sum(separate), abs=1e-6)
    assert 0 < float(share) < 1


def rollouts(rng, prompt, n=4):
    """Made-up threads: a line, two threads behind it, the joined rest; several rollouts begin alike."""
    out = []
    for _ in range(n):
        line = [*prompt, 20, int(rng.integers(21, 23))]
        texts = [[int(t) for t in rng.integers(10, 14, int(rng.integers(1, 4)))] for _ in range(2)]
        joined = [*line, 30, *texts[0], 30, *texts[1]]
        units = [Unit(line, len(prompt))] + [Unit([*line, 30, *t], len(line) + 1) for t in texts]
        units.append(Unit([*joined, 31, EOS], len(joined)))
        out.append(Rollout(units, [*joined[len(prompt) :], 31, EOS], 10, 8, True))
    return out


def by_hand(net, groups, values):
    """-sum of A log pi over every generated token of every unit, each in a forward of its own, over all tokens."""
    total = tokens = 0
    for group, each in zip(groups, values, strict=True):
        for r, a in zip(group, each, strict=True):
            for u in r.units:
                law = torch.log_softmax(plain_logits_grad(net, u.tokens), -1)
                total = total - a * sum(law[i - 1, u.tokens[i]] for i in range(u.learnt, len(u.tokens)))
                tokens += len(u.tokens) - u.learnt
    return total / tokens


def plain_logits_grad(net, ids):
    from stretto.models.context import PackedContext

    t = len(ids)
    mask = torch.ones(1, t, t, dtype=torch.bool).tril()
    hidden = net.hidden(torch.tensor(ids), torch.arange(t), PackedContext([t], mask, device=torch.device("cpu")))
    return net.logits(hidden)


@pytest.mark.parametrize("length", [16, 200], ids=["a trie a rollout", "a trie a prompt"])
def test_gradients_equal_those_of_separate_forwards(length):
    net, rng = model(scale=1.0), np.random.default_rng(0)
    assert torch.allclose(plain_logits_grad(net, PROMPTS[0]), plain_logits(net, PROMPTS[0]), atol=1e-5)
    groups = [rollouts(rng, p) for p in PROMPTS]
    verify = lambda ids: ids[1] == 21
    s = PGRPO(length=length, rows=2, lr=0.0)
    other = copy.deepcopy(net)
    (seen,) = p_grpo(other, [(p, verify) for p in PROMPTS], PGRPO(prompts_per_step=2, length=length, rows=2, lr=0.0),
                     steps=1, roll=lambda *_: groups, pad_id=0)  # fmt: skip
    a = np.array(seen.advantages).reshape(2, -1)
    assert a.any() and np.allclose(a.sum(1), 0)
    want = by_hand(net, groups, a)
    want.backward()
    taught = [[[Unit(u.tokens, u.learnt, w) for u in r.units] for r, w in zip(g, row, strict=True)]
              for g, row in zip(groups, a.tolist(), strict=True)]  # fmt: skip
    rows = pg._rows(taught, s, 0)
    assert (len(rows[0].tokens[0]) == 200) == (length == 200)
    got = copy.deepcopy(net)
    got.zero_grad()
    for batch in rows:
        places = pg._places(batch)
        logp = pg.logps(pg.PackedNet(got), batch, places)
        loss, _ = policy_loss(logp, logp.detach(), batch.weight[places], batch.against[places], s)
        (loss / pg._generated(taught)).backward()
    for (name, p), q in zip(net.named_parameters(), got.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6), name


def test_equal_rewards_change_nothing_at_all():
    net, rng = model(scale=1.0), np.random.default_rng(1)
    groups = [rollouts(rng, p) for p in PROMPTS]
    for verify in (lambda ids: True, lambda ids: False):
        before = {n: p.clone() for n, p in net.named_parameters()}
        (seen,) = p_grpo(net, [(p, verify) for p in PROMPTS], PGRPO(prompts_per_step=2), steps=1,
                         roll=lambda *_: groups, pad_id=0)  # fmt: skip
        assert "equal" in seen.skipped and not any(seen.advantages)
        assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def sample(net, prompts, seed):
    """Plain completions: P-GRPO wants units, total and longest path, not threads."""
    engine = rollout_engine(net, [EOS], seqs=16)
    method = make("ar", engine.host, {})
    streams = [engine.add(list(p), SamplingParams(max_tokens=3, n=8, seed=seed * 7 + i), method)
               for i, p in enumerate(prompts)]  # fmt: skip
    while engine.busy:
        engine.step()
    return [
        [Rollout([Unit(s.seq.tokens, s.seq.prompt_len)], s.seq.tokens[s.seq.prompt_len :], 3, 3, True) for s in group]
        for group in streams
    ]


@pytest.mark.parametrize("updates", [1, 2])
def test_it_learns_what_is_rewarded_and_survives_a_raising_verifier(updates):
    net = model(scale=0.7)
    verify = lambda ids: ids[0] % 4 == 1
    steps = list(p_grpo(net, [(p, verify) for p in PROMPTS], PGRPO(prompts_per_step=2, lr=1e-2, updates=updates),
                        steps=14, roll=sample, pad_id=0))  # fmt: skip
    assert np.mean([s.accuracy for s in steps[-3:]]) > np.mean([s.accuracy for s in steps[:3]]) + 0.3
    (seen,) = p_grpo(net, [(p, lambda ids: 1 / 0) for p in PROMPTS], PGRPO(prompts_per_step=2), steps=1, roll=sample,
                     pad_id=0)  # fmt: skip
    assert seen.errors == 16 and seen.accuracy == 0 and seen.skipped
