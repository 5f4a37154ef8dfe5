"""Rollouts of a block diffusion model: what was decided in which forward, and rows that evaluate it again.

The path of a response is its canvas and the forward in which each place became final, places behind the end of the
text included: they were visible to the others of their block. Legend: b responses, t places of the clean stream, q
places of the noisy one, k places with a loss, B block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stretto.decoding.canvas import Canvas
from stretto.decoding.registry import make
from stretto.engine.engine import Engine, Stream
from stretto.engine.params import SamplingParams
from stretto.errors import OptionError
from stretto.training.objectives import Net

__all__ = ["Path", "Rows", "logps", "path_rows", "roll_out"]

Kind = Literal["trace", "one_step"]


@dataclass(frozen=True, slots=True)
class Path:
    """One response. ``ids``: prompt and canvas to the end of its last block, the mask id where nothing was decided;
    ``decided``: place -> forward; ``length``: tokens returned, up to and with the first end-of-text."""

    ids: list[int]
    prompt: int
    decided: dict[int, int]
    length: int
    forwards: int  # the engine's count
    complete: bool  # ended by itself, not by max_tokens
    recorded: tuple[float, ...] = ()  # log-probability of each returned token at its forward, where asked for

    @property
    def tokens(self) -> list[int]:
        return self.ids[self.prompt : self.prompt + self.length]

    @property
    def steps(self) -> list[int]:
        """The forward of each returned token."""
        return [self.decided[i] for i in range(self.prompt, self.prompt + self.length)]

    @property
    def tokens_per_forward(self) -> float:
        """Returned tokens over the forwards in which any of them became final."""
        return self.length / len(set(self.steps))


def roll_out(
    engine: Engine, prompts: Sequence[Sequence[int]], group: int, *, max_tokens: int, seed: int, threshold: float = 0.9,
    temperature: float = 1.0, record: bool = False,
) -> list[list[Path]]:
    """``group`` responses to each prompt, all in one batch: threshold unmasking of sampled tokens."""
    if group < 2:
        raise OptionError("group_size", group, "at least 2: advantages compare responses to one prompt")
    if temperature <= 0:
        raise OptionError("temperature", temperature, "above 0: greedy responses of a group are all the same")
    method = make("diffusion", engine.host, {"threshold": threshold})
    begun: list[list[tuple[Stream, Canvas]]] = []
    for i, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, n=group, seed=seed * 1_000_003 + i,
            logprobs=1 if record else None,
        )
        begun.append([(s, s.seq.state) for s in engine.add(list(prompt), params, method)])
    while engine.busy:
        engine.step()
    return [[_path(stream, canvas) for stream, canvas in group] for group in begun]


def _path(stream: Stream, canvas: Canvas) -> Path:
    """What a finished stream and its canvas (kept from before its end) tell."""
    seq, decided = stream.seq, dict(canvas.decided)
    recorded = ()
    if seq.logprobs is not None:
        text = seq.tokens[seq.prompt_len :]
        recorded = tuple(row[token] for row, token in zip(seq.logprobs, text, strict=True))
    return Path(
        list(canvas.ids), seq.prompt_len, decided, seq.generated, seq.metrics.forwards,
        stream.finish_reason == "stop", recorded,
    )


@dataclass(frozen=True, slots=True)
class Rows:
    """Clean texts, and beside each the states of its blocks. Padding: ``copy`` -1 and ``clean_block`` -1."""

    noisy: Tensor  # int64 [b, q]
    positions: Tensor  # int64 [b, q]
    copy: Tensor  # int64 [b, q] the state that a row belongs to
    clean: Tensor  # int64 [b, t]
    clean_block: Tensor  # int64 [b, t]
    target: Tensor  # int64 [b, q] the token that became final here in the next forward, -1 = none
    block: int
    mask_id: int

    @property
    def labels(self) -> Tensor:
        """bool [b, q]"""
        return self.target >= 0


def path_rows(paths: Sequence[Path], block: int, mask_id: int, kind: Kind = "trace", shrink: int = 1) -> Rows:
    """The rows whose laws give the log-probability of every returned token, in one forward.

    "trace": one state of a block for each forward that made a returned token of it final (``shrink`` merges so many
    into one: the state before the first of them). "one_step": every block with nothing decided, as the public code
    has it.
    """
    columns = [_columns(p, block, mask_id, kind, shrink) for p in paths]
    q, t = max(len(c[0]) for c in columns), max(len(p.ids) for p in paths)
    fill = (mask_id, 0, -1, -1)
    noisy, positions, copy, target = (
        torch.tensor([c[i] + [fill[i]] * (q - len(c[i])) for c in columns]) for i in range(4)
    )
    clean = torch.tensor([p.ids + [mask_id] * (t - len(p.ids)) for p in paths])
    at = torch.arange(t)
    sizes = torch.tensor([len(p.ids) for p in paths])
    clean_block = (at // block).expand(len(paths), t).masked_fill(at >= sizes[:, None], -1)
    return Rows(noisy, positions, copy, clean, clean_block, target, block, mask_id)


def _columns(p: Path, block: int, mask_id: int, kind: Kind, shrink: int) -> tuple[list[int], ...]:
    """(noisy token, position, copy, target) of one path."""
    noisy, positions, copies, target, count = [], [], [], [], 0
    end = p.prompt + p.length
    for start in range(p.prompt // block * block, end, block):
        places = range(start, min(start + block, len(p.ids)))
        mine = [i for i in places if p.prompt <= i < end]
        steps = sorted({p.decided[i] for i in mine})
        groups = [steps] if kind == "one_step" else [steps[i : i + shrink] for i in range(0, len(steps), shrink)]
        for group in groups:
            known = (lambda i: i < p.prompt) if kind == "one_step" else (
                lambda i, before=group[0]: i < p.prompt or p.decided.get(i, 1 << 30) < before
            )
            noisy += [p.ids[i] if known(i) else mask_id for i in places]
            positions += places
            copies += [count] * len(places)
            target += [p.ids[i] if i in mine and p.decided[i] in group else -1 for i in places]
            count += 1
    return noisy, positions, copies, target


def logps(net: Net, rows: Rows) -> Tensor:
    """float [k]: log-probability of every label (``rows.labels``, row by row); the mask token is impossible."""
    t = rows.clean.shape[1]
    hidden = net.hidden(
        torch.cat([rows.noisy, rows.clean], 1),
        torch.cat([rows.positions, torch.arange(t).expand_as(rows.clean)], 1),
        visible(rows),
    )
    labels = rows.labels
    states = hidden[:, : labels.shape[1]][labels]
    laws = net.logits(states).float()
    laws = laws.index_fill(-1, torch.tensor(rows.mask_id), -torch.inf).log_softmax(-1)
    return laws.gather(-1, rows.target[labels][:, None])[:, 0]


def visible(rows: Rows) -> Tensor:
    """Who sees whom in [noisy ; clean]: bool [b, q+t, q+t]. A state sees itself and the clean blocks before its own;
    clean places see the clean blocks up to their own."""
    of = rows.positions // rows.block
    own = (rows.copy[:, :, None] == rows.copy[:, None, :]) & (rows.copy >= 0)[:, :, None]
    real = (rows.clean_block >= 0)[:, None, :]
    before = (rows.clean_block[:, None, :] < of[:, :, None]) & real
    up_to = (rows.clean_block[:, None, :] <= rows.clean_block[:, :, None]) & real
    top = torch.cat([own, before], 2)
    bottom = torch.cat([torch.zeros_like(before).transpose(1, 2), up_to], 2)
    seen = torch.cat([top, bottom], 1)
    return seen | torch.eye(seen.shape[1], dtype=torch.bool)  # padding sees itself, so that no row is empty
