"""Checkpoints in the Hugging Face layout, both ways: ``load`` streams tensor by tensor, ``save`` is
atomic.

A directory holds config.json, ``model.safetensors`` (or shards and
``model.safetensors.index.json``), and perhaps generation_config.json and tokenizer files. Every
problem with the tensors is listed in one WeightsError.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stretto.errors import CheckpointError, OptionError, UnsupportedError, WeightsError
from stretto.models.adapter import fingerprint
from stretto.models.config import ModelConfig
from stretto.models.lora import load_lora, noted_fingerprint
from stretto.models.names import Piece, ignorable, pieces
from stretto.models.store import DTYPES, INDEX, WEIGHTS, Store, listed, read_json
from stretto.models.transformer import Transformer
from stretto.zoo.models import base_folder, resolve

__all__ = ["Source", "auto_dtype", "load", "load_config", "save"]

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
SHARD_BYTES = 5_000_000_000
NAMED_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class Source:
    """Where a model came from: its directory, and the dtype of each tensor there."""

    path: Path
    dtypes: Mapping[str, torch.dtype]


def auto_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 on CUDA and on processors that multiply it natively (AMX, AVX512-BF16), else
    float32.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def load_config(path: str | os.PathLike) -> ModelConfig:
    """The config of the checkpoint in directory ``path``; its stop ids include those of
    generation_config.json.
    """
    path = base_folder(resolve(path))
    config = ModelConfig.from_hf(read_json(path / CONFIG))
    stops = list(config.eos_token_ids)
    if (path / GENERATION).exists():
        more = read_json(path / GENERATION).get("eos_token_id")
        more = more if isinstance(more, list) else [] if more is None else [more]
        stops += [t for t in more if t not in stops]
    return replace(config, stop_token_ids=tuple(stops))


def load(
    path: str | os.PathLike,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
) -> Transformer:
    """The model that ``path`` names: a directory, "zoo:NAME", or a hub id. ``dtype``: "auto" (see
    ``auto_dtype``), or a name or torch dtype.

    Raises CheckpointError for missing or unreadable files, ArchitectureError for what is not
    covered, and WeightsError with every missing, unexpected, misshapen or NaN tensor.
    """
    path = resolve(path)
    if (base := base_folder(path)) != path:
        return _with_adapter(base, path, dtype, device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = _dtype(dtype, device)
    config = load_config(path)
    model = Transformer(config, dtype=dtype, device="meta")
    with ExitStack() as stack:
        store = Store(path, stack)
        plan = {name: _plan(name, p, store, config) for name, p in model.named_parameters()}
        _check(model, plan, store, config)
        for name, parts in plan.items():
            _assign(model, name, _read(model.get_parameter(name), parts, store, dtype, device))
    model.source = Source(path, store.dtypes)
    return model


def save(
    model: Transformer,
    path: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int = SHARD_BYTES,
) -> None:
    """Write ``model`` as a checkpoint that transformers reads. An existing checkpoint at ``path``
    is replaced whole.

    ``dtype`` None keeps the dtype each tensor had in its source checkpoint (unmodified tensors come
    back byte for byte), or the model's own. ``max_shard_size`` in bytes.
    """
    path = Path(path)
    _saveable(model)
    forced = None if dtype is None else _dtype(dtype, "cpu")
    if path.is_file():
        raise CheckpointError(f"{path} is a file: give a directory to save to")
    if path.is_dir() and any(path.iterdir()) and not (path / CONFIG).exists():
        raise CheckpointError(f"{path} is not empty and holds no config.json: give a new directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temp.chmod(0o755)
        written = _write_weights(model, temp, forced, max_shard_size)
        _write_config(model, temp, written, keep=forced is None and model.source is not None)
        _copy_extras(model, path, temp)
        _swap(temp, path)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise


# --- reading


def _with_adapter(base: Path, adapter: Path, dtype: Any, device: Any) -> Transformer:
    """The model in ``base`` with a LoRA adapter added to its weights. UnsupportedError for an
    adapter that notes another base."""
    model = load(base, dtype=dtype, device=device)
    noted, here = noted_fingerprint(adapter), fingerprint(model)
    if noted is not None and noted != here:
        raise UnsupportedError(
            f"the adapter {adapter} was trained on another model than {base} (hash {noted}, here "
            f"{here}): train it again on this one, or restore the base it belongs to"
        )
    load_lora(model, adapter)
    model.source = None
    return model


def _plan(name: str, param: Tensor, store: Store, config: ModelConfig) -> list[Piece]:
    """The pieces of a parameter; a file that holds fused experts under our name is read as it
    is.
    """
    if name in store.where and ".experts." in name:
        return [Piece(name)]
    return list(pieces(name, config))


def _check(
    model: Transformer, plan: dict[str, list[Piece]], store: Store, config: ModelConfig
) -> None:
    """Every expected tensor is there once, in its shape, in a dtype we read; nothing else is."""
    missing, wrong, wanted = [], [], set()
    for name, parts in plan.items():
        param = model.get_parameter(name)
        for piece in parts:
            wanted.add(piece.name)
            shape = tuple(param[piece.index].shape)
            shape = shape if piece.part is None else (piece.whole, *shape[1:])
            if piece.name not in store.where:
                missing.append(piece.name)
            elif store.shapes[piece.name] != shape:
                wrong.append(f"{piece.name} is {store.shapes[piece.name]}, expected {shape}")
            elif store.kinds[piece.name] not in DTYPES:
                wrong.append(f"{piece.name} has dtype {store.kinds[piece.name]}")
    extra = [n for n in store.where if n not in wanted and not ignorable(n, config)]
    parts = [
        f"{len(names)} {what}: {listed(names)}"
        for what, names in (("missing", missing), ("misshapen", wrong), ("unexpected", extra))
        if names
    ]
    if parts:
        raise WeightsError(
            f"the tensors of {store.path} do not fit its config.json; " + "; ".join(parts)
        )


def _read(
    param: Tensor,
    parts: list[Piece],
    store: Store,
    dtype: torch.dtype,
    device: str | torch.device,
) -> Tensor:
    out = None
    for piece in parts:
        tensor = store.get(piece.name)
        if tensor.isnan().any():
            raise WeightsError(f"tensor {piece.name} of {store.path} contains NaN")
        if piece.part is not None:
            tensor = tensor[piece.part].clone()
        if piece.index == ():
            return tensor.to(device=device, dtype=dtype)
        if out is None:
            out = torch.empty(param.shape, dtype=dtype, device=device)
        out[piece.index] = tensor.to(device=device, dtype=dtype)
    return out


def _assign(model: Transformer, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value))


# --- writing


def _saveable(model: Transformer) -> None:
    if model.packed:
        raise UnsupportedError(
            "a packed model cannot be saved: save before pack(), or load it again"
        )
    extra = [n for n, _ in model.named_parameters() if ".lora_" in n]
    if extra:
        raise UnsupportedError(
            f"the model carries an adapter ({extra[0]}): merge it or save the adapter"
        )


def _write_weights(
    model: Transformer, folder: Path, forced: torch.dtype | None, max_shard: int
) -> torch.dtype:
    """Write the shards; the dtype of the first tensor, for config.json."""
    shards: list[list[str]] = [[]]
    sizes = [0]
    buffer: dict[str, Tensor] = {}
    first = None
    for name, tensor in _disk_tensors(model, forced):
        first = first or tensor.dtype
        if buffer and sizes[-1] + tensor.nbytes > max_shard:
            _flush(buffer, folder, len(shards))
            shards.append([])
            sizes.append(0)
        buffer[name] = tensor
        shards[-1].append(name)
        sizes[-1] += tensor.nbytes
    _flush(buffer, folder, len(shards))
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
        index = {
            "metadata": {"total_size": sum(sizes)},
            "weight_map": {t: f for f, tensors in zip(names, shards, strict=True) for t in tensors},
        }
        _dump(folder / INDEX, index)
    for i, file in enumerate(names, 1):
        (folder / f"{i}.part").rename(folder / file)
    return first


def _flush(buffer: dict[str, Tensor], folder: Path, number: int) -> None:
    save_file(buffer, folder / f"{number}.part", metadata={"format": "pt"})
    buffer.clear()


def _disk_tensors(model: Transformer, forced: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """(disk name, tensor) of every parameter, in the source's dtype unless ``forced``."""
    source = model.source
    dtypes = source.dtypes if source is not None else {}
    with ExitStack() as stack:
        store = None
        for disk, value in _whole_tensors(model):
            want = forced or dtypes.get(disk, value.dtype)
            if forced is None and not _exact(value.dtype, want) and source.path.is_dir():
                store = store or Store(source.path, stack)
                original = store.get(disk)
                if torch.equal(original.to(value.dtype), value.cpu()):
                    yield disk, original
                    continue
            yield disk, value.to("cpu", want).contiguous().clone()


def _whole_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(disk name, its tensor): parameters that share one on disk are put together when all are there."""
    parts: dict[str, dict[int, Tensor]] = {}
    for name, param in model.named_parameters():
        for piece in pieces(name, model.config):
            value = param.detach()[piece.index]
            if piece.part is None:
                yield piece.name, value
                continue
            found = parts.setdefault(piece.name, {})
            found[piece.part.start] = value
            if sum(map(len, found.values())) == piece.whole:
                yield piece.name, torch.cat([x for _, x in sorted(found.items())])


def _exact(held: torch.dtype, wanted: torch.dtype) -> bool:
    """Does ``held`` represent every value of ``wanted``?"""
    return torch.promote_types(held, wanted) == held


def _write_config(model: Transformer, folder: Path, dtype: torch.dtype, *, keep: bool) -> None:
    """``keep``: leave the dtype that the source file names."""
    data = model.config.to_hf()
    key = "torch_dtype" if "torch_dtype" in data and "dtype" not in data else "dtype"
    if not keep:
        data[key] = str(dtype).removeprefix("torch.")
    _dump(folder / CONFIG, data)


def _copy_extras(model: Transformer, old: Path, folder: Path) -> None:
    """Tokenizer and generation files of the source, and whatever else lay in the directory that is
    replaced.
    """
    source = model.source
    if source is not None and source.path.is_dir():
        for name in (*TOKENIZER_FILES, GENERATION):
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, folder / name)
    if old.is_dir():
        for item in old.iterdir():
            if (folder / item.name).exists() or item.suffix == ".safetensors" or item.name == INDEX:
                continue
            (shutil.copytree if item.is_dir() else shutil.copy2)(item, folder / item.name)
    if not (folder / GENERATION).exists():
        c = model.config
        eos = list(c.stop_token_ids or c.eos_token_ids)
        data = {"bos_token_id": c.bos_token_id, "pad_token_id": c.pad_token_id}
        data["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
        _dump(folder / GENERATION, {k: v for k, v in data.items() if v is not None})


def _swap(temp: Path, path: Path) -> None:
    """Put ``temp`` in the place of ``path``."""
    if not path.exists():
        temp.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    path.rename(old / "was")
    temp.rename(path)
    shutil.rmtree(old)


# --- helpers


def _dump(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _dtype(dtype: str | torch.dtype, device: str | torch.device) -> torch.dtype:
    if dtype == "auto":
        return auto_dtype(device)
    found = NAMED_DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise OptionError("dtype", dtype, f"auto, {', '.join(NAMED_DTYPES)}")
    return found
