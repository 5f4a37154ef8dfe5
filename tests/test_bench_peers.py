"""Peers: what is measured beside what, absent ones, and the file that llama.cpp reads."""

import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stretto.bench import peers as peers_module
from stretto.bench.bars import BARS, judge
from stretto.bench.gguf_file import write_gguf
from stretto.bench.peers import SHAPES, measure_peers
from stretto.bench.peers_engines import Ours, check, write_checkpoint
from stretto.errors import MissingExtraError, UnsupportedError
from stretto.models.tokenizer import Tokenizer
from stretto.zoo.models import resolve
from stretto.zoo.workbook import TASKS, examples

SMALL = peers_module._qwen3(32, 64, 2, 4, 2, 8, 2048)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("peers") / "m", SMALL)


def test_shapes_have_the_size_of_their_name():
    for name, size in (("tiny", 3e6), ("125M", 128e6), ("600M", 596e6)):
        c = SHAPES[name]
        heads, kv, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        layer = c["hidden_size"] * (2 * heads * dim + 2 * kv * dim + 3 * c["intermediate_size"])
        total = c["num_hidden_layers"] * layer + c["vocab_size"] * c["hidden_size"]
        assert total == pytest.approx(size, rel=0.1)


def test_each_measurement_is_a_ratio_to_a_peer(monkeypatch):
    def engine(name, factor, **more):
        return SimpleNamespace(
            name=name, decode=lambda prompts, tokens, method="ar": factor * (1 + len(prompts) / 16), backend="fake",
            rows=lambda n, context: factor * (1 + n / 16), forward=lambda n, kind, context: (lambda: n), **more,
        )

    def absent(path, threads):
        raise MissingExtraError("nobody", "peers")

    def broken(path, threads):
        raise RuntimeError("no such instruction\nand more")

    def make(function, name, package):
        function.name, function.package = name, package
        return function

    slow = make(lambda path, threads: engine("slow", 3.0, offers=("one row", "rows", "batch")), "slow", "slow")
    monkeypatch.setattr(peers_module, "ENGINES", (slow, make(absent, "gone", "gone-py"), make(broken, "broken", "b")))
    monkeypatch.setattr(peers_module, "Ours", lambda path, threads, **mode: engine("stretto", 2.0 if mode.get("deterministic") else 1.0))
    monkeypatch.setattr(peers_module, "write_checkpoint", lambda path, config: path)
    result = measure_peers(shapes=["tiny"], threads=1)
    rows = {(r["what"], r["peer"]): r for r in result["rows"]}
    assert rows["one row", "slow"]["ratio"] == pytest.approx(3) and rows["one row", "slow"]["unit"] == "tokens/s"
    assert rows["16 rows", "slow"]["ratio"] == pytest.approx(1)
    assert rows["batch 16, mixed lengths", "slow"]["ratio"] == pytest.approx(3)
    assert rows["batch 16, mixed lengths", "stretto, one by one"]["ratio"] == pytest.approx(16 * (17 / 16) / 2)
    assert rows["one row, deterministic", "stretto, default mode"]["ratio"] == pytest.approx(0.5)
    for kind in peers_module.KINDS:
        assert rows[f"16 rows of a {kind}, deterministic", "stretto, default mode"]["ratio"] > 0
    assert rows["16 rows", "stretto, one row"]["stretto"] > 0
    assert all(r["ratio_low"] <= r["ratio"] <= r["ratio_high"] for r in result["rows"])
    gone = {a["peer"]: a["reason"] for a in result["absent"]}
    assert gone == {"gone": "not installed: pip install gone-py", "broken": "RuntimeError: no such instruction"}
    assert result["provenance"]["threads"] == 1


def test_bars_are_judged_by_what_was_measured():
    def row(what, shape, peer, ratio, stretto=1.0):
        return {"what": what, "shape": shape, "peer": peer, "ratio": ratio, "stretto": stretto}

    rows = [
        row("one row", "125M", "transformers generate", 1.8), row("one row", "tiny", "transformers generate", 2.4),
        row("16 rows", "125M", "stretto, one row", 0.8, stretto=1.3),
        row("batch 16, mixed lengths", "125M", "stretto, one by one", 5.5),
    ]
    found = {(b["claim"], b["shape"]): b for b in judge(rows, [{"peer": "llama.cpp", "what": "all", "reason": "not here"}])}
    assert found["one row: speed, times transformers' generate", "125M"]["holds"] is True
    assert found["one row: speed, times transformers' generate", "tiny"]["holds"] is False
    assert found["16 rows: cost, times one row", "125M"] | {"holds": False, "measured": 1.3, "at_most": True} == found[
        "16 rows: cost, times one row", "125M"
    ]
    llama = found["one row: speed, times llama.cpp", "125M"]
    assert llama["holds"] is None and llama["reason"] == "not here"
    assert found["batch 16 of mixed lengths: throughput, times batch 1", "tiny"]["holds"] is None
    measured = {(b.what, b.shape, b.peer) for b in BARS}
    assert len(measured) == len(BARS)


@pytest.mark.parametrize("kind", peers_module.KINDS)
def test_forwards_of_each_kind(folder, kind):
    ours = Ours(folder, 1)
    call = ours.forward(7, kind, 5)
    batch = call.args[0]
    paths = np.split(batch.local, batch.local_ptr[1:-1])
    assert all(i in path for i, path in enumerate(paths)) and batch.positions.max() < 5 + 7
    last = {"chain": [0, 1, 2, 3, 4, 5, 6], "block": [0, 1, 2, 3, 4, 5, 6], "tree": [0, 2, 6]}[kind]
    assert paths[6].tolist() == last


def test_a_peer_that_stops_early_is_refused():
    with pytest.raises(UnsupportedError):
        check("x", [3, 4], [3, 5])


def test_gguf_holds_the_same_weights(folder, tmp_path):
    file = tmp_path / "m.gguf"
    write_gguf(folder, file)
    data = file.read_bytes()
    at = 0

    def take(form):
        nonlocal at
        found = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return found if len(found) > 1 else found[0]

    def text():
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at].decode()

    assert data[:4] == b"GGUF"
    at = 4
    version, count, pairs = take("IQQ")
    assert version == 3
    def value(kind):
        if kind == 9:
            of, size = take("IQ")
            return [value(of) for _ in range(size)]
        return text() if kind == 8 else take({4: "I", 5: "i", 6: "f", 7: "?"}[kind])

    facts = {}
    for _ in range(pairs):
        key, kind = text(), take("I")
        facts[key] = value(kind)
    assert facts["general.architecture"] == "qwen3" and facts["qwen3.block_count"] == 2
    assert facts["qwen3.attention.key_length"] == 8 and facts["qwen3.rope.freq_base"] == 1e6
    tokenizer, tokens = Tokenizer(folder), facts["tokenizer.ggml.tokens"]
    assert len(tokens) == len(facts["tokenizer.ggml.token_type"]) == 2048
    assert all(tokenizer.token(i) == t for i, t in enumerate(tokens) if not t.startswith("<|unused"))
    assert tokens[facts["tokenizer.ggml.eos_token_id"]] == "<|im_end|>" and "im_start" in facts["tokenizer.chat_template"]
    infos = {}
    for _ in range(count):
        name, dims = text(), take("I")
        shape = [take("Q") for _ in range(dims)][::-1]
        infos[name] = (shape, *take("IQ"))
    start = -(-at // 32) * 32
    weights = load_file(folder / "model.safetensors")
    assert len(infos) == len(weights) == 2 * 11 + 2
    for name, ours in (
        ("token_embd.weight", "model.embed_tokens.weight"), ("output_norm.weight", "model.norm.weight"),
        ("blk.1.attn_k.weight", "model.layers.1.self_attn.k_proj.weight"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
    ):
        shape, kind, offset = infos[name]
        assert offset % 32 == 0 and kind == (0 if len(shape) == 1 else 30)
        dtype = torch.float32 if kind == 0 else torch.bfloat16
        size = weights[ours].numel() * (4 if kind == 0 else 2)
        found = torch.frombuffer(bytearray(data[start + offset : start + offset + size]), dtype=dtype).view(shape)
        assert torch.equal(found, weights[ours].to(dtype))


def test_llama_cpp_reads_the_same_tokens_as_we_do(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = resolve("zoo:tiny")
    write_gguf(folder, tmp_path / "m.gguf")
    theirs, ours = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False), Tokenizer(folder)
    for task in TASKS:
        for e in examples(task, "test", 3, 5):
            text = f"<|im_start|>user\n{e.prompt}<|im_end|>\n<|im_start|>assistant\n{e.answer}"
            assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ours.encode(text)


def test_a_server_beside_ours_is_waited_for_and_ended(tmp_path):
    from stretto.bench.servers import Running

    served = Running([sys.executable, "-c", SERVE], "/", 1, tmp_path / "log")
    served.close()
    assert served._process.poll() is not None
    with pytest.raises(RuntimeError, match="did not come up: boom"):
        Running([sys.executable, "-c", "print('boom'); raise SystemExit(3)"], "/", 1, tmp_path / "log")


SERVE = "import http.server, sys; http.server.HTTPServer(('127.0.0.1', int(sys.argv[-1])), http.server.SimpleHTTPRequestHandler).serve_forever()"
