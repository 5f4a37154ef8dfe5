"""``LLM``: the offline face of the engine, with vLLM's names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stretto.decoding.profiles import AutoChoice, resolve_auto
from stretto.decoding.registry import get, make
from stretto.engine.engine import Engine, Stream
from stretto.engine.grammar import compile_constraint
from stretto.engine.host import Host
from stretto.engine.params import SamplingParams
from stretto.engine.runner import Runner
from stretto.engine.types import Metrics
from stretto.errors import CapacityError, InputError, OptionError, PromptError, UnsupportedError
from stretto.models.checkpoint import load
from stretto.models.context import plain_logits
from stretto.models.tokenizer import Tokenizer
from stretto.session import Session
from stretto.zoo.models import resolve

__all__ = ["LLM", "CompletionOutput", "RequestOutput"]

Prompt = str | list[int]
DRAFT_ROOM = 64  # rows behind the context in which drafts are verified


@dataclass(slots=True)
class CompletionOutput:
    """One choice. ``logprobs``: per token {id: log-probability}. ``step_map``: per token the 0-based forward of this
    choice that decided it."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: str | int | None
    logprobs: list[dict[int, float]] | None
    step_map: list[int]
    metrics: Metrics


@dataclass(slots=True)
class RequestOutput:
    """``metrics`` are those of the first choice; each choice carries its own."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def metrics(self) -> Metrics:
        return self.outputs[0].metrics


class LLM:
    """A model with an engine around it.

    ``model``: a zoo name ("zoo:tiny"), a directory in Hugging Face layout, or a hub id. ``dtype``: "auto",
    "float32", "bfloat16". ``deterministic``: every lossless method returns plain decoding's tokens exactly.
    ``backend``: "auto", "native", "torch". ``kv_cache_tokens``: slots of the K/V pool (default: 1 GiB worth, between
    4096 and 131072). ``plan=False`` keeps methods from switching themselves off. ``kv_layout``: "paged", or "slots": a
    contiguous region of max_model_len rows for each of max_num_seqs sequences, closed up when one ends unless
    ``compaction=False`` (engine/slot_cache.py).

    Raises CheckpointError for files that are no model, InputError for unusable arguments.
    """

    def __init__(
        self, model: str | Path, *, dtype: str = "auto", device: str = "auto", deterministic: bool = False,
        backend: str = "auto", max_model_len: int | None = None, max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None, kv_cache_tokens: int | None = None,
        enable_prefix_caching: bool = True, threads: int | None = None, plan: bool = True,
        kv_layout: str = "paged", compaction: bool = True,
    ):
        if threads is not None:
            if threads < 1:
                raise OptionError("threads", threads, "a whole number from 1")
            torch.set_num_threads(threads)
        if backend not in ("auto", "native", "torch"):
            raise OptionError("backend", backend, "auto, native or torch")
        if kv_layout not in ("paged", "slots"):
            raise OptionError("kv_layout", kv_layout, "paged or slots")
        self.model_name, self.deterministic = str(model), deterministic
        self._dtype, self._device, self._backend = dtype, device, backend
        self._plan = plan
        path = resolve(model)
        self.model = load(path, dtype=dtype, device=device)
        self.config = self.model.config
        self.tokenizer = Tokenizer(path)
        self.tokenizer.check_fits(self.config.vocab_size)
        self.max_model_len = min(
            max_model_len or self.config.max_position_embeddings, self.config.max_position_embeddings
        )
        slots, regions = kv_cache_tokens or _default_slots(self.config), 0
        if kv_layout == "slots":
            regions = max_num_seqs
            slots = _region_slots(self.config, regions, self.max_model_len, kv_cache_tokens)
        self.runner = self._runner(self.model, slots, len(self.tokenizer), regions=regions, compaction=compaction)
        self.host = Host(
            self.runner, tuple(self.tokenizer.stop_ids(self.config)), self.max_model_len,
            self._open_runner, plan=plan,
        )
        self.engine = Engine(
            self.runner, self.host, make_decoder=self.tokenizer.decoder,
            max_rows=max_num_batched_tokens or (512 if self.model.device.type == "cpu" else 2048),
            max_seqs=max_num_seqs, prefix_caching=enable_prefix_caching,
        )
        self._methods: dict[str, Any] = {}

    def generate(
        self, prompts: Prompt | Seq[Prompt], sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *, method: str | Seq[str] = "ar", options: Mapping[str, Any] | Seq[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; all share forwards. Lists of params, methods or options go one per prompt.

        ``method`` "auto": the one that ``stretto tune`` found for this model (``auto``)."""
        items = self._items(prompts)
        params = _spread(sampling_params or SamplingParams(), len(items), "sampling_params")
        methods = _spread(method, len(items), "method")
        opts = _spread(options or {}, len(items), "options")
        requests: list[list[Stream]] = []
        try:
            for item, p, m, o in zip(items, params, methods, opts, strict=True):
                requests.append(self.submit(item, p, method=m, options=o))
            left = [s for streams in requests for s in streams]
            while left:
                self.engine.step()
                while left and left[-1].finish_reason is not None:
                    left.pop()
        except BaseException:
            for streams in requests:
                for stream in streams:
                    self.engine.abort(stream)
            raise
        return [self._output(i, streams) for i, streams in zip(items, requests, strict=True)]

    def submit(
        self, prompt: Prompt, params: SamplingParams, *, method: str = "ar",
        options: Mapping[str, Any] | None = None, decode_text: bool = False, priority: int = 0, salt: str = "",
    ) -> list[Stream]:
        """Queue one request on the engine without running it; one stream per choice."""
        note = None
        if method == "auto":
            method, options, note = self.auto.method, {**self.auto.options, **(options or {})}, self.auto.note
        made = self.method(method, options)
        ids = self._encode(prompt)
        constraint = self.constraint(params)
        if constraint is not None and not getattr(made, "grammar", True):
            raise UnsupportedError(
                f"method {method!r} cannot follow a grammar: it does not commit tokens from left to right"
            )
        streams = self.engine.add(
            ids, params, made, decode_text=decode_text, priority=priority, salt=salt, constraint=constraint
        )
        if note is not None:
            for stream in streams:
                stream.seq.metrics.note(note)
        return streams

    @cached_property
    def auto(self) -> AutoChoice:
        """What ``method="auto"`` stands for here: what ``stretto tune`` kept for this model, else plain decoding."""
        return resolve_auto(self.model_name)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, method: str = "ar",
        options: Mapping[str, Any] | None = None, seen: Callable[[Stream], None] | None = None,
    ) -> Iterator[str]:
        """The text of one completion, piece by piece, as it becomes final. ``seen`` gets the engine's stream."""
        params = sampling_params or SamplingParams()
        (stream,) = self.submit(prompt, params, method=method, options=options, decode_text=True)
        if seen is not None:
            seen(stream)
        sent = 0
        try:
            while stream.finish_reason is None:
                self.engine.step()
                safe = stream.stops.safe
                if safe > sent:
                    yield stream.stops.text[sent:safe]
                    sent = safe
        finally:
            self.engine.abort(stream)

    def method(self, name: str, options: Mapping[str, Any] | None = None) -> Any:
        """The method with these options on this engine; made once and then shared."""
        key = json.dumps([get(name).name, options or {}], sort_keys=True, default=str)
        if key not in self._methods:
            self._methods[key] = make(name, self.host, options)
        return self._methods[key]

    def constraint(self, params: SamplingParams) -> Callable[[], Any] | None:
        """What makes the grammar of ``params``, if it has one."""
        if params.regex is None and params.json_schema is None:
            return None
        return compile_constraint(self.tokenizer, params, self.host.stop_ids, self.config.vocab_size)

    def session(self, prompt: Prompt, **budget: Any) -> Session:
        """A session on ``prompt``: threads that fork and join over shared K/V (see ``stretto.session.Session``)."""
        return Session(self, prompt, **budget)

    def logits(self, token_ids: Seq[int]) -> torch.Tensor:
        """A plain forward without cache: float32 [n, vocabulary]."""
        ids = self._encode(list(token_ids))
        return plain_logits(self.model, ids)

    def chat_prompt(self, messages: Seq[Mapping[str, Any]], **kwargs: Any) -> str:
        """The chat template's text for ``messages``, ready for an answer."""
        return self.tokenizer.chat(messages, **kwargs)

    def _items(self, prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
        if isinstance(prompts, str):
            return [prompts]
        items = list(prompts)
        if items and all(isinstance(i, (int, np.integer)) for i in items):
            return [[int(i) for i in items]]
        if not items:
            raise PromptError("no prompt was given")
        return items

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return [int(t) for t in prompt]

    def _output(self, prompt: Prompt, streams: list[Stream]) -> RequestOutput:
        outputs = []
        for s in streams:
            ids = s.seq.tokens[s.seq.prompt_len :]
            text = s.stops.finish() if s.seq.params.stop else self.tokenizer.decode(
                ids, skip_special_tokens=s.seq.params.skip_special_tokens
            )
            outputs.append(
                CompletionOutput(
                    s.choice, text, ids, s.finish_reason, s.stop_reason, s.seq.logprobs,
                    s.seq.step_map, s.seq.metrics,
                )
            )
        seq = streams[0].seq
        return RequestOutput(
            prompt if isinstance(prompt, str) else None, seq.tokens[: seq.prompt_len], outputs
        )

    def _runner(self, model: Any, slots: int, vocabulary: int, **layout: Any) -> Runner:
        return Runner(
            model, slots=slots, backend=self._backend, vocabulary=vocabulary,
            deterministic=self.deterministic, **layout,
        )

    def _open_runner(self, name: str) -> Runner:
        """Another model for a method (a draft); its tokenizer must agree with this one's."""
        path = resolve(name)
        other = Tokenizer(path)
        if other.inner.get_vocab() != self.tokenizer.inner.get_vocab():
            raise InputError(
                f"the vocabulary of {name} ({len(other)} ids) is not that of {self.model_name} "
                f"({len(self.tokenizer)} ids): a draft must share the tokenizer of its target"
            )
        model = load(path, dtype=self._dtype, device=self._device)
        return self._runner(model, self.runner.alloc.total, len(other))


def _default_slots(config: Any) -> int:
    per_slot = 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return int(min(131072, max(4096, (1 << 30) // per_slot)))


def _region_slots(config: Any, regions: int, max_model_len: int, given: int | None) -> int:
    """Slots of the layout "slots": whole contexts and room for drafts behind them, or what was given.

    CapacityError names the bytes before anything is allocated.
    """
    slots = given or regions * (max_model_len + DRAFT_ROOM)
    need = slots * 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else need
    if need > pages:
        raise CapacityError(
            f"{regions} slots of {slots // regions} rows need {need / 2**30:.1f} GiB of keys and values, "
            f"{pages / 2**30:.1f} are free: lower max_num_seqs or max_model_len"
        )
    return slots


def _spread(value: Any, n: int, name: str) -> list[Any]:
    if isinstance(value, (list, tuple)):
        if len(value) != n:
            raise OptionError(name, f"{len(value)} values", f"one value, or one for each of the {n} prompts")
        return list(value)
    return [value] * n
