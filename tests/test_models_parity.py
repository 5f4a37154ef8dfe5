"""Our transformer against transformers, family by family: logits, gradients, and checkpoints both
ways.
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from model_zoo import BASE, CASES, ids, reference
from stretto.models.checkpoint import load, load_config
from stretto.models.config import ModelConfig
from stretto.models.context import packed, plain_logits
from stretto.models.transformer import Transformer

N = 19


def logits(hf, tokens):
    with torch.no_grad():
        return hf(tokens[None]).logits[0].float()


def reread(path, **options):
    """The checkpoint as transformers loads it; reference experts, one after the other."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()
    if hasattr(hf, "set_experts_implementation"):
        hf.set_experts_implementation("eager")
    return hf


@pytest.fixture(params=CASES, scope="module")
def checkpoint(request, tmp_path_factory):
    family, changes = CASES[request.param]
    path = tmp_path_factory.mktemp("hf")
    reference(family, **changes).save_pretrained(path)
    return path


def test_logits(checkpoint):
    want = logits(reread(checkpoint, dtype=torch.float32), ids(N))
    got = plain_logits(load(checkpoint, dtype="float32"), ids(N))
    assert want.std() > 0.1
    assert (got - want).abs().max() <= 2e-6 * max(1.0, want.abs().max())


def test_logits_bf16(checkpoint):
    """The order of casts is the same: no difference at all."""
    want = logits(reread(checkpoint, dtype=torch.bfloat16), ids(N))
    got = plain_logits(load(checkpoint, dtype="bfloat16"), ids(N))
    assert torch.equal(got, want)


def test_save_gives_the_same_files(checkpoint, tmp_path):
    load(checkpoint, dtype="float32").save(tmp_path / "again")
    old = load_file(checkpoint / "model.safetensors")
    new = load_file(tmp_path / "again" / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(old[k].dtype == new[k].dtype and torch.equal(old[k], new[k]) for k in old)
    assert json.loads((checkpoint / "config.json").read_text()) == json.loads(
        (tmp_path / "again" / "config.json").read_text()
    )


def test_transformers_reads_what_we_write(checkpoint, tmp_path):
    """Also from a config that we made ourselves, without the source's keys."""
    model = load(checkpoint, dtype="float32")
    want = logits(reread(checkpoint, dtype=torch.float32), ids(N))
    model.config = model.config.changed(source={}, dtype="float32")
    model.save(tmp_path / "fresh")
    got = logits(reread(tmp_path / "fresh", dtype=torch.float32), ids(N))
    assert torch.equal(got, want)
    again = load_config(tmp_path / "fresh")
    assert again == model.config


def test_gradients(checkpoint):
    hf = reread(checkpoint, dtype=torch.float32)
    ours = load(checkpoint, dtype="float32")
    tokens = ids(N)
    hf(tokens[None], labels=tokens[None]).loss.backward()
    out = ours(tokens, torch.arange(N), packed(ours.config, [N]))
    torch.nn.functional.cross_entropy(out[:-1], tokens[1:]).backward()
    theirs = dict(hf.named_parameters())
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, theirs[name].grad, atol=1e-5, rtol=1e-4), name


def test_old_rope_keys(tmp_path):
    """rope_theta and rope_scaling of files before transformers 5, with ``type`` or
    ``rope_type``.
    """
    new = reference("llama", **CASES["llama-llama3"][1]).config.to_dict()
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    params = dict(new["rope_parameters"])
    old["rope_theta"] = params.pop("rope_theta")
    for key in ("type", "rope_type"):
        scaling = {key: params["rope_type"]} | {k: v for k, v in params.items() if k != "rope_type"}
        read = ModelConfig.from_hf(old | {"rope_scaling": scaling})
        assert read.rope == ModelConfig.from_hf(new).rope
        assert read.to_hf()["rope_scaling"] == scaling


def test_defaults_of_absent_keys():
    def read(kind, **changes):
        keys = {k: v for k, v in BASE.items() if k not in changes}
        return ModelConfig.from_hf(
            keys | {"model_type": kind} | {k: v for k, v in changes.items() if v is not None}
        )

    assert read("qwen3").head_dim == 128
    assert read("llama").head_dim == 8
    assert read("mistral").windows == (4096, 4096)
    assert read("mixtral").rope.theta == 1e6
    assert read("llama", num_key_value_heads=None).num_key_value_heads == 4
    assert read("qwen2").qkv_bias
    assert not read("qwen2").o_bias
    assert read("llama", eos_token_id=[2, 5]).eos_token_ids == (2, 5)


def test_stretto_section():
    """A qwen3 with full attention, as our zoo ships it, stays a qwen3 for everybody else."""
    data = BASE | {"model_type": "qwen3", "head_dim": 8}
    data["stretto"] = {"attention": "block", "block_size": 8, "shift": True, "mask_token_id": 5}
    c = ModelConfig.from_hf(data)
    assert (c.attention, c.block_size, c.shift, c.mask_token_id) == ("block", 8, True, 5)
    fresh = c.changed(source={}).to_hf()
    assert fresh["model_type"] == "qwen3"
    assert ModelConfig.from_hf(fresh) == c.changed(dtype="float32")
    full = c.changed(attention="full", block_size=1)
    assert ModelConfig.from_hf(full.to_hf()) == full


def test_moe_runs_only_the_chosen_experts():
    c = ModelConfig.from_hf(
        BASE
        | dict(model_type="qwen3_moe", head_dim=8, num_experts=4, num_experts_per_tok=1)
        | dict(moe_intermediate_size=8)
    )
    model = Transformer(c)
    mlp = model.layers[0].mlp
    seen = []
    run = mlp.experts._expert
    mlp.experts._expert = lambda e, x: seen.append((e, len(x))) or run(e, x)
    x = torch.randn(7, c.hidden_size)
    chosen = mlp.gate(x).argmax(-1)
    mlp(x)
    assert sorted(seen) == sorted((int(e), int((chosen == e).sum())) for e in chosen.unique())
