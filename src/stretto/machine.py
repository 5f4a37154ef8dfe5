"""The state machine of ThreadWeaver (arXiv 2512.07843), over token ids and free of input and output.

    SEQUENTIAL  complete the line up to the end of a list of outlines, or of the text
    PARALLEL    for every number of the list one completion behind its own head; threads do not see each other
    JOIN        the line takes over all threads in order, as ordinary text, and goes on

It asks for completions and is given them: by an engine, by an endpoint, or by an answer that is there already
(``Script``), which gives what the machine would have generated piece by piece: the units of training. Blocks are not
nested: inside a thread tags are text. Unlike in the published prompts no newlines stand around threads: the tags are
single tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from stretto.errors import InputError, OptionError, UnsupportedError
from stretto.outline import Grammar, StructureError

__all__ = ["Ask", "Backend", "Piece", "Reply", "Script", "Spec", "Woven", "drive", "machine", "plain"]

@dataclass(frozen=True, slots=True)
class Ask:
    """Complete ``context + head`` for every head, each up to one of ``stops``, of a token that ends texts, or of
    ``room`` tokens. One empty head: the line itself goes on. ``joined``: the threads of the ask before are part
    of the context now."""

    context: list[int]
    heads: list[list[int]]
    stops: tuple[int, ...]
    room: int
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """``ids``: with the token that ended them. ``reason``: "stop" or "length"."""

    ids: list[int]
    reason: str


@dataclass(frozen=True, slots=True)
class Piece:
    """One completion: ``context`` is everything that it saw, ``ids`` what was generated behind it."""

    context: list[int]
    ids: list[int]


@dataclass(slots=True)
class Woven:
    """An answer. ``tokens``: its ids as one text, forced ones included; ``pieces``: the completions it is made of;
    ``blocks``: threads of each block; ``notes``: what was clipped or given up, and why."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    finish_reason: str = ""
    notes: list[str] = field(default_factory=list)
    text: str = ""
    usage: Any = None

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


Machine = Generator[Ask, Sequence[Reply], Woven]


def machine(prompt: Sequence[int], spec: Spec) -> Machine:
    """The state machine. Yields what to complete, is sent the completions, returns the answer."""
    out = Woven(list(prompt))
    ids, line, joined = spec.grammar.ids, list(prompt), False
    for _ in range(spec.max_blocks):
        room = spec.limit - len(line)
        if room < 1:
            out.finish_reason = "length"
            break
        (reply,) = yield Ask(list(line), [[]], (ids["goal_close"],), room, joined)
        out.pieces.append(Piece(list(line), reply.ids))
        line += reply.ids
        joined = False
        if reply.ids[-1] != ids["goal_close"]:
            out.finish_reason = reply.reason
            break
        numbers = spec.numbers(line, out)
        if not numbers:
            continue
        heads = [spec.grammar.header(n) for n in numbers]
        room = (spec.limit - len(line) - sum(map(len, heads)) - 1) // len(heads) - 1  # closers are kept free
        if room < 1:
            out.finish_reason = "length"
            break
        replies = yield Ask(list(line), heads, (ids["path_close"],), room)
        out.blocks.append(len(heads))
        out.pieces += [Piece([*line, *h], r.ids) for h, r in zip(heads, replies, strict=True)]
        whole = all(r.ids[-1] == ids["path_close"] for r in replies)
        for head, reply in zip(heads, replies, strict=True):
            line += [*head, *spec.closed(reply.ids)]
        if not whole:
            out.note("a thread did not end by itself: it was closed, and the answer ends with its block")
            line.append(ids["close"])
            out.finish_reason = "length" if any(r.reason == "length" for r in replies) else "stop"
            break
        line += spec.parting
        joined = True
    else:
        out.note(f"stopped after {spec.max_blocks} rounds (max_blocks)")
        out.finish_reason = "length"
    out.tokens = line[len(prompt) :]
    return out


@dataclass(frozen=True, slots=True)
class Spec:
    """What the machine keeps to. ``ends``: ids that end a text; ``limit``: longest line, prompt included; ``parting``:
    forced behind a join."""

    grammar: Grammar
    ends: tuple[int, ...]
    limit: int
    max_threads: int = 8
    max_blocks: int = 32
    parting: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.ends:
            raise UnsupportedError("the tokenizer has no token that ends a text (EOS): threads would never end")
        for name in ("max_threads", "max_blocks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(name, value, "a whole number from 1")

    def numbers(self, line: Sequence[int], out: Woven) -> tuple[str, ...]:
        """The numbers of the outlines that ``line`` ends with; none where they cannot be followed, which ``out`` is
        told."""
        try:
            found = self.grammar.outlines(line)
        except StructureError as error:
            out.note(f"a list of outlines cannot be followed, the text goes on in sequence: {error}")
            return ()
        if len(found) > self.max_threads:
            out.note(f"{len(found)} outlines, at most {self.max_threads} threads (max_threads): goes on in sequence")
            return ()
        return found

    def closed(self, ids: list[int]) -> list[int]:
        """A thread's text, cut at a token that ends texts, and closed."""
        close = self.grammar.ids["path_close"]
        if ids[-1] == close:
            return ids
        return [*(ids[:-1] if ids[-1] in self.ends else ids), close]


def plain(prompt: Sequence[int], spec: Spec) -> Machine:
    """One completion, in sequence to the end of the text."""
    line = list(prompt)
    (reply,) = yield Ask(line, [[]], (), spec.limit - len(line))
    return Woven(line, list(reply.ids), [Piece(line, reply.ids)], finish_reason=reply.reason)


class Backend(Protocol):
    """Where completions come from."""

    def ask(self, ask: Ask) -> list[Reply]:
        """The completions of every head, made side by side."""
        ...


class Script:
    """Replies read from an answer that is there already: what the machine would have asked to get it.

    Raises InputError where the answer is not one that the machine could have made."""

    def __init__(self, prompt: Sequence[int], answer: Sequence[int], ends: Sequence[int]):
        self.text, self.ends = [*prompt, *answer], set(ends)

    def ask(self, ask: Ask) -> list[Reply]:
        at, out = len(ask.context), []
        if self.text[:at] != ask.context:
            raise InputError("the answer is not what the state machine makes of it")
        for head in ask.heads:
            if self.text[at : at + len(head)] != head:
                raise InputError(f"the answer has no thread with head {head} at its token {at}")
            start = at = at + len(head)
            while at < len(self.text) and self.text[at] not in self.ends and self.text[at] not in ask.stops:
                at += 1
            at = min(at + 1, len(self.text))
            if at == start:
                raise InputError("the answer ends before the state machine does")
            ended = self.text[at - 1] in self.ends or self.text[at - 1] in ask.stops
            out.append(Reply(self.text[start:at], "stop" if ended else "length"))
        return out


def drive(work: Machine, backend: Backend) -> Woven:
    """Run a machine on a back end."""
    try:
        ask = next(work)
        while True:
            ask = work.send(backend.ask(ask))
    except StopIteration as end:
        return end.value
