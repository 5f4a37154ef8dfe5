"""Lines that are read while they are written, against a definition that recomputes every row ever from nothing.

The definition knows, for each row, the ordered list of the rows that it saw when it was written. The last of the list is
the row itself, and the distance of a key is how far from the end of that list it stands: nothing else.
"""

import copy
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stretto.engine.cache import View
from stretto.engine.pack import Plan, pack
from stretto.engine.runner import Runner
from stretto.engine.sampling import Sampler
from stretto.engine.team import Team, check_model, units, whole
from stretto.engine.types import Sequence, Step
from stretto.errors import UnsupportedError
from stretto.joins import turn_keys
from stretto.models.native import NativeForward
from stretto.models.rope import apply_rope
from tiny import V, config, greedy, model

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


class Distances:
    """Attention by an explicit distance for every pair; q and k arrive at position 0."""

    def __init__(self, net, sees):
        n = len(sees)
        self.mask, self.distance = torch.zeros(n, n, dtype=torch.bool), torch.zeros(n, n, dtype=torch.int64)
        for i, seen in enumerate(sees):
            self.mask[i, seen] = True
            self.distance[i, seen] = torch.arange(len(seen) - 1, -1, -1)
        cos, sin = net.rotary(-self.distance.flatten(), torch.float64)  # keys stand behind
        self.angles = cos / net.rotary.scale, sin / net.rotary.scale

    def attend(self, layer, q, k, v):
        n, heads, dim = q.shape
        pairs = apply_rope(k.repeat(n, 1, 1), *self.angles).view(n, n, -1, dim)  # [i, j] = key j as row i reads it
        q = q.view(n, pairs.shape[2], -1, dim)
        scores = torch.einsum("igrd,ijgd->igrj", q, pairs) * dim**-0.5
        law = scores.masked_fill(~self.mask[:, None, None], -torch.inf).softmax(-1)
        return torch.einsum("igrj,jgd->igrd", law, v).reshape(n, heads, dim)


@dataclass
class Line:
    seq: Sequence
    rows: list[int] = field(default_factory=list)  # global numbers


class World:
    def __init__(self, net, backend, deterministic=False):
        self.net = copy.deepcopy(net).double()
        self.runner = Runner(copy.deepcopy(net), slots=1024, backend=backend, deterministic=deterministic)
        self.tokens, self.sees, self.lines, self.error = [], [], [], 0.0

    def line(self):
        params = greedy(4)
        self.lines.append(Line(Sequence(0, [], 0, params, None, View(self.runner.alloc), Sampler(params))))
        return self.lines[-1]

    def step(self, jobs, extra=()):
        """jobs: (line, tokens, lines that it reads), written in one forward; ``extra`` plans share it. The logits."""
        plans = []
        for line, text, reads in jobs:
            seq = line.seq
            seq.reads, seq.team = tuple(r.seq.view for r in reads), Team(len(jobs))
            plans.append(Plan(seq, 0, Step(text), slots=self.runner.alloc.alloc(len(text))))
        got = self.runner.forward(pack([*plans, *extra])).logits[: sum(p.rows for p in plans)]
        before, numbers = {id(line): list(line.rows) for line in self.lines}, []
        for line, text, _ in jobs:
            line.rows += range(len(self.tokens), len(self.tokens) + len(text))
            self.tokens += text
        for (line, text, reads), plan in zip(jobs, plans, strict=True):
            others = [r for other in reads for r in other.rows]  # with the rows of this very forward
            for i in range(len(text)):
                self.sees.append(others + line.rows[: len(before[id(line)]) + i + 1])
                numbers.append(line.rows[len(before[id(line)]) + i])
            line.seq.view.append(plan.slots)
        want = self.reference()[numbers].float()
        self.error = max(self.error, float((got - want).abs().max() / want.abs().max()))
        assert self.error < 1e-5
        return got

    def move(self, line, to):
        """The rows of ``line`` go behind ``to``."""
        turn_keys(self.runner, line.seq.view.slots, line.seq.view.slots, len(to.rows))
        to.seq.view.join(line.seq.view, 0)
        line.seq.view.release()
        to.rows, line.rows = to.rows + line.rows, []

    def reference(self):
        """float64 [rows, V]: all rows ever, with what each saw."""
        with torch.inference_mode():
            n = len(self.tokens)
            hidden = self.net.hidden(
                torch.tensor(self.tokens), torch.zeros(n, dtype=torch.int64), Distances(self.net, self.sees)
            )
            return self.net.logits(hidden)


@pytest.fixture(scope="module")
def net():
    return model(scale=1.2)


PROGRAMS = st.lists(
    st.tuples(st.sampled_from(["step", "step", "step", "line", "move"]), st.integers(0, 9), st.integers(0, 1 << 20)),
    min_size=2, max_size=9,
)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=PROGRAMS)
def test_random_programs(net, backend, program):
    world = World(net, backend)
    first = world.line()
    world.step([(first, [1, 5, 9], [])])
    for action, which, seed in program:
        rng = np.random.default_rng(seed)
        lines = world.lines
        if action == "line" or len(lines) < 2:
            world.line()
        elif action == "step":
            writers = [w for w in lines if rng.random() < 0.7] or [lines[-1]]
            jobs = []
            for w in writers:
                others = [x for x in lines if x is not w and rng.random() < 0.8]
                rng.shuffle(others)
                jobs.append((w, rng.integers(0, V, rng.integers(1, 4)).tolist(), others))
            world.step(jobs)
        elif lines[which % len(lines)].rows:
            line = lines[which % len(lines)]
            world.move(line, lines[(which + 1) % len(lines)])


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_rope_that_scales_does_so_once(backend):
    net = model(scale=1.2, rope_parameters=YARN)
    assert net.rotary.scale != 1.0
    world = World(net, backend)
    a, b = world.line(), world.line()
    for t in range(4):
        world.step([(a, [t + 1], [b]), (b, [t + 9], [a])])
    world.move(a, b)
    world.step([(a, [3], [b])])


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_one_writer_is_a_plain_text_however_it_is_split(net, backend):
    """Card, invariant 1: W = 1, any split into lines: logits of a plain causal forward."""
    text = np.random.default_rng(0).integers(0, V, 40).tolist()
    world = World(net, backend)
    parts = [world.line() for _ in range(4)]
    got, at = [], 0
    for i, n in enumerate((11, 1, 17, 11)):
        for size in (n - n // 2, n // 2):
            if size:
                got.append(world.step([(parts[i], text[at : at + size], parts[:i])]))
                at += size
    from stretto.models.context import plain_logits

    want = plain_logits(world.net, text).float()
    assert float((torch.cat(got) - want).abs().max()) < 1e-4


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_same_step_visibility_and_isolation(net, backend):
    """What a writer is given in a forward moves its readers' logits in that forward, and nobody else's."""

    def logits(token):
        world = World(net, backend)
        a, b, c, blind = (world.line() for _ in range(4))
        world.step([(a, [1, 2], [])])
        return world.step([(b, [token], [a]), (c, [7], [a, b]), (blind, [7], [a])])

    x, y = logits(11), logits(12)
    assert (x[1] - y[1]).abs().max() > 1e-3 and torch.equal(x[2], y[2])


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_batch_mates_change_no_bit(net, backend):
    """Alone or beside another sequence's rows: the same bits (deterministic mode)."""

    def run(beside):
        world = World(net, backend, deterministic=True)
        a, b = world.line(), world.line()
        world.step([(a, [1, 2, 3], [])])
        extra = []
        if beside:
            mate = world.line().seq
            extra = [Plan(mate, 0, Step(list(range(20))), slots=world.runner.alloc.alloc(20))]
        return world.step([(b, [4], [a]), (a, [5], [b])], extra)

    assert torch.equal(run(False), run(True))


def test_moving_keeps_values_and_distances(net):
    """Card, invariants 3 and 5: values stay bit for bit; who sees the moved tokens at the same distances sees the same."""
    world = World(net, "auto")
    common, a, reader, again = (world.line() for _ in range(4))
    world.step([(common, [1, 2, 3], [])])
    world.step([(a, [4, 5], [common])])
    before = world.step([(reader, [6], [common, a])])
    slots = a.seq.view.slots.copy()
    values = world.runner.pool.v[:, slots].clone()
    world.move(a, common)
    after = world.step([(again, [6], [common])])
    assert torch.equal(values, world.runner.pool.v[:, slots])
    assert torch.allclose(before, after, atol=1e-5)


def test_equal_contents_give_equal_logits(net):
    """Card, invariant 4."""
    world = World(net, "auto")
    common, a, b = (world.line() for _ in range(3))
    world.step([(common, [1, 2, 3, 4], [])])
    got = world.step([(a, [8, 9], [common]), (b, [8, 9], [common])])
    assert torch.equal(got[:2], got[2:])


def test_turning_the_query_is_turning_the_key():
    """Card, invariant 2: offsets of both signs, grouped heads, a rotated part of each head."""
    from stretto.models.config import RopeConfig
    from stretto.models.rope import Rotary

    g = torch.Generator().manual_seed(0)
    for partial in (1.0, 0.5):
        rotary = Rotary(RopeConfig(partial=partial), 16, 4096)
        q, k = (torch.randn(1, h, 16, generator=g, dtype=torch.float64) for h in (4, 2))
        for offset in (-10, -1, 0, 7, 300, 2048):
            at = lambda p: rotary(torch.tensor([p]), torch.float64)
            keys = apply_rope(k, *at(offset + 5))
            left = apply_rope(q, *at(20)).view(2, 2, 16) @ keys.view(2, 16, 1)
            right = apply_rope(q, *at(20 - offset)).view(2, 2, 16) @ apply_rope(k, *at(5)).view(2, 16, 1)
            assert torch.allclose(left, right, atol=1e-4)  # angles are float32


def test_bad_runs_are_refused(net):
    from stretto.models.batch import Runs

    if NativeForward.supported(config()) is not None:
        pytest.skip("no native forward here")
    world = World(net, "native")
    line = world.line()
    plan = Plan(line.seq, 0, Step([1, 2]), slots=world.runner.alloc.alloc(2))
    batch = pack([plan])
    for ptr, start, at in (([0, 1, 2], [0, 1], [0, 0]), ([0, 0, 1], [0], [-1]), ([0, 2, 2], [0, 9], [1, 1]), ([0, 1], [0], [0])):
        batch.runs = Runs(*(np.array(x, np.int32) for x in (ptr, start, at)))
        with pytest.raises(IndexError, match="run"):
            world.runner.forward(batch)


@pytest.mark.parametrize("changes", [
    {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    {"model_type": "mistral", "sliding_window": 7},
])
def test_models_that_cannot(changes):
    with pytest.raises(UnsupportedError):
        check_model(Runner(model(**changes), slots=64))


def test_teams_go_as_a_whole():
    @dataclass
    class Item:
        seq: Sequence
        base: None = None

    def item(team):
        params = greedy(1)
        return Item(Sequence(0, [], 0, params, None, None, Sampler(params), team=team))

    two, three = Team(2), Team(3)
    items = [item(two), item(None), item(three), item(two), item(three)]
    assert whole(items) == [items[0], items[1], items[3]]
    assert [len(u) for u in units(items)] == [2, 1, 2]
