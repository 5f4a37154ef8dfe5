"""Runs the recipe of a model that reasons in threads: stage after stage, each resumable, then writes what ships.

    sft    the base on the page's solutions, in threads and flat
    self   the base again, on the model's own answers in threads that are well formed and right
    rl     the model itself, by P-GRPO
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stretto.errors import OptionError, StrettoError
from stretto.models import checkpoint
from stretto.models.transformer import Transformer
from stretto.tags import TAGS_FILE, THREADWEAVER, read_tags, write_tags
from stretto.training import checkpoints, thread_units
from stretto.training.nets import PackedNet, fast_dtype
from stretto.training.optim import MuonAdamW
from stretto.training.p_grpo import PGRPO, Step, p_grpo
from stretto.training.parallel_units import MODES, grammar_of, initialise_tags
from stretto.training.recipes import ThreadsRecipe
from stretto.training.run import (
    prepare,
    provenance,
    special_ids,
    watched,
    write_json,
    write_model,
)
from stretto.training.trainer import Record, TrainConfig, Trainer
from stretto.training.trie import TrieData, TrieLoss, Unit
from stretto.zoo.models import resolve

__all__ = ["policy_steps", "run_threads"]

POOL = 256  # examples packed together
SAVE = 90.0  # seconds between two checkpoints of the policy stage
Report = Callable[[Record], None] | None


def run_threads(
    recipe: ThreadsRecipe, out: Path, *, minutes: float | None, steps: int | None, resume: bool, threads: int | None,
    device: str, report: Report,
) -> dict[str, Any]:
    """See ``recipes.run_recipe``; ``minutes`` and ``steps`` are those of every stage."""
    unknown = set(recipe.stages) - {"sft", "self", "rl"}
    if unknown or not recipe.stages:
        raise OptionError("stages", ",".join(recipe.stages), "some of sft, self, rl, in that order")
    device, work = prepare(out, resume, threads, device)
    model, about = _start(recipe), {}
    for stage in recipe.stages:
        budget = {"minutes": minutes if steps is None else None, "steps": steps}
        if minutes is None and steps is None:
            budget["minutes"] = recipe.rl_minutes if stage == "rl" else recipe.minutes
        if stage == "rl":
            about[stage] = _policy(recipe, model, work / stage, **budget)
            continue
        pool = _own(recipe, model) if stage == "self" else None
        model = _start(recipe) if stage == "self" else model
        about[stage] = _supervised(recipe, model, work / stage, pool, device, report, **budget)
    return _ship(recipe, model, out, about)


def _start(recipe: ThreadsRecipe) -> Transformer:
    """The base, with the tags' embeddings at the means of their words, or as the tags that it knows in their roles."""
    folder = Path(resolve(recipe.base) if recipe.base.startswith("zoo:") else recipe.base)
    model = checkpoint.load(folder, dtype="float32")
    known = grammar_of(read_tags(folder)[0]).ids if (folder / TAGS_FILE).is_file() else None
    initialise_tags(model, grammar_of(THREADWEAVER), known)
    return model


def _supervised(
    recipe: ThreadsRecipe, model: Transformer, folder: Path, pool: Any, device: str, report: Report, *,
    minutes: float | None, steps: int | None,
) -> dict[str, Any]:
    examples = pool or (lambda k: thread_units.supervised("train", POOL, recipe.seed * 1_000_003 + k))
    data = TrieData(examples, rows=recipe.rows, length=None, pad_id=special_ids()["<|pad|>"], seed=recipe.seed)
    config = TrainConfig(
        steps=steps, minutes=minutes, seed=recipe.seed, lr=recipe.lr, adam_lr=recipe.adam_lr, warmup=recipe.warmup,
        decay=recipe.decay, average=recipe.average,
    )
    autocast = fast_dtype(device)
    trainer = Trainer(
        model, PackedNet(model), TrieLoss(), data, config, folder=folder, device=device, autocast=autocast
    )
    trainer.resume()
    record = watched(recipe.model, trainer, report)
    with torch.no_grad():
        final = trainer.final_weights()
        for name, p in model.named_parameters():
            p.copy_(final[name])
    return provenance(recipe, trainer, record)


def _own(recipe: ThreadsRecipe, model: Transformer) -> Callable[[int], list[list[Unit]]]:
    """Pools of the model's own right answers, and the page's flat ones in the share that stage sft has."""
    source = copy.deepcopy(model).eval()
    kept: dict[int, list[list[Unit]]] = {}

    def pool(k: int) -> list[list[Unit]]:
        if k not in kept:
            number = (recipe.seed + 31) * 1_000_003 + k
            kept.clear()
            found = thread_units.cases("train", POOL, number)
            kept[k] = thread_units.own_answers(source, found, number, max_tokens=recipe.max_tokens)
            if not kept[k]:
                raise StrettoError("no own answer is right and well formed: train stage sft for longer")
            flat = thread_units.WAYS["sequential"]
            kept[k] += thread_units.supervised("train", int(len(kept[k]) * flat / (1 - flat)), number, "sequential")
        return kept[k]

    return pool


def policy_steps(
    recipe: ThreadsRecipe, model: Transformer, settings: PGRPO, *, steps: int, clock: Callable[[], bool] | None = None,
    optimizer: MuonAdamW | None = None, first: int = 0,
):
    """The steps of P-GRPO on the training split's prompts; the model decides whether it uses threads."""
    found = thread_units.cases("train", 4096, recipe.seed + 7)
    prompts = [(thread_units.prompt_of(c), lambda ids, c=c: thread_units.right(c, ids)) for c in found]
    roll = lambda net, some, seed: thread_units.roll_out(
        net, some, settings.group_size, seed, max_tokens=settings.max_tokens
    )
    yield from p_grpo(
        model, prompts, settings, steps=steps, roll=roll, pad_id=special_ids()["<|pad|>"], clock=clock,
        optimizer=optimizer, first=first,
    )


def _policy(
    recipe: ThreadsRecipe, model: Transformer, folder: Path, *, minutes: float | None, steps: int | None
) -> dict[str, Any]:
    s = PGRPO(
        prompts_per_step=recipe.prompts, lr=recipe.rl_lr, seed=recipe.seed, normalise=recipe.normalise,
        max_tokens=recipe.max_tokens, length=recipe.length,
    )
    optimizer = MuonAdamW(model, lr=s.lr, adam_lr=s.lr, weight_decay=0.0, muon=False)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "curve": []}
    found = checkpoints.latest(folder)
    if found is not None:
        groups, state = checkpoints.read(found)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(groups["weights"][name])
        optimizer.restore(groups["optimizer"])
    before, start, saved = state["seconds"], time.perf_counter(), 0.0
    spent = lambda: before + time.perf_counter() - start
    clock = None if minutes is None else lambda: spent() < 60 * minutes
    for seen in policy_steps(
        recipe, model, s, steps=steps or 1 << 30, clock=clock, optimizer=optimizer, first=state["step"]
    ):
        state = {"step": seen.step + 1, "seconds": spent(), "curve": [*state["curve"], _line(seen)]}
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.jsonl").open("a") as f:
            f.write(json.dumps(_line(seen) | {"seconds": round(spent(), 1)}) + "\n")
        if spent() - saved > SAVE:
            saved = spent()
            _save(model, optimizer, folder, state)
    _save(model, optimizer, folder, state)
    return {"steps": state["step"], "minutes": round(state["seconds"] / 60, 1), "curve": state["curve"][::5],
            "settings": asdict(s)}  # fmt: skip


def _save(model: Transformer, optimizer: MuonAdamW, folder: Path, state: dict[str, Any]) -> None:
    groups = {"weights": dict(model.named_parameters()), "optimizer": optimizer.tensors()}
    checkpoints.write(folder, state["step"], groups, state)


def _line(seen: Step) -> dict[str, Any]:
    return {
        "step": seen.step, "accuracy": round(seen.accuracy, 3), "longest": round(seen.longest, 1),
        "total": round(seen.total, 1), "blocks": round(seen.blocks, 3), "formed": round(seen.formed, 3),
        "loss": round(seen.loss, 5),
    }


def _ship(recipe: ThreadsRecipe, model: Transformer, out: Path, about: dict[str, Any]) -> dict[str, Any]:
    write_model(model, {n: p.detach() for n, p in model.named_parameters()}, out)
    write_tags(out, THREADWEAVER, modes=MODES)
    (out / "parallel_tags.json").chmod(0o644)
    made = {"recipe": recipe.name, "base": recipe.base, "stages": about}
    write_json(out / "training.json", made)
    return made
