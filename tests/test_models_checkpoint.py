"""Every way in which a checkpoint can be wrong gives one clear error; saving is atomic and
exact.
"""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_zoo import CASES, ids, reference
from stretto.errors import (
    ArchitectureError,
    CheckpointError,
    OptionError,
    UnsupportedError,
    WeightsError,
)
from stretto.models.checkpoint import auto_dtype, load, load_config, save
from stretto.models.config import ModelConfig
from stretto.models.context import plain_logits
from stretto.models.linear import InferenceLinear, can_pack
from stretto.models.transformer import Transformer


@pytest.fixture
def path(tmp_path):
    """A tiny qwen3 as transformers writes it."""
    family, changes = CASES["qwen3"]
    reference(family, **changes).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path, **changes):
    """Change config.json; None deletes a key."""
    file = path / "config.json"
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def edit_tensors(path, change):
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# --- config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="gpt2"), r"'gpt2' is not supported: supported are .*qwen3"),
        (dict(model_type=None), "None is not supported"),
        (dict(quantization_config={"quant_method": "awq"}), "awq"),
        (dict(hidden_act="gelu"), "gelu"),
        (dict(num_key_value_heads=3), "not a multiple of num_key_value_heads=3"),
        (dict(head_dim=7), "even"),
        (dict(hidden_size=None), "lacks hidden_size"),
        (dict(num_hidden_layers=0), "num_hidden_layers=0"),
        (dict(rope_parameters={"rope_type": "spiral"}), "spiral.*llama3"),
        (dict(rope_parameters={"rope_type": "yarn"}), "needs factor"),
        (dict(rope_parameters={"rope_type": "llama3", "factor": 2.0}), "needs low_freq_factor"),
        (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial"),
        (dict(stretto={"attention": "sideways"}), "sideways.*causal"),
        (dict(stretto={"attention": "block", "block_size": 0}), "block_size=0"),
        (dict(stretto={"mask_token_id": 61}), "mask_token_id=61 is outside"),
        (dict(hidden_size="wide"), "hidden_size"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_config_errors(path, changes, message):
    edit(path, **changes)
    with pytest.raises(ArchitectureError, match=message):
        load(path)


def test_other_keys_of_the_stretto_section_stay(path):
    edit(path, stretto={"attention": "full", "recipe": "copy"})
    changed = load_config(path).changed(attention="block", block_size=4).to_hf()["stretto"]
    assert changed == {"attention": "block", "block_size": 4, "shift": False, "recipe": "copy"}


def test_no_config(path):
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(path)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_config_that_is_no_object(path, content):
    (path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(path)


def test_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match="no model .*nothing"):
        load(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        load_config(tmp_path / "file")


def test_dtype_names(path):
    with pytest.raises(OptionError, match=r"int4.*bfloat16"):
        load(path, dtype="int4")
    assert load(path, dtype=torch.float64).dtype == torch.float64
    assert load(path).dtype == auto_dtype()


def test_stop_ids_include_generation_config(path):
    edit(path, eos_token_id=2)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    config = load_config(path)
    assert config.eos_token_ids == (2,)
    assert config.stop_token_ids == (2, 5)
    edit(path, eos_token_id=None)
    (path / "generation_config.json").unlink()
    assert load_config(path).stop_token_ids == ()


# --- tensors


def test_all_problems_in_one_error(path):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
        tensors["model.layers.7.extra"] = torch.zeros(1)

    edit_tensors(path, spoil)
    with pytest.raises(WeightsError) as e:
        load(path)
    text = str(e.value)
    assert "1 missing: model.norm.weight" in text
    assert "up_proj.weight is (3, 3), expected (40, 32)" in text
    assert "1 unexpected: model.layers.7.extra" in text


def test_long_lists_are_cut(path):
    edit(path, num_hidden_layers=9, layer_types=None)
    with pytest.raises(WeightsError, match=r"77 missing.* and 65 more"):
        load(path)


def test_nan(path):
    edit_tensors(path, lambda t: t["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(WeightsError, match=r"model\.norm\.weight .*NaN"):
        load(path)


def test_integer_tensor(path):
    edit_tensors(path, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(WeightsError, match=r"model\.norm\.weight has dtype I8"):
        load(path)


def test_harmless_extras_are_ignored(path):
    """Old rotary buffers; the head of a tied model."""
    edit(path, tie_word_embeddings=True)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(path, lambda t: t.update({name: torch.ones(8)}))
    assert not hasattr(load(path), "lm_head")


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}x"])
def test_corrupt_file(path, content):
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        load(path)


def test_truncated_file(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        load(path)


def test_unreadable_file(path):
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").mkdir()
    with pytest.raises(WeightsError, match="cannot be read"):
        load(path)


def test_other_formats(path):
    (path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor"):
        load(path)
    (path / "pytorch_model.bin").touch()
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin cannot be read: convert"):
        load(path)


def test_missing_shard(path, tmp_path):
    load(path, dtype="float32").save(tmp_path / "sharded", max_shard_size=20_000)
    (gone := sorted((tmp_path / "sharded").glob("model-*"))[1]).unlink()
    with pytest.raises(WeightsError, match=gone.name):
        load(tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(WeightsError, match="weight_map"):
        load(tmp_path / "sharded")


# --- saving


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "llama-tied"])
def test_shards(tmp_path, name):
    family, changes = CASES[name]
    reference(family, **changes).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", dtype="float32")
    model.save(tmp_path / "sharded", max_shard_size=15_000)
    shards = sorted(p.name for p in (tmp_path / "sharded").glob("*.safetensors"))
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(shards)
    whole = load_file(tmp_path / "model" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert set(index["weight_map"]) == set(whole)
    again = load(tmp_path / "sharded", dtype="float32")
    assert torch.equal(plain_logits(again, ids(9)), plain_logits(model, ids(9)))


@pytest.mark.parametrize("disk", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("held", ["float32", "bfloat16", "float64"])
def test_unmodified_tensors_come_back_byte_for_byte(path, tmp_path, disk, held):
    """Whatever dtype the model ran in; a modified tensor keeps the dtype and takes the new
    value.
    """

    def cast(tensors):
        tensors.update({k: v.to(disk) for k, v in tensors.items()})

    edit_tensors(path, cast)
    edit(path, dtype=str(disk)[6:])
    model = load(path, dtype=held)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.5)
    model.save(tmp_path / "again")
    old = load_file(path / "model.safetensors")
    new = load_file(tmp_path / "again" / "model.safetensors")
    changed = new.pop("model.norm.weight")
    assert changed.dtype == disk
    assert (changed == 1.5).all()
    for name, tensor in new.items():
        assert tensor.dtype == disk
        assert torch.equal(tensor, old[name])


def test_save_in_another_dtype(path, tmp_path):
    load(path).save(tmp_path / "half", dtype="bfloat16")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_other_files(path, tmp_path):
    """Tokenizer and generation files travel with the model; what lies at the target stays."""
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("hi")
    (path / "generation_config.json").write_text('{"temperature": 0.5}')
    target = tmp_path / "out"
    load(path).save(target)
    (target / "log.txt").write_text("kept")
    (target / "model-00001-of-00009.safetensors").write_text("stale")
    load(path).save(target)
    assert {p.name for p in target.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "log.txt",
        "model.safetensors",
        "tokenizer.json",
    }
    assert json.loads((target / "generation_config.json").read_text()) == {"temperature": 0.5}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_save_over_its_own_source(path):
    model = load(path, dtype="float32")
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    want = plain_logits(model, ids(5))
    model.save(path)
    assert torch.equal(plain_logits(load(path, dtype="float32"), ids(5)), want)


def test_generation_config_of_a_new_model(tmp_path):
    config = ModelConfig("llama", 16, 8, 8, 1, 2, 1, 4, eos_token_ids=(3, 4), bos_token_id=1)
    Transformer(config).save(tmp_path / "new")
    data = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert data == {"bos_token_id": 1, "eos_token_id": [3, 4]}
    assert load_config(tmp_path / "new") == config.changed(dtype="float32")


def test_a_failed_save_leaves_the_old_checkpoint(path, monkeypatch):
    model = load(path, dtype="float32")
    before = {p.name: p.read_bytes() for p in path.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("stretto.models.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save(path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert os.listdir(path.parent) == [path.name]


def test_refused_saves(path, tmp_path):
    model = load(path, dtype="float32")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        save(model, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        save(model, tmp_path / "full")
    with pytest.raises(UnsupportedError, match="packed"):
        save(model.pack(), tmp_path / "packed")


# --- packed linears


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packed_linear(dtype):
    """The packed kernel where there is one, F.linear elsewhere; the weights can be read back
    exactly.
    """
    torch.manual_seed(0)
    weights = [torch.randn(o, 48).to(dtype) for o in (32, 16)]
    biases = [torch.randn(o).to(dtype) for o in (32, 16)]
    packed = InferenceLinear(weights, biases)
    assert packed.packed == can_pack(dtype)
    assert all(torch.equal(a, b) for a, b in zip(packed.plain(), weights, strict=True))
    for rows in (1, 5, 33):
        x = torch.randn(rows, 48).to(dtype)
        want = torch.nn.functional.linear(x.double(), torch.cat(weights).double())
        want += torch.cat(biases).double()
        limit = {torch.float32: 1e-5, torch.bfloat16: 2e-1, torch.float64: 1e-12}[dtype]
        assert (packed(x).double() - want).abs().max() < limit
