"""The one trainer: a model, an objective, data, a budget.

Every step is a function of the weights, the optimizer's state, the place in the data and (seed, step): the noise of a
step comes from a generator seeded by these two numbers. So a resumed run repeats the uninterrupted one bit for bit
when its budget is in steps; a budget in minutes ties the schedule to the clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stretto.errors import OptionError, StrettoError
from stretto.training import checkpoints
from stretto.training.objectives import Net, Objective
from stretto.training.optim import MuonAdamW, schedule

__all__ = ["Data", "Record", "TrainConfig", "Trainer"]


class Data(Protocol):
    """An endless supply of batches that can go on at any place."""

    position: tuple[int, int]

    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The budget is ``steps``, ``minutes`` or both (whichever ends first)."""

    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    lr: float = 6e-3  # of Muon; its update has root-mean-square 0.2 lr
    adam_lr: float = 3e-3  # of AdamW: embeddings, norms, routers; all parameters when muon is off
    muon: bool = True
    weight_decay: float = 0.05
    warmup: int = 50  # steps
    decay: float = 0.35  # last share of the budget over which the rate falls to zero
    clip: float = 1.0  # norm of the gradient
    average: float = 0.0  # decay of the exponential moving average of the weights, 0 = off
    checkpoint_minutes: float = 2.0
    log_every: int = 10
    callback_minutes: float = 5.0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise OptionError("steps", None, "a training budget is needed: steps, minutes, or both")
        for name in ("steps", "minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise OptionError(name, value, "a training budget must be positive")


@dataclass(slots=True)
class Record:
    """What a run has done so far; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0  # places of examples that were read, padding excluded
    seconds: float = 0.0
    loss: float = float("nan")  # mean since the last log line
    position: tuple[int, int] = (0, 0)
    tokens_per_second: float = 0.0
    history: list[float] = field(default_factory=list)  # loss of every step since the start of this process


class Trainer:
    """Trains ``model`` in place; see :meth:`run`.

    ``net`` is the model as the objective sees it (the compiled one, say); ``folder`` receives checkpoints and
    ``log.jsonl``; ``callback(trainer)`` runs every ``callback_minutes`` and at the end, and may return numbers for
    the log.
    """

    def __init__(
        self, model: nn.Module, net: Net, objective: Objective, data: Data, config: TrainConfig, *,
        folder: Path | None = None, callback: Callable[[Trainer], dict[str, Any] | None] | None = None,
        device: torch.device | str = "cpu", autocast: torch.dtype | None = None,
    ):
        self.model, self.net, self.objective, self.data, self.config = model, net, objective, data, config
        self.folder, self.callback, self.device, self.autocast = folder, callback, torch.device(device), autocast
        self.optimizer = MuonAdamW(
            model, lr=config.lr, adam_lr=config.adam_lr, weight_decay=config.weight_decay, muon=config.muon
        )
        self.record = Record()
        self.averaged: dict[str, Tensor] = (
            {n: p.detach().clone() for n, p in model.named_parameters()} if config.average else {}
        )

    def resume(self) -> bool:
        """Continue from the newest checkpoint in ``folder``; False when there is none."""
        found = checkpoints.latest(self.folder) if self.folder else None
        if found is None:
            return False
        groups, state = checkpoints.read(found)
        self._load_weights(groups["weights"])
        self.optimizer.restore(groups["optimizer"])
        if self.averaged and "averaged" in groups:
            self.averaged = {n: groups["averaged"][n].to(self.device) for n in self.averaged}
        self.record = Record(**state | {"position": tuple(state["position"])})
        self.data.position = self.record.position
        return True

    def save(self) -> None:
        """Write a checkpoint now."""
        if self.folder is None:
            return
        weights = dict(self.model.named_parameters())
        groups = {"weights": weights, "optimizer": self.optimizer.tensors()}
        if self.averaged:
            groups["averaged"] = self.averaged
        r = self.record
        state = {"step": r.step, "tokens": r.tokens, "seconds": r.seconds, "loss": r.loss, "position": r.position}
        checkpoints.write(self.folder, r.step, groups, state)

    def progress(self) -> float:
        """The share of the budget that is used up, 0..1."""
        parts = [0.0]
        if self.config.steps:
            parts.append(self.record.step / self.config.steps)
        if self.config.minutes:
            parts.append(self.record.seconds / (60 * self.config.minutes))
        return min(1.0, max(parts))

    def run(self, report: Callable[[Record], None] | None = None) -> Record:
        """Train until the budget is spent; ``report`` sees the record after every step."""
        batches = iter(self.data)
        saved = called = self.record.seconds
        since, loss_sum = (self.record.step, self.record.tokens, self.record.seconds), 0.0
        while self.progress() < 1.0:
            start = time.perf_counter()
            loss_sum += self._step(batches)
            self.record.seconds += time.perf_counter() - start
            if self.record.step % self.config.log_every == 0 or self.progress() >= 1.0:
                self._log_speed(since, loss_sum)
                since, loss_sum = (self.record.step, self.record.tokens, self.record.seconds), 0.0
            if report:
                report(self.record)
            if self.record.seconds - saved > 60 * self.config.checkpoint_minutes:
                saved = self.record.seconds
                self.save()
            if self.callback and self.record.seconds - called > 60 * self.config.callback_minutes:
                called = self.record.seconds
                self._call_back()
        self.save()
        if self.callback:
            self._call_back()
        return self.record

    def final_weights(self) -> dict[str, Tensor]:
        """What ships: the averaged weights when there is an average, else the weights."""
        return self.averaged or {n: p.detach() for n, p in self.model.named_parameters()}

    def _step(self, batches: Iterator[Any]) -> float:
        batch = next(batches).to(self.device)
        generator = torch.Generator().manual_seed((self.config.seed << 32) + self.record.step)
        factor = schedule(self.progress(), self.record.step, warmup=self.config.warmup, decay=self.config.decay)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            loss = self.objective(self.net, batch, generator).value
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        value = loss.item()
        if not value < float("inf"):
            raise StrettoError(f"the loss is {value} at step {self.record.step}: lower lr or adam_lr")
        self.optimizer.step(factor)
        self.record.step += 1
        self.record.tokens += int((batch.docs >= 0).sum())
        self.record.position = self.data.position
        self.record.history.append(value)
        self._average()
        return value

    @torch.no_grad()
    def _average(self) -> None:
        if self.averaged:
            decay = min(self.config.average, (self.record.step + 1) / (self.record.step + 10))
            torch._foreach_lerp_(
                list(self.averaged.values()), [p.detach() for p in self.model.parameters()], 1 - decay
            )

    @torch.no_grad()
    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])

    def _log_speed(self, since: tuple[int, int, float], loss_sum: float) -> None:
        step, tokens, seconds = since
        self.record.loss = loss_sum / max(self.record.step - step, 1)
        self.record.tokens_per_second = (self.record.tokens - tokens) / max(self.record.seconds - seconds, 1e-9)
        self._log({
            "step": self.record.step, "loss": round(self.record.loss, 5), "tokens": self.record.tokens,
            "tokens_per_second": round(self.record.tokens_per_second), "seconds": round(self.record.seconds, 1),
            "factor": round(schedule(
                self.progress(), self.record.step, warmup=self.config.warmup, decay=self.config.decay), 4),
        })

    def _call_back(self) -> None:
        assert self.callback is not None
        if extra := self.callback(self):
            self._log({"step": self.record.step} | extra)

    def _log(self, line: dict[str, Any]) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "log.jsonl").open("a") as f:
                f.write(json.dumps(line) + "\n")
