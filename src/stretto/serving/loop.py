"""The engine's thread: it owns all state; everybody else posts to its inbox.

    drain the inbox (add, abort, call), expire deadlines, one forward, publish what became final
"""

from __future__ import annotations

import json
import queue
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stretto.decoding.registry import make
from stretto.engine.engine import Progress, Stream
from stretto.engine.params import SamplingParams
from stretto.errors import CapacityError, InputError, StrettoError, UnknownNameError
from stretto.llm import LLM
from stretto.serving.drafters import ONLINE, Drafters
from stretto.serving.held import Held
from stretto.serving.protocol import UnknownSessionError
from stretto.serving.samples import LAYER, Recorder

__all__ = ["Loop", "error_of"]

METHODS_KEPT = 32  # configurations of methods that stay made; idle ones beyond are dropped, oldest first
IDLE = 0.5  # seconds between two looks at the deadlines while nothing runs


@dataclass(slots=True)
class _Live:
    """A request of this engine. ``sent``: characters of each choice's text that were published."""

    id: str
    streams: list[Stream]
    method: str
    options: dict[str, Any]
    deadline: float | None = None
    sent: list[int] = field(default_factory=list)
    open: int = 0
    store: bool = True
    note: str | None = None
    ended: Callable[[bool], None] = lambda finished: None  # True: all streams finished; False: given up


class Loop:
    """``publish`` sends a message to the front and never blocks. ``post`` may be called from any thread. ``sessions``:
    limits of ``Held``."""

    def __init__(
        self, llm: LLM, publish: Callable[[dict[str, Any]], None], sessions: Mapping[str, Any] | None = None
    ):
        self.llm, self._publish = llm, publish
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._live: dict[str, _Live] = {}
        self._owner: dict[Stream, _Live] = {}
        self._methods: OrderedDict[str, Any] = OrderedDict()
        self._closed = False
        self.held = Held(llm, self.step, self._give_up, **(sessions or {}))
        self.calls: dict[str, Callable[..., Any]] = {"stats": self.stats, "score": self.score, "session": self.held.do}
        self.drafters: Drafters | None = None
        self.recorder: Recorder | None = None

    def post(self, message: dict[str, Any]) -> None:
        self._inbox.put(message)

    def run(self) -> None:
        """Until a "close" message; exceptions of a forward pass through, and the engine is then unusable."""
        while not self._closed:
            self._drain()
            self._expire()
            if self.llm.engine.busy:
                self.step()
            if self.drafters is not None:
                self.drafters.poll()

    def step(self) -> list[Progress]:
        """One forward, and its news to everybody who waits for some."""
        progress = self.llm.engine.step()
        self._tell(progress)
        return progress

    def learn(self, folder: Path, plain: str, share: float, min_gain: float = 1.1) -> None:
        """Record what is served into ``folder``, and use the drafters that are published there."""
        self.drafters = Drafters(self.llm, folder, plain=plain, min_gain=min_gain)
        self.recorder = Recorder(self.llm.runner, folder / "samples", self._stored, share=share)
        self.llm.host.taps = (LAYER,)
        self.llm.engine.watchers += [self.recorder, self._judge]
        self.calls |= {"drafters": self._learning, "rollback": self._back, "update": self._update}

    def _stored(self, stream: Stream) -> bool:
        return stream in self._owner and self._owner[stream].store

    def _judge(self, stream: Stream) -> None:
        assert self.drafters is not None
        if stream in self._owner:
            self.drafters.judge(stream, str(self._owner[stream].options.get("adapter", "")))

    def _learning(self) -> dict[str, Any]:
        assert self.drafters is not None and self.recorder is not None
        return self.drafters.state() | {"recorded": self.recorder.recorded, "dropped": self.recorder.dropped}

    def _back(self) -> dict[str, Any]:
        assert self.drafters is not None
        return self.drafters.rollback()

    def _update(self) -> dict[str, Any]:
        assert self.drafters is not None
        return {"updated": self.drafters.update(), **self._learning()}

    def stats(self) -> dict[str, Any]:
        """What the gauges show: numbers of this moment, counters since the start."""
        engine, alloc = self.llm.engine, self.llm.runner.alloc
        prefix = engine.prefix
        return {
            "running": len(engine.scheduler.running), "waiting": len(engine.scheduler.waiting),
            "requests": len(self._live), "sessions": len(self.held), "slots": alloc.total, "used": alloc.used,
            "prefix": prefix.slots if prefix else 0,
            "prefix_queries": prefix.queries if prefix else 0, "prefix_hits": prefix.hits if prefix else 0,
            "preemptions": engine.scheduler.preemptions, "forwards": engine.forwards, "rows": engine.rows,
        }

    def score(self, prompt: list[int], top: int) -> list[list[Any]]:
        """For every token of ``prompt`` from the second on: [id, log-probability] of itself and the ``top`` best.

        One plain forward without cache: nothing that is cached is read, and nothing else runs meanwhile.
        """
        law = torch.log_softmax(self.llm.logits(prompt)[:-1].double(), -1)
        best = torch.topk(law, max(1, top)).indices.tolist()
        return [
            [[t, float(row[t])] for t in dict.fromkeys([token, *ids[:top]])]
            for token, row, ids in zip(prompt[1:], law, best, strict=True)
        ]

    def _drain(self) -> None:
        wait = not self.llm.engine.busy
        while True:
            try:
                message = self._inbox.get(timeout=IDLE) if wait else self._inbox.get_nowait()
            except queue.Empty:
                return
            wait = False
            self._obey(message)
            if self._closed:
                return

    def _obey(self, message: dict[str, Any]) -> None:
        op = message["op"]
        if op == "add":
            self._admit(message, self._request)
        elif op == "gen":
            self._admit(message, self._threads)
        elif op == "abort":
            self._end(message["id"])
        elif op == "refuse":
            self._publish({"op": "error", "id": message["id"], "error": message["error"]})
        elif op == "call":
            self._call(message)
        elif op == "close":
            self._closed = True
        else:
            raise AssertionError(f"unknown message {op!r}")

    def _call(self, message: dict[str, Any]) -> None:
        answer: dict[str, Any] = {"op": "result", "call": message["call"]}
        try:
            found = self.calls.get(message["name"])
            if found is None:
                raise UnknownNameError("call", message["name"], self.calls)
            answer["value"] = found(**message.get("args", {}))
        except StrettoError as error:
            answer["error"] = error_of(error)
        self._publish(answer)

    def _admit(self, message: dict[str, Any], start: Callable[[dict[str, Any]], _Live]) -> None:
        try:
            live = start(message)
        except StrettoError as error:
            self._publish({"op": "error", "id": message["id"], "error": error_of(error)})
            return
        seconds = message.get("deadline")
        live.deadline = None if seconds is None else time.monotonic() + seconds
        live.sent, live.open = [0] * len(live.streams), len(live.streams)
        self._live[live.id] = live
        self._owner.update((s, live) for s in live.streams)
        self._publish({"op": "added", "id": live.id})

    def _request(self, message: dict[str, Any]) -> _Live:
        params = message.get("made") or SamplingParams.make(**message["params"])
        name, options, note = self._named(message)
        streams = self.llm.engine.add(
            message["prompt"], params, self._method(name, options), priority=message.get("priority", 0),
            salt=message.get("salt", ""), constraint=message.get("constraint"), decode_text=True,
        )
        return _Live(message["id"], streams, name, options, store=message.get("store", True), note=note)

    def _threads(self, message: dict[str, Any]) -> _Live:
        """Threads of a session generate together; choice i is the i-th of them."""
        params = SamplingParams.make(**message["params"])
        name, options, note = self._named(message)
        streams, ended = self.held.gen(
            message["id"], message["session"], message["owner"], message["threads"], self._method(name, options), params
        )
        return _Live(message["id"], streams, name, options, store=False, note=note, ended=ended)

    def _named(self, message: dict[str, Any]) -> tuple[str, dict[str, Any], str | None]:
        """(method, options, note) of a message; "online" stands for the drafter as it is now."""
        if message["method"] == ONLINE and self.drafters is not None:
            return self.drafters.resolve()
        return message["method"], message.get("options") or {}, None

    def _method(self, name: str, options: Mapping[str, Any]) -> Any:
        """The method with these options; shared while it is kept."""
        key = json.dumps([name, options], sort_keys=True)
        if key not in self._methods:
            if len(self._methods) >= METHODS_KEPT:
                self._forget()
            self._methods[key] = make(name, self.llm.host, options)
        self._methods.move_to_end(key)
        return self._methods[key]

    def _forget(self) -> None:
        busy = {id(s.seq.method) for s in self._owner}
        for key, method in self._methods.items():
            if id(method) not in busy:
                del self._methods[key]
                return
        raise CapacityError(
            f"{METHODS_KEPT} different methods and options are running: use one of theirs, or try again later"
        )

    def _expire(self) -> None:
        now = time.monotonic()
        self.held.expire(now)
        for live in [x for x in self._live.values() if x.deadline is not None and x.deadline <= now]:
            self._give_up(live.id, "the deadline of this request passed before it was finished", "Deadline")

    def _give_up(self, request: str, why: str, kind: str = "InputError") -> None:
        self._publish({"op": "error", "id": request, "error": {"type": kind, "message": why}})
        self._end(request)

    def _end(self, request: str) -> None:
        live = self._live.pop(request, None)
        if live is not None:
            for stream in live.streams:
                self.llm.engine.abort(stream)
                self._owner.pop(stream, None)
            live.ended(False)

    def _tell(self, progress: list[Progress]) -> None:
        events = [self._event(p) for p in progress if p.stream in self._owner and (p.tokens or p.finish_reason)]
        if events:
            self._publish({"op": "step", "events": events, "stats": self.stats()})

    def _event(self, progress: Progress) -> dict[str, Any]:
        stream = progress.stream
        live, seq = self._owner[stream], stream.seq
        if progress.finish_reason:
            stream.stops.finish()
        choice = live.streams.index(stream)
        safe, sent = stream.stops.safe, live.sent[choice]
        live.sent[choice] = max(safe, sent)
        n = len(progress.tokens)
        event: dict[str, Any] = {
            "id": live.id, "choice": choice, "text": stream.stops.text[sent:safe],
            "tokens": progress.tokens, "forwards": seq.step_map[len(seq.step_map) - n :],
        }
        if seq.logprobs is not None:
            event["logprobs"] = [list(x.items()) for x in seq.logprobs[len(seq.logprobs) - n :]]
        if progress.finish_reason:
            event |= {"finish": progress.finish_reason, "stop": stream.stop_reason, "cost": _cost(live, stream)}
            self._owner.pop(stream)
            live.open -= 1
            if not live.open:
                self._live.pop(live.id, None)
                live.ended(True)
        return event


def _cost(live: _Live, stream: Stream) -> dict[str, Any]:
    m = stream.seq.metrics
    return {
        "method": live.method, "options": live.options, "forwards": m.forwards,
        "prefill_forwards": m.prefill_forwards, "rows": m.rows,
        "tokens": m.tokens, "tokens_per_forward": round(m.tokens_per_forward, 4), "drafted": m.drafted,
        "accepted": m.accepted, "acceptance": round(m.acceptance, 4) if m.drafted else None,
        "cached_tokens": m.cached_tokens, "preemptions": m.preemptions, "ttft": m.ttft, "seconds": m.seconds,
        "queued": max(0.0, (m.started or stream.arrival) - stream.arrival),
        "notes": ([live.note] if live.note else []) + list(m.notes),
    }


def error_of(error: Exception) -> dict[str, Any]:
    """An exception as the front needs it: its class, its message, the option it is about."""
    plain = isinstance(error, InputError) and not isinstance(error, UnknownSessionError)
    kind = "InputError" if plain else type(error).__name__
    param = error.kind.split()[0] if isinstance(error, UnknownNameError) else getattr(error, "name", None)
    return {"type": kind, "message": str(error), "param": param}
