"""What the routes share: the engine's link, who may ask, how much may wait, what is counted."""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stretto.decoding.registry import METHODS
from stretto.models.tokenizer import Tokenizer
from stretto.serving.link import Channel, Link
from stretto.serving.metrics import Metrics
from stretto.serving.problems import Problem
from stretto.serving.requests import Job, Model
from stretto.zoo.models import resolve

__all__ = ["Online", "Service", "Settings"]


@dataclass(slots=True)
class Online:
    """Learning while serving. ``folder``: samples and versions; ``share`` of a core for training; ``record``: fraction
    of texts kept; ``options``: more of online.Settings."""

    folder: str
    share: float = 0.5
    record: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def told(self) -> dict[str, Any]:
        """What the engine's process must know."""
        return {"folder": self.folder, "record": self.record, "min_gain": self.options.get("min_gain", 1.1)}


@dataclass(slots=True)
class Settings:
    """Limits and keys of a server. Bytes, seconds, counts; ``engine``: options of LLM."""

    model: str
    name: str = ""  # what requests call the model; the model's own name too
    engine: dict[str, Any] = field(default_factory=dict)
    auto: tuple[str, Mapping[str, Any], str] = ("ar", {}, "")
    plain: str = "ar"
    api_keys: Sequence[str] = ()
    max_queued_requests: int = 256
    max_queued_tokens: int = 65536
    max_choices: int = 16
    max_body: int = 4 << 20
    stream_bytes: int = 1 << 20
    timeout: float | None = None
    health_timeout: float = 5.0
    drain_timeout: float = 30.0
    score_timeout: float = 120.0
    restarts: int = 0
    linger: float = 3.0
    strict: bool = False
    paths: Sequence[str] = ()
    ping: float = 15.0
    sessions: dict[str, Any] = field(default_factory=dict)  # limits of serving.held.Held
    online: Online | None = None


class Service:
    """One model behind HTTP. ``start`` before anything else; everything here runs in the event loop's thread."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.name = settings.name or settings.model
        self.tokenizer = Tokenizer(resolve(settings.model))
        self.link = Link(
            settings.model, settings.engine, plain=settings.plain, restarts=settings.restarts,
            channel_bytes=settings.stream_bytes, watch=self._watch,
            more={"sessions": settings.sessions}
            | ({"online": settings.online.told} if settings.online else {}),
        )
        self.trainer: subprocess.Popen[bytes] | None = None
        self.trainers = 0
        self.draining = False
        list(METHODS)  # read the files now: Python 3.11 cannot parse in two threads at the same time
        self.created = int(time.time())
        self._keys = [k.encode() for k in settings.api_keys]
        self._ends: deque[float] = deque(maxlen=64)  # when choices finished, for Retry-After
        self._metrics: Metrics | None = None
        self._model: Model | None = None

    async def start(self) -> None:
        await self.link.start()
        facts = self.link.facts
        self._model = Model(
            self.name, self.tokenizer, facts["max_model_len"], facts["vocabulary"], facts["attention"],
            self.settings.plain, self.settings.auto, self.settings.max_choices, frozenset(self.settings.paths),
            self.settings.online is not None,
        )
        self.train()
        self._metrics = Metrics(self.name, facts["max_model_len"])

    def train(self) -> None:
        """Start the trainer, if there is to be one and none runs; after five it stays away."""
        online = self.settings.online
        if online is None or self.trainers >= 5 or (self.trainer is not None and self.trainer.poll() is None):
            return
        given = {"model": self.settings.model, "folder": online.folder, "share": online.share, **online.options}
        command = [sys.executable, "-m", "stretto.serving.online", json.dumps(given)]
        self.trainer = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
        self.trainers += 1

    async def close(self) -> None:
        """End the engine and the trainer."""
        if self.trainer is not None and self.trainer.poll() is None:
            self.trainer.kill()
            await asyncio.to_thread(self.trainer.wait)
        await self.link.close()

    async def drafters(self, name: str) -> dict[str, Any]:
        """"drafters", "update" or "rollback" of the drafter that learns; Problem 404 where none does."""
        if self.settings.online is None:
            raise Problem(404, "this server does not learn: start it with --online-training", code="no_training")
        self.train()
        found = await self.link.call(name, self.settings.health_timeout)
        alive = self.trainer is not None and self.trainer.poll() is None
        about = {"alive": alive, "starts": self.trainers, "share": self.settings.online.share}
        return found | {"trainer": about | ({"pid": self.trainer.pid} if self.trainer is not None and alive else {})}

    @property
    def model(self) -> Model:
        assert self._model is not None
        return self._model

    @property
    def stop_ids(self) -> list[int]:
        return self.link.facts["stop_ids"]

    @property
    def metrics(self) -> Metrics:
        assert self._metrics is not None
        return self._metrics

    def tenant(self, header: str | None) -> str:
        """Who asks, by the Authorization header; "" where no keys are set. Problem 401."""
        if not self._keys:
            return ""
        scheme, _, given = (header or "").partition(" ")
        key = given.strip().encode("latin-1", "replace")
        if scheme.lower() != "bearer" or not sum(hmac.compare_digest(key, k) for k in self._keys):
            raise Problem(401, "give a valid key: 'Authorization: Bearer KEY'", code="invalid_api_key")
        return given.strip()

    def check_model(self, name: str | None) -> None:
        """Problem 404 for a model that is not served here."""
        if name not in (self.name, self.settings.model):
            shown = str(name)[:80]
            raise Problem(
                404, f"the model {shown!r} does not exist: this server has {self.name!r}", param="model",
                code="model_not_found",
            )

    def submit(self, job: Job, request: str) -> Channel:
        """Queue a job. Problem 429 when too much waits already, 503 while the server drains."""
        self.admit(job.params["n"], len(job.prompt))
        if job.timeout is None or (self.settings.timeout and job.timeout > self.settings.timeout):
            job.timeout = self.settings.timeout
        channel = self.link.submit(job.message(request), job.params["n"])
        channel.prompt = len(job.prompt)
        self.metrics.start(len(job.prompt), job.params["max_tokens"], job.params["n"])
        return channel

    def gen(self, message: dict[str, Any]) -> Channel:
        """Queue a step of a session's threads, under the same limits."""
        choices, most = len(message["threads"]), self.settings.timeout
        self.admit(choices, 0)
        if message["deadline"] is None or (most and message["deadline"] > most):
            message["deadline"] = most
        channel = self.link.submit({"op": "gen", **message}, choices)
        self.metrics.start(0, message["params"]["max_tokens"], choices)
        return channel

    async def session(self, verb: str, session: str, owner: str, **args: Any) -> dict[str, Any]:
        """One verb on a session: its state afterwards, with what the verb found."""
        if self.draining and verb in ("open", "fork"):
            self.admit(1, 0)
        found = await self.link.call(
            "session", self.settings.score_timeout, verb=verb, session=session, owner=owner, **args
        )
        return {"id": session, "object": "session", "model": self.name, **found}

    def admit(self, choices: int, tokens: int) -> None:
        s, link = self.settings, self.link
        if self.draining:
            raise Problem(
                503, "the server is shutting down: send this to another one", code="draining", retry=s.drain_timeout
            )
        most = s.engine.get("max_num_seqs", 64) + s.max_queued_requests
        if link.live and link.live + choices > most:
            raise Problem(
                429, f"{link.live} choices run or wait, at most {most} may: try again later",
                code="queue_full", retry=self.patience(),
            )
        if link.waiting and link.waiting_tokens + tokens > s.max_queued_tokens:
            raise Problem(
                429,
                f"{link.waiting_tokens} prompt tokens wait already, at most {s.max_queued_tokens}: try again later",
                code="queue_full", retry=self.patience(),
            )

    def patience(self) -> float:
        """Seconds until the queue will have moved on, by the pace of the last finished choices; 1 to 60."""
        recent = [t for t in self._ends if t > time.monotonic() - 60]
        if len(recent) < 2:
            return 1.0
        pace = (len(recent) - 1) / max(1e-3, recent[-1] - recent[0])
        return min(60.0, max(1.0, math.ceil(self.link.waiting / 2 / pace)))

    async def health(self) -> dict[str, Any]:
        """A round trip through the engine's loop; EngineError when it fails."""
        stats = await self.link.call("stats", self.settings.health_timeout)
        self.metrics.state(stats)
        return stats

    def methods(self) -> list[dict[str, Any]]:
        """What the page and clients may choose from."""
        fits = [m for m in METHODS.values() if self.model.attention in m.kinds]
        return [
            {
                "name": m.name, "purpose": m.purpose, "lossless": m.lossless,
                "options": [{"name": o.name, "type": o.type, "default": o.default, "help": o.help} for o in m.options],
            }
            for m in fits
        ]

    async def drain(self) -> None:
        """Refuse new requests, wait for the running ones up to ``drain_timeout``."""
        self.draining = True
        end = time.monotonic() + self.settings.drain_timeout
        while self.link.live and time.monotonic() < end and self.link.state == "ready":
            await asyncio.sleep(0.02)

    def _watch(self, message: dict[str, Any]) -> None:
        """Every message of the engine passes here."""
        if self._metrics is None or message["op"] != "step":
            return
        self._metrics.state(message["stats"])
        for event in message["events"]:
            if "finish" in event:
                self._metrics.end(event["cost"], event["finish"])
                self._ends.append(time.monotonic())
