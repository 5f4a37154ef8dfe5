"""How the children of a thread come back to it (``Thread.join``): the modes share, reencode, rotate, gather, select."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stretto.errors import InputError, OptionError, UnknownNameError, UnsupportedError
from stretto.models.rope import apply_rope

__all__ = ["JOINS", "join", "turn_keys"]

Thread = Any  # session.Thread, which imports this
JOINS = ("share", "reencode", "rotate", "gather", "select")


def join(parent: Thread, children: list[Thread], mode: str, order: Any, separator: Any, select: int) -> list[str]:
    """See ``Thread.join``. Raises InputError for threads that are no living, resting forks of ``parent``."""
    if mode not in JOINS:
        raise UnknownNameError("join mode", mode, JOINS)
    _check(parent, children)
    children = _ordered(children, order)
    texts = [c.text for c in children]
    parting = parent.session.encode(separator) if separator is not None else []
    if mode == "select":
        if not 0 <= select < len(children):
            raise OptionError("select", select, f"a whole number from 0 to {len(children) - 1}")
        _become(parent, children[select])
    elif mode == "reencode":
        _reencode(parent, children, parting)
    elif mode == "share":
        _share(parent, children, parting)
    elif mode == "rotate":
        _rotate(parent, children, parting)
    for child in children:
        child.end()
    parent.depth = max(parent.depth, *(c.depth for c in children))
    return texts


def _check(parent: Thread, children: list[Thread]) -> None:
    if not children:
        raise InputError(f"nothing to join to thread {parent.id}: no child was given")
    parent._check_open()
    for child in children:
        if child.session is not parent.session:
            raise InputError(f"thread {child.id} belongs to another session than thread {parent.id}")
        if child.parent is not parent:
            raise InputError(f"thread {child.id} is no child of thread {parent.id}")
        child._check_open()
        if child.children:
            raise InputError(f"thread {child.id} has {len(child.children)} living children: join or end them first")
        if child.start != len(parent.tokens):
            raise InputError(f"thread {parent.id} went on after thread {child.id} was forked: they cannot be joined")
    if len(set(map(id, children))) < len(children):
        raise InputError("a child was given twice")


def _ordered(children: list[Thread], order: Any) -> list[Thread]:
    if order == "index":
        return sorted(children, key=lambda c: c.id)
    if order == "finish":
        return sorted(children, key=lambda c: (c.depth, c.id))
    if not isinstance(order, Seq) or isinstance(order, str) or sorted(order) != list(range(len(children))):
        raise OptionError("order", order, f"index, finish, or the numbers 0 to {len(children) - 1} in some order")
    return [children[i] for i in order]


def _become(parent: Thread, child: Thread) -> None:
    """The parent goes on as ``child``."""
    view = child.view.fork()
    parent.view.release()
    parent.view, parent.tokens = view, list(child.tokens)
    parent.shift, parent.plain = child.shift, child.plain
    parent.gens = max(parent.gens, child.gens)


def _reencode(parent: Thread, children: list[Thread], parting: list[int]) -> None:
    """The first child's rows are those of the joined text already; the rest waits for the next forward."""
    first = children[0]
    tail = [t for c in children[1:] for t in [*parting, *c.own]]
    if first.shift == parent.shift:
        _become(parent, first)
    else:
        parent.tokens += first.own
    parent.tokens += [*tail, *parting]


def _evaluate(parent: Thread, children: list[Thread]) -> None:
    """All of it in one forward; the line first where children wait for its rows."""
    if any(len(c.view) < c.start for c in children):
        parent.session.evaluate(parent)
    parent.session.evaluate(parent, *children)


def _share(parent: Thread, children: list[Thread], parting: list[int]) -> None:
    """All rows are listed as they are; the line goes on behind the furthest position."""
    _evaluate(parent, children)
    ends = [len(c.tokens) + c.shift for c in children]
    for child in children:
        parent.view.join(child.view, child.start)
        parent.tokens += child.own
    parent.shift = max(ends) - len(parent.tokens)
    parent.plain = parent.plain and len(children) == 1 and children[0].plain
    parent.tokens += parting


def _rotate(parent: Thread, children: list[Thread], parting: list[int]) -> None:
    """Keys are copied and turned to contiguous positions; values are copied as they are."""
    session, runner = parent.session, parent.session.llm.runner
    rotary = runner.model.rotary
    if rotary.cacheable is not None:
        raise UnsupportedError(
            f"keys of rope type {rotary.rope.type!r} cannot be turned (their frequencies depend on the length): "
            "join with share or reencode"
        )
    _evaluate(parent, children)
    for i, child in enumerate(children):
        old = child.view.slots[child.start : len(child.tokens)].copy()
        new = runner.alloc.alloc(len(old))
        delta = len(parent.tokens) + parent.shift - (child.start + child.shift)
        turn_keys(runner, old, new, delta)
        parent.view.append(new)
        parent.tokens += child.own
        if parting and i + 1 < len(children):
            parent.tokens += parting
            session.evaluate(parent)
    parent.plain = False
    parent.tokens += parting


def turn_keys(runner: Any, old: np.ndarray, new: np.ndarray, delta: int) -> None:
    """Slots ``new`` get the values of ``old`` and their keys, turned by ``delta`` positions (a pure rotation)."""
    pool, rotary = runner.pool, runner.model.rotary
    source, target = torch.from_numpy(old).long(), torch.from_numpy(new).long()
    pool.v[:, target] = pool.v[:, source]
    keys = pool.k[:, source].float()  # [layers, n, G, D]
    cos, sin = (x / rotary.scale for x in rotary(torch.tensor([delta], device=keys.device), torch.float32))
    turned: Tensor = apply_rope(keys.flatten(0, 1), cos, sin).view_as(keys)
    pool.k[:, target] = turned.to(pool.k.dtype)
    pool.positions[new] = pool.positions[old] + delta
