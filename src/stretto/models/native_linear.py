"""Linears of the native forward: weights in panels, packed once.

Legend: n rows, K inputs and N outputs of a linear, P panels of 2 x ``lanes`` columns.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import subprocess
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stretto.errors import UnsupportedError
from stretto.models.native_library import INT, LONG, POINTER, Mat, address, build, team

__all__ = ["Memory", "PackedLinear", "argmax", "library", "linear", "multiplies_halves"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOAT, BFLOAT, HALVES = range(3)  # formats of weights


@lru_cache(maxsize=1)
def library() -> tuple[Any, str | None]:
    """The loaded library, or None and the reason in one line."""
    try:
        lib = ctypes.CDLL(str(build()))
    except (OSError, subprocess.SubprocessError) as e:
        return None, str(e)
    for name, result, *arguments in (
        ("lanes", INT),
        ("halves", INT),
        ("forward", INT, POINTER, POINTER),
        ("chain", LONG, POINTER, POINTER, POINTER),
        ("heads", LONG, POINTER, POINTER, POINTER),
        ("features", LONG, POINTER, POINTER, POINTER, POINTER, POINTER),
        ("free", None, POINTER),
        ("linear", INT, POINTER, POINTER, POINTER, LONG, POINTER),
        ("argmax", None, POINTER, LONG, LONG, POINTER),
    ):
        function = getattr(lib, f"stretto_{name}")
        function.restype, function.argtypes = result, arguments
    if not _rows_are_invariant(lib):
        return None, "the compiled kernels give a row other bits in a larger batch"
    return lib, None


def _rows_are_invariant(lib: Any) -> bool:
    """Has one row alone the bits that it has among others? A compiler may round otherwise than expected."""
    x = torch.linspace(-1, 1, 25 * 75, dtype=torch.float32).sin().view(25, 75)
    for dtype in DTYPES.values():
        packed = PackedLinear(torch.linspace(-3, 3, 75 * 70).cos().view(70, 75), dtype=dtype, lib=lib)
        alone = torch.cat([linear(row[None], packed, threads=1) for row in x])
        if not all(torch.equal(linear(x[:n], packed, threads=1), alone[:n]) for n in range(1, len(x) + 1)):
            return False
    return True


class PackedLinear:
    """A weight [N, K] in panels for the native kernels, stored as ``dtype``; ``bias`` [N].

    ``gated``: N/2 gates, then N/2 ups; the output is silu(gate) * up, [n, N/2]. ``halves``: store and multiply as
    halves; default: a bfloat16 weight, where the machine can.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32, *, gated: bool = False,
        halves: bool | None = None, lib: Any = None, memory: Memory | None = None,
    ):
        self.lib, reason = (lib, None) if lib else library()
        if reason:
            raise UnsupportedError(reason)
        lanes, weight, scale = self.lib.stretto_lanes(), weight.detach().to(dtype), 1.0
        form = FLOAT if dtype == torch.float32 else BFLOAT
        if self.lib.stretto_halves() and (form == BFLOAT if halves is None else halves):
            form, (weight, scale) = HALVES, _as_halves(weight)
        panels = _in_panels(weight, lanes, gated)
        panels = _ordered(panels, form)
        self.weight = memory.copy(panels) if memory else panels.contiguous()
        self.bias = None if bias is None else _in_panels(bias.detach().float()[:, None], lanes, gated).contiguous()
        self.n, self.k = len(weight) // (2 if gated else 1), weight.shape[1]
        self.mat = Mat(address(self.weight), address(self.bias), self.n, self.k, form, gated, scale)


def _as_halves(weight: Tensor) -> tuple[Tensor, float]:
    """(halves h below 2^3, s a power of two) with weight = h s; exact for bfloat16 down to 2^-19 of the largest."""
    largest = weight.abs().max().item() if weight.numel() else 0.0
    exponent = math.frexp(largest)[1] - 3 if 0 < largest < math.inf else 0
    return (weight.float() * 2.0**-exponent).half(), 2.0**exponent


class Memory:
    """Memory for the weights of one model, in large pages where the system has them: fewer misses of the TLB."""

    PAGE, BLOCK = 1 << 21, 1 << 25

    def __init__(self):
        self._block: Tensor | None = None
        self._used = 0

    def copy(self, x: Tensor) -> Tensor:
        size = x.numel() * x.element_size()
        if self._block is None or self._used + size > len(self._block):
            self._open(size)
        assert self._block is not None
        out = self._block[self._used : self._used + size].view(x.dtype).view(x.shape)
        self._used += -(-size // 64) * 64
        return out.copy_(x)

    def _open(self, size: int) -> None:
        pages = mmap.mmap(-1, max(size, self.BLOCK) + 2 * self.PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                pages.madvise(mmap.MADV_HUGEPAGE)
        block = torch.frombuffer(pages, dtype=torch.uint8)
        self._block, self._used = block[-block.data_ptr() % self.PAGE :], 0


def _in_panels(weight: Tensor, lanes: int, gated: bool) -> Tensor:
    """[N, K] -> [P, 2, lanes, K], missing columns zero."""
    parts = weight.chunk(2) if gated else (weight,)
    width = lanes if gated else 2 * lanes
    padded = [torch.nn.functional.pad(x, (0, 0, 0, -len(x) % width)).view(-1, width, x.shape[1]) for x in parts]
    return torch.stack(padded, 1).view(-1, 2, lanes, weight.shape[1])


def _ordered(panels: Tensor, form: int) -> Tensor:
    """[P, 2, lanes, K] -> as the kernels of this format read it (native.h: Mat)."""
    if form == BFLOAT:
        return panels.permute(0, 3, 2, 1)
    if form == FLOAT:
        return panels.permute(0, 3, 1, 2)
    columns = torch.nn.functional.pad(panels.flatten(1, 2), (0, panels.shape[3] % 2))
    return columns.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 3, 2, 1, 4)


def linear(x: Tensor, packed: PackedLinear, *, threads: int | None = None) -> Tensor:
    """x float32 [n, K] -> [n, N]"""
    if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != packed.k or x.device.type != "cpu":
        raise UnsupportedError(f"linear() takes float32 [n, {packed.k}] on the CPU, not {x.dtype} {tuple(x.shape)}")
    x, threads_of = x.contiguous(), team(threads)
    out = torch.empty((len(x), packed.n), dtype=torch.float32)
    if packed.lib.stretto_linear(ctypes.byref(threads_of), ctypes.byref(packed.mat), address(x), len(x), address(out)):
        raise MemoryError(f"no memory for a linear of {len(x)} rows")
    return out


def argmax(x: Tensor) -> Tensor:
    """x [n, V] -> int64 [n], the lowest index of the largest value."""
    lib, reason = library()
    if reason:
        raise UnsupportedError(reason)
    x, out = x.float().contiguous(), torch.empty(len(x), dtype=torch.int64)
    lib.stretto_argmax(address(x), *x.shape, address(out))
    return out


def multiplies_halves() -> bool:
    """Does this machine's native forward multiply the linears of bfloat16 models in half precision?"""
    lib, _ = library()
    return lib is not None and bool(lib.stretto_halves())
