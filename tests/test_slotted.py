"""ppd and hidden_transfer: what their cards call exact. The property matrix runs both through everything else."""

import numpy as np
import pytest
import torch

import tiny
from stretto.decoding.registry import make
from stretto.decoding.slots import group_mask
from stretto.engine.params import SamplingParams
from stretto.errors import OptionError, UnsupportedError
from stretto.models.adapter import Adapter, Base
from stretto.models.context import plain_logits
from stretto.training import slot_rows
from stretto.training.data import Document, pack
from stretto.training.optim import MuonAdamW
from stretto.training.parts import FrozenNet, make_part
from tiny import engine, greedy, model, run, tokens

TEXT = [5, 9, 7, 5, 9, 7, 5, 9, 7, 11, 5, 9]
BACKENDS = ["native", "torch"]


@pytest.fixture(scope="module")
def net():
    return model(num_hidden_layers=4)


def batch(n: int = 3, length: int = 20):
    gen = torch.Generator().manual_seed(2)
    docs = [Document(torch.randint(5, tiny.V, (length - 3 * i,), generator=gen).tolist(), 4) for i in range(n)]
    return pack(docs, 2 * length, pad_id=0)


def adapter(net, kind: str, tensors: dict, **config) -> Adapter:
    return Adapter(kind, Base.of(net), tensors, config)


def generate(net, part: Adapter, *, options=None, backend="auto", prompts=(TEXT,), params=None):
    eng = engine(net, backend=backend)
    eng.host.parts = lambda kind, name: part
    jobs = [(p, params or greedy(24, ignore_eos=True), part.kind, options or {}) for p in prompts]
    return eng, [s for (s,) in run(eng, jobs)]


def plain(net, prompts=(TEXT,), params=None):
    return [tokens(s) for (s,) in run(engine(net), [(p, params or greedy(24, ignore_eos=True), "ar", {}) for p in prompts])]


def ppd_part(net, members=1, mask="ensemble", seed=0, k=3):
    vectors = torch.randn(k, members, 32, generator=torch.Generator().manual_seed(seed)) * 3
    return adapter(net, "ppd", {"vectors": vectors}, tokens=k, members=members, mask=mask)


def transfer_part(net, entries=(1, 1, 2), seed=0, chain=False):
    weight = torch.randn(len(entries), 32, 32, generator=torch.Generator().manual_seed(seed))
    return adapter(net, "hidden_transfer", {"layers.weight": weight}, entries=list(entries), chain=chain)


def all_parts(net):
    return [
        ppd_part(net), ppd_part(net, 2, "ensemble"), ppd_part(net, 2, "decoder"), ppd_part(net, 2, "encoder"),
        transfer_part(net), transfer_part(net, (0, 4)), transfer_part(net, (3, 3), chain=True),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_weights_give_the_text_of_plain_decoding(net, backend):
    prompts = [TEXT, TEXT[:3], [5]] if backend == "native" else [TEXT]
    for params in (greedy(20, ignore_eos=True), SamplingParams(max_tokens=20, temperature=0.8, seed=3, ignore_eos=True)):
        want = plain(net, prompts, params)
        for part in all_parts(net)[:: 1 if backend == "native" else 3]:
            for options in ({}, {"tree_budget": 16}):
                _, streams = generate(net, part, options=options, backend=backend, prompts=prompts, params=params)
                assert [tokens(s) for s in streams] == want
                assert sum(s.seq.metrics.drafted for s in streams) > 8, "drafts were tried"


def test_a_part_that_knows_the_text_is_accepted(net):
    """Slots whose laws are right make steps of several tokens: the laws of the next step are those of the last node."""
    part = transfer_part(net, (4, 4))
    want = plain(net)[0]
    eng = engine(net)
    eng.host.parts = lambda kind, name: part
    method = make("hidden_transfer", eng.host, {"tree_budget": 8})
    laws = method.slotted._laws
    (stream,) = eng.add(TEXT, greedy(24, ignore_eos=True), method)

    def oracle(outcome, at):
        known, done = laws(outcome, at), stream.seq.generated + oracle.taken
        known.best = [(want + [1] * 9)[done + 1 + d] for d in range(len(known.best))]
        return known

    accept = method.slotted.verified

    def commit(seq, step, outcome):
        oracle.taken = 0
        best, at, node = outcome.argmax, step.extra, 0
        while at is not None:  # how many tokens this step commits
            oracle.taken += 1
            child = [i for i in range(1, at.nodes) if at.parent[i] == node and step.tokens[i] == best[node]]
            if not child:
                break
            node = child[0]
        oracle.taken = max(oracle.taken - 1, 0)
        return accept(seq, step, outcome)

    method.slotted._laws, method.slotted.verified = oracle, commit
    while eng.busy:
        eng.step()
    assert tokens(stream) == want
    assert stream.seq.metrics.tokens_per_forward > 1.8


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_every_commit_the_cache_is_that_of_a_plain_prefill(net, backend):
    for part in (ppd_part(net), transfer_part(net)):
        eng = engine(net, backend=backend, prefix_caching=False)
        eng.host.parts = lambda kind, name, part=part: part
        (stream,) = eng.add(TEXT, greedy(16, ignore_eos=True), make(part.kind, eng.host, {"tree_budget": 16}))
        while eng.busy:
            eng.step()
            if stream.finish_reason:
                break
            seq, alloc = stream.seq, eng.runner.alloc
            assert len(seq.view) == len(seq.tokens) - 1 and alloc.used == len(seq.view), "no slot's rows are left"
            fresh = engine(net, backend=backend, prefix_caching=False)
            (other,) = fresh.add(seq.tokens, greedy(2, ignore_eos=True), make("ar", fresh.host, {}))
            fresh.step()
            a, b = (e.runner.pool.k[:, s.view.slots[: len(seq.view)]] for e, s in ((eng, seq), (fresh, other.seq)))
            assert torch.allclose(a, b, atol=1e-5)


def test_members_that_are_alike_are_one(net):
    one = ppd_part(net)
    many = ppd_part(net)
    many.tensors["vectors"] = one.tensors["vectors"].repeat(1, 3, 1)
    many.config["members"] = 3
    laws = [_laws(net, part) for part in (one, many)]
    assert torch.allclose(laws[0], laws[1], atol=1e-4)


def _laws(net, part, entries=None):
    """[k, V]: what the slots of the last place of TEXT say, by the engine's rows."""
    eng = engine(net)
    eng.host.parts = lambda kind, name: part
    method = make(part.kind, eng.host, {"tree_budget": 16})
    (stream,) = eng.add(TEXT, greedy(8, ignore_eos=True), method)
    seen = []
    commit = method.slotted.verified

    def keep(seq, step, outcome):
        rows = step.extra
        at = rows.slot_rows[0]
        m = method.slotted._members
        seen.append(outcome.logits[at].view(-1, m, outcome.logits.shape[-1]).mean(1).clone())
        return commit(seq, step, outcome)

    method.slotted.verified = keep
    eng.step()
    eng.abort(stream)
    return seen[0]


@pytest.mark.parametrize("case", range(7))
def test_the_packed_training_forward_gives_the_laws_of_inference(net, case):
    """Many cuts in one forward, a cut alone, and the engine's rows: one law."""
    part = all_parts(net)[case]
    frozen = FrozenNet(net)
    options = {"ppd": ("tokens", "members", "mask"), "hidden_transfer": ("entries", "chain")}[part.kind]
    kind = make_part(part.kind, frozen, **{o: part.config[o] for o in options})
    part.into(kind.module)
    doc = pack([Document([*TEXT, 5, 9, 7, 5], 2), Document(TEXT[::-1], 2)], 40, pad_id=0)
    places = torch.tensor([[3, len(TEXT) - 1, 7, -1, 20]])
    with torch.no_grad():
        many = slot_rows.laws(frozen, kind.states(doc, places))[0, :, 1]
        alone = slot_rows.laws(frozen, kind.states(doc, places[:, 1:2]))[0, :, 0]
    assert torch.allclose(many, alone, atol=1e-4)
    assert torch.allclose(alone, _laws(net, part), atol=1e-3)


def test_only_the_new_numbers_learn(net):
    before = {n: p.clone() for n, p in net.named_parameters()}
    for kind, options, size in (
        ("ppd", {"tokens": 3, "members": 2}, 3 * 2 * 32), ("hidden_transfer", {"entries": [1, 2]}, 2 * 32 * 32),
    ):
        part = make_part(kind, FrozenNet(net), **options)
        optimizer = MuonAdamW(part.module, lr=1e-2, adam_lr=1e-2, weight_decay=0.0)
        held = [p for o, _ in optimizer.parts for g in o.param_groups for p in g["params"]]
        assert sum(p.numel() for p in held) == size
        losses = []
        for _step in range(25):
            loss = part(part._net, batch(), torch.Generator().manual_seed(0)).value
            loss.backward()
            losses.append(loss.item())
            assert all(p.grad is None for p in net.parameters())
            optimizer.step(1.0)
        assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_no_gradient_passes_below_the_entry(net):
    """The real rows' states carry none, so nothing can flow into layers at or below it."""
    text = slot_rows.read(FrozenNet(net), batch(), [2])
    assert not text.states[2].requires_grad and not text.final.requires_grad
    assert not any(k.requires_grad for k in text.keys.values())


def test_a_teacher_sees_no_further_than_it_should(net):
    """What stands behind a cut changes nothing in its slots' laws."""
    part = make_part("hidden_transfer", FrozenNet(net), entries=[1, 1])
    a, b = list(TEXT) * 2, list(TEXT) * 2
    b[14:] = [21] * (len(b) - 14)
    cuts = torch.tensor([[13, 5]])
    with torch.no_grad():
        one, two = (part.states(pack([Document(x, 2)], 30, pad_id=0), cuts) for x in (a, b))
    assert torch.equal(one, two)


def test_limits_of_transfer(net):
    """Behind the last layer: head(norm(W h)). Identity at the bottom in the row's own place: the row's own law."""
    weight = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(1))
    part = adapter(net, "hidden_transfer", {"layers.weight": weight}, entries=[4], chain=False)
    frozen = FrozenNet(net)
    text = slot_rows.read(frozen, pack([Document(TEXT, 2)], len(TEXT), pad_id=0), [4])
    want = net.head(net.norm(text.states[4][0, -1] @ weight[0].T))
    assert torch.allclose(_laws(net, part)[0], want, atol=1e-3)
    kind = make_part("hidden_transfer", frozen, entries=[0])
    rows = slot_rows.SlotRows(frozen, slot_rows.read(frozen, text.batch, [0]), torch.tensor([[len(TEXT) - 2]]), [0])
    rows.positions = torch.tensor([[len(TEXT) - 1]])  # of the token after the cut, whose embedding it gets
    with torch.no_grad():
        law = slot_rows.laws(frozen, rows.run([net.embed(torch.tensor(TEXT[-1:])).view(1, 1, 1, -1)]))[0, 0, 0]
    assert torch.allclose(law, plain_logits(net, TEXT)[-1], atol=1e-3)
    assert kind.config["entries"] == [0]


def test_masks_among_members():
    sees = {kind: group_mask(2, 2, kind).reshape(4, 4).astype(int).tolist() for kind in ("ensemble", "decoder", "encoder")}
    assert sees["ensemble"] == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
    assert sees["decoder"] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert sees["encoder"] == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    with pytest.raises(OptionError, match="decoder"):
        group_mask(2, 2, "diagonal")


def test_what_does_not_fit_is_refused_by_name(net):
    other = model(seed=5, num_hidden_layers=4)
    with pytest.raises(UnsupportedError, match="hash"):
        generate(other, ppd_part(net))
    with pytest.raises(OptionError, match="entries"):
        generate(net, transfer_part(net, (2, 1)))
    with pytest.raises(OptionError, match=r"0\.\.4"):
        generate(net, transfer_part(net, (5,)))
    with pytest.raises(OptionError, match="at least 6"):
        generate(net, ppd_part(net), options={"tree_budget": 5})


def test_statistics_of_training_become_chances_of_candidates(net):
    part = make_part("ppd", FrozenNet(net), tokens=2)
    found = part.statistics([batch()])
    hits, tries = np.array(found["hits"]), np.array(found["tries"])
    assert hits.shape == (2, 5, slot_rows.RANKS) and (hits.sum(2) <= tries).all()
    assert sum(found["seen"].values()) >= tries[0].sum() and len(found["acceptance"]) == 2
