"""Self-distillation of a diffusion model: its own right answers, a LoRA adapter, one of the objectives of ``distill``.

Prompts come from the workbook's training split. The base answers them by its slow decoding (one token a step,
greedy), the task's checker keeps what is right, and the adapter is trained on that: the model's own ends of its own
trajectories, not human text. What ships is a LoRA adapter in PEFT's layout whose base is named and known by its
fingerprint: ``LLM("zoo:NAME")`` merges the two.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stretto.errors import OptionError, StrettoError
from stretto.models import checkpoint
from stretto.models.adapter import fingerprint
from stretto.models.lora import TARGETS, LoRALinear, add_lora, save_lora
from stretto.models.transformer import Transformer
from stretto.training.data import Document, PackedData
from stretto.training.distill import CertaintyForcing, Dscd, FrozenBase
from stretto.training.nets import PackedNet, fast_dtype
from stretto.training.objectives import BlockDiffusion, MaskedDiffusion, Objective
from stretto.training.parts import Answers
from stretto.training.recipes import DistillRecipe
from stretto.training.run import prepare, provenance, special_ids, watched, write_json
from stretto.training.trainer import Record, TrainConfig, Trainer
from stretto.zoo import workbook
from stretto.zoo.models import resolve

__all__ = ["objective_of", "own_right_answers", "run_distill"]

POOL = 512  # examples asked at a time
CANVAS = 32  # room behind the length of the task's answer


class _Paths(nn.Module):
    """The trained matrices alone, for the trainer: its parameters are those of the adapter."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.paths = nn.ModuleDict()
        for name, m in model.named_modules():
            if isinstance(m, LoRALinear):
                self.paths[name.replace(".", "-")] = nn.ModuleList([m.lora_A, m.lora_B])


def run_distill(
    recipe: DistillRecipe, out: Path, *, minutes: float | None, steps: int | None, resume: bool, threads: int | None,
    device: str, report: Callable[[Record], None] | None,
) -> dict[str, Any]:
    """Train the adapter of ``recipe``; see ``recipes.run_recipe``."""
    device, work = prepare(out, resume, threads, device)
    base = checkpoint.load(resolve(recipe.base), dtype="float32")
    if base.config.mask_token_id is None:
        raise OptionError("base", recipe.base, "a masked diffusion model")
    answers, known = Answers(base), fingerprint(base)
    torch.manual_seed(recipe.seed)
    add_lora(base, rank=recipe.rank, alpha=recipe.alpha, targets=TARGETS)
    model = base.to(device)
    objective = objective_of(recipe, model)
    kept = {"asked": 0, "right": 0}
    data = _data(recipe, model, answers, kept, work)
    config = TrainConfig(
        steps=steps, minutes=minutes, seed=recipe.seed, adam_lr=recipe.lr, muon=False, weight_decay=recipe.weight_decay,
        warmup=recipe.warmup, decay=recipe.decay, average=recipe.average,
    )
    trainer = Trainer(
        _Paths(model), PackedNet(model), objective, data, config, folder=work, device=device,
        autocast=fast_dtype(device),
    )
    if isinstance(objective, Dscd):
        objective.progress = trainer.progress
    trainer.resume()
    record = watched(recipe.model, trainer, report)
    with torch.no_grad():
        final = trainer.final_weights()
        for name, p in trainer.model.named_parameters():
            p.copy_(final[name].to(torch.bfloat16))
    save_lora(model, out, base=recipe.base, fingerprint=known, dtype=torch.bfloat16)
    about = provenance(recipe, trainer, record) | {
        "objective": recipe.objective, "options": dict(recipe.options), "rank": recipe.rank, "alpha": recipe.alpha,
        "lr": recipe.lr, "own_answers": kept,
    }
    write_json(out / "training.json", about)
    for file in out.iterdir():
        file.chmod(0o644)
    return about


def objective_of(recipe: DistillRecipe, model: Transformer) -> Objective:
    """"certainty", "dscd", or "sft" (the control: the base's own loss)."""
    c = model.config
    mask, kind = c.mask_token_id, c.attention
    assert mask is not None
    block = c.block_size if kind == "block" else 32
    if recipe.objective == "certainty":
        return CertaintyForcing(mask, kind, block=block, **recipe.options)
    if recipe.objective == "dscd":
        return Dscd(mask, kind, FrozenBase(model), block=block, **recipe.options)
    return BlockDiffusion(mask, block) if kind == "block" else MaskedDiffusion(mask, law="count")


def own_right_answers(
    examples: Sequence[workbook.Example], answers: Answers, length: int, eos: int, multiple: int,
) -> list[Document]:
    """Prompts with the model's own answers that the task's checker accepts, the end of the turn included; padded with
    end-of-text to a multiple of ``multiple`` places, because what lies behind the end is decoded too."""
    prompts = [workbook.encode(e)[0] for e in examples]
    fits = [i for i, p in enumerate(prompts) if len(p) + 8 < length]
    wanted = [len(workbook.encode(examples[i])[1]) + CANVAS for i in fits]  # full attention pays for a longer canvas
    rooms = [min(length - len(prompts[i]), n) for i, n in zip(fits, wanted, strict=True)]
    out = []
    for i, own in zip(fits, answers([prompts[i] for i in fits], rooms), strict=True):
        e = examples[i]
        if own[-1:] != [eos]:
            continue
        text = workbook._tokenizer().decode(own[:-1], skip_special_tokens=False)
        if workbook.TASKS[e.task].score(e.prompt, text, e.answer):
            pad = -(len(prompts[i]) + len(own)) % multiple
            out.append(Document([*prompts[i], *own, *[eos] * pad][:length], len(prompts[i])))
    return out


def _data(
    recipe: DistillRecipe, model: Transformer, answers: Answers, kept: dict[str, int], work: Path
) -> PackedData:
    """Batches of right answers, ``recipe.epochs`` times over; pool k is drawn from stream k // epochs of the recipe's
    seed. What was answered stays in ``work``, so that a resumed run does not ask again."""
    ids = special_ids()
    multiple = model.config.block_size if model.config.attention == "block" else 32

    def asked(number: int) -> list[Document]:
        file = work / f"own-answers-{number}.json"
        if file.exists():
            return [Document(tokens, prompt) for tokens, prompt in json.loads(file.read_text())]
        stream = workbook.stream("train", number, recipe.weights or None)
        examples = [next(stream) for _ in range(POOL)]
        found = own_right_answers(examples, answers, recipe.length, ids["<|im_end|>"], multiple)
        if not found:
            raise StrettoError(f"{recipe.base} answered none of {len(examples)} training prompts right")
        work.mkdir(parents=True, exist_ok=True)
        write_json(file, [[list(d.tokens), d.prompt] for d in found])
        return found

    def pool(k: int) -> list[Document]:
        number, epoch = divmod(k, recipe.epochs)
        number += (recipe.seed + 11) * 1_000_003
        found = asked(number)
        if not epoch:
            kept["asked"] += POOL
            kept["right"] += len(found)
        random.Random(number * recipe.epochs + epoch).shuffle(found)
        return found

    return PackedData(pool, rows=recipe.rows, length=recipe.length, pad_id=ids["<|pad|>"], seed=recipe.seed)
