"""The filter of Learn2PD: recorded on the base's own slow decoding, trained on what stayed.

The base decodes prompts one token a step, greedy; at every step the recorder keeps, for each masked position of the
window, the confidence and the predicted token. When the text is done, a prediction's label is whether it equals the
final token: the base's own text, not the truth, so that the filter learns to keep the base's answers. Then two small
linear layers, full batch, AdamW, binary cross-entropy over masked positions. The threshold that ships is the smallest
one at which, on held-out prompts, at most ``budget`` of the accepted predictions change later.

Legend: r recorded steps, B positions of a block, F inputs per position.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stretto.decoding.denoise import State
from stretto.decoding.filter import KIND, block_inputs
from stretto.decoding.registry import make
from stretto.decoding.unmask import Candidates
from stretto.engine.engine import Engine
from stretto.engine.host import Host
from stretto.engine.params import SamplingParams
from stretto.engine.runner import Runner
from stretto.errors import InputError, OptionError
from stretto.models import checkpoint
from stretto.models.adapter import Adapter, Base, save_adapter
from stretto.models.transformer import Transformer
from stretto.training.recipes import FilterRecipe
from stretto.training.run import prepare, special_ids, write_json
from stretto.training.trainer import Record
from stretto.zoo import workbook
from stretto.zoo.models import resolve

__all__ = ["Recording", "auc", "fit", "record", "run_filter", "safe_threshold"]

LOOK = 25  # epochs


@dataclass(slots=True)
class Recording:
    """What was seen: ``inputs`` float32 [r, F B], ``right`` and ``masked`` bool [r, B]."""

    inputs: np.ndarray
    right: np.ndarray
    masked: np.ndarray


def record(
    model: Transformer, prompts: Sequence[Sequence[int]], rooms: Sequence[int], stops: Sequence[int], *,
    inputs: Sequence[str] = ("confidence",), block: int | None = None, slots: int = 32768,
) -> Recording:
    """Decode ``prompts`` by the reference schedule and record every step."""
    c = model.config
    block = block or (c.block_size if c.attention == "block" else 32)
    runner = Runner(copy.deepcopy(model), slots=slots)
    host = Host(runner, tuple(stops), c.max_position_embeddings)
    engine = Engine(runner, host, max_seqs=64, prefix_caching=False)
    method = make("diffusion", host, {"unmask": "fixed", "block_length": block})
    seen: list[tuple[State, Candidates, np.ndarray]] = []

    def observe(state: State, found: Candidates, chosen: np.ndarray) -> None:
        start = state.canvas.start
        seen.append((
            State(state.seq, replace(state.canvas), list(state.positions)), found,
            block_inputs(inputs, found, state.positions, start, block),
        ))

    method.denoiser = replace(method.denoiser, observe=observe)
    for p, n in zip(prompts, rooms, strict=True):
        engine.add(list(p), SamplingParams(max_tokens=n, temperature=0.0), method)
    while engine.busy:
        engine.step()
    return _labelled(seen, block)


def _labelled(seen: Sequence[tuple[State, Candidates, np.ndarray]], block: int) -> Recording:
    """Labels from the final texts; positions behind a text's end have none."""
    right, masked = np.zeros((2, len(seen), block), bool)
    for i, (state, found, _) in enumerate(seen):
        text = state.seq.tokens
        for at, token in zip(state.positions, found.tokens.tolist(), strict=True):
            if at < len(text):
                j = at - state.canvas.start
                masked[i, j], right[i, j] = True, text[at] == token
    return Recording(np.stack([x for _, _, x in seen]), right, masked)


class FilterNet(nn.Module):
    """The trained form of ``decoding.filter.Filter``; the same names."""

    def __init__(self, width: int, hidden: int, block: int):
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, block)

    def forward(self, x: Tensor) -> Tensor:
        """[r, F B] -> logits [r, B]"""
        return self.second(F.relu(self.first(x)))


def fit(
    data: Recording, hidden: int, *, epochs: int, seed: int, lr: float = 1e-3, held: Recording | None = None,
) -> FilterNet:
    """Full-batch AdamW on the binary cross-entropy over masked positions; the state that is best on ``held``, looked at
    every ``LOOK`` epochs, if that is given. Raises InputError without both labels."""
    labels = data.right[data.masked]
    if not len(labels) or labels.all() or not labels.any():
        raise InputError(
            f"the recording has {int(labels.sum())} right and {int((~labels).sum())} changed predictions: a filter "
            "needs both, record more prompts"
        )
    torch.manual_seed(seed)
    net = FilterNet(data.inputs.shape[1], hidden, data.right.shape[1])
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    best, kept = float("inf"), {n: p.detach().clone() for n, p in net.state_dict().items()}
    for epoch in range(epochs):
        loss = _entropy(net, data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if held is not None and (epoch + 1) % LOOK == 0:
            with torch.no_grad():
                value = _entropy(net, held).item()
            if value < best:
                best, kept = value, {n: p.detach().clone() for n, p in net.state_dict().items()}
    if held is not None:
        net.load_state_dict(kept)
    return net


def _entropy(net: FilterNet, data: Recording) -> Tensor:
    """Binary cross-entropy, mean over masked positions."""
    weight = torch.from_numpy(data.masked).float()
    x, y = torch.from_numpy(data.inputs), torch.from_numpy(data.right).float()
    return F.binary_cross_entropy_with_logits(net(x), y, weight / weight.sum(), reduction="sum")


def auc(score: np.ndarray, label: np.ndarray) -> float:
    """Probability that a right prediction scores above a changed one; ties count half."""
    order = np.argsort(score, kind="stable")
    values, rank = score[order], np.empty(len(score))
    _, first, count = np.unique(values, return_index=True, return_counts=True)
    rank[order] = np.repeat(first + (count + 1) / 2, count)
    n = int(label.sum())
    return float((rank[label].sum() - n * (n + 1) / 2) / max(n * (len(label) - n), 1))


def safe_threshold(probability: np.ndarray, right: np.ndarray, budget: float) -> float:
    """The smallest threshold at which at most ``budget`` of the accepted predictions are changed later; 1.0 = none."""
    order = np.argsort(-probability, kind="stable")
    changed = np.cumsum(~right[order]) / np.arange(1, len(order) + 1)
    good = np.flatnonzero(changed <= budget)
    if not len(good):
        return 1.0
    last = good[-1]
    below = probability[order][last + 1] if last + 1 < len(order) else 0.0
    return float((probability[order][last] + below) / 2)


def run_filter(
    recipe: FilterRecipe, out: Path, *, minutes: float | None, steps: int | None, resume: bool, threads: int | None,
    device: str, report: Callable[[Record], None] | None,
) -> dict[str, Any]:
    """Record, fit, choose the threshold, write the adapter; see ``recipes.run_recipe``. ``steps`` = epochs."""
    prepare(out, resume, threads, device)
    model = checkpoint.load(resolve(recipe.base), dtype="float32")
    if model.config.mask_token_id is None:
        raise OptionError("base", recipe.base, "a masked diffusion model")
    stops = [special_ids()["<|im_end|>"]]
    parts = [_prompts(recipe, split, n) for split, n in (("train", recipe.prompts), ("held", recipe.held_out))]
    recorded = [record(model, p, rooms, stops, inputs=recipe.inputs) for p, rooms in parts]
    block = recorded[0].right.shape[1]
    net = fit(
        recorded[0], recipe.hidden, epochs=steps or recipe.epochs, seed=recipe.seed, lr=recipe.lr, held=recorded[1]
    )
    state = {n: p.detach().to(torch.bfloat16).float() for n, p in net.state_dict().items()}
    net.load_state_dict(state)
    held = recorded[1]
    with torch.no_grad():
        probability = torch.sigmoid(net(torch.from_numpy(held.inputs))).numpy()[held.masked]
    right = held.right[held.masked]
    threshold = safe_threshold(probability, right, recipe.budget)
    accepted = probability > threshold
    statistics = {
        "auc": auc(probability, right), "auc_of_confidence": auc(held.inputs[:, :block][held.masked], right),
        "right": float(right.mean()), "accepted": float(accepted.mean()),
        "precision": float(right[accepted].mean()) if accepted.any() else None,
        "recorded_steps": len(recorded[0].inputs), "prompts": recipe.prompts,
    }
    config = {"block": block, "hidden": recipe.hidden, "inputs": list(recipe.inputs), "threshold": threshold}
    base = Base.of(model, recipe.base if recipe.base.startswith("zoo:") else Path(recipe.base).name)
    save_adapter(out, Adapter(KIND, base, state, config, statistics))
    about = {"recipe": recipe.name, "base": recipe.base, "seed": recipe.seed, "statistics": statistics, **config}
    write_json(out / "training.json", about)
    return about


def _prompts(recipe: FilterRecipe, split: str, n: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of the workbook's training split, other ones for the held-out part, and room for their answers."""
    stream = workbook.stream("train", (recipe.seed + 3) * 1_000_003 + (split == "held"), recipe.weights or None)
    pairs = [workbook.encode(next(stream)) for _ in range(n)]
    return [p for p, _ in pairs], [-(-len(a) * 5 // 32) * 8 for _, a in pairs]
