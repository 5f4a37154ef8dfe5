"""Training a part on a frozen model: Medusa heads, EAGLE layers, prompt tokens, filters. One way for all of them.

A *kind* of part is a class listed in ``KINDS`` by name. ``Kind(net, options)`` builds the part for a frozen base:

    module      nn.Module: what is trained, by the one trainer (parameters under ".layers." go to Muon)
    config      dict: what ``adapter.json`` keeps, enough to build the part again
    __call__    the objective (net, batch, generator) -> Loss, as in ``objectives.py``; teacher-forced on the batch
    statistics  (batches) -> dict: what is measured after training on test prompts with the base's own greedy answers

Texts are workbook examples of the training split; the answers of ``own_answers`` of them are the base's own greedy
ones, because that is the text that a drafter has to foresee. ``net.features`` gives the frozen base's hidden states.
A recipe (``PartRecipe`` in recipes.py) names kind, base, options and budget: ``stretto train NAME`` trains it, resumes
it, logs to ``NAME.training/log.jsonl`` and writes the adapter with ``training.json`` to the folder NAME.

Legend of shapes: b rows, t places, H width, V vocabulary, k labels.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stretto.decoding.registry import make
from stretto.engine.engine import Engine
from stretto.engine.host import Host
from stretto.engine.params import SamplingParams
from stretto.engine.runner import Runner
from stretto.errors import UnknownNameError
from stretto.models import checkpoint
from stretto.models.adapter import Adapter, Base, save_adapter
from stretto.models.context import PackedContext
from stretto.models.transformer import Transformer
from stretto.training.data import Document, PackedBatch, PackedData, pack
from stretto.training.nets import PackedNet, fast_dtype
from stretto.training.objectives import Objective, causal_mask
from stretto.training.recipes import PartRecipe
from stretto.training.run import POOL, prepare, provenance, special_ids, watched, write_json
from stretto.training.trainer import Record, TrainConfig, Trainer
from stretto.zoo import workbook
from stretto.zoo.models import resolve

__all__ = ["KINDS", "FrozenNet", "Kind", "acceptance", "ahead", "make_part", "own_documents", "run_part"]

KINDS = {  # kind -> "module:class"
    "medusa": "stretto.training.drafters:Medusa",
    "ppd": "stretto.training.slot_rows:PromptTokens",
    "hidden_transfer": "stretto.training.slot_rows:HiddenTransfer",
    "clover": "stretto.training.drafters:Clover",
    "clover2": "stretto.training.drafters:Clover",
    "eagle": "stretto.training.drafters:Eagle",
    "eagle3": "stretto.training.drafters:Eagle",
}
DEFAULTS: dict[str, dict[str, Any]] = {"clover2": {"version": 2, "augment": 2, "heads": 5}, "eagle3": {"version": 3}}
WIDTH = 8  # ranks of the acceptance statistics
TEST_EXAMPLES = 12  # of every task


class Kind(Objective, Protocol):
    """See the module's docstring."""

    module: nn.Module
    config: dict[str, Any]

    def __init__(self, net: FrozenNet, **options: Any): ...

    def statistics(self, batches: Sequence[PackedBatch]) -> dict[str, Any]: ...


class FrozenNet(PackedNet):
    """The base over packed rows; its weights never change and take no gradient."""

    def __init__(self, model: Transformer):
        super().__init__(model.requires_grad_(False).eval())

    @torch.no_grad()
    def features(self, batch: PackedBatch, taps: Sequence[int] = (-1,)) -> dict[int, Tensor]:
        """The states [b, t, H] after each of ``taps`` (0 = embeddings, -1 = final-normed), every place seeing its
        example up to itself."""
        b, t = batch.tokens.shape
        ctx = PackedContext([t] * b, causal_mask(batch), device=batch.tokens.device)
        tapped: dict[int, Tensor] = {}
        tokens, positions = batch.tokens.flatten(), batch.positions.flatten()
        tapped[-1] = self.model.hidden(tokens, positions, ctx, taps=taps, tapped=tapped)
        return {layer: tapped[layer].view(b, t, -1) for layer in taps}

    @property
    def head(self) -> Tensor:
        """The rows [V, H] of the LM head."""
        tied = self.model.config.tie_word_embeddings
        return self.model.model.embed_tokens.weight if tied else self.model.lm_head.weight


def ahead(batch: PackedBatch, distance: int) -> tuple[Tensor, Tensor]:
    """(tokens, valid) [b, t]: the token ``distance`` places on, and whether it belongs to the same example's answer."""
    tokens = torch.zeros_like(batch.tokens)
    valid = torch.zeros_like(batch.answer)
    n = batch.tokens.shape[1] - distance
    tokens[:, :n] = batch.tokens[:, distance:]
    same = (batch.docs[:, :n] == batch.docs[:, distance:]) & (batch.docs[:, :n] >= 0)
    valid[:, :n] = same & batch.answer[:, distance:]
    return tokens, valid


def acceptance(ranks: Sequence[Tensor], width: int = WIDTH) -> list[list[float]]:
    """acc[d][r] = P(the candidate of rank r at depth d + 1 is right | those above it are in the tree).

    ``ranks[d]`` int64 [k]: the rank of the right token among the drafter's at that depth, for the same k places; -1 =
    no such token in the answer. A place counts at a depth when the right tokens before were among the first ``width``.
    """
    out, alive = [], torch.ones_like(ranks[0], dtype=torch.bool)
    for rank in ranks:
        seen = rank[alive & (rank >= 0)]
        out.append([round(float((seen == r).float().mean()), 4) if len(seen) else 0.0 for r in range(width)])
        alive &= (rank >= 0) & (rank < width)
    return out


def make_part(kind: str, net: FrozenNet, **options: Any) -> Kind:
    """The part ``kind`` for a frozen base, at its start."""
    if kind not in KINDS:
        raise UnknownNameError("kind of part", kind, KINDS)
    module, _, name = KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), name)(net, **{**DEFAULTS.get(kind, {}), **options})


def run_part(
    recipe: PartRecipe, out: Path, *, minutes: float | None, steps: int | None, resume: bool, threads: int | None,
    device: str, report: Callable[[Record], None] | None,
) -> dict[str, Any]:
    """Train the part of ``recipe`` and write the adapter; see ``recipes.run_recipe``."""
    device, work = prepare(out, resume, threads, device)
    base = checkpoint.load(resolve(recipe.base), dtype="float32").to(device)
    net = FrozenNet(base)
    torch.manual_seed(recipe.seed)
    part = make_part(recipe.kind, net, **recipe.options)
    part.module.to(device)
    answers = Answers(base)
    config = TrainConfig(
        steps=steps, minutes=minutes, seed=recipe.seed, lr=recipe.lr, adam_lr=recipe.adam_lr, clip=recipe.clip,
        warmup=recipe.warmup, decay=recipe.decay, average=recipe.average, weight_decay=recipe.weight_decay,
    )
    trainer = Trainer(
        part.module, net, part, data_of(recipe, answers), config, folder=work, device=device,
        autocast=fast_dtype(device),
    )
    trainer.resume()
    record = watched(recipe.model, trainer, report)
    weights = {n: w.to(torch.bfloat16).float() for n, w in trainer.final_weights().items()}
    with torch.no_grad():
        for name, p in part.module.named_parameters():
            p.copy_(weights[name])
    statistics = part.statistics([b.to(device) for b in test_batches(recipe, answers)])
    about = provenance(recipe, trainer, record) | {"statistics": statistics}
    statistics = statistics | {"minutes": about["minutes"], "tokens": about["tokens"]}
    name = recipe.base if recipe.base.startswith("zoo:") else Path(recipe.base).name
    tensors = {n: t for n, t in part.module.state_dict().items() if n in weights}
    save_adapter(out, Adapter(recipe.kind, Base.of(base, name), tensors, part.config, statistics))
    write_json(out / "training.json", about)
    return about


class Answers:
    """The base's own greedy answers, by the engine: plain decoding, of a diffusion model one token a forward."""

    def __init__(self, base: Transformer, slots: int = 32768):
        import copy

        runner = Runner(copy.deepcopy(base), slots=slots)  # the torch forward repacks the weights
        self._stop = special_ids()["<|im_end|>"]
        host = Host(runner, (self._stop,), base.config.max_position_embeddings)
        self._engine = Engine(runner, host, max_seqs=64, prefix_caching=False)
        causal = base.config.attention == "causal"
        self._method = make("ar", host, {}) if causal else make("diffusion", host, {"unmask": "fixed"})

    def __call__(self, prompts: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
        """For each prompt at most ``limits[i]`` tokens, the end of the turn included."""
        streams = [
            self._engine.add(p, SamplingParams(max_tokens=n, temperature=0.0), self._method)[0]
            for p, n in zip(prompts, limits, strict=True)
        ]
        while self._engine.busy:
            self._engine.step()
        return [s.seq.tokens[s.seq.prompt_len :] for s in streams]


def own_documents(
    examples: Sequence[workbook.Example], answers: Answers, length: int, own: Sequence[bool]
) -> list[Document]:
    """The examples as documents of at most ``length`` tokens; where ``own`` says so, with the base's answer."""
    pairs = [workbook.encode(e) for e in examples]
    asked = [i for i, (prompt, _) in enumerate(pairs) if own[i] and len(prompt) < length]
    given = answers([pairs[i][0] for i in asked], [length - len(pairs[i][0]) for i in asked])
    for i, answer in zip(asked, given, strict=True):
        pairs[i] = (pairs[i][0], answer)
    return [Document((p + a)[:length], len(p)) for p, a in pairs if len(p) < length]


def data_of(recipe: PartRecipe, answers: Answers) -> PackedData:
    """Batches of the training split; pool k is drawn from stream number k of the recipe's seed."""

    def pool(k: int) -> list[Document]:
        number = (recipe.seed + 7) * 1_000_003 + k
        stream, rng = workbook.stream("train", number, recipe.weights or None), random.Random(number)
        examples = [next(stream) for _ in range(POOL)]
        return own_documents(examples, answers, recipe.length, [rng.random() < recipe.own_answers for _ in examples])

    return PackedData(pool, rows=recipe.rows, length=recipe.length, pad_id=special_ids()["<|pad|>"], seed=recipe.seed)


def test_batches(recipe: PartRecipe, answers: Answers, n: int = TEST_EXAMPLES) -> list[PackedBatch]:
    """Test prompts of every task with the base's own answers: one batch a task."""
    out = []
    for task in workbook.TASKS:
        examples = workbook.examples(task, "test", n, 10_007)
        documents = own_documents(examples, answers, recipe.length, [True] * n)
        out.append(pack(documents, recipe.length, pad_id=special_ids()["<|pad|>"]))
    return out
