"""Where Jacobi Forcing's trajectories come from: training examples of the workbook, answered by the model as it is now.

Pool k is recorded once, when training first asks for it, with the weights of that moment and with the block size that
the spent share of the budget says (they grow); it is kept as a file, so that a resumed run reads the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stretto.errors import StrettoError
from stretto.models.transformer import Transformer
from stretto.training.jacobi import TrajectoryData
from stretto.training.recipes import Recipe
from stretto.training.trajectories import Trajectory, collect, fingerprint, read, write
from stretto.zoo import workbook

__all__ = ["Pools", "recorded_data"]

LONGEST = 128  # tokens of an answer


class Pools:
    """``pools(k)``: the trajectories of pool k, of right answers only. ``progress``: the spent share of the budget."""

    def __init__(self, recipe: Recipe, model: Transformer, folder: Path, *, examples: int | None = None):
        self.recipe, self.model, self.folder, self.examples = recipe, model, folder, examples or recipe.examples
        self.progress: Callable[[], float] = lambda: 0.0
        tokenizer = workbook._tokenizer()
        vocabulary = repr(sorted(tokenizer.get_vocab().items())).encode()
        self.expect = {
            "base": fingerprint(model), "vocabulary": hashlib.sha256(vocabulary).hexdigest()[:16],
            "examples": self.examples, "seed": recipe.seed,
        }
        self._special = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]

    def __call__(self, k: int) -> list[Trajectory]:
        path = self.folder / f"pool-{k:05d}.safetensors"
        if path.exists():
            return read(path, self.expect)[0]
        sizes = self.recipe.trajectories
        n = sizes[min(len(sizes) - 1, int(self.progress() * len(sizes)))]
        found, about = self.record(k, n)
        write(path, found, self.expect | about)
        return found

    def record(self, k: int, n: int) -> tuple[list[Trajectory], dict[str, float | int | str]]:
        """Answer the examples of pool k in blocks of ``n``: the trajectories of the right answers, and their cost."""
        seed = self.recipe.seed * 1_000_003 + k
        stream = workbook.stream("train", seed, self.recipe.weights or None)
        drawn = [next(stream) for _ in range(self.examples)]
        eos = self.model.config.eos_token_ids
        made, sums = collect(
            self.model, [workbook.encode(e)[0] for e in drawn], n=n, seed=seed, stop_ids=eos, banned=self._special,
            max_tokens=LONGEST,
        )
        right = [t for e, t in zip(drawn, made, strict=True) if self._right(e, t)]
        if not right:
            raise StrettoError(
                f"none of {self.examples} answers is right: the model cannot be distilled on its own trajectories; "
                "train it longer first, or lower the learning rate"
            )
        blocks = [b for t in right for b in t.blocks]
        return right, {
            "n": n, "model": fingerprint(self.model), "right": len(right), "blocks": len(blocks),
            "iterations_per_token": round(sums["forwards"] / sums["tokens"], 4),
            "states_per_block": round(float(np.mean([len(b.states) for b in blocks])), 3) if blocks else 0.0,
        }

    def _right(self, example: workbook.Example, t: Trajectory) -> bool:
        """Ended, and right by the task's own check (which no repetition passes)."""
        answer = t.tokens[t.prompt :]
        if not answer or answer[-1] not in self.model.config.eos_token_ids:
            return False
        text = workbook._tokenizer().decode(answer, skip_special_tokens=True)
        return workbook.TASKS[example.task].score(example.prompt, text, example.answer)


def recorded_data(recipe: Recipe, pools: Pools, *, pad_id: int) -> TrajectoryData:
    return TrajectoryData(
        pools, rows=recipe.rows, length=recipe.length, pad_id=pad_id, seed=recipe.seed, window=recipe.window,
        schedule=recipe.schedule,
    )
