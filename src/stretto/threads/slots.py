"""Function calls whose name and arguments are decoded at the same time (SimpleTool, 2026).

The prompt is evaluated once; behind it, one thread for each field, opened by a token that says which field it is. All
threads add one token a forward, so a call takes as many forwards as its longest value has tokens. Fields do not see
each other (coupling="independent"); with "after_function" the name comes first, and the arguments see it: a few
forwards more, but never a value for another tool's schema. Values are converted by the type in the schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

from stretto.account import Generated, Usage
from stretto.engine.params import SamplingParams
from stretto.errors import CheckpointError, InputError, OptionError, UnsupportedError
from stretto.session import Children, Session
from stretto.threads.tools import Parameter, Tool, convert, parse_tools, prompt_of
from stretto.zoo.models import resolve

__all__ = ["Call", "Slots", "call_tool", "stream_call"]

FILE = "tool_slots.json"
COUPLINGS = ("independent", "after_function")


@dataclass(frozen=True, slots=True)
class Slots:
    """Token ids of a model's fields: 0 the name, then the arguments in the order of the schema."""

    openers: tuple[int, ...]
    closers: tuple[int, ...]
    null: int

    @classmethod
    def of(cls, llm: Any) -> Slots:
        """Of a loaded model. Raises UnsupportedError for a model without them."""
        if llm not in _known:
            _known[llm] = cls._read(llm)
        return _known[llm]

    @classmethod
    def _read(cls, llm: Any) -> Slots:
        path = Path(resolve(llm.model_name)) / FILE
        if not path.is_file():
            raise UnsupportedError(
                f"{llm.model_name} has no {FILE}: it was not trained to fill fields at the same time; use "
                "zoo:tiny-tools, or ask for ordinary JSON calls"
            )
        try:
            names = json.loads(path.read_text(encoding="utf-8"))
            ids = {t: llm.tokenizer.inner.token_to_id(t) for t in [*names["openers"], *names["closers"], names["null"]]}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise CheckpointError(f"{path} cannot be read: {e!r}") from e
        missing = [t for t, i in ids.items() if i is None]
        if missing or len(names["openers"]) != len(names["closers"]):
            raise CheckpointError(f"{path} names tokens that the tokenizer does not have: {missing}")
        return cls(
            tuple(ids[t] for t in names["openers"]), tuple(ids[t] for t in names["closers"]), ids[names["null"]]
        )

    @property
    def arguments(self) -> int:
        return len(self.openers) - 1


_known: WeakKeyDictionary[Any, Slots] = WeakKeyDictionary()


@dataclass(slots=True)
class Call:
    """One call. ``name`` None: the model calls nothing. ``fields``: the text of each field by name, as decoded (None =
    left out); ``problems``: field -> what is wrong with it (cut at max_slot_tokens, not of its type, required but left
    out): such a field is not in ``arguments``. ``usage`` counts the prompt once."""

    name: str | None
    arguments: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, str | None] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    finish_reason: Literal["tool_calls", "stop", "length"] = "stop"
    usage: Usage = field(default_factory=Usage)

    @property
    def json(self) -> str:
        """``arguments`` as the string that OpenAI's interface carries, in the order of the schema."""
        return json.dumps(self.arguments)


def call_tool(
    llm: Any, query: str, tools: Sequence[Mapping[str, Any] | Tool], *, tool_choice: str | Mapping[str, Any] = "auto",
    coupling: str = "independent", max_slot_tokens: int = 32, grammar: bool = False, slots: Slots | None = None,
    sampling_params: SamplingParams | None = None,
) -> Call:
    """Decode one call of one of ``tools`` (OpenAI's form) for ``query``.

    ``tool_choice``: "auto", "none", "required", or the function that must be called. ``grammar``: hold every field to
    its schema (needs the extra grammar). Raises InputError for tools that the model cannot serve, naming the tool.
    """
    run = _Run(
        llm, query, tools, tool_choice=tool_choice, coupling=coupling, max_slot_tokens=max_slot_tokens, grammar=grammar,
        slots=slots, sampling_params=sampling_params,
    )
    for _ in run.events():
        pass
    return run.call


def stream_call(llm: Any, query: str, tools: Sequence[Mapping[str, Any] | Tool], **options: Any) -> Iterator[str]:
    """The call as text fragments, as clients of OpenAI's interface put them together: the name first, then pieces of
    the arguments' JSON string in the order of the schema. ``options``: those of ``call_tool``."""
    yield from _Run(llm, query, tools, **options).events()


class _Run:
    """One call under way."""

    def __init__(
        self, llm: Any, query: str, tools: Sequence[Any], *, tool_choice: Any = "auto", coupling: str = "independent",
        max_slot_tokens: int = 32, grammar: bool = False, slots: Slots | None = None,
        sampling_params: SamplingParams | None = None,
    ):
        limit = max_slot_tokens
        if coupling not in COUPLINGS:
            raise OptionError("coupling", coupling, " or ".join(COUPLINGS))
        if not isinstance(limit, int) or limit < 1:
            raise OptionError("max_slot_tokens", limit, "a whole number from 1")
        self.llm, self.query, self.slots = llm, query, slots or Slots.of(llm)
        self.tools = parse_tools(tools)
        self.coupling, self.grammar = coupling, grammar
        self.choice = self._chosen(tool_choice)
        for tool in self.tools:
            if len(tool.parameters) > self.slots.arguments:
                raise InputError(
                    f"tool {tool.name!r} has {len(tool.parameters)} parameters, the model has fields for "
                    f"{self.slots.arguments}: ask for an ordinary JSON call of it"
                )
        base = sampling_params or SamplingParams(temperature=0.0)
        ends = [*self.slots.closers, self.slots.null]
        self.params = replace(base, n=1, max_tokens=limit, stop=None, stop_token_ids=ends)
        self.call = Call(None)

    def _chosen(self, choice: Any) -> str | None:
        """The name that must be called, if there is one; sets ``must``."""
        self.must = choice not in ("auto", "none")
        self.silent = choice == "none"
        if choice in ("auto", "none", "required"):
            return None
        name = choice.get("function", {}).get("name") if isinstance(choice, Mapping) else choice
        if name not in [t.name for t in self.tools]:
            raise OptionError("tool_choice", choice, f"auto, none, required, or one of {[t.name for t in self.tools]}")
        return name

    def events(self) -> Iterator[str]:
        """Fragments of text; ``call`` is whole when they end."""
        if self.silent:
            return
        prompt = self.llm.chat_prompt([{"role": "user", "content": prompt_of(self.tools, self.query)}])
        with self.llm.session(prompt) as session:
            yield from self._independent(session) if self.coupling == "independent" else self._after(session)
            self.call.usage = session.usage

    def _independent(self, session: Session) -> Iterator[str]:
        most = max(len(t.parameters) for t in self.tools)
        heads = session.fork(prefixes=[[t] for t in self.slots.openers[: 1 + most]], late=True)
        outs = heads.gen([self._name_params(), *[self._free(i) for i in range(most)]])
        tool = self._name(outs[0])
        if tool is not None:
            yield from self._assemble(tool, outs[1:])

    def _after(self, session: Session) -> Iterator[str]:
        head = session.fork(prefixes=[[self.slots.openers[0]]], late=True)
        tool = self._name(head.gen([self._name_params()])[0])
        if tool is None:
            return
        n = len(tool.parameters)
        args: list[Generated] = []
        if n:
            heads = Children(head[0].fork(prefixes=[[t] for t in self.slots.openers[1 : 1 + n]], late=True))
            args = heads.gen([self._typed(p) for p in tool.parameters])
        yield from self._assemble(tool, args)

    def _name_params(self) -> SamplingParams:
        names = [self.choice] if self.choice else [t.name for t in self.tools]
        if not (self.grammar or self.choice or self.must):
            return self.params
        bias = {self.slots.null: -100.0} if self.must else None
        return replace(self.params, regex="|".join(map(re.escape, names)), logit_bias=bias)

    def _free(self, i: int) -> SamplingParams:
        """Of argument ``i`` before the tool is known: a grammar only where all tools agree on its type."""
        known = {t.parameters[i] for t in self.tools if len(t.parameters) > i}
        same = {(p.type, p.enum) for p in known}
        if self.grammar and len(same) == 1 and all(len(t.parameters) > i for t in self.tools):
            return self._typed(next(iter(known)))
        return self.params

    def _typed(self, p: Parameter) -> SamplingParams:
        if not self.grammar:
            return self.params
        return replace(self.params, regex=_pattern(p))

    def _name(self, out: Generated) -> Tool | None:
        text = self._text(out)
        self.call.fields["name"] = text
        if out.finish_reason == "length":
            self.call.problems["name"] = f"cut at {self.params.max_tokens} tokens"
            self.call.finish_reason = "length"
            return None
        tool = next((t for t in self.tools if t.name == text), None)
        if tool is None and text:
            self.call.problems["name"] = f"{text!r} is none of the tools"
        return tool

    def _assemble(self, tool: Tool, outs: Sequence[Generated]) -> Iterator[str]:
        call, sent = self.call, 0
        call.name, call.finish_reason = tool.name, "tool_calls"
        yield tool.name
        for parameter, out in zip(tool.parameters, outs, strict=False):
            text = self._text(out)
            call.fields[parameter.name] = text
            if out.finish_reason == "length":
                call.problems[parameter.name] = f"cut at {self.params.max_tokens} tokens"
                call.finish_reason = "length"
                continue
            if text is None:
                if parameter.required:
                    call.problems[parameter.name] = "required, but left out"
                continue
            try:
                call.arguments[parameter.name] = convert(text, parameter)
            except ValueError:
                call.problems[parameter.name] = f"{text!r} is no {parameter.type}"
                continue
            whole = call.json[:-1]
            yield whole[sent:]
            sent = len(whole)
        yield "}" if sent else "{}"

    def _text(self, out: Generated) -> str | None:
        ids = [t for t in out.token_ids if t not in self.slots.closers]
        if not ids or self.slots.null in ids:
            return None
        return self.llm.tokenizer.decode(ids, skip_special_tokens=True).strip()


def _pattern(p: Parameter) -> str:
    """A regular expression of the values of ``p``."""
    if p.enum:
        return "|".join(re.escape(v if isinstance(v, str) else json.dumps(v)) for v in p.enum)
    return {
        "integer": r"-?(0|[1-9][0-9]{0,17})", "number": r"-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?",
        "boolean": "true|false", "string": r"[^<\n]+",
    }.get(p.type, r"[\[{][^<\n]*[\]}]")
