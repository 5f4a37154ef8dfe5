"""What mirrored speculation costs on devices that are not here: the step times of the paper, and a run over them.

T_ar   = T_lower + T_upper                                              a token
T_spec = T_draft + T_lower + T_upper + T_channel                        a step of plain speculation
T_mir  = T_lower + T_channel + max(T_upper, T_draft) + T_channel + [fallback] T_draft

with T_draft = gamma forwards of the draft, and the fallback where the correction was not among the early candidates.
(arXiv 2510.13161, section 3.3. All times in seconds, those of one forward over the window.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from stretto.errors import OptionError
from stretto.planning import stations
from stretto.planning.stations import Barrier, Job, Meet, Station, Use

__all__ = ["Setup", "best_exit", "expected_tokens", "rates", "simulate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """``layer``: seconds of a target layer; ``draft``: of a draft forward over one branch; ``branch``: what every
    further branch adds to it, as a share; ``channel``: of a message. ``alpha``: acceptance of a drafted token.
    ``omega``: chance that the correction is among the early candidates."""

    layers: int = 48
    exit: int = 24
    layer: float = 1e-3
    draft: float = 2e-3
    branch: float = 0.0
    channel: float = 2e-5
    gamma: int = 7
    kappa: int = 8
    alpha: float = 0.8
    omega: float = 0.9

    def __post_init__(self) -> None:
        if not 1 <= self.exit < self.layers:
            raise OptionError("exit", self.exit, f"1..{self.layers - 1}, below the last of {self.layers} layers")
        if self.gamma < 1:
            raise OptionError("gamma", self.gamma, "a whole number from 1")

    @property
    def lower(self) -> float:
        return self.exit * self.layer

    @property
    def upper(self) -> float:
        return (self.layers - self.exit) * self.layer

    @property
    def rollout(self) -> float:
        """Seconds of the branch-complete rollout: gamma forwards over (gamma + 1) kappa branches."""
        return self.gamma * self.draft * (1 + self.branch * ((self.gamma + 1) * self.kappa - 1))

    @property
    def chain(self) -> float:
        """Seconds of a window drafted for one text."""
        return self.gamma * self.draft


def expected_tokens(alpha: float, gamma: int) -> float:
    """(1 - alpha^(gamma + 1)) / (1 - alpha): tokens of a step."""
    return gamma + 1.0 if alpha == 1.0 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def rates(s: Setup) -> dict[str, float]:
    """Tokens per second by the closed forms: {"ar", "speculation", "mirror"}."""
    tokens = expected_tokens(s.alpha, s.gamma)
    mirror = s.lower + 2 * s.channel + max(s.upper, s.rollout) + (1 - s.omega) * s.chain
    return {
        "ar": 1 / (s.lower + s.upper),
        "speculation": tokens / (s.chain + s.lower + s.upper + s.channel),
        "mirror": tokens / mirror,
    }


def simulate(s: Setup, *, steps: int = 4000, seed: int = 0) -> dict[str, float]:
    """The same by events: the draft's rollout runs against the target's upper layers, and what is not done when the
    verdict comes is finished after it, on the one branch that came true. The target starts its next step then."""
    rng = np.random.default_rng(seed)
    accepted = np.minimum(rng.geometric(1 - s.alpha, steps) - 1, s.gamma) if s.alpha < 1 else np.full(steps, s.gamma)
    hit = rng.random(steps) < s.omega
    lower, upper, draft = Station("lower layers", 1), Station("upper layers", 1), Station("draft", 1)
    early, late, window = Barrier(2), Barrier(2), Barrier(2)
    decided = [0]  # verdicts that have reached the draft

    def target() -> Job:
        for _ in range(steps):
            yield Use(lower, s.lower)
            yield Meet(early)
            yield Use(upper, s.upper)
            yield Use(Station("channel", 1), s.channel)
            decided[0] += 1
            yield Meet(late)
            yield Meet(window)

    def drafting() -> Job:
        for step, covered in enumerate(hit):
            yield Meet(early)
            yield Use(Station("channel", 1), s.channel)
            if covered:
                for _ in range(s.gamma):
                    yield Use(draft, s.rollout / s.gamma if decided[0] == step else s.draft)
            yield Meet(late)
            if not covered:  # nothing of the rollout came true: it was dropped when the verdict came
                yield Use(draft, s.chain)
            yield Meet(window)

    seconds = stations.simulate([target(), drafting()])
    tokens = float(accepted.sum() + steps)
    own = s.lower + s.upper + s.channel
    return {"mirror": tokens / seconds, "waited": seconds / steps - own, "tokens_per_step": tokens / steps}


def best_exit(s: Setup, omega: dict[int, float]) -> tuple[int, float]:
    """The exit layer with the highest rate, given what coverage each layer has; (layer, tokens per second)."""
    found = {l: rates(replace(s, exit=l, omega=o))["mirror"] for l, o in omega.items() if 1 <= l < s.layers}
    layer = max(found, key=lambda l: found[l])
    return layer, found[layer]
