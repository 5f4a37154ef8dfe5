"""Plain autoregressive decoding: one row in, one token out. The reference that lossless methods must equal."""

from __future__ import annotations

from dataclasses import dataclass

from stretto.decoding.verify import choose
from stretto.engine.host import Host
from stretto.engine.types import Commit, Outcome, Sequence, Step
from stretto.errors import UnsupportedError

__all__ = ["Autoregressive", "Options"]

ROOT = range(1)


@dataclass(frozen=True, kw_only=True)
class Options:
    """No options."""


class Autoregressive:
    """Plain decoding, one token per forward: the baseline."""

    name = "ar"
    lossless = True
    kinds = ("causal",)
    rides = True

    def __init__(self, host: Host, options: Options):
        self._host = host

    def admit(self, seq: Sequence) -> None:
        require_causal(self._host, self.name)

    def prefill(self, seq: Sequence) -> int:
        return len(seq.tokens) - 1

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        return [Step([seq.tokens[-1]]) for seq in seqs]

    def commit(
        self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]
    ) -> list[Commit]:
        return [
            Commit([choose(seq, outcome, 0)], keep=ROOT, logprob_rows=ROOT)
            for seq, outcome in zip(seqs, outcomes, strict=True)
        ]

    def release(self, seq: Sequence) -> None:
        pass

    def preemptible(self, seq: Sequence) -> bool:
        return True


def require_causal(host: Host, name: str) -> None:
    """UnsupportedError when the model is not a causal one."""
    kind = host.config.attention
    if kind != "causal":
        raise UnsupportedError(
            f"method {name!r} needs a model with causal attention; this one has {kind!r} attention: "
            "use method 'diffusion'"
        )
