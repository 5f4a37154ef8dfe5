"""Rows that enter in mid-stack, on both backends: what they compute, and that nobody else is changed by them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from stretto.engine.runner import Runner
from stretto.errors import UnsupportedError
from stretto.models.batch import FlatBatch
from stretto.models.entries import Entry, sink
from stretto.models.native import NativeForward
from stretto.models.pool_context import forward_batch

REASON = NativeForward.supported(tiny.config())
BACKENDS = ["torch", pytest.param("native", marks=pytest.mark.skipif(REASON is not None, reason=str(REASON)))]
SHAPES = {"qwen3": {}, "moe": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
                               "moe_intermediate_size": 24}}  # fmt: skip
N, LAYERS = 12, 4


def net(name: str = "qwen3"):
    return tiny.model(num_hidden_layers=LAYERS, **SHAPES[name])


def runner(model, backend: str) -> Runner:
    return Runner(model, slots=128, backend=backend)


def text(n: int = N) -> FlatBatch:
    """Causal rows 0..n-1 of one text, all with logits."""
    cols, counts = np.tril_indices(n)[1].astype(np.int32), np.arange(1, n + 1)
    return FlatBatch(
        tokens=np.random.default_rng(0).integers(0, tiny.V, n), positions=np.arange(n, dtype=np.int32),
        slots=np.arange(5, 5 + n, dtype=np.int32), context_of=np.zeros(n, np.int32), context=np.zeros(0, np.int32),
        context_ptr=np.zeros(2, np.int32), local=cols, local_ptr=np.concatenate([[0], counts.cumsum()]).astype(np.int32),
        logit_rows=np.arange(n, dtype=np.int32),
    )  # fmt: skip


def with_rows(batch: FlatBatch, rows: list[tuple[int, int, int, object]]) -> FlatBatch:
    """``rows``: (source, position, layer, matrix); each sees what its source sees and itself, or stands in for it."""
    n, lists, entries = batch.n, [], []
    for j, (source, position, layer, matrix) in enumerate(rows):
        seen = batch.local[batch.local_ptr[source] : batch.local_ptr[source + 1]]
        lists.append([*seen[: len(seen) - (position == source)], n + j])
        entries.append(Entry(layer, matrix, np.array([n + j], np.int32), np.array([source], np.int32)))
    extra = np.arange(n, n + len(rows), dtype=np.int32)
    return replace(
        batch, tokens=np.concatenate([batch.tokens, np.zeros(len(rows), np.int64)]),
        positions=np.concatenate([batch.positions, [p for _, p, _, _ in rows]]).astype(np.int32),
        slots=np.concatenate([batch.slots, 60 + extra - n]).astype(np.int32),
        context_of=np.zeros(n + len(rows), np.int32),
        local=np.concatenate([batch.local, *lists]).astype(np.int32),
        local_ptr=np.concatenate([batch.local_ptr, batch.local_ptr[-1] + np.cumsum([len(x) for x in lists])]).astype(np.int32),
        logit_rows=np.arange(n + len(rows), dtype=np.int32), entries=entries,
    )  # fmt: skip


def weights(k: int = 3) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(5)
    return [torch.eye(32) + 0.3 * torch.randn(32, 32, generator=gen) for _ in range(k)]


def some_rows(r: Runner) -> list[tuple]:
    a, b, c = (r.matrix(w) for w in weights())
    return [(11, 12, 2, a), (4, 5, 1, b), (11, 13, 3, c), (4, 6, 3, c), (7, 8, 1, b), (0, 3, 4, a), (2, 3, 0, a)]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_rows_keep_every_bit(backend, name):
    r = runner(net(name), backend)
    plain = r.forward(replace(text(), taps=(2,)))
    batch = replace(with_rows(text(), some_rows(r)), taps=(2,))
    both = r.forward(batch)
    if backend == "native":
        assert torch.equal(both.logits[:N], plain.logits) and torch.equal(both.hidden[2][:N], plain.hidden[2])
    assert torch.allclose(both.logits[:N], plain.logits, atol=1e-4)
    double = net(name).double()
    pool = Runner(double, slots=128, backend="torch").pool
    want = forward_batch(double, pool, text()).logits
    got = forward_batch(double, pool, with_rows(text(), some_rows(Runner(double, slots=128, backend="torch"))))
    assert torch.allclose(got.logits[:N].double(), want.double(), atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_entering_row_is_the_matrix_times_the_source_run_through_the_layers_above(backend, name):
    """The definition: layers one by one, the row's own state set behind its layer."""
    model = net(name)
    r = runner(net(name), backend)
    rows = some_rows(r)
    logits = r.forward(with_rows(text(), rows)).logits[N:]
    for got, (source, position, layer, matrix) in zip(logits, rows, strict=True):
        tokens = torch.from_numpy(text().tokens[: source + 1])
        seen = len(tokens)
        x, y = model.embed(tokens), None
        at = torch.cat([torch.arange(seen), torch.tensor([position])])
        for i in range(LAYERS + 1):
            if i == layer:
                y = x[source] @ matrix.weight.float().T
            if i == LAYERS:
                break
            both = torch.cat([x, y[None]]) if y is not None else x
            mask = torch.tril(torch.ones(len(both), len(both), dtype=torch.bool))
            ctx = _Dense(mask)
            out = model.layers[i](both, model.rotary(at[: len(both)], both.dtype), ctx)
            x, y = out[:seen], out[seen] if y is not None else None
        want = model.head(model.norm(y[None]))[0]
        assert torch.allclose(got, want, atol=2e-3), (source, layer)


class _Dense:
    def __init__(self, mask):
        self.mask = mask

    def attend(self, layer, q, k, v):
        share = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(share, 1) for x in (k, v))
        scores = torch.einsum("iad,jad->aij", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("aij,jad->iad", scores.masked_fill(~self.mask, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits(backend):
    """Identity at layer 0 at the source's own place is the source; at the last layer the matrix feeds the head."""
    model = net()
    r = runner(net(), backend)
    eye, w = r.matrix(torch.eye(32)), r.matrix(weights()[0])
    batch = replace(with_rows(text(), [(6, 6, 0, eye), (9, 9, LAYERS, w)]), taps=(LAYERS,))
    out = r.forward(batch)
    assert torch.allclose(out.logits[N], out.logits[6], atol=1e-4)
    state = out.hidden[LAYERS][9] @ weights()[0].T
    assert torch.allclose(out.logits[N + 1], model.head(model.norm(state[None]))[0], atol=1e-3)


def test_sinking_moves_rows_and_nothing_else():
    r = runner(net(), "torch")
    batch = with_rows(text(), some_rows(r))
    sunk, now = sink(batch)
    assert [e.layer for e in sunk.entries] == sorted(e.layer for e in sunk.entries)
    assert len(sunk.entries) == 5, "rows of one layer and matrix are one entry"
    for i in range(batch.n):
        j = now[i]
        assert sunk.slots[j] == batch.slots[i] and sunk.positions[j] == batch.positions[i]
        seen = batch.local[batch.local_ptr[i] : batch.local_ptr[i + 1]]
        assert (now[seen] == sunk.local[sunk.local_ptr[j] : sunk.local_ptr[j + 1]]).all()
    assert torch.allclose(r.forward(sunk).logits, r.forward(batch).logits, atol=1e-5)
    assert sink(sunk)[1] is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_is_refused(backend):
    r = runner(net(), backend)
    w = r.matrix(weights()[0])
    error = UnsupportedError if backend == "torch" else IndexError
    with pytest.raises(error):
        r.forward(with_rows(text(), [(3, 4, LAYERS + 1, w)]))
    late = with_rows(text(), [(3, 4, 2, w)])
    late.local[late.local_ptr[5]] = N  # a row of the text sees it
    with pytest.raises(error):
        r.forward(late)
    early = with_rows(text(), [(3, 4, 2, w), (3, 5, 2, w)])
    with pytest.raises(error):  # a source that enters at the same layer
        r.forward(replace(early, entries=[early.entries[0], replace(early.entries[1], sources=np.array([N], np.int32))]))
