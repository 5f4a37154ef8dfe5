"""A model with its K/V pool: the only place that runs a forward, and that knows what a forward costs here."""

from __future__ import annotations

import copy
import time
from bisect import bisect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from stretto.engine.cache import SlotAllocator
from stretto.engine.slot_cache import SlotCache
from stretto.errors import CapacityError, OptionError, UnsupportedError
from stretto.models.batch import Doubt, Early, FlatBatch, ForwardResult, KVPool
from stretto.models.entries import Matrix, sink
from stretto.models.pool_context import forward_batch
from stretto.models.staged import StagedForward, check_early
from stretto.models.transformer import Transformer

__all__ = ["LatencyCurve", "Runner"]

ROW_BLOCK = 16  # fewer rows take other kernels, with other last bits
CURVE_ROWS = (1, 2, 4, 8, 16, 32, 64)


class LatencyCurve:
    """Seconds of a forward by rows, measured on this machine; monotone, linear between the points."""

    def __init__(self, rows: list[int], seconds: list[float]):
        self.rows = np.asarray(rows, float)
        self.seconds = np.maximum.accumulate(np.asarray(seconds, float))

    def __call__(self, rows: float) -> float:
        if rows <= self.rows[-1]:
            return float(np.interp(rows, self.rows, self.seconds))
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.rows[-1] - self.rows[-2])
        return float(self.seconds[-1] + slope * (rows - self.rows[-1]))


class Runner:
    """``model`` on ``slots`` cache slots. ``backend``: "auto" (native where it can), "native", or "torch".

    ``deterministic``: a row's bits depend on its own text alone. The native forward is always so, the torch one
    then multiplies in blocks of 16 rows and lets every row attend alone.
    ``regions`` > 0: the cache has the "slots" layout, a contiguous region for each of so many sequences
    (engine/slot_cache.py); ``compaction`` closes them up.
    ``forward`` returns logits with the ids that the tokenizer does not know at -inf.
    """

    def __init__(
        self, model: Transformer, *, slots: int, backend: str = "auto", vocabulary: int | None = None,
        deterministic: bool = False, regions: int = 0, compaction: bool = True,
    ):
        self.model, self.config = model, model.config
        c = model.config
        weight = model.model.embed_tokens.weight
        self.native, self.backend_reason = _native(model, backend)
        self.backend = "native" if self.native else "torch"
        self.deterministic = deterministic
        self._torch: Transformer | None = None
        if self.native is None:
            self._torch = model.pack(block=ROW_BLOCK if deterministic else 0)
        kv_dtype = torch.float32 if self.native else weight.dtype
        self.pool = KVPool(
            c.num_hidden_layers, slots, c.num_key_value_heads, c.head_dim,
            dtype=kv_dtype, device=weight.device,
        )
        self.alloc: SlotAllocator | SlotCache = SlotAllocator(slots)
        if regions:
            self.alloc = SlotCache(slots, regions, self._copy, compaction=compaction)
            self.pool.region = self.alloc.length
        self.max_rows: int | None = None  # most rows of a forward, where memory is short; who plans rows obeys
        self._holds: list[tuple[int, int]] = []
        self.peak_rows = self.peak_logits = 0  # rows of the largest forward, and of the largest logits
        self.vocabulary = min(vocabulary or c.vocab_size, c.vocab_size)
        self.states: dict[int, torch.Tensor] = {}  # layer -> [S, H] by slot; see ``keep``
        self.written = np.zeros(slots, np.int64)  # the forward that wrote a slot's states; < 0: a move; 0: none
        self._moves = 0
        self.staged: StagedForward | None = None  # made when a method first looks between the layers
        self._curves: dict[int, LatencyCurve] = {}

    def keep(self, layer: int) -> torch.Tensor:
        """float32 [S, H]: where the states of rows after ``layer`` are kept, by slot. Memory is used as slots are."""
        if not -1 <= layer <= self.config.num_hidden_layers:
            raise OptionError("taps", layer, f"-1..{self.config.num_hidden_layers}")
        if layer not in self.states:
            size = (self.alloc.total, self.config.hidden_size)
            self.states[layer] = torch.zeros(size, device=self.pool.k.device)
        return self.states[layer]

    def forward(self, batch: FlatBatch, early: Early | None = None) -> ForwardResult:
        """``early[l]`` is called with what layer l would give, while the layers above it wait: it must return at
        once."""
        if batch.n > self.peak_rows or len(batch.logit_rows) > self.peak_logits:
            self.peak_rows = max(self.peak_rows, batch.n)
            self.peak_logits = max(self.peak_logits, len(batch.logit_rows))
        if early:
            check_early(early, self.config.num_hidden_layers)
        if self.native is not None and not batch.sharing:
            return self._natively(batch, early)
        with torch.inference_mode():
            self.pool.positions[batch.slots] = batch.positions
            shown = {l: partial(self._show, look) for l, look in early.items()} if early else None
            result = forward_batch(
                self._packed(), self.pool, batch, rowwise=self.deterministic, early=shown
            )
            self._close(result)
        return result

    def _copy(self, source: np.ndarray, target: np.ndarray) -> int:
        """Move what belongs to rows to other slots; the bytes copied. The runs may overlap."""
        a, b = (torch.from_numpy(np.asarray(x, np.int64)).to(self.pool.k.device) for x in (source, target))
        for x in (self.pool.k, self.pool.v):
            x[:, b] = x[:, a]
        for x in self.states.values():
            x[b] = x[a]
        self.pool.positions[target] = self.pool.positions[source]
        self._moves -= 1  # whoever keeps something of its own under a slot must see that the row is another one
        self.written[target] = np.where(self.written[source] == 0, 0, self._moves)
        kept = sum(x[0].numel() * x.element_size() for x in self.states.values())
        return len(source) * (self.pool.nbytes // self.pool.slots + kept)

    def hold(self, slots: int, rows: int) -> None:
        """Keep to ``slots`` of the cache and ``rows`` a forward until ``lift``; of several holds the tightest counts.

        CapacityError when more slots are in use now, UnsupportedError for a cache of regions.
        """
        if not isinstance(self.alloc, SlotAllocator):
            raise UnsupportedError("a cache of regions cannot be held to fewer slots: load the model without regions")
        self._holds.append((slots, rows))
        try:
            self._keep_to_holds()
        except CapacityError:
            self._holds.pop()
            raise

    def lift(self, slots: int, rows: int) -> None:
        """End one hold of these numbers."""
        self._holds.remove((slots, rows))
        self._keep_to_holds()

    def _keep_to_holds(self) -> None:
        assert isinstance(self.alloc, SlotAllocator)
        self.alloc.limit(min([s for s, _ in self._holds], default=self.pool.slots))
        self.max_rows = min([r for _, r in self._holds], default=None)

    def chain(
        self, context: np.ndarray, tokens: list[int], position: int, slots: np.ndarray, doubt: Doubt | None = None
    ) -> tuple[list[int], list[int]]:
        """The greedy continuation of ``tokens`` behind the cached rows ``context``, a forward for each new token.

        ``position`` of the first of ``tokens``. ``slots`` int32 [len(tokens) - 1 + tokens to make]: where the K/V of
        the rows go, in order; where ``doubt`` ends the chain early, the last ones stay unused. Returns the new tokens
        and the class of each by ``doubt``.
        """
        if self.native is not None:
            return self.native.chain(self.pool, context, tokens, position, slots, self.vocabulary, doubt)
        given, found = len(tokens), []
        gain, text = doubt.gain if doubt else 1.0, list(tokens)
        while len(text) <= len(slots):
            at = len(text) - 1 if len(text) > given else 0
            before = np.concatenate([context, slots[:at]])
            batch = _chain(before, slots[at : len(text)], text[at:], position + at, last=True)
            result = self.forward(batch)
            text.append(int(result.argmax[0]))
            if doubt is not None:
                sure = float(torch.softmax(result.logits[0], -1).max())
                found.append(bisect(doubt.borders, sure))
                gain *= doubt.rates[found[-1]]
                if gain * doubt.rates[found[-1]] < doubt.least:
                    break
        return text[given:], found

    @property
    def lm_head(self) -> torch.Tensor:
        """The rows [V, H] of the LM head."""
        model, packed = self.model, self.model._packed_head
        if self.config.tie_word_embeddings:
            return model.model.embed_tokens.weight
        return packed.plain()[0] if packed is not None else model.lm_head.weight

    @torch.inference_mode()
    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] of final-normed states float32 [n, H], as ``forward`` gives them."""
        if self.native is not None:
            from stretto.models.native_linear import linear

            logits = linear(x, self.native.head)
        else:
            logits = self.model.head(x.to(self.model.dtype)).float()
        if self.vocabulary < self.config.vocab_size:
            logits[:, self.vocabulary :] = -torch.inf
        return logits

    def product(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
        """x [n, K] -> [n, N] for a weight [N, K] of a method's own, by the kernels of this runner."""
        if self.native is not None:
            from stretto.models.native_linear import PackedLinear, linear

            packed = PackedLinear(weight, bias, self.native.weight_dtype)
            return lambda x: linear(x, packed)
        weight = weight.to(self.model.device)
        bias = None if bias is None else bias.to(weight)
        return lambda x: torch.nn.functional.linear(x, weight, bias)

    def matrix(self, weight: torch.Tensor) -> Matrix:
        """``weight`` [H, H] ready for rows that enter in mid-stack (``Step.entries``)."""
        here = self.model.model.embed_tokens.weight
        weight = weight.detach().to(here)
        if self.native is None:
            return Matrix(weight)
        from stretto.models.native_linear import PackedLinear

        return Matrix(weight, PackedLinear(weight, dtype=self.native.weight_dtype))
    def _packed(self) -> Transformer:
        """The model as the torch forward runs it; beside a native forward a copy, made when first needed."""
        if self._torch is None:
            self._torch = copy.deepcopy(self.model).pack(block=ROW_BLOCK if self.deterministic else 0)
        return self._torch

    def _close(self, result: ForwardResult) -> None:
        """Ids that the tokenizer does not know are never chosen."""
        if self.vocabulary < self.config.vocab_size:
            result.logits[:, self.vocabulary :] = -torch.inf
        result.argmax = torch.argmax(result.logits, -1).cpu().numpy()

    def _show(self, look: Callable[[ForwardResult], None], logits: torch.Tensor) -> None:
        result = ForwardResult(logits)
        self._close(result)
        look(result)

    def _natively(self, batch: FlatBatch, early: Early | None) -> ForwardResult:
        """Rows that enter in mid-stack go last, as the native code wants them; their states go back to their places."""
        batch, moved = sink(batch) if batch.entries else (batch, None)
        if early:
            if self.staged is None:
                self.staged = StagedForward(self.model, self.native.weight_dtype)
            result = self.staged.forward(self.pool, batch, early, self.vocabulary)
        else:
            result = self.native.forward(self.pool, batch, self.vocabulary)
        if moved is not None:
            result.hidden = {layer: x[moved] for layer, x in result.hidden.items()}
        return result

    def curve(self, context: int = 128) -> LatencyCurve:
        """The measured cost of 1..64 rows on about ``context`` cached rows (rounded up to a power of two)."""
        size = 1 << max(6, (max(1, context) - 1).bit_length())
        size = min(size, self.alloc.total // 4)
        if size not in self._curves:
            self._curves[size] = self._measure(size)
        return self._curves[size]

    def _measure(self, context: int) -> LatencyCurve:
        rows = [r for r in CURVE_ROWS if r + context <= self.alloc.free and r <= (self.max_rows or r)]
        if not rows:
            raise CapacityError(f"the latency curve needs {context + 1} free cache slots")
        slots = self.alloc.alloc(context + rows[-1])
        try:
            seconds = []
            for n in rows:
                batch = _chain(slots[:context], slots[context : context + n], [0] * n, context)
                times = []
                budget = time.perf_counter() + 0.25
                while len(times) < 3 or (len(times) < 12 and time.perf_counter() < budget):
                    start = time.perf_counter()
                    self.forward(batch)
                    times.append(time.perf_counter() - start)
                seconds.append(min(times))
        finally:
            self.alloc.release(slots)
        return LatencyCurve(rows, seconds)


def _native(model: Transformer, backend: str) -> tuple[Any, str | None]:
    """The native forward, or None and why not."""
    if backend == "torch":
        return None, "backend='torch' was asked for"
    from stretto.models.native import NativeForward

    reason = NativeForward.supported(model.config)
    if model.model.embed_tokens.weight.device.type != "cpu":
        reason = "the model is not on a CPU"
    if reason is None:
        return NativeForward(model), None
    if backend == "native":
        raise UnsupportedError(f"backend='native' cannot serve this model here: {reason}")
    return None, reason


def _chain(
    context: np.ndarray, slots: np.ndarray, tokens: list[int], position: int, *, last: bool = False
) -> FlatBatch:
    """Causal rows of one sequence behind ``context``, with the logits of all or of the last."""
    n = len(tokens)
    cols, counts = np.tril_indices(n)[1].astype(np.int32), np.arange(1, n + 1)
    return FlatBatch(
        tokens=np.array(tokens, np.int64),
        positions=np.arange(position, position + n, dtype=np.int32),
        slots=slots.astype(np.int32),
        context_of=np.zeros(n, np.int32),
        context=context.astype(np.int32),
        context_ptr=np.array([0, len(context)], np.int32),
        local=cols,
        local_ptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        logit_rows=np.arange(n - 1 if last else 0, n, dtype=np.int32),
    )
