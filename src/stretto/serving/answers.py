"""Answers in OpenAI's shapes: whole ones and the chunks of a stream."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stretto.models.tokenizer import Tokenizer
from stretto.serving.link import Channel
from stretto.serving.requests import Job
from stretto.serving.tools import Reader

__all__ = ["Answer", "ChatShape", "CompletionShape", "Shape", "collect", "cost", "usage"]

LOWEST = -9999.0  # what stands for a log-probability of minus infinity: JSON has none


@dataclass(slots=True)
class Answer:
    """What one choice said so far."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish: str | None = None
    stop: int | str | None = None  # what ended it, where that was asked for
    cost: dict[str, Any] = field(default_factory=dict)

    def add(self, event: Mapping[str, Any]) -> None:
        self.text += event["text"]
        self.tokens += event["tokens"]
        self.forwards += event["forwards"]
        self.logprobs += event.get("logprobs", ())
        self.finish, self.stop = event.get("finish"), event.get("stop")
        self.cost = event.get("cost", self.cost)


async def collect(channel: Channel) -> list[Answer]:
    """The finished answers of a channel's choices."""
    answers = [Answer(i) for i in range(channel.choices)]
    while events := await channel.take():
        for event in events:
            answers[event["choice"]].add(event)
    return answers


class Shape:
    """``id``, ``created`` and ``model`` are the same in every chunk."""

    whole = partial = ""

    def __init__(self, request: str, model: str, tokenizer: Tokenizer, stop_ids: Iterable[int]):
        self.id, self.model, self.created = request, model, int(time.time())
        self.tokenizer, self.stop_ids = tokenizer, frozenset(stop_ids)

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def shown(self, event: Mapping[str, Any]) -> list[tuple[int, Any]]:
        """(token, its log-probabilities) of an event, without the stop token that ended it."""
        pairs = self.every(event)
        if event.get("finish") == "stop" and pairs and pairs[-1][0] in self.stop_ids:
            pairs.pop()
        return pairs

    def every(self, event: Mapping[str, Any]) -> list[tuple[int, Any]]:
        """(token, its log-probabilities) of an event, a stop token included."""
        return list(zip(event["tokens"], event.get("logprobs") or [()] * len(event["tokens"]), strict=True))

    def text_of(self, token: int) -> str:
        return self.tokenizer.token_bytes(token).decode("utf-8", "replace")


class ChatShape(Shape):
    """chat.completion and chat.completion.chunk."""

    whole, partial = "chat.completion", "chat.completion.chunk"

    def choice(self, job: Job, answer: Answer, index: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        finish = answer.finish
        if job.tools:
            reader = Reader(job.tools)
            content, calls = _gather([*reader.push(answer.text), *reader.finish()])
            message["content"] = content or (None if calls else "")
            if calls:
                message["tool_calls"] = calls
                finish = "tool_calls" if finish == "stop" else finish
        found = {"content": self._logprobs(job, {**vars_of(answer)}), "refusal": None} if job.top is not None else None
        return {"index": index, "message": message, "logprobs": found, "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def deltas(self, job: Job, event: Mapping[str, Any], reader: Reader | None, index: int) -> list[dict[str, Any]]:
        """The choices of the chunks for one event; the last one of a finished choice says why it ended."""
        found = {"content": self._logprobs(job, event), "refusal": None} if job.top is not None else None
        pieces: list[Any] = [event["text"]] if event["text"] else []
        finish = event.get("finish")
        if reader is not None:
            pieces = reader.push(event["text"]) + (reader.finish() if finish else [])
            if reader.calls and finish == "stop":
                finish = "tool_calls"
        out = [
            {"index": index, "delta": {"content": p} if isinstance(p, str) else {"tool_calls": [_fragment(p)]},
             "logprobs": None, "finish_reason": None}
            for p in pieces
        ]
        if found and found["content"]:
            if not out:
                out.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": None})
            out[0]["logprobs"] = found
        if finish:
            out.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": finish})
        return out

    def _logprobs(self, job: Job, event: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [self._entry(token, dict(pairs), job.top or 0) for token, pairs in self.shown(event)]

    def _entry(self, token: int, law: Mapping[int, float], top: int) -> dict[str, Any]:
        best = sorted(law, key=lambda t: -law[t])[:top]
        return self._one(token, law) | {"top_logprobs": [self._one(t, law) for t in best]}

    def _one(self, token: int, law: Mapping[int, float]) -> dict[str, Any]:
        data = self.tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": _finite(law.get(token))}


class CompletionShape(Shape):
    """text_completion, whole and in chunks."""

    whole = partial = "text_completion"

    def choice(self, job: Job, answer: Answer, index: int) -> dict[str, Any]:
        if job.drop:
            answer.text, answer.tokens, answer.logprobs, answer.finish = "", [], [], "length"
        text = (job.text or "") + answer.text if job.echo else answer.text
        found = self._logprobs(job, vars_of(answer), 0) if job.top is not None else None
        more = {}
        if job.ids:  # vLLM's names
            more = {"token_ids": answer.tokens, "stop_reason": answer.stop, "prompt_token_ids": job.prompt}
        return {"index": index, "text": text, "logprobs": found, "finish_reason": answer.finish, **more}

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def deltas(self, job: Job, event: Mapping[str, Any], reader: Reader | None, index: int) -> list[dict[str, Any]]:
        found = self._logprobs(job, event, 0) if job.top is not None else None
        finish = event.get("finish")
        if not event["text"] and not finish and not (found and found["tokens"]):
            return []
        return [{"index": index, "text": event["text"], "logprobs": found, "finish_reason": finish}]

    def _logprobs(self, job: Job, event: Mapping[str, Any], offset: int) -> dict[str, Any]:
        out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if job.scores is not None:
            for token, law in zip(job.prompt, [None, *job.scores], strict=True):
                self.put(out, token, law, job.top or 0, offset)
                offset += len(out["tokens"][-1])
        for token, pairs in self.every(event):  # as OpenAI and vLLM do: clients cut the generated token off by position
            self.put(out, token, dict(pairs) if pairs is not None else None, job.top or 0, offset)
            offset += len(out["tokens"][-1])
        return out

    def put(self, out: dict[str, Any], token: int, law: Mapping[int, float] | None, top: int, offset: int) -> None:
        """Append a token; ``law`` None: nothing is known of it (the first of a prompt)."""
        text = self.text_of(token)
        out["tokens"].append(text)
        out["text_offset"].append(offset)
        if law is None:
            out["token_logprobs"].append(None)
            out["top_logprobs"].append(None)
            return
        best = sorted(law, key=lambda t: -law[t])[: max(top, 1)]
        out["token_logprobs"].append(_finite(law.get(token)))
        shown = {self.text_of(t): _finite(law[t]) for t in reversed(best)}
        out["top_logprobs"].append(shown if top else {})


def vars_of(answer: Answer) -> dict[str, Any]:
    return {"tokens": answer.tokens, "logprobs": answer.logprobs, "finish": answer.finish}


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else LOWEST


def _fragment(piece: Mapping[str, Any]) -> dict[str, Any]:
    """A piece of a call as a delta: id, type and name in the first one only."""
    function = {"arguments": piece["arguments"]}
    if "name" not in piece:
        return {"index": piece["index"], "function": function}
    return {
        "index": piece["index"], "id": piece["id"], "type": "function",
        "function": {"name": piece["name"], **function},
    }


def _gather(pieces: Iterable[Any]) -> tuple[str, list[dict[str, Any]]]:
    content, calls = "", []
    for piece in pieces:
        if isinstance(piece, str):
            content += piece
        elif "name" in piece:
            function = {"name": piece["name"], "arguments": piece["arguments"]}
            calls.append({"id": piece["id"], "type": "function", "function": function})
        else:
            calls[piece["index"]]["function"]["arguments"] += piece["arguments"]
    return content, calls


def usage(jobs: Sequence[Job], answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """The prompt counts once, whatever n is; completion tokens are those of all choices."""
    prompt = sum(len(j.prompt) for j in jobs)
    done = sum(len(a.tokens) for group in answers for a in group)
    cached = sum(group[0].cost.get("cached_tokens", 0) for group in answers if group)
    return {
        "prompt_tokens": prompt, "completion_tokens": done, "total_tokens": prompt + done,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def cost(jobs: Sequence[Job], answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """What the answer cost. Choices run side by side: ``critical_path`` is the longest of them."""
    flat = [a.cost for group in answers for a in group if a.cost]
    forwards = sum(c["forwards"] for c in flat)
    tokens, drafted = sum(c["tokens"] for c in flat), sum(c["drafted"] for c in flat)
    notes = [n for j in jobs if j.note for n in [j.note]] + [n for c in flat for n in c["notes"]]
    out = {
        "method": flat[0]["method"] if flat else jobs[0].method,
        "options": flat[0]["options"] if flat else jobs[0].options, "forwards": forwards,
        "tokens_per_forward": round(tokens / forwards, 4) if forwards else 0.0,
        "acceptance": round(sum(c["accepted"] for c in flat) / drafted, 4) if drafted else None,
        "critical_path": max((c["forwards"] + c["prefill_forwards"] for c in flat), default=0),
        "rows": sum(c["rows"] for c in flat), "preemptions": sum(c["preemptions"] for c in flat),
        "notes": list(dict.fromkeys(notes)),
    }
    if len(flat) > 1:
        out["choices"] = flat
    return out
