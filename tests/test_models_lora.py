"""LoRA adapters from and to peft: the same logits, and errors that name both sides."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from model_zoo import CASES, ids, reference
from stretto.errors import ArchitectureError, CheckpointError, UnsupportedError, WeightsError
from stretto.models.checkpoint import load
from stretto.models.context import packed, plain_logits
from stretto.models.lora import add_lora, load_lora, merge_lora, save_lora

OPTIONS = {
    "attention": dict(target_modules=["q_proj", "v_proj"]),
    "all-linear": dict(target_modules="all-linear", use_rslora=True),
    "patterns": dict(
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 5, "layers.1.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 3},
    ),
}


@pytest.fixture
def base(tmp_path):
    family, changes = CASES["qwen3-tied-bias"]
    reference(family, **changes).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapt(base, path, **options):
    """A peft adapter with random matrices; the adapted model's logits."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    wrapped = peft.get_peft_model(hf, config)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.3)
        logits = wrapped(ids(9)[None]).logits[0]
    wrapped.save_pretrained(path)
    return logits


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "parallel"])
@pytest.mark.parametrize("options", OPTIONS)
def test_peft_to_us(base, tmp_path, options, merge):
    want = adapt(base, tmp_path / "adapter", **OPTIONS[options])
    model = load(base, dtype="float32")
    plain = plain_logits(model, ids(9))
    names = load_lora(model, tmp_path / "adapter", merge=merge)
    assert names
    got = plain_logits(model, ids(9))
    assert (got - want).abs().max() <= 5e-6 * want.abs().max()
    assert (got - plain).abs().max() > 0.01
    merge_lora(model)
    assert (plain_logits(model, ids(9)) - want).abs().max() <= 5e-6 * want.abs().max()
    model.save(tmp_path / "merged")


@pytest.mark.parametrize("options", OPTIONS)
def test_us_to_peft(base, tmp_path, options):
    """An adapter that we load and save again gives peft the same logits."""
    want = adapt(base, tmp_path / "adapter", **OPTIONS[options])
    model = load(base, dtype="float32")
    load_lora(model, tmp_path / "adapter", merge=False)
    save_lora(model, tmp_path / "again", base=str(base))
    old = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    new = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[k], new[k]) for k in old)
    hf = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        got = peft.PeftModel.from_pretrained(hf, tmp_path / "again")(ids(9)[None]).logits[0]
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_train_a_fresh_adapter(base, tmp_path):
    model = load(base, dtype="float32")
    before = plain_logits(model, ids(9))
    names = add_lora(model, rank=3, alpha=6, targets=["q_proj", "up_proj"])
    assert len(names) == 4
    assert torch.equal(plain_logits(model, ids(9)), before)
    assert all((".lora_" in n) == p.requires_grad for n, p in model.named_parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(ids(9), torch.arange(9), packed(model.config, [9])).square().mean().backward()
    optimizer.step()
    after = plain_logits(model, ids(9))
    assert not torch.equal(after, before)
    save_lora(model, tmp_path / "adapter")
    fresh = load(base, dtype="float32")
    load_lora(fresh, tmp_path / "adapter", merge=False)
    assert torch.equal(plain_logits(fresh, ids(9)), after)


def test_peft_wraps_our_model(base):
    """Our module names are those that peft looks for."""
    model = load(base, dtype="float32")
    wrapped = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]), model
    )
    names = [n for n, _ in wrapped.named_parameters() if "lora_A" in n]
    assert len(names) == 4
    assert names[0] == "model.layers.0.self_attn.q_proj.lora_A.default.weight"


def test_adapter_of_experts_is_merged(tmp_path):
    """Per-expert matrices, as older files have them, go into the fused tensors."""
    family, changes = CASES["qwen3_moe"]
    reference(family, **changes).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", dtype="float32")
    module = "model.layers.1.mlp.experts.3.up_proj"
    a, b = torch.randn(2, 32), torch.randn(24, 2)
    write(tmp_path / "adapter", {f"{module}.lora_A": a, f"{module}.lora_B": b})
    before = model.layers[1].mlp.experts.gate_up_proj.detach().clone()
    load_lora(model, tmp_path / "adapter")
    delta = model.layers[1].mlp.experts.gate_up_proj - before
    assert torch.allclose(delta[3, 24:], 2 * b @ a, atol=1e-5)
    assert delta[3, :24].abs().max() == 0
    assert delta[[0, 1, 2, 4, 5]].abs().max() == 0
    with pytest.raises(WeightsError, match="only be merged"):
        load_lora(model, tmp_path / "adapter", merge=False)


# --- wrong adapters


def write(path, tensors, **config):
    path.mkdir()
    named = {f"base_model.model.{k}.weight": v.contiguous() for k, v in tensors.items()}
    save_file(named, path / "adapter_model.safetensors")
    data = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    (path / "adapter_config.json").write_text(json.dumps(data))
    return path


Q = "model.layers.0.self_attn.q_proj"


def test_wrong_shape_names_both_sides(base, tmp_path):
    bad = {f"{Q}.lora_A": torch.zeros(2, 64), f"{Q}.lora_B": torch.zeros(32, 2)}
    with pytest.raises(
        WeightsError, match=r"B \(32, 2\) x A \(2, 64\) does not fit W \(32, 32\)"
    ) as e:
        load_lora(load(base), write(tmp_path / "a", bad))
    assert Q in str(e.value)


@pytest.mark.parametrize(
    ("tensors", "config", "error", "message"),
    [
        (
            {"model.layers.9.self_attn.q_proj": (2, 32)},
            {},
            WeightsError,
            "layers.9.*does not exist",
        ),
        ({Q: (2, 32)}, {"peft_type": "IA3"}, ArchitectureError, "IA3"),
        ({Q: (2, 32)}, {"use_dora": True}, ArchitectureError, "DoRA"),
        ({Q: (2, 32)}, {"bias": "all"}, ArchitectureError, "bias"),
        ({Q: (2, 32)}, {"modules_to_save": ["lm_head"]}, ArchitectureError, "modules_to_save"),
    ],
)
def test_wrong_adapters(base, tmp_path, tensors, config, error, message):
    both = {}
    for name, (r, i) in tensors.items():
        both[f"{name}.lora_A"], both[f"{name}.lora_B"] = torch.zeros(r, i), torch.zeros(32, r)
    with pytest.raises(error, match=message):
        load_lora(load(base), write(tmp_path / "a", both, **config))


def test_broken_files(base, tmp_path):
    model = load(base)
    with pytest.raises(CheckpointError, match="adapter_config"):
        load_lora(model, tmp_path)
    half = write(tmp_path / "half", {f"{Q}.lora_A": torch.zeros(2, 32)})
    with pytest.raises(WeightsError, match="only one of"):
        load_lora(model, half)
    nan = torch.full((2, 32), float("nan"))
    with pytest.raises(WeightsError, match="NaN"):
        load_lora(model, write(tmp_path / "nan", {f"{Q}.lora_A": nan}))
    odd = write(tmp_path / "odd", {"model.embed_tokens.lora_embedding_A": torch.zeros(2, 2)})
    with pytest.raises(WeightsError, match="not a LoRA matrix"):
        load_lora(model, odd)
    (odd / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_lora(model, odd)


def test_refusals(base, tmp_path):
    model = load(base)
    with pytest.raises(UnsupportedError, match="no adapter"):
        save_lora(model, tmp_path / "x")
    with pytest.raises(UnsupportedError, match="q_proj"):
        add_lora(model, rank=2, alpha=2, targets=["attention"])
    add_lora(model, rank=2, alpha=2)
    with pytest.raises(UnsupportedError, match="merge it"):
        model.save(tmp_path / "y")
    with pytest.raises(UnsupportedError, match="merge"):
        model.pack()
    path = write(
        tmp_path / "a", {f"{Q}.lora_A": torch.zeros(2, 32), f"{Q}.lora_B": torch.zeros(32, 2)}
    )
    with pytest.raises(UnsupportedError, match=r"before pack\(\)"):
        load_lora(merge_lora(model).pack(), path)
