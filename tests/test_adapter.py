"""Adapters: one file format, errors that name both sides; states of cached rows for methods that read them."""

import json
from typing import ClassVar

import pytest
import torch

from stretto.decoding.ar import Autoregressive
from stretto.errors import CheckpointError, UnknownNameError, UnsupportedError, WeightsError
from stretto.models.adapter import (
    Adapter,
    Base,
    fingerprint,
    load_adapter,
    open_adapter,
    save_adapter,
)
from stretto.models.checkpoint import load, save
from stretto.models.context import packed
from stretto.zoo.models import PARTS, resolve
from tiny import engine, greedy, model


def some(net, kind="medusa"):
    return Adapter(kind, Base.of(net, "test"), {"a": torch.randn(3, 32), "b": torch.ones(2)}, {"heads": 2}, {"x": [1.0]})


def test_round_trip(tmp_path):
    net = model()
    made = some(net)
    save_adapter(tmp_path / "part", made)
    save_adapter(tmp_path / "part", made)
    got = open_adapter("medusa", str(tmp_path / "part"), net)
    assert (got.kind, got.base, got.config, got.statistics) == (made.kind, made.base, made.config, made.statistics)
    assert torch.equal(got.tensors["a"], made.tensors["a"].bfloat16().float())
    assert sorted(p.name for p in (tmp_path / "part").iterdir()) == ["adapter.json", "adapter.safetensors"]


def test_fingerprint_is_of_the_weights_not_of_their_form(tmp_path):
    net = model().to(torch.bfloat16).float()
    first = fingerprint(net)
    save(net, tmp_path / "m", dtype=torch.bfloat16)
    assert fingerprint(load(tmp_path / "m", dtype="float32")) == fingerprint(load(tmp_path / "m", dtype="bfloat16")) == first
    assert fingerprint(load(tmp_path / "m", dtype="float32").pack()) == first
    assert fingerprint(model(seed=1)) != first
    with torch.no_grad():
        net.layers[1].mlp.down_proj.weight[0, 0] += 1
    assert fingerprint(net) != first


def test_errors_name_both_sides(tmp_path):
    net, other, wide = model(), model(seed=1), model(hidden_size=64)
    save_adapter(tmp_path / "p", some(net))
    with pytest.raises(UnsupportedError, match="'medusa'.*'eagle'"):
        open_adapter("eagle", str(tmp_path / "p"), net)
    with pytest.raises(UnsupportedError, match=f"{fingerprint(net)}.*{fingerprint(other)}"):
        open_adapter("medusa", str(tmp_path / "p"), other)
    with pytest.raises(UnsupportedError, match="width 32, vocabulary 64.*width 64"):
        open_adapter("medusa", str(tmp_path / "p"), wide)
    with pytest.raises(CheckpointError, match="there is no adapter"):
        open_adapter("medusa", str(tmp_path / "none"), net)
    with pytest.raises(UnknownNameError, match="tiny-medusa"):
        open_adapter("medusa", "zoo:tiny-medus", net)
    with pytest.raises(UnsupportedError, match=fingerprint(net)):
        open_adapter("medusa", "auto", net)
    with pytest.raises(UnsupportedError, match="part of zoo:tiny"):
        resolve("zoo:tiny-medusa")
    with pytest.raises(WeightsError, match=r"b: the part needs \(5,\), the file has \(2,\)"):
        part = torch.nn.Module()
        part.a, part.b = torch.nn.Parameter(torch.zeros(3, 32)), torch.nn.Parameter(torch.zeros(5))
        load_adapter(tmp_path / "p").into(part)


def test_damaged_files(tmp_path):
    save_adapter(tmp_path / "p", some(model()))
    weights, about = tmp_path / "p" / "adapter.safetensors", tmp_path / "p" / "adapter.json"
    good, text = weights.read_bytes(), about.read_text()
    weights.write_bytes(good[:-3])
    with pytest.raises(WeightsError, match="damaged"):
        load_adapter(tmp_path / "p")
    weights.unlink()
    with pytest.raises(WeightsError, match=r"adapter\.safetensors"):
        load_adapter(tmp_path / "p")
    weights.write_bytes(good)
    for broken in (text[:20], "[]", json.dumps(json.loads(text) | {"format": 9})):
        about.write_text(broken)
        with pytest.raises(CheckpointError, match=r"adapter\.json"):
            load_adapter(tmp_path / "p")


class Reader(Autoregressive):
    """Plain decoding that has states kept."""

    taps: ClassVar = (1, -1)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_kept_states_are_those_of_a_plain_forward(backend):
    """After every step, for every cached row: chunked prefill, shared prefixes and preemption included."""
    net = model()
    eng = engine(net, backend=backend, slots=128, max_rows=24)
    texts = [[5 + (i * j) % 40 for i in range(40)] for j in (3, 3, 5)]
    method, params = Reader(eng.host, None), greedy(24, ignore_eos=True)
    streams = [eng.add(t, params, method)[0] for t in texts]
    streams += eng.add(texts[0], params, Autoregressive(eng.host, None))
    checked = 0
    while eng.busy:
        eng.step()
        for seq in [s.seq for s in streams[:3] if s.finish_reason is None and len(s.seq.view)]:
            n = len(seq.view)
            tapped = {}
            final = model().hidden(
                torch.tensor(seq.tokens[:n]), torch.arange(n), packed(net.config, [n]), taps=(1,), tapped=tapped
            )
            for layer, want in ((1, tapped[1]), (-1, final)):
                got = eng.host.states(layer)[torch.from_numpy(seq.view.slots.astype("int64"))]
                torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-3)
            assert (eng.host.written[seq.view.slots] > 0).all()
            checked += 1
    assert checked > 30 and eng.scheduler.preemptions > 0
    assert streams[1].seq.metrics.cached_tokens or streams[2].seq.metrics.cached_tokens or eng.prefix.hits


@pytest.mark.parametrize("part", [p for p in PARTS.values() if (p.folder / "adapter.json").exists()], ids=lambda p: p.name)
def test_shipped_parts_belong_to_their_bases(part):
    base = load(resolve(f"zoo:{part.base}"))
    adapter = open_adapter(part.kind, "auto", base)
    assert adapter.source == str(part.folder) and adapter.statistics
    assert sum(f.stat().st_size for f in part.folder.iterdir()) < 2_000_000
