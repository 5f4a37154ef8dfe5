"""Runs a recipe: builds model, data and objective, trains, and writes the checkpoint that ships.

A budget ends the run; the averaged weights, rounded to bfloat16, are what is written and what is probed last.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from stretto.models import checkpoint
from stretto.models.config import ModelConfig, MoEConfig
from stretto.models.transformer import Transformer
from stretto.tags import TAGS_FILE
from stretto.training.agent_data import agent_data, agent_tests
from stretto.training.data import Document, PackedBatch, PackedData, pack
from stretto.training.jacobi import JacobiForcing
from stretto.training.nets import PackedNet, fast_dtype, initialise, upcycle
from stretto.training.objectives import (
    Autoregressive,
    Balanced,
    BlockDiffusion,
    MaskedDiffusion,
    Objective,
)
from stretto.training.parallel_units import flat_tests, grammar_of, initialise_tags, parallel_data, write_parallel
from stretto.training.probe import Matcher, match_autoregressive, match_diffusion, probe
from stretto.training.recipes import Recipe
from stretto.training.recorded import Pools, recorded_data
from stretto.training.recovery import CausalRecovery, match_recovery
from stretto.training.spans import StructuredAttention
from stretto.training.step_units import step_data
from stretto.training.tool_units import tool_data, write_slots
from stretto.training.trainer import Record, TrainConfig, Trainer
from stretto.training.trie import TrieLoss
from stretto.training.worker_data import WorkerLoss, worker_data, worker_probe
from stretto.training.worker_traces import write_texts
from stretto.zoo import workbook
from stretto.zoo.models import resolve

__all__ = [
    "build_model", "config_of", "documents", "objective_of", "prepare", "provenance", "run", "ship", "special_ids",
    "watched", "write_json", "write_model",
]

CONTEXT = 1024  # positions of every model of the zoo
POOL = 1024  # examples packed together
CANVAS = 128  # longest answer region that a full-attention model is trained to fill
TOKENIZER = workbook.TOKENIZER.parent
TRIES = {"tool_slots": tool_data, "worked_steps": step_data}  # objectives on packed tries -> their data


def run(
    recipe: Recipe, out: Path, *, minutes: float | None, steps: int | None, resume: bool, threads: int | None,
    device: str, report: Callable[[Record], None] | None,
) -> dict[str, Any]:
    """See ``recipes.run_recipe``."""
    device, work = prepare(out, resume, threads, device)
    model = build_model(recipe).to(device)
    net = PackedNet(model, balance=bool(recipe.experts))
    config = TrainConfig(
        steps=steps, minutes=minutes, seed=recipe.seed, lr=recipe.lr, adam_lr=recipe.adam_lr,
        warmup=recipe.warmup, decay=recipe.decay, average=recipe.average,
    )
    exact = prober(recipe, net)
    pools = Pools(recipe, model, work / "trajectories") if recipe.objective == "jacobi_forcing" else None
    pad = special_ids()["<|pad|>"]
    clock: list[Callable[[], float]] = []  # how far the training is, once there is a trainer
    if pools is not None:
        data: Any = recorded_data(recipe, pools, pad_id=pad)
    elif recipe.objective == "structured_attention":
        data = parallel_data(recipe, lambda: clock[0](), pad_id=pad)
    else:
        makers = {name: partial(make, pad_id=pad) for name, make in TRIES.items()} | {"workers": worker_data}
        data = makers.get(recipe.objective, data_of)(recipe)
    trainer = Trainer(
        model, net, objective_of(recipe), data, config, folder=work, device=device,
        autocast=fast_dtype(device), callback=lambda t: {"exact": exact(False) if device == "cpu" else {}},
    )
    clock.append(trainer.progress)
    if pools is not None:
        pools.progress = trainer.progress
    trainer.resume()
    record = watched(recipe.model, trainer, report)
    return ship(recipe, trainer, record, out, exact)


def prepare(out: Path, resume: bool, threads: int | None, device: str) -> tuple[str, Path]:
    """(device, folder of checkpoints and log)"""
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    work = out.with_name(out.name + ".training")
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    return device, work


class Watched(Protocol):
    """What a progress bar and ``training.json`` read of a trainer."""

    model: Any
    device: torch.device

    def progress(self) -> float: ...

    def run(self, report: Callable[[Record], None] | None = None) -> Record: ...


def watched(name: str, trainer: Watched, report: Callable[[Record], None] | None) -> Record:
    """Run ``trainer``, with a progress bar unless ``report`` sees the steps."""
    with _progress(name, trainer) if report is None else nullcontext(report) as show:
        return trainer.run(show)


def provenance(recipe: Any, trainer: Watched, record: Record) -> dict[str, Any]:
    """What ``training.json`` says of every run."""
    return {
        "recipe": recipe.name, "base": recipe.base, "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": record.step, "tokens": record.tokens, "minutes": round(record.seconds / 60, 1),
        "loss": round(record.loss, 5), "seed": recipe.seed, "dtype": "float32, rounded to bfloat16",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "device": trainer.device.type, "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def ship(
    recipe: Recipe, trainer: Trainer, record: Record, out: Path, exact: Callable[[bool], dict[str, float]]
) -> dict[str, Any]:
    """Write the rounded weights, tokenizer and ``training.json`` to ``out``; returns the latter's content."""
    model = trainer.model
    write_model(model, trainer.final_weights(), out)
    found = exact(True) if trainer.device.type == "cpu" else {}
    if recipe.objective == "block_diffusion":  # where SDAR's own configs have it
        config = json.loads((out / checkpoint.CONFIG).read_text())
        write_json(out / checkpoint.CONFIG, config | {"block_size": recipe.block_size})
    if recipe.objective == "tool_slots":
        write_slots(out)
    if recipe.objective == "structured_attention":
        write_parallel(out)
    if recipe.objective == "workers":
        write_texts(out)
    for file in out.iterdir():
        file.chmod(0o644)
    about = provenance(recipe, trainer, record)
    about["exact_after_rounding"] = {task: round(share, 3) for task, share in found.items()}
    write_json(out / "training.json", about)
    return about


def write_model(model: Transformer, weights: Mapping[str, torch.Tensor], out: Path) -> None:
    """Round ``weights`` to bfloat16, in ``model`` too, and write them with the zoo's tokenizer to ``out``."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name].to(torch.bfloat16).to(p.dtype))
    checkpoint.save(model, out, dtype=torch.bfloat16)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, out / file.name)
    write_json(out / checkpoint.GENERATION, {
        "eos_token_id": model.config.eos_token_ids[0], "pad_token_id": model.config.pad_token_id, "do_sample": False,
    })
    for file in out.iterdir():
        file.chmod(0o644)


def build_model(recipe: Recipe) -> Transformer:
    """The model at its start: fresh from the seed, or from the base's weights."""
    model = Transformer(config_of(recipe))
    initialise(model, recipe.seed, layers=recipe.layers)
    if recipe.base:
        folder = resolve(recipe.base) if recipe.base.startswith("zoo:") else Path(recipe.base)
        upcycle(checkpoint.load(folder, dtype="float32"), model, recipe.seed)
        if recipe.objective == "structured_attention" and not (folder / TAGS_FILE).is_file():
            initialise_tags(model, grammar_of())
    return model


def config_of(recipe: Recipe) -> ModelConfig:
    """The ``config.json`` of a recipe."""
    ids = special_ids()
    kind = {"masked_diffusion": "full", "block_diffusion": "block"}.get(recipe.objective, "causal")
    dense = recipe.ffn if recipe.sparse_every == 1 else recipe.dense_ffn
    moe = MoEConfig(
        recipe.experts, recipe.top_k, recipe.ffn, renormalize=True, cast=True,
        sparse=tuple((recipe.layers - i - 1) % recipe.sparse_every == 0 for i in range(recipe.layers)),
    )
    return ModelConfig(
        _family(recipe),
        workbook_vocabulary(), recipe.hidden, dense, recipe.layers, recipe.heads, recipe.kv_heads, recipe.head_dim,
        tie_word_embeddings=True, qk_norm=True, max_position_embeddings=CONTEXT, attention=kind,
        block_size=recipe.block_size if kind == "block" else 1, moe=moe if recipe.experts else None,
        eos_token_ids=(ids["<|im_end|>"],), pad_token_id=ids["<|pad|>"],
        mask_token_id=ids["<|mask|>"] if not recipe.causal or recipe.objective == "causal_recovery" else None,
    )


def _family(recipe: Recipe) -> str:
    """The published layout that the model is saved in."""
    if recipe.objective == "causal_recovery":
        return "wedlm"
    if recipe.objective == "block_diffusion":
        return "sdar_moe" if recipe.experts else "sdar"
    return "qwen3_moe" if recipe.experts else "qwen3"


def special_ids() -> dict[str, int]:
    """Ids of the special tokens of the workbook's tokenizer."""
    tokenizer = workbook._tokenizer()
    return {name: tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|pad|>", "<|mask|>")}


def workbook_vocabulary() -> int:
    return workbook._tokenizer().get_vocab_size()


def objective_of(recipe: Recipe) -> Objective:
    mask = special_ids()["<|mask|>"]
    if recipe.objective == "masked_diffusion":
        return MaskedDiffusion(mask, law="count", suffix=recipe.suffix)
    plain: Objective = Autoregressive()
    if recipe.objective == "block_diffusion":
        plain = BlockDiffusion(mask, recipe.block_size)
    elif recipe.objective == "jacobi_forcing":
        plain = JacobiForcing(recipe.ar_weight)
    elif recipe.objective in TRIES:
        plain = TrieLoss()
    elif recipe.objective == "structured_attention":
        plain = StructuredAttention()
    elif recipe.objective == "workers":
        plain = WorkerLoss(config_of(recipe))
    elif recipe.objective == "causal_recovery":
        plain = CausalRecovery(mask, recipe.block_size, end_id=special_ids()["<|im_end|>"], suffix=recipe.suffix)
    return Balanced(plain, recipe.balance) if recipe.experts else plain


def data_of(recipe: Recipe) -> PackedData:
    """Batches of the training split; pool k is drawn from stream number k of the recipe's seed."""
    if recipe.pages == "orchestra":
        return agent_data(recipe, pad_id=special_ids()["<|pad|>"])

    def pool(k: int) -> list[Document]:
        number = recipe.seed * 1_000_003 + k
        stream = workbook.stream("train", number, recipe.weights or None)
        return documents(recipe, [next(stream) for _ in range(POOL)], random.Random(number))

    return PackedData(pool, rows=recipe.rows, length=recipe.length, pad_id=special_ids()["<|pad|>"], seed=recipe.seed)


def documents(recipe: Recipe, examples: Sequence[workbook.Example], rng: random.Random) -> list[Document]:
    """Examples as the objective wants them: behind the answer, diffusion models learn to fill with end-of-text.

    Block diffusion and causal recovery: up to the end of the block. Full attention: up to a canvas whose length is
    mostly a little more than the answer's, and in three cases of ten anything up to ``CANVAS``.
    """
    eos, out = special_ids()["<|im_end|>"], []
    for example in examples:
        prompt, answer = workbook.encode(example)
        extra = 0
        if recipe.objective in ("block_diffusion", "causal_recovery"):
            extra = -(len(prompt) + len(answer)) % recipe.block_size
        elif recipe.objective == "masked_diffusion":
            room = max(0, min(CANVAS - len(answer), recipe.length - len(prompt) - len(answer)))
            extra = rng.randint(0, room) if rng.random() < 0.3 else min(room, rng.randint(0, 16))
        out.append(Document([*prompt, *answer, *[eos] * extra], len(prompt)))
    return out


def test_batches(recipe: Recipe, n: int) -> dict[str, PackedBatch]:
    """``n`` test examples of every task, packed; only for watching the training. Where the next token is asked for,
    nothing stands behind the answers."""
    structured = recipe.objective == "structured_attention"
    recipe = replace(recipe, objective="ar") if recipe.causal else recipe
    pad = special_ids()["<|pad|>"]
    if structured:
        return flat_tests(n, recipe.length, pad_id=pad)
    if recipe.pages == "orchestra":
        return agent_tests(recipe, n, pad_id=pad)
    return {
        task: pack(
            documents(recipe, workbook.examples(task, "test", n, 10_007), random.Random(0)), recipe.length, pad_id=pad
        )
        for task in workbook.TASKS
    }


def prober(recipe: Recipe, net: PackedNet) -> Callable[[bool], dict[str, float]]:
    """Shares of right tokens on test examples, by task; a final look (True) takes more of them."""
    if recipe.objective == "workers":
        return partial(worker_probe, net)
    match = matcher(recipe, net)
    sizes = {False: 24 if recipe.causal else 2, True: 32 if recipe.causal else 4}
    return lambda final: probe(match, test_batches(recipe, sizes[final]))


def matcher(recipe: Recipe, net: PackedNet) -> Matcher:
    if recipe.objective == "causal_recovery":
        return partial(match_recovery, net, mask_id=special_ids()["<|mask|>"])
    if recipe.causal:
        return partial(match_autoregressive, net)
    ids, causal = special_ids(), recipe.objective == "block_diffusion"
    return partial(
        match_diffusion, net, mask_id=ids["<|mask|>"], eos_id=ids["<|im_end|>"], block_causal=causal,
        block=recipe.block_size if causal else 32,
    )


class _progress:
    """A progress bar over the budget, with loss and speed."""

    def __init__(self, name: str, trainer: Watched):
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn(name), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("step {task.fields[step]} loss {task.fields[loss]:.3f}"
                                              " {task.fields[speed]:.0f} tokens/s"),
        )
        self._trainer = trainer

    def __enter__(self) -> Callable[[Record], None]:
        self._bar.__enter__()
        task = self._bar.add_task("", total=1.0, step=0, loss=float("nan"), speed=0.0)
        return lambda r: self._bar.update(
            task, completed=self._trainer.progress(), step=r.step, loss=r.loss, speed=r.tokens_per_second
        )

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)


def write_json(file: Path, data: Any) -> None:
    partial_name = file.with_suffix(".partial")
    partial_name.write_text(json.dumps(data, indent=1) + "\n")
    partial_name.rename(file)
