"""Training on traces of workers: what it computes is what the engine computes while they write."""

import copy
import random

import numpy as np
import pytest
import torch

from stretto.engine.cache import View
from stretto.engine.pack import Plan, pack
from stretto.engine.runner import Runner
from stretto.engine.sampling import Sampler
from stretto.engine.team import Team
from stretto.engine.types import Sequence, Step
from stretto.joins import turn_keys
from stretto.training.nets import PackedNet
from stretto.training.worker_data import WorkerData, WorkerLoss, lay_traces
from stretto.training.worker_traces import OTHERS, OWN, PROMPT, problems, simulate, unfinished
from stretto.zoo import workbook
from tiny import greedy, model


@pytest.fixture(scope="module")
def net():
    return model(scale=1.2, vocab_size=workbook._tokenizer().get_vocab_size(), max_position_embeddings=1024)


class Lines:
    """The lines of one run on a real cache."""

    def __init__(self, net, backend):
        self.runner = Runner(copy.deepcopy(net), slots=2048, backend=backend)
        self.made = {}

    def __getitem__(self, name):
        if name not in self.made:
            params = greedy(1)
            self.made[name] = Sequence(0, [], 0, params, None, View(self.runner.alloc), Sampler(params))
        return self.made[name]

    def forward(self, jobs):
        """jobs: (name, tokens, names that it reads) -> logits of all rows."""
        plans = []
        for name, tokens, reads in jobs:
            seq = self[name]
            seq.reads, seq.team = tuple(self[r].view for r in reads), Team(len(jobs))
            plans.append(Plan(seq, 0, Step(tokens), slots=self.runner.alloc.alloc(len(tokens))))
        logits = self.runner.forward(pack(plans)).logits
        for plan in plans:
            plan.seq.view.append(plan.slots)
        return logits

    def move(self, name):
        view, to = self[name].view, self[PROMPT].view
        turn_keys(self.runner, view.slots, view.slots, len(to))
        to.join(view, 0)
        view.release()


def served(trace, net, backend):
    """Logits [rows, V] of a trace, computed forward by forward through the cache."""
    lines, rows, out = Lines(net, backend), trace.rows, {}

    def go(jobs):
        numbers = [i for _, numbers, _ in jobs for i in numbers]
        logits = lines.forward([(name, [rows[i].token for i in numbers], reads) for name, numbers, reads in jobs])
        out.update(zip(numbers, logits, strict=True))

    of = lambda line: [i for i, r in enumerate(rows) if r.line == line]
    go([(PROMPT, of(PROMPT), [])])
    for header in (OTHERS, OWN):
        go([(header, of(header), [PROMPT])])
    gone = set()
    for time, here in enumerate(trace.here):
        present = [w for w in range(trace.workers) if here[w] is not None]
        jobs = []
        for w in present:
            others = [o for o in present if o != w]
            reads = {
                "combined": [PROMPT, OTHERS, *others, OWN], "contiguous": [PROMPT, *others, OWN],
                "interleaved": [PROMPT],
            }[trace.layout]
            numbers = [i for i in of(w) if rows[i].time == time]
            if numbers:
                jobs.append((w, numbers, reads))
        go(jobs)
        done = len(trace.common) > time + 1 and trace.history[trace.common[time] : trace.common[time + 1]]
        for w in dict.fromkeys(rows[i].line for i in done or ()):
            lines.move(w)
        gone |= {w for w in range(trace.workers) if here[w] is None}
    return torch.stack([out[i] for i in range(len(rows))])


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("layout,workers,check", [
    ("combined", 1, 0), ("combined", 3, 0), ("combined", 4, 30), ("interleaved", 3, 0), ("contiguous", 2, 0),
])
def test_training_equals_serving(net, backend, layout, workers, check):
    """Log-probabilities of every row, fp32: within 1e-4."""
    rng = random.Random(3)
    traces = [simulate(p, workers, layout, rng, noise=0.1, check_every=check) for p in problems("train", 2, 5, (3, 4))]
    batch = lay_traces(traces)
    with torch.no_grad():
        hidden = PackedNet(net).hidden(batch.tokens, batch.positions, batch.context(net.config))[0]
        trained = torch.log_softmax(net.logits(hidden), -1)
    first = 0
    for trace in traces:
        want = torch.log_softmax(served(trace, net, backend), -1)
        got = trained[first : first + len(want)]
        assert (got - want).abs().max() < 1e-4
        first += len(want)


def test_gradients_by_hand_are_those_of_autograd(net):
    trace = simulate(problems("train", 1, 1, (3, 3))[0], 2, "combined", random.Random(0))
    batch = lay_traces([trace])
    ctx = batch.context(net.config)
    n, heads, kv, dim = len(trace.rows), 4, 2, 8
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, dim, generator=g).requires_grad_() for h in (heads, kv, kv))
    up = torch.randn(n, heads, dim, generator=g)
    (ctx.attend(0, q, k, v) * up).sum().backward()
    x = torch.randn(n, heads, dim, generator=g)
    for leaf, step in ((q, x), (k, x[:, :kv]), (v, x[:, :kv])):
        with torch.no_grad():
            values = []
            for e in (1e-2, -1e-2):
                args = [t + e * step if t is leaf else t for t in (q, k, v)]
                values.append(float((ctx.attend(0, *args) * up).sum()))
        assert abs((values[0] - values[1]) / 2e-2 - float((leaf.grad * step).sum())) < 2e-2 * (1 + abs(values[0]))


def test_traces_do_what_they_should():
    rng = random.Random(0)
    for p in problems("train", 30, 2):
        lengths = []
        for workers in (1, 2, 4):
            trace = simulate(p, workers, "combined", rng)
            assert sorted(trace.steps) == sorted(letter for letter, _, _ in p.items)  # everything once
            text = workbook._tokenizer().decode([t for _, t, _ in trace.targets], skip_special_tokens=False)
            assert "Answer" in text
            lengths.append(len(trace.common))
        assert lengths[1] < 0.75 * lengths[0] and lengths[2] < 0.55 * lengths[0]
    blind = [simulate(p, 2, "interleaved", rng) for p in problems("train", 30, 2, (8, 8))]
    assert sum(len(t.steps) for t in blind) > 30 * 8  # who sees finished steps only does some twice


def test_the_split_and_the_data_resume():
    train, test = ({p.text for p in problems(s, 60, 0, (3, 4))} for s in ("train", "test"))
    assert not train & test
    pool = lambda k: [unfinished(p, random.Random(k), 2) for p in problems("train", 6, k, (3, 4))]
    one, two = WorkerData(pool, rows=2), WorkerData(pool, rows=2)
    it = iter(one)
    batches = [next(it) for _ in range(5)]
    two.position = (0, 3)
    later = iter(two)
    assert torch.equal(next(later).tokens, batches[3].tokens) and torch.equal(next(later).tokens, batches[4].tokens)


def test_it_learns(net):
    small = copy.deepcopy(net).train()
    packed, loss = PackedNet(small), WorkerLoss(small.config)
    rng = random.Random(1)
    batch = lay_traces([simulate(p, 2, "combined", rng) for p in problems("train", 3, 9, (3, 3))])
    opt = torch.optim.Adam(small.parameters(), 3e-3)
    values = []
    for _ in range(12):
        opt.zero_grad()
        value = loss(packed, batch, torch.Generator()).value
        value.backward()
        opt.step()
        values.append(value.item())
    assert np.isfinite(values).all() and values[-1] < 0.6 * values[0]
