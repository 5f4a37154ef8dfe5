"""Versions of the drafter that learns while it serves: which one new requests get, how each does, and the way back.

Lives in the engine's thread. A version is a method instance of its own, so a switch happens between two requests:
running ones keep theirs to the end, and no cache has to be made anew. The output never depends on the version: the
target verifies.

A version is judged beside the one before it, on the same traffic: of every three requests one goes to the old version
until both are known. Figures of different times would blame a version for a change of the traffic. A version that
gives less than ``min_gain`` tokens per forward is paused: plain decoding serves, its texts are recorded all the same,
and the next version that promises enough of them starts speculation again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stretto.decoding.registry import METHODS
from stretto.engine.engine import Stream
from stretto.errors import InputError, StrettoError
from stretto.models.adapter import Adapter, load_adapter, open_adapter
from stretto.serving.online import KIND, LATEST

__all__ = ["ONLINE", "Drafters"]

ONLINE = "online"  # the name by which requests ask for the current version
WORSE = 0.9  # a version whose tokens per forward fall below this share of the last one's is taken back
BESIDE = 3  # during a trial one request of so many goes to the version before
POLL = 0.25  # seconds between two looks at the folder


@dataclass(slots=True)
class _Version:
    number: int
    adapter: Adapter
    metric: float
    since: float
    lengths: deque[float] = field(default_factory=lambda: deque(maxlen=50))  # tokens per forward of finished requests

    @property
    def live(self) -> float | None:
        return statistics.fmean(self.lengths) if self.lengths else None


class Drafters:
    """``plain``: what serves while there is no version; ``enough``: finished requests before a version is judged;
    ``min_gain``: tokens per forward under which a version is paused."""

    def __init__(self, llm: Any, folder: Path, *, plain: str = "ar", enough: int = 24, min_gain: float = 1.1):
        self._llm, self._folder, self._plain, self._enough = llm, folder, plain, enough
        self._min_gain = min_gain
        self._versions: list[_Version] = []
        self._refused: set[int] = set()
        self._looked, self._seen, self._asked = 0.0, 0, 0
        self._trial = False  # the last two versions serve side by side
        self.rollbacks, self.pauses, self.alarm, self.paused = 0, 0, None, None
        llm.host.parts = self._part

    @property
    def current(self) -> _Version | None:
        return self._versions[-1] if self._versions else None

    def resolve(self) -> tuple[str, dict[str, Any], str]:
        """(method, options, note) that a request for "online" gets now."""
        if self.current is None or KIND not in METHODS:
            return self._plain, {}, f"no drafter is trained yet: {self._plain}"
        if self.paused is not None:
            return self._plain, {}, f"{self.paused}: {self._plain}"
        self._asked += 1
        number = self._versions[-2 if self._trial and self._asked % BESIDE == 0 else -1].number
        return KIND, {"adapter": f"{ONLINE}:{number}"}, f"drafter of version {number}"

    def poll(self) -> bool:
        """Look for a new version, at most every quarter of a second and not in a trial; whether one is used now."""
        now = time.monotonic()
        return self.update() if now - self._looked >= POLL and not self._trial else False

    def update(self) -> bool:
        """Look now. A version that cannot be used leaves the old one in place and sets ``alarm``."""
        self._looked = time.monotonic()
        try:
            about = json.loads((self._folder / LATEST).read_text())
            number = int(about["version"])
            if number <= self._seen:
                return False
            self._seen = number
            adapter = load_adapter(about["path"]).check(self._llm.runner.model, KIND)
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, StrettoError) as error:
            self.alarm = f"a version was not used: {error}"
            return False
        self._trial = bool(self._versions) and self.paused is None
        if self._trial:
            self._versions[-1].lengths.clear()
            self._asked = 0
        self._versions = [*self._versions[-2:], _Version(number, adapter, float(about["metric"]), time.time())]
        self.alarm = self.paused = None
        return True

    def rollback(self) -> dict[str, Any]:
        """Go back to the version before; InputError when there is none."""
        if len(self._versions) < 2:
            raise InputError("there is no earlier version to go back to")
        bad = self._versions.pop()
        self._refused.add(bad.number)
        self.rollbacks += 1
        self._trial, self.paused = False, None
        return self.state()

    def judge(self, stream: Stream, adapter: str) -> None:
        """A stream of version ``adapter`` ends: count it; take the current one back where it is worse than the last."""
        metrics = stream.seq.metrics
        for version in self._versions:
            if adapter == f"{ONLINE}:{version.number}" and metrics.forwards:
                version.lengths.append(metrics.tokens_per_forward)
        if self.current is None or self.paused is not None:
            return
        if self._trial and self._worse(*self._versions[-2:]):
            last, now = self._versions[-2:]
            self.rollback()
            self.alarm = f"version {now.number} was taken back: {now.live:.2f} tokens a forward against {last.live:.2f}"
        now = self.current
        lately = list(now.lengths)[-self._enough :]
        if len(lately) == self._enough and statistics.fmean(lately) < self._min_gain:
            self.pauses += 1
            self._trial, gave = False, f"{statistics.fmean(lately):.2f} tokens a forward"
            self.paused = f"version {now.number} gave {gave}, less than {self._min_gain:g}"

    def _worse(self, last: _Version, now: _Version) -> bool:
        """Whether ``now`` is worse than ``last`` by more than its share and the standard error; ends the trial."""
        if len(now.lengths) < self._enough or len(last.lengths) < max(2, self._enough // 2):
            return False
        self._trial = False
        a, b = [WORSE * x for x in last.lengths], list(now.lengths)
        error = (statistics.variance(a) / len(a) + statistics.variance(b) / len(b)) ** 0.5
        return statistics.fmean(a) - statistics.fmean(b) > error

    def state(self) -> dict[str, Any]:
        """For ``GET /v1/drafters``."""
        return {
            "current": self.current.number if self.current else None, "rollbacks": self.rollbacks, "alarm": self.alarm,
            "pauses": self.pauses, "paused": self.paused, "trial": self._trial,
            "versions": [
                {"version": v.number, "simulated": v.metric, "age": time.time() - v.since,
                 "tokens_per_forward": v.live, "requests": len(v.lengths)}
                for v in self._versions
            ],
        }

    def _part(self, kind: str, name: str) -> Adapter:
        if name.startswith(f"{ONLINE}:"):
            number = name.partition(":")[2]
            for version in self._versions:
                if str(version.number) == number:
                    return version.adapter
            raise InputError(f"version {number} of the drafter is gone")
        return open_adapter(kind, name, self._llm.runner.model)
