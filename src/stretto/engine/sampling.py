"""From logits to a token: processors, the processed law, and counter-based random numbers.

The noise of a token depends on (seed, choice, branch path, index in the output) and on nothing else, so a result never
depends on batch mates, preemption or resumption. Sampling is Gumbel-max over the processed law: token =
argmax(log p + g), g_v = -log(-log u_v), u from Philox (Salmon et al., 2011). A method whose drafts are checked
against these draws therefore returns the very tokens that plain decoding with the same seed returns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Seq
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stretto.engine.params import SamplingParams

__all__ = ["Constraint", "Sampler", "noise"]


class Constraint(Protocol):
    """A grammar over the output of one sequence, advanced by the engine with every final token."""

    def mask(self, path: Seq[int]) -> Tensor:
        """bool [V]: which tokens may follow the final tokens and ``path``."""
        ...

    def advance(self, tokens: Seq[int]) -> None: ...


def _key(parts: tuple) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def noise(key: int, index: int, draw: int, n: int) -> np.ndarray:
    """float64 [n], uniform in (0, 1), a function of its arguments alone. ``draw`` separates uses at one index."""
    bits = np.random.Philox(key=key, counter=[0, 0, draw, index])
    return np.random.Generator(bits).random(n) * (1 - 2.0**-53) + 2.0**-54


class Sampler:
    """Chooses the tokens of one sequence.

    ``plain``: greedy without any processor: the argmax of the raw logits is the answer, and callers may use the
    batched argmax of the forward instead of ``pick``.
    """

    def __init__(
        self, params: SamplingParams, *, choice: int = 0, path: tuple[int, ...] = (),
        stop_ids: Seq[int] = (), prompt: Seq[int] = (), constraint: Constraint | None = None,
    ):
        p = self.params = params
        self._origin = (params.seed or 0, choice, path)
        self.constraint = constraint
        self._stop_ids = list(stop_ids)
        self._prompt = prompt
        self._out: list[int] = []
        self._counts = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
        self.greedy = p.temperature == 0.0
        processed = bool(self._counts or p.logit_bias or p.min_tokens or constraint)
        self.plain = self.greedy and not processed
        self._raw = not processed
        self._whole = p.top_k <= 0 and p.top_p >= 1.0 and p.min_p <= 0.0  # no token is cut off
        self._bits: np.random.Philox | None = None

    @cached_property
    def key(self) -> int:
        """Of the random numbers."""
        return _key(self._origin)

    def advance(self, tokens: Seq[int]) -> None:
        """Tell the sampler which tokens became final."""
        if self._counts:
            self._out += tokens
        if self.constraint is not None:
            self.constraint.advance(tokens)

    def process(self, logits: Tensor, index: int, path: Seq[int] = ()) -> Tensor:
        """Penalties, bias, minimum length and grammar on float [V]; ``path``: drafted tokens before this one."""
        if self._raw:
            return logits
        p, out = self.params, logits.clone()
        if self._counts:
            self._penalise(out, [*self._out, *path])
        for token, bias in (p.logit_bias or {}).items():
            out[token] += bias
        if index < p.min_tokens and self._stop_ids:
            out[self._stop_ids] = -torch.inf
        if self.constraint is not None:
            out[~self.constraint.mask(path)] = -torch.inf
        return out

    def _penalise(self, out: Tensor, text: list[int]) -> None:
        p = self.params
        if p.repetition_penalty != 1.0:
            ids = torch.tensor(sorted({*self._prompt, *text}))
            x = out[ids]
            out[ids] = torch.where(x > 0, x / p.repetition_penalty, x * p.repetition_penalty)
        if text:
            ids, counts = torch.tensor(text).unique(return_counts=True)
            out[ids] -= p.frequency_penalty * counts + p.presence_penalty

    def law(self, logits: Tensor, index: int, path: Seq[int] = ()) -> Tensor:
        """The processed law, float64 [V] summing to 1: temperature, top-k, top-p, min-p after the processors.

        Greedy gives a point mass. Used where probabilities are needed (rejection sampling); ``pick`` follows it.
        """
        x = self.process(logits, index, path).double()
        if self.greedy:
            out = torch.zeros_like(x)
            out[int(x.argmax())] = 1.0
            return out
        return truncate(torch.softmax(x / self.params.temperature, -1), self.params)

    def pick(self, logits: Tensor, index: int, path: Seq[int] = ()) -> int:
        """The token at output position ``index`` (0-based) given float [V] logits.

        Computed as a race, argmin_v E_v / p_v with E_v = -log u_v: the same token with one logarithm.
        """
        if self.greedy:
            return int(self.process(logits, index, path).argmax())
        if self._whole:
            x = self.process(logits, index, path).detach().cpu().numpy().astype(np.float64)
            x /= self.params.temperature
            x -= x.max()
            p = np.exp(x, out=x)
        else:
            p = self.law(logits, index, path).cpu().numpy()
        with np.errstate(divide="ignore"):
            return int((np.log(self._noise(index, len(p))) / -p).argmin())

    def _noise(self, index: int, n: int) -> np.ndarray:
        """``noise(self.key, index, 0, n)`` from a generator that is set back instead of made anew."""
        if self._bits is None:
            self._bits = np.random.Philox(key=self.key)
            self._generator, self._state = np.random.Generator(self._bits), self._bits.state
            self._state["buffer_pos"] = 4
        self._state["state"]["counter"][:] = (0, 0, 0, index)
        self._bits.state = self._state
        return self._generator.random(n) * (1 - 2.0**-53) + 2.0**-54

    def draw(self, law: Tensor, index: int, draw: int) -> int:
        """A token from ``law`` [V] with noise of its own (``draw`` >= 1 keeps it apart from ``pick``)."""
        gumbel = -np.log(-np.log(noise(self.key, index, draw, len(law))))
        return int((law.log() + torch.from_numpy(gumbel)).argmax())

    def uniform(self, index: int, draw: int) -> float:
        """One number in (0, 1)."""
        return float(noise(self.key, index, draw, 1)[0])


def truncate(p: Tensor, params: SamplingParams) -> Tensor:
    """top-k, then top-p, then min-p on probabilities [..., V]; renormalised. Ties at a border: lower ids stay."""
    n = p.shape[-1]
    if not (0 < params.top_k < n or params.top_p < 1.0 or params.min_p > 0.0):
        return p
    top = _descending(p)
    kept = top.clone()
    if 0 < params.top_k < n:
        kept[..., params.top_k :] = 0
    if params.top_p < 1.0:
        law = kept / kept.sum(-1, keepdim=True)
        kept[law.cumsum(-1) - law >= params.top_p] = 0
    if params.min_p > 0.0:
        kept[top < params.min_p * top[..., :1]] = 0
    count = (kept > 0).sum(-1, keepdim=True)
    border = top.gather(-1, count - 1)
    above, tied = p > border, p == border
    keep = above | (tied & (tied.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    out = torch.where(keep, p, torch.zeros_like(p))
    return out / out.sum(-1, keepdim=True)


def _descending(p: Tensor) -> Tensor:
    """Values sorted along the last dim; numpy's sort is several times faster than torch's on a CPU."""
    if p.device.type != "cpu":
        return p.sort(-1, descending=True).values
    return torch.from_numpy(np.sort(p.numpy(), -1)[..., ::-1].copy())
