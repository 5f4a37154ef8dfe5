"""Dynamic expert sharing: the rules on router scores, the routed layer, and diffusion decoding with them."""

import pytest
import torch

from stretto.errors import OptionError, UnsupportedError
from stretto.experts.sharing import SharedByTop, SharedByVote, measured, sharing_rule
from stretto.models.config import MoEConfig
from stretto.models.moe import choose_within, scores, shared_routing
from tiny import MASK, engine, greedy, model, run, tokens

E, K, T, H = 16, 4, 12, 32
MOE = {
    "model_type": "qwen3_moe", "num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": 16,
    "norm_topk_prob": False, "stretto": {"attention": "block", "block_size": 8, "mask_token_id": MASK},
}  # fmt: skip
PLAIN = MoEConfig(E, K, 16, renormalize=False, cast=False, sparse=(True,))
GROUPED = MoEConfig(
    E, K, 16, renormalize=True, cast=False, sparse=(True,), score="sigmoid", expert_bias=True, groups=4, top_groups=2, scale=2.5
)
ALL = SharedByVote(budget=E)


def router(moe, seed=0, rows=T):
    g = torch.Generator().manual_seed(seed)
    x, logits = torch.randn(rows, H, generator=g), torch.randn(rows, E, generator=g) * 1.5
    bias = torch.randn(E, generator=g) * 0.3 if moe.expert_bias else None
    return *scores(logits, moe, bias), x


def routed(moe, rule, seed=0, rows=T):
    gate, choice, x = router(moe, seed, rows)
    return choose_within(gate, choice, moe, x, [(rule, torch.arange(rows))])


@pytest.fixture(scope="module")
def net():
    return model(**MOE)


@pytest.mark.parametrize("moe", [PLAIN, GROUPED], ids=["softmax", "grouped"])
@pytest.mark.parametrize(
    "rule", [ALL, SharedByTop(K), SharedByVote(coverage=1.0), SharedByVote(fraction=1.0)], ids=["all", "k0=k", "eta=1", "beta=1"]
)
def test_no_restriction_is_plain_routing(moe, rule):
    """M = E, k0 = k, and all votes covered: the very weights and experts of the model."""
    gate, choice, x = router(moe)
    free = choose_within(gate, choice, moe, x, [])
    got = routed(moe, rule)
    assert torch.equal(got.chosen, free.chosen) and torch.equal(got.weights, free.weights)


@pytest.mark.parametrize("moe", [PLAIN, GROUPED], ids=["softmax", "grouped"])
@pytest.mark.parametrize("rule", [SharedByTop(1), SharedByTop(2), SharedByVote(5), SharedByVote(8, saliency="norm")], ids=str)
def test_every_row_stays_inside_the_set(moe, rule):
    gate, choice, x = router(moe)
    inside = rule.coreset(gate, choice, K, x)
    got = routed(moe, rule)
    kept = got.weights > 0
    lost = torch.isneginf(choice.masked_fill(~inside, -torch.inf)).all(-1)  # a row without an eligible expert there
    assert inside[got.chosen[kept & ~lost[:, None]]].all()
    assert torch.isfinite(choice.gather(-1, got.chosen)[kept]).all(), "the groups of the model hold too"
    if isinstance(rule, SharedByVote):
        assert int(inside.sum()) == rule.budget
    else:
        best = choice.topk(rule.keep, -1).indices
        assert all(set(b.tolist()) <= set(c.tolist()) for b, c in zip(best, got.chosen, strict=True))
    for row in range(T):  # the best of what is left, in order
        left = choice[row].masked_fill(~inside, -torch.inf)
        want = [e for e in left.argsort(descending=True, stable=True).tolist() if inside[e]][:K]
        want = [e for e in want if torch.isfinite(left[e])] or [int(choice[row].argmax())]
        assert got.chosen[row][kept[row]].tolist() == want


def test_votes_by_hand():
    """Two rows, three experts: weights .6 + .1, .3 + .2, .1 + .7; one of two experts a row."""
    moe = MoEConfig(3, 1, 8, renormalize=False, cast=False, sparse=(True,))
    gate = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])
    x = torch.tensor([[3.0], [1.0]])
    count = lambda rule, k: rule.coreset(gate, gate, k, x).tolist()
    assert count(SharedByVote(1), 1) == [False, False, True]  # .7 against .6
    assert count(SharedByVote(1, saliency="norm"), 1) == [True, False, False]  # 3 * .6 against .7
    assert count(SharedByVote(1, floor=True), 1) == [True, False, True]
    assert count(SharedByVote(coverage=0.5), 1) == [False, False, True]  # .7 of 1.3
    assert count(SharedByVote(coverage=0.6), 1) == [True, False, True]
    got = choose_within(gate, gate, moe, x, [(SharedByVote(1), torch.arange(2))])
    assert got.chosen.tolist() == [[2], [2]] and got.weights.flatten().tolist() == pytest.approx([0.1, 0.7])
    full = choose_within(gate, gate, moe, x, [(SharedByVote(1, to_full=True), torch.arange(2))])
    assert full.weights.flatten().tolist() == pytest.approx([0.6, 0.7]), "as much weight as without sharing"


def test_permuted_rows_permute_the_outputs():
    gate, choice, x = router(PLAIN)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    for rule in (SharedByTop(1), SharedByVote(6)):
        a = choose_within(gate, choice, PLAIN, x, [(rule, torch.arange(T))])
        b = choose_within(gate[order], choice[order], PLAIN, x[order], [(rule, torch.arange(T))])
        assert torch.equal(a.chosen[order], b.chosen) and torch.equal(a.weights[order], b.weights)


def test_groups_and_rows_outside_them_do_not_touch_each_other(net):
    """A layer on two groups and free rows = the layer on each of them alone; fewer experts run."""
    mlp, g = net.layers[0].mlp, torch.Generator().manual_seed(2)
    x = torch.randn(30, net.config.hidden_size, generator=g)
    rule, a, b, rest = SharedByVote(5), torch.arange(3, 13), torch.arange(20, 30), torch.tensor([0, 1, 2, *range(13, 20)])
    with torch.no_grad():
        with shared_routing(net, [(rule, a), (rule, b)]):
            whole = mlp(x)
        assert torch.allclose(whole[rest], mlp(x[rest]), atol=1e-6)
        for part in (a, b):
            with shared_routing(net, [(rule, torch.arange(10))]), measured(net) as meter:
                alone = mlp(x[part])
            assert torch.allclose(whole[part], alone, atol=1e-6) and meter.distinct == [5]
            with measured(net) as free:
                assert not torch.allclose(mlp(x[part]), alone, atol=1e-3)
            assert free.distinct[0] > 5 and free.kept == [1.0] and 0.3 < meter.kept[0] < 1


TEXT = [5, 9, 7, 5, 9, 7, 5, 9, 7, 11, 5, 9]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_decoding_shares_only_the_block(net, backend):
    """With M = E nothing changes; with a small set the block's rows share it and prompt rows do not."""
    free = run(engine(net, backend=backend), [(TEXT, greedy(20, ignore_eos=True), "diffusion", {})])[0][0]
    every = {"moe_sharing": "vote", "moe_budget": E}
    same = run(engine(net, backend=backend), [(TEXT, greedy(20, ignore_eos=True), "diffusion", every)])[0][0]
    assert tokens(same) == tokens(free)
    eng = engine(net, backend=backend)
    seen = []
    inner = eng.runner.forward
    eng.runner.forward = lambda batch, *more: seen.append(batch) or inner(batch, *more)
    (stream,) = run(eng, [(TEXT, greedy(20, ignore_eos=True), "diffusion", {"moe_sharing": "vote", "moe_budget": K})])[0]
    assert tokens(stream) != tokens(free)
    for batch in seen:
        ((_, rows),) = batch.sharing
        first = len(stream.seq.tokens) if not len(rows) else batch.positions[rows].min()
        assert first % 8 == 0 and len(rows) <= 8
        outside = set(range(batch.n)) - set(rows.tolist())
        assert all(batch.positions[i] < first for i in outside), "earlier blocks route freely"


def test_the_pass_of_a_finished_block_shares_when_asked(net):
    """One set for both blocks of a forward; prompt rows beside them stay free."""
    eng, seen = engine(net), []
    inner = eng.runner.forward
    eng.runner.forward = lambda batch, *more: seen.append(batch) or inner(batch, *more)
    options = {"moe_sharing": "vote", "moe_budget": K, "moe_commit": True}
    run(eng, [(TEXT, greedy(20, ignore_eos=True), "diffusion", options)])
    sizes = [len(rows) for batch in seen for _, rows in batch.sharing]
    assert len(sizes) == len(seen) and max(sizes) == 16 and min(sizes) >= 8


def test_the_scope_decides_about_batch_mates(net):
    def decode(scope, mates):
        eng = engine(net)
        options = {"moe_sharing": "vote", "moe_budget": 5, "moe_scope": scope}
        jobs = [(TEXT, greedy(16, ignore_eos=True), "diffusion", options)]
        jobs += [([6 + i, 9, 13, 5], greedy(16, ignore_eos=True), "diffusion", options) for i in range(mates)]
        return tokens(run(eng, jobs)[0][0])

    assert decode("sequence", 0) == decode("sequence", 3)
    assert decode("batch", 0) == decode("sequence", 0) != decode("batch", 3)


def test_full_attention_and_preemption():
    """Kind F with every cache: a preempted sequence shares as before."""
    full = model(**(MOE | {"stretto": {"attention": "full", "mask_token_id": MASK}}))
    for cache in ("none", "prefix", "dual"):
        options = {"moe_sharing": "seq", "moe_budget": 1, "cache": cache, "block_length": 6}
        jobs = [([5 + i, 9, 7, 11], greedy(18, ignore_eos=True), "diffusion", options) for i in range(4)]
        alone = [tokens(run(engine(full), [job])[0][0]) for job in jobs]
        tight = run(engine(full, slots=96), jobs)
        assert [tokens(s) for (s,) in tight] == alone


def test_bad_input(net):
    with pytest.raises(UnsupportedError, match="dense"):
        sharing_rule("vote", None)
    with pytest.raises(OptionError, match="moe_budget.*4..16"):
        sharing_rule("vote", net.config.moe, K - 1)
    with pytest.raises(OptionError, match="moe_budget.*1..4"):
        sharing_rule("seq", net.config.moe, K + 1)
    assert sharing_rule("off", None) is None
