"""ThreadWeaver (arXiv 2512.07843): reasoning in threads on any engine that completes token ids.

The state machine (``threads/machine.py``) on one of two back ends: forks of a session on our engine (all threads of a
block in the same forwards, joined by "reencode"), or requests to an HTTP endpoint of completions
(``threads/endpoint.py``). Greedy, both give the tokens of a hand-written loop of plain completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stretto.account import Generated
from stretto.engine.params import SamplingParams
from stretto.errors import CapacityError, EngineError, OptionError
from stretto.machine import Ask, Machine, Reply, Spec, Woven, drive, machine, plain
from stretto.outline import Grammar
from stretto.session import Children, Thread
from stretto.tags import read_tags
from stretto.threads.endpoint import Endpoint

__all__ = ["aweave", "weave"]


class Local:
    """Forks of a thread of a session: all threads of a block in the same forwards, their common text evaluated once."""

    def __init__(self, thread: Thread, params: SamplingParams, join: str, spec: Spec):
        self.thread, self.params, self.join = thread, params, join
        self.parting = list(spec.parting) or None
        self.children: Children | None = None

    def ask(self, ask: Ask) -> list[Reply]:
        threads, params = self._ready(ask)
        return self._replies(threads.gen(params))

    async def aask(self, ask: Ask) -> list[Reply]:
        """``ask`` that shares forwards with the other tasks of the event loop."""
        threads, params = self._ready(ask)
        return self._replies(await threads.agen(params))

    def _ready(self, ask: Ask) -> tuple[Children, SamplingParams]:
        thread = self.thread
        if ask.joined and self.children is not None:
            thread.join(self.children, self.join, separator=self.parting)
        assert thread.tokens == ask.context
        self.children = thread.fork(prefixes=ask.heads, late=True) if ask.heads != [[]] else None
        return self.children or Children([thread]), _bounded(self.params, ask)

    def _replies(self, outs: Sequence[Generated]) -> list[Reply]:
        return [Reply(o.token_ids, o.finish_reason or "length") for o in outs]


class Remote:
    """Requests to an endpoint of completions, those of a block under way at the same time."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint

    def ask(self, ask: Ask) -> list[Reply]:
        prompts = [[*ask.context, *head] for head in ask.heads]
        return [Reply(*done) for done in self.endpoint.complete(prompts, ask.stops, ask.room)]


def _bounded(params: SamplingParams, ask: Ask) -> SamplingParams:
    return replace(params, max_tokens=ask.room, stop_token_ids=[*(params.stop_token_ids or []), *ask.stops])


def weave(
    llm: Any, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None, *, max_tokens: int = 512,
    max_threads: int = 8, max_blocks: int = 32, backend: str = "local", join: str = "reencode",
    grammar: Grammar | None = None, **address: Any,
) -> Woven:
    """Answer ``prompt`` in as many threads as the model opens. Greedy unless ``sampling_params`` say otherwise.

    ``llm``: a model trained for it (``grammar``: of the tags beside its weights); where ``backend`` is the address of
    an endpoint of completions, the model's ``Tokenizer`` is enough. ``max_tokens``: of the whole answer, all threads
    together. ``join``: "reencode" (what the model was trained for), or "share" (local: no forward for the join, but
    other positions than in training). ``address``: ``model``, ``api_key``, ``timeout``, ``max_model_len`` of the
    endpoint. A failure of engine or endpoint under way is answered by one plain completion of the prompt, and noted.
    Raises OptionError, and UnsupportedError for a tokenizer without the tags or an endpoint that does not keep ids.
    """
    _check(backend, join, address)
    params, tokenizer = sampling_params or SamplingParams(temperature=0.0), getattr(llm, "tokenizer", llm)
    ends = _ends(llm, tokenizer)
    remote = None if backend == "local" else Endpoint(backend, params, ends, **address)
    longest = remote.max_model_len if remote else llm.max_model_len
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else [int(t) for t in prompt]
    grammar = grammar or Grammar(read_tags(tokenizer.path)[0], tokenizer.inner)
    spec = Spec(
        grammar, ends, min(longest, len(ids) + max_tokens), max_threads, max_blocks, _parting(grammar, join)
    )
    try:
        out = _run(machine(ids, spec), remote, llm, params, join, spec, ids)
    except (CapacityError, EngineError, OSError) as error:
        out = _run(plain(ids, spec), remote, llm, params, join, spec, ids)
        out.note(f"given up, and answered by one plain completion: {error}")
    out.text = tokenizer.decode(out.tokens, skip_special_tokens=False)
    return out


async def aweave(
    llm: Any, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None, *, max_tokens: int = 512,
    max_threads: int = 8, max_blocks: int = 32, join: str = "reencode", grammar: Grammar | None = None,
) -> Woven:
    """``weave`` on our engine for asyncio: the lines and threads of several answers share forwards. Failures are
    raised."""
    _check("local", join, {})
    params = sampling_params or SamplingParams(temperature=0.0)
    ids = llm.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(t) for t in prompt]
    grammar = grammar or Grammar(read_tags(llm.tokenizer.path)[0], llm.tokenizer.inner)
    limit = min(llm.max_model_len, len(ids) + max_tokens)
    spec = Spec(grammar, _ends(llm, None), limit, max_threads, max_blocks, _parting(grammar, join))
    with llm.session(ids, max_threads=max_threads + 1) as session:
        work, local = machine(ids, spec), Local(session, params, join, spec)
        try:
            ask = next(work)
            while True:
                ask = work.send(await local.aask(ask))
        except StopIteration as end:
            out: Woven = end.value
        out.usage = session.usage
    out.text = llm.tokenizer.decode(out.tokens, skip_special_tokens=False)
    return out


def _check(backend: str, join: str, address: Mapping[str, Any]) -> None:
    if join not in ("reencode", "share"):
        raise OptionError("join", join, "reencode or share")
    if backend == "local" and address:
        name = sorted(address)[0]
        raise OptionError(name, address[name], "nothing where backend is local")
    if backend != "local" and join == "share":
        raise OptionError("join", join, "reencode where completions come from an endpoint")


def _ends(llm: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a text: the engine's, or the tokenizer's own where there is no engine."""
    if hasattr(llm, "host"):
        return tuple(llm.host.stop_ids)
    own = tokenizer.special_id("eos")
    return () if own is None else (own,)


def _parting(grammar: Grammar, join: str) -> tuple[int, ...]:
    """Rows that are listed as they are have no law of what follows: the block's end is forced behind them."""
    return (grammar.ids["close"],) if join == "share" else ()


def _run(
    work: Machine, remote: Endpoint | None, llm: Any, params: SamplingParams, join: str, spec: Spec, ids: list[int]
) -> Woven:
    if remote is not None:
        return drive(work, Remote(remote))
    with llm.session(ids, max_threads=spec.max_threads + 1) as session:
        out = drive(work, Local(session, params, join, spec))
        out.usage = session.usage
    return out
