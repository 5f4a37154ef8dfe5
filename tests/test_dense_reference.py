"""Random programs of fork, join, truncate and tree steps against a slow dense reference.

The reference keeps every row ever evaluated, with its token, its position and the rows that it saw, and recomputes all of
them at once with an explicit mask, without any cache.
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
from stretto.engine.types import Sequence, Step
from stretto.models.context import PackedContext
from tiny import V, greedy, model


@dataclass
class Thread:
    seq: Sequence
    rows: list[int] = field(default_factory=list)  # global numbers of the rows in the view
    born: int = 0


class World:
    """The engine's own parts on one side, the list of all rows on the other."""

    def __init__(self, net, backend):
        self.net, self.runner = net, Runner(copy.deepcopy(net), slots=2048, backend=backend)
        self.tokens, self.positions, self.sees = [], [], []
        self.threads = [Thread(self._sequence())]

    def _sequence(self):
        params = greedy(4)
        return Sequence(0, [], 0, params, None, View(self.runner.alloc), Sampler(params))

    def evaluate(self, jobs):
        """jobs: (thread, Step, kept rows). One packed forward; compare its logits with the reference."""
        plans = [Plan(t.seq, 0, step, slots=self.runner.alloc.alloc(len(step))) for t, step, _ in jobs]
        got = self.runner.forward(pack(plans)).logits
        numbers = []
        for (thread, step, keep), plan in zip(jobs, plans, strict=True):
            first = len(self.tokens)
            for i, token in enumerate(step.tokens):
                seen = [j for j in range(len(step)) if self._visible(step, i, j)]
                self.tokens.append(token)
                self.positions.append(
                    len(thread.rows) + i if step.positions is None else step.positions[i]
                )
                self.sees.append([*thread.rows, *(first + j for j in seen)])
            numbers += range(first, len(self.tokens))
            thread.seq.view.append(plan.slots[list(keep)])
            rest = [i for i in range(len(step)) if i not in set(keep)]
            self.runner.alloc.release(plan.slots[rest])
            thread.rows += [first + i for i in keep]
        want = self.reference()[numbers]
        assert torch.allclose(got, want, atol=2e-4, rtol=1e-4)

    @staticmethod
    def _visible(step, i, j):
        if isinstance(step.see, str):
            return j <= i
        while i >= 0:
            if i == j:
                return True
            i = step.see[i]
        return False

    def reference(self):
        n = len(self.tokens)
        mask = torch.zeros(n, n, dtype=torch.bool)
        for i, seen in enumerate(self.sees):
            mask[i, seen] = True
        with torch.inference_mode():
            hidden = self.net.hidden(
                torch.tensor(self.tokens), torch.tensor(self.positions), PackedContext([n], kind=mask)
            )
            return self.net.logits(hidden)


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["chain", "all", "tree", "fork", "truncate", "join", "drop"]),
        st.integers(0, 9), st.integers(0, 1 << 20),
    ),
    min_size=1, max_size=14,
)


@pytest.fixture(scope="module")
def net():
    return model(scale=1.5)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS)
def test_random_programs(net, backend, actions):
    world = World(net, backend)
    for action, which, seed in actions:
        rng = np.random.default_rng(seed)
        threads = world.threads
        thread = threads[which % len(threads)]
        text = rng.integers(0, V, rng.integers(1, 9)).tolist()
        if action == "chain":
            world.evaluate([(thread, Step(text), range(len(text)))])
        elif action == "all":
            world.evaluate([(t, Step(text[: 1 + i]), range(len(text[: 1 + i]))) for i, t in enumerate(threads)])
        elif action == "tree":
            parent = [-1] + [int(rng.integers(0, i)) for i in range(1, len(text))]
            depth = [0]
            for p in parent[1:]:
                depth.append(depth[p] + 1)
            path, at = [], len(text) - 1
            while at >= 0:
                path.append(at)
                at = parent[at]
            positions = [len(thread.rows) + d for d in depth]
            world.evaluate([(thread, Step(text, positions, parent), path[::-1])])
        elif action == "fork" and len(threads) < 6:
            child = Thread(world._sequence(), list(thread.rows), len(thread.rows))
            child.seq.view = thread.seq.view.fork()
            threads.append(child)
        elif action == "truncate":
            n = int(rng.integers(0, len(thread.rows) + 1))
            thread.seq.view.truncate(n)
            del thread.rows[n:]
            thread.born = min(thread.born, n)
        elif action == "join" and len(threads) > 1:
            child = threads[(which + 1) % len(threads)]
            if child is not thread and not set(child.rows[child.born :]) & set(thread.rows):
                thread.seq.view.join(child.seq.view, child.born)
                thread.rows += child.rows[child.born :]
        elif action == "drop" and len(threads) > 1:
            threads.remove(thread)
            thread.seq.view.release()
    for thread in world.threads:
        thread.seq.view.release()
    assert world.runner.alloc.used == 0


def test_forks_share_the_prompt(net):
    world = World(net, "auto")
    root = world.threads[0]
    world.evaluate([(root, Step(list(range(5, 55))), range(50))])
    for _ in range(8):
        child = Thread(world._sequence(), list(root.rows), 50)
        child.seq.view = root.seq.view.fork()
        world.threads.append(child)
    assert world.runner.alloc.used == 50
    world.evaluate([(t, Step([7]), [0]) for t in world.threads[1:]])
    assert world.runner.alloc.used == 58
