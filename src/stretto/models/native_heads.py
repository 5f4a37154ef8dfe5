"""Chains of guesses by light parts, all in C: Clover's heads, EAGLE's layer (``csrc/heads.c``). One text at a time.

The torch code of the methods does the same for trees and batches; the tests hold one against the other.
Legend: H width, V vocabulary, A attention heads, d depths.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from stretto.models.batch import KVPool
from stretto.models.native import NativeForward
from stretto.models.native_library import (
    POINTER,
    Batch,
    Chain,
    Features,
    Guesses,
    Heads,
    Mat,
    address,
    array_address,
)
from stretto.models.native_linear import PackedLinear

__all__ = ["CloverChain", "EagleChain"]


class _Guesser:
    """The target's head, and when a chain ends: where the product of its rates falls below ``least``.

    The rate of a guess at depth i whose probability lies in class k by ``borders`` is ``rates[i * classes + k]``.
    """

    def __init__(self, target: NativeForward, known: int, borders: Sequence[float], depth: int):
        self.target, self._known, self._depth = target, known, depth
        self._borders = np.array(borders, np.float32)
        self._logits = np.empty(target.config.vocab_size, np.float32)
        self._tokens, self._sure = np.empty(depth, np.int64), np.empty(depth, np.float32)

    def guesses(self, most: int, rates: Sequence[float], least: float) -> tuple[Any, np.ndarray]:
        classes = len(self._borders) + 1
        given = np.array(rates[: most * classes], np.float32)
        return Guesses(
            most, self._known, classes, ctypes.addressof(self.target.head.mat), array_address(self._borders),
            array_address(given), array_address(self._logits), array_address(self._tokens), array_address(self._sure),
            1.0, least,
        ), given  # fmt: skip

    def found(self, made: int) -> tuple[list[int], list[float]]:
        if made < 0:
            raise MemoryError("no memory for a chain") if made == -1 else IndexError(f"a chain with code {-1 - made}")
        return self._tokens[:made].tolist(), self._sure[:made].tolist()


def _plain(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


class CloverChain:
    """``table``: vectors [V, H], keys of length 1 and values [V, A, D] of all tokens; ``mats``: weights [H, H] of the
    depths (version 1), or those of the first and of the later ones (version 2)."""

    def __init__(
        self, target: NativeForward, known: int, borders: Sequence[float], *, version: int, depth: int,
        table: Sequence[Tensor], norm: Tensor, query: tuple[Tensor, Tensor], mats: Sequence[Tensor],
        out_norm: Tensor | None, eps: float,
    ):
        self._guesser, self._team = _Guesser(target, known, borders, depth), target._model.team
        packed = [PackedLinear(w, None, target.weight_dtype) for w in mats]
        self._query = PackedLinear(*query, target.weight_dtype)
        self._mats = (Mat * len(packed))(*(p.mat for p in packed))
        floats = [_plain(t) for t in (*table, norm)] + ([_plain(out_norm)] if out_norm is not None else [])
        self._keep = packed, floats
        width = len(norm)
        self._work = np.empty(5 * width, np.float32)
        self._heads = Heads(
            version, width, table[1].shape[1], 0, *(address(t) for t in floats[:4]),
            address(floats[4]) if out_norm is not None else None, ctypes.addressof(self._query.mat),
            ctypes.addressof(self._mats), array_address(self._work), eps, 0.0,
        )  # fmt: skip

    def __call__(
        self, root: int, h0: Tensor, most: int, rates: Sequence[float], least: float
    ) -> tuple[list[int], list[float]]:
        """At most ``most`` guesses behind token ``root`` from h_0 [H], and how probable each is."""
        self._work[: len(h0)] = h0.numpy()
        self._heads.root = root
        guesses, _given = self._guesser.guesses(most, rates, least)
        lib = self._guesser.target._lib
        made = lib.stretto_heads(*map(ctypes.addressof, (self._team, self._heads, guesses)))
        return self._guesser.found(made)


class EagleChain:
    """``layer``: the native forward of EAGLE's layer; ``entry``: weight [H, 2 H] and bias of [embedding; feature];
    ``normed``: does the head read the layer's output after its norm?"""

    def __init__(
        self, target: NativeForward, known: int, borders: Sequence[float], *, layer: NativeForward, depth: int,
        entry: tuple[Tensor, Tensor], normed: bool,
    ):
        self._guesser, self._layer, self._normed = _Guesser(target, known, borders, depth), layer, normed
        self._entry = PackedLinear(*entry, layer.weight_dtype)

    def __call__(
        self, pool: KVPool, context: np.ndarray, tokens: Sequence[int], position: int, slots: np.ndarray,
        features: Tensor, rates: Sequence[float], least: float,
    ) -> tuple[list[int], list[float]]:
        """Guesses behind ``tokens`` [n], of which the first has ``position`` and all have ``features`` [n, H].

        ``context``: slots of the layer's rows before them; ``slots`` int32 [n - 1 + d]: where rows go. Returns at
        most d guesses, and how probable each is.
        """
        layer, n, rows = self._layer, len(tokens), len(slots)
        width, most = layer.config.hidden_size, rows - n + 1
        size, bf16, keys, values, positions = layer._pool_facts(pool)
        text = np.array([*tokens, *[0] * most], np.int64)
        context, slots = np.ascontiguousarray(context, np.int32), np.ascontiguousarray(slots, np.int32)
        ints = np.empty(5 * n + 9 + len(context) + rows + n * (n + 1) // 2, np.int32)
        room, zeros = np.empty((6, n, width), np.float32), np.zeros(n, np.int64)
        room[0] = features.numpy()
        at = [array_address(room[i]) for i in range(6)]  # features, inputs (two wide), x, out, final
        layers = layer.config.num_hidden_layers
        taps = (POINTER * (layers + 2))()
        taps[layers] = at[4]
        if self._normed:
            taps[-1] = at[5]
        best = np.empty(1, np.int64)
        batch = Batch(
            0, 0, 0, 0, 0, 0, size, bf16, 0, 1, None, None, None, keys, values, positions, None, array_address(best),
            ctypes.addressof(taps),
        )  # fmt: skip
        chain = Chain(
            len(context), n, most, position, 0, array_address(context), array_address(slots), array_address(text),
            array_address(ints), None, None, None, 1.0, 0.0,
        )  # fmt: skip
        target = self._guesser.target._model
        entered = Features(
            target.embed, target.embed_bf16, self._normed, ctypes.addressof(self._entry.mat), array_address(zeros),
            at[0], at[1], at[3], at[4], at[5],
        )  # fmt: skip
        guesses, _given = self._guesser.guesses(most, rates, least)
        with layer._lock:
            if position + rows > layer._model.angles:
                layer._grow_angles(position + rows)
            made = layer._lib.stretto_features(
                *map(ctypes.addressof, (layer._model, batch, chain, entered, guesses))
            )
        return self._guesser.found(made)
