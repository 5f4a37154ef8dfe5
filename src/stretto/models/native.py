"""The decoder's forward in C: one call a forward, weights repacked once, no Python between the layers.

Without a C compiler, or with ``STRETTO_NATIVE=0``, the torch implementation serves. Weights are stored in float32 or in
16 bits. Arithmetic and activations are float32, with one exception: where the processor multiplies halves, the dense
linears of a bfloat16 model do so (``csrc/half.c`` says how, and how exactly). A row's bits do not depend on the other
rows of the batch, on the slots of its keys, or on the number of threads (``csrc/native.h`` says why).

Legend: n rows, k rows with logits.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stretto.errors import OptionError, PromptError, UnsupportedError
from stretto.models.batch import Doubt, FlatBatch, ForwardResult, KVPool, Runs
from stretto.models.config import ModelConfig
from stretto.models.entries import structs
from stretto.models.moe import SparseMLP
from stretto.models.native_library import POINTER, Batch, Chain, Layer, Mat, Model, address, array_address, team
from stretto.models.native_linear import DTYPES, Memory, PackedLinear, library
from stretto.models.transformer import MLP, Attention, Block, Transformer

__all__ = ["NativeForward"]

def _weight(module: Any) -> Tensor:
    """The weight [N, K] of a linear, whatever runs in its place."""
    if hasattr(module, "plain"):  # reordered for oneDNN
        return torch.cat(module.plain())
    if hasattr(module, "lora_A"):
        return module.weight + module.lora_B.weight @ module.lora_A.weight * module.scale
    return module.weight


class NativeForward:
    """``model`` as the native code runs it: a packed copy of its weights, and ``forward``.

    ``weight_dtype``: "float32", "bfloat16", or "auto" = bfloat16 for a bfloat16 model, else float32. ``threads``:
    default, as many as torch uses. ``halves``: may linears of bfloat16 weights be multiplied in half precision?
    Default: where the machine can. A float32 weight of bfloat16 numbers is stored in 16 bits, which changes no bit of
    the result. Later changes of the model's weights are not seen.
    """

    @staticmethod
    def supported(config: ModelConfig) -> str | None:
        """None, or why this machine or model cannot use it."""
        if os.environ.get("STRETTO_NATIVE") == "0":
            return "STRETTO_NATIVE=0 turns it off"
        if config.rope.partial != 1.0:
            return "its rotary embedding covers a part of each head only"
        if (m := config.moe) and (m.score, m.expert_bias, m.groups, m.scale, m.shared) != ("softmax", False, 1, 1.0, 0):
            return "its router has sigmoid scores, biases, groups or shared experts"
        return "only for little-endian machines" if sys.byteorder == "big" else library()[1]

    @torch.no_grad()
    def __init__(
        self, model: Transformer, weight_dtype: str = "auto", threads: int | None = None, *, halves: bool | None = None
    ):
        if weight_dtype not in ("auto", *DTYPES):
            raise OptionError("weight_dtype", weight_dtype, "auto, float32 or bfloat16")
        reason = self.supported(model.config) or _unusual(model)
        if reason:
            raise UnsupportedError(f"the native forward cannot serve this model: {reason}")
        auto = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float32
        self.weight_dtype = DTYPES.get(weight_dtype, auto)
        self.config, self.rotary, self._lib = model.config, model.rotary, library()[0]
        self._memory, self._halves = Memory(), halves
        self._keep: list[Any] = []  # what the structures point to
        self._lock = threading.Lock()  # one scratch memory
        self._no_taps = (POINTER * (self.config.num_hidden_layers + 2))()
        self._pool: tuple[Any, Any] = (None, None)  # the pool of the last forward, and what was found out about it
        self._model = self._describe(model, threads)
        self._grow_angles(min(2048, self.config.max_position_embeddings))

    @property
    def threads(self) -> int:
        return self._model.team.threads

    @property
    def scratch_bytes(self) -> int:
        """What the largest forward so far needed besides weights and cache."""
        return self._model.scratch_bytes

    def _mat(self, *modules: Any, gated: bool = False, halves: bool = True) -> Any:
        """The linears of one input as one."""
        biases = [m.bias for m in modules if getattr(m, "bias", None) is not None]
        bias = torch.cat(biases) if biases else None
        weight = torch.cat([_weight(m) for m in modules])
        self._keep.append(self._pack(weight, bias, gated, self._halves if halves else False))
        return self._keep[-1].mat

    def _pack(self, weight: Tensor, bias: Tensor | None, gated: bool, halves: bool | None = False) -> PackedLinear:
        dtype = self.weight_dtype
        if dtype == torch.float32 and torch.equal(weight.bfloat16().float(), weight.float()):
            dtype, halves = torch.bfloat16, False  # the same numbers in half the memory, and the same arithmetic
        return PackedLinear(weight, bias, dtype, gated=gated, halves=halves, memory=self._memory)

    def _mats(self, weights: list[Any], gated: bool) -> int:
        """Where the structures of several plain weights begin."""
        packed = [self._pack(w, None, gated) for w in weights]
        array = (Mat * len(packed))(*(p.mat for p in packed))
        self._keep += [packed, array]
        return ctypes.addressof(array)

    def _floats(self, module: Any) -> int | None:
        if module is None:
            return None
        self._keep.append(module.weight.detach().float().clone())
        return address(self._keep[-1])

    def _describe(self, model: Transformer, threads: int | None) -> Any:
        c, moe = model.config, model.config.moe
        table = model.model.embed_tokens.weight.detach()
        table = table if table.dtype in DTYPES.values() else table.float()
        layers = (Layer * c.num_hidden_layers)(*map(self._layer, model.layers, c.windows))
        self._keep += [table, layers]
        head = model._packed_head or (model.model.embed_tokens if c.tie_word_embeddings else model.lm_head)
        head_mat = self._mat(head)
        self.head: PackedLinear = self._keep[-1]
        return Model(
            team=team(threads), layers_n=c.num_hidden_layers, H=c.hidden_size, A=c.num_attention_heads,
            G=c.num_key_value_heads, D=c.head_dim, V=c.vocab_size, experts=moe.experts if moe else 0,
            I=max(c.intermediate_size, moe.intermediate_size if moe else 0), top_k=moe.top_k if moe else 0,
            embed_bf16=table.dtype == torch.bfloat16, eps=c.rms_norm_eps, scale=c.head_dim**-0.5, embed=address(table),
            norm=self._floats(model.model.norm), layers=ctypes.addressof(layers), head=head_mat,
        )  # fmt: skip

    def _layer(self, block: Block, window: int | None) -> Any:
        a, m = block.self_attn, block.mlp
        out = Layer(
            qkv=self._mat(a.qkv_proj) if a.qkv_proj else self._mat(a.q_proj, a.k_proj, a.v_proj),
            o=self._mat(a.o_proj), q_norm=self._floats(a.q_norm), k_norm=self._floats(a.k_norm), window=window or 0,
            norm1=self._floats(block.input_layernorm), norm2=self._floats(block.post_attention_layernorm),
        )  # fmt: skip
        if isinstance(m, SparseMLP):
            e = m.experts
            pairs = zip(e.gate_up_proj, e.down_proj) if e.packed is None else (map(_weight, pair) for pair in e.packed)
            ups, downs = zip(*pairs)
            out.router = self._mat(m.gate, halves=False)
            out.experts, out.top_k, out.renormalize = len(ups), m.top_k, m.renormalize
            out.expert_gate_up, out.expert_down = self._mats(ups, True), self._mats(downs, False)
        else:
            pair = (m.gate_up_proj,) if m.gate_up_proj else (m.gate_proj, m.up_proj)
            out.gate_up, out.down = self._mat(*pair, gated=True), self._mat(m.down_proj)
        return out

    def _grow_angles(self, positions: int) -> None:
        """Tables of cos and sin for at least ``positions`` positions, as far as the rope type allows."""
        limit, size = self.rotary.cacheable, 1 << (positions - 1).bit_length()
        if limit is not None and positions > limit:
            raise UnsupportedError(
                f"position {positions - 1} with rope type {self.config.rope.type!r}: its angles change from position "
                f"{limit} on, so cached keys would be wrong"
            )
        size = size if limit is None else min(size, limit)
        angles = self.rotary(torch.arange(size), torch.float32)
        self._angles = [a[:, 0, : self.config.head_dim // 2].contiguous() for a in angles]
        self._model.cos, self._model.sin = map(address, self._angles)
        self._model.angles = size

    def forward(self, pool: KVPool, batch: FlatBatch, known: int | None = None) -> ForwardResult:
        """float32 logits of ``batch.logit_rows``, their argmax, and the tapped states (float32).

        Logits from id ``known`` on are -inf."""
        c, n, k = self.config, len(batch.tokens), len(batch.logit_rows)
        if pool is not self._pool[0]:
            self._pool = pool, self._pool_facts(pool)
        slots, bf16, keys, values, positions = self._pool[1]
        logits, best = torch.empty((k, c.vocab_size), dtype=torch.float32), np.empty(k, np.int64)
        hidden, taps = self._taps(batch) if batch.taps else ({}, self._no_taps)
        embeds, n_embeds = None, 0
        if batch.embeds is not None:
            embeds, n_embeds = batch.embeds.detach().to("cpu", torch.float32).contiguous(), len(batch.embed_rows)
        ints, tokens = batch.in_one(), np.ascontiguousarray(batch.tokens, np.int64)
        entries = structs(batch.entries) if batch.entries else None
        b = Batch(
            n, len(batch.context_ptr) - 1, len(batch.context), len(batch.local), k, n_embeds, slots, bf16,
            len(batch.entries), known or c.vocab_size, array_address(tokens), array_address(ints), address(embeds),
            keys, values, positions, logits.data_ptr(), array_address(best), ctypes.addressof(taps),
            ctypes.addressof(entries) if entries else None,
        )  # fmt: skip
        if batch.runs is not None:
            self._read_in_runs(b, batch.runs)
        sure = None
        if batch.sure:
            sure = np.empty(k, np.float32)
            b.sure = array_address(sure)
        with self._lock:
            code = self._lib.stretto_forward(ctypes.addressof(self._model), ctypes.addressof(b))
            if code == 1 and batch.positions.min() >= 0:
                self._grow_angles(batch.furthest + 1)
                code = self._lib.stretto_forward(ctypes.addressof(self._model), ctypes.addressof(b))
        if code == 2:
            raise PromptError(f"token ids must lie in 0..{c.vocab_size - 1}")
        if code < 0:
            raise MemoryError(f"no memory for a forward of {n} rows")
        if code:
            what = ("position", "token", "slot", "context", "row", "entry", "run")[code - 1]
            raise IndexError(f"the batch names a {what} that does not exist")
        return ForwardResult(logits, hidden, best, sure)

    def _read_in_runs(self, b: Any, runs: Runs) -> None:
        if any(self.config.windows):
            raise UnsupportedError("rows that read segments at positions of their own need a model without windows")
        b.n_runs = len(runs.start)
        b.run_ptr, b.run_start, b.run_at = map(array_address, (runs.ptr, runs.start, runs.at))

    def chain(
        self, pool: KVPool, context: np.ndarray, tokens: list[int], position: int, slots: np.ndarray,
        known: int | None = None, doubt: Doubt | None = None,
    ) -> tuple[list[int], list[int]]:
        """The greedy continuation of ``tokens`` behind the cached rows ``context``, one forward a token, all in C.

        ``position`` of the first of ``tokens``; ``slots`` int32 [len(tokens) - 1 + tokens to make]. Returns the new
        tokens and the class of each by ``doubt``.
        """
        c, given, rows = self.config, len(tokens), len(slots)
        most = rows - given + 1
        if pool is not self._pool[0]:
            self._pool = pool, self._pool_facts(pool)
        size, bf16, keys, values, positions = self._pool[1]
        logits, best, found = np.empty(c.vocab_size, np.float32), np.empty(1, np.int64), np.empty(most, np.int32)
        text, context, slots = np.array([*tokens, *[0] * most], np.int64), _ints(context), _ints(slots)
        ints = np.empty(4 * given + 8 + len(context) + rows + given * (given + 1) // 2, np.int32)
        bounds = np.array([*doubt.borders, *doubt.rates] if doubt else [0], np.float32)
        classes = len(doubt.rates) if doubt else 0
        b = Batch(
            0, 0, 0, 0, 0, 0, size, bf16, 0, known or c.vocab_size, None, None, None, keys, values, positions,
            array_address(logits), array_address(best), ctypes.addressof(self._no_taps),
        )  # fmt: skip
        at = array_address(bounds)
        chain = Chain(
            len(context), given, most, position, classes, array_address(context), array_address(slots),
            array_address(text), array_address(ints), at, at + 4 * max(0, classes - 1), array_address(found),
            *((doubt.gain, doubt.least) if doubt else (1.0, 0.0)),
        )  # fmt: skip
        with self._lock:
            if position + rows > self._model.angles:
                self._grow_angles(position + rows)
            made = self._lib.stretto_chain(*map(ctypes.addressof, (self._model, b, chain)))
        if made < 0:
            raise MemoryError("no memory for a forward") if made == -1 else IndexError(f"a chain with code {-1 - made}")
        return text[given : given + made].tolist(), found[:made].tolist() if doubt else []

    def _pool_facts(self, pool: KVPool) -> tuple[int, bool, int | None, int | None, int | None]:
        """Slots, whether it is bfloat16, and where keys, values and positions lie."""
        c, keys, slots = self.config, pool.k, len(pool.positions)
        if keys.shape != (c.num_hidden_layers, slots, c.num_key_value_heads, c.head_dim) or keys.device.type != "cpu":
            raise UnsupportedError(f"the K/V pool is {tuple(keys.shape)} on {keys.device}: it is not of this model")
        if keys.dtype not in DTYPES.values():
            raise UnsupportedError(f"the K/V pool is {keys.dtype}: allowed are float32 and bfloat16")
        return slots, keys.dtype == torch.bfloat16, address(keys), address(pool.v), address(pool.positions)

    def _taps(self, batch: FlatBatch) -> tuple[dict[int, Tensor], Any]:
        """Room for the tapped states, and the table of where it is."""
        layers, hidden = self.config.num_hidden_layers, {}
        taps = (POINTER * (layers + 2))()
        for tap in batch.taps:
            if not -1 <= tap <= layers:
                raise OptionError("taps", tap, f"-1..{layers}")
            hidden[tap] = torch.empty((batch.n, self.config.hidden_size), dtype=torch.float32)
            taps[tap] = address(hidden[tap])
        return hidden, taps

    def __del__(self) -> None:
        if hasattr(self, "_model"):
            self._lib.stretto_free(ctypes.addressof(self._model))


def _ints(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.int32)


def _unusual(model: Transformer) -> str | None:
    """The part of ``model`` that the native code does not know, or None."""
    for block in model.layers:
        parts = type(block), type(block.self_attn), type(block.mlp)
        if parts not in ((Block, Attention, MLP), (Block, Attention, SparseMLP)):
            return "a layer is not the standard block"
    return None if model.device.type == "cpu" else f"it is on {model.device}"
