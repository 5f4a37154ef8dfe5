"""Runs a recipe of LightningRL: prompts of the workbook with its checkers, resumable, with a log of every step."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stretto.models import checkpoint
from stretto.models.transformer import Transformer
from stretto.training import checkpoints
from stretto.training.lightning import Lightning, Step, lightning
from stretto.training.optim import MuonAdamW
from stretto.training.policy import Verifier
from stretto.training.recipes import RLRecipe
from stretto.training.run import prepare, provenance, watched, write_json, write_model
from stretto.training.trainer import Record
from stretto.zoo import workbook
from stretto.zoo.models import resolve

__all__ = ["prompts_of", "run_rl"]

EACH = 256  # prompts a task; they are walked in order, and again from the front
SAVE = 60.0  # seconds between checkpoints


def prompts_of(tasks: Sequence[str], seed: int, stops: Sequence[int]) -> list[tuple[list[int], Verifier]]:
    """Prompts of the training split in turns of ``tasks``, each with the check of an answer's ids (1.0 = right)."""
    tokenizer = workbook._tokenizer()

    def verifier(example: workbook.Example) -> Verifier:
        score = workbook.TASKS[example.task].score
        return lambda ids: score(example.prompt, tokenizer.decode([t for t in ids if t not in stops]), example.answer)

    found = [workbook.examples(task, "train", EACH, 77 + seed) for task in tasks]
    return [(workbook.encode(e)[0], verifier(e)) for group in zip(*found, strict=True) for e in group]


class _Run:
    """One run: what a progress bar and ``provenance`` read of a trainer, around the steps of ``lightning``."""

    def __init__(self, model: Transformer, recipe: RLRecipe, folder: Path, minutes: float | None, steps: int | None):
        self.model, self.recipe, self.folder = model, recipe, folder
        self.minutes, self.steps, self.device = minutes, steps, torch.device("cpu")
        self.settings = Lightning(**{**recipe.options, "seed": recipe.seed})
        self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        s = self.settings
        self.optimizer = MuonAdamW(model, lr=s.lr, adam_lr=s.lr, weight_decay=0.0, muon=False)
        self.record, self.curve = Record(), []

    def resume(self) -> None:
        found = checkpoints.latest(self.folder)
        if found is None:
            return
        groups, state = checkpoints.read(found)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(groups["weights"][name])
        self.optimizer.restore(groups["optimizer"])
        self.curve = state.pop("curve")
        self.record = Record(**state)

    def save(self) -> None:
        r = self.record
        state = {"step": r.step, "tokens": r.tokens, "seconds": r.seconds, "loss": r.loss, "curve": self.curve}
        groups = {"weights": dict(self.model.named_parameters()), "optimizer": self.optimizer.tensors()}
        checkpoints.write(self.folder, r.step, groups, state)

    def progress(self) -> float:
        """The share of the budget that is used up, 0..1."""
        r = self.record
        return min(1.0, max(r.step / (self.steps or 1 << 30), r.seconds / (60 * (self.minutes or 1e9))))

    def run(self, report: Callable[[Record], None] | None = None) -> Record:
        """Steps until the budget is spent, each with a line of the log."""
        r, saved = self.record, self.record.seconds
        stops = self.model.config.eos_token_ids
        prompts = prompts_of(self.recipe.tasks, self.recipe.seed, stops)
        start = time.perf_counter() - r.seconds
        for seen in lightning(
            self.model, prompts, self.settings, steps=self.steps or 1 << 30, stop_ids=stops, first=r.step,
            optimizer=self.optimizer, reference=self.reference, clock=lambda: self.progress() < 1.0,
        ):
            r.step, r.loss, r.tokens = seen.step + 1, seen.loss, r.tokens + seen.tokens
            r.seconds = time.perf_counter() - start
            r.tokens_per_second = r.tokens / r.seconds
            self._log(seen)
            if report:
                report(r)
            if r.seconds - saved > SAVE:
                saved = r.seconds
                self.save()
        self.save()
        return r

    def _log(self, seen: Step) -> None:
        line = {
            "step": seen.step, "accuracy": round(seen.accuracy, 3), "groups": seen.groups, "kl": round(seen.kl, 5),
            "tokens_per_forward": round(seen.tokens_per_forward, 3), "loss": round(seen.loss, 5),
        }
        self.curve.append([line["accuracy"], line["tokens_per_forward"]])
        about = line | {"seconds": round(self.record.seconds, 1), "skipped": seen.skipped, "errors": seen.errors}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a") as f:
            f.write(json.dumps(about) + "\n")


def run_rl(
    recipe: RLRecipe, out: Path, *, minutes: float | None, steps: int | None, resume: bool, threads: int | None,
    device: str, report: Callable[[Record], None] | None,
) -> dict[str, Any]:
    """Train and write the model of ``recipe``; see ``recipes.run_recipe``. Rollouts run on the CPU's engine."""
    _, work = prepare(out, resume, threads, "cpu")
    model = checkpoint.load(resolve(recipe.base), dtype="float32")
    run = _Run(model, recipe, work, minutes, steps)
    run.resume()
    record = watched(recipe.model, run, report)
    write_model(model, {n: p.detach() for n, p in model.named_parameters()}, out)
    config = json.loads((out / checkpoint.CONFIG).read_text())
    write_json(out / checkpoint.CONFIG, config | {"block_size": model.config.block_size})
    about = provenance(recipe, run, record) | {
        "tasks": list(recipe.tasks), "settings": asdict(run.settings), "curve": run.curve[::5],
    }
    write_json(out / "training.json", about)
    return about
