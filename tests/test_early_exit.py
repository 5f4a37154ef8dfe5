"""A look between the layers: it sees what the layer would give, and changes nothing."""

import numpy as np
import pytest
import torch

from stretto.engine.types import Commit, Step
from stretto.errors import OptionError
from stretto.models.context import plain_logits
from stretto.models.entries import Entry
from stretto.models.staged import slice_layers
from tiny import engine, greedy, model, run, tokens


class Watcher:
    """Plain decoding that looks at ``layer``."""

    name, lossless = "watcher", True

    def __init__(self, layer, taps=()):
        self.layer, self.taps, self.early, self.final, self.hidden = layer, taps, [], [], []

    def admit(self, seq):
        pass

    def prefill(self, seq):
        return len(seq.tokens) - 1

    def propose(self, seqs):
        look = (self.layer, lambda o: self.early.append((o.logits.clone(), o.argmax.copy())))
        return [Step([s.tokens[-1]], taps=self.taps, early=look) for s in seqs]

    def commit(self, seqs, steps, outcomes):
        self.final += [o.logits.clone() for o in outcomes]
        self.hidden += [{t: o.hidden(t).clone() for t in self.taps} for o in outcomes]
        return [Commit([int(o.argmax[0])], keep=(0,)) for o in outcomes]

    def release(self, seq):
        pass

    def preemptible(self, seq):
        return True


@pytest.fixture(scope="module")
def net():
    return model(num_hidden_layers=4)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_the_look_is_the_layers_own_law(net, backend):
    prompts = [[5, 9, 7], [11, 5, 6, 13, 7]]
    eng, method = engine(net, backend=backend), Watcher(2, taps=(0, 1, 2, 3, 4, -1))
    streams = [eng.add(p, greedy(6, ignore_eos=True), method)[0] for p in prompts]
    while eng.busy:
        eng.step()
    other, whole = engine(net, backend=backend), Watcher(1, taps=(0, 1, 2, 3, 4, -1))
    whole.propose = lambda seqs: [Step([s.tokens[-1]], taps=whole.taps) for s in seqs]
    for p in prompts:
        other.add(p, greedy(6, ignore_eos=True), whole)
    while other.busy:
        other.step()
    assert len(method.early) == len(method.final) == len(whole.final) == 12 and not whole.early
    for a, b in zip(method.final, whole.final, strict=True):
        assert torch.equal(a, b), "bits do not change"
    for a, b in zip(method.hidden, whole.hidden, strict=True):
        assert all(torch.equal(a[t], b[t]) for t in a)
    lower = slice_layers(net, 0, 2)
    for i, stream in enumerate(streams):
        for step in range(6):
            want = plain_logits(lower, stream.seq.tokens[: stream.seq.prompt_len + step])[-1]
            logits, argmax = method.early[2 * step + i]
            assert torch.allclose(logits[0], want, atol=1e-4) and argmax[0] == int(np.argmax(logits[0].numpy()))


def test_several_layers_in_one_forward_and_other_methods_beside(net):
    eng = engine(net)
    looks = [Watcher(1), Watcher(3)]
    streams = [eng.add([5, 9, 7], greedy(8, ignore_eos=True), m)[0] for m in looks]
    (want,) = run(eng, [([5, 9, 7], greedy(8, ignore_eos=True), "ar", {})])[0]
    assert all(tokens(s) == tokens(want) for s in streams)
    assert all(len(m.early) == 8 for m in looks)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("layer", [0, 4])
def test_layers_that_are_not_inside_are_refused(net, layer, backend):
    with pytest.raises(OptionError, match=r"1\.\.3"):
        eng = engine(net, backend=backend)
        eng.add([5, 9], greedy(3), Watcher(layer))
        eng.step()


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_rows_that_enter_in_mid_stack_do_so_in_stages_too(net, backend, layer):
    def logits(early):
        eng, method = engine(net, backend=backend), Watcher(2)
        matrix = eng.runner.matrix(torch.eye(32) + 0.1)
        entry = Entry(layer, matrix, np.array([1], np.int32), np.array([0], np.int32))
        look = (2, lambda o: None) if early else None
        method.propose = lambda seqs: [Step([s.tokens[-1], 0], entries=[entry], early=look) for s in seqs]
        eng.add([5, 9, 7], greedy(4, ignore_eos=True), method)
        while eng.busy:
            eng.step()
        return torch.stack(method.final)

    assert torch.equal(logits(True), logits(False))
