"""The decoder's forward in C: one call a forward, weights repacked once, no Python between the layers.

The sources in ``csrc`` are compiled by the machine's C compiler at first use and kept in the user's cache directory.
Without a compiler, or with ``STRETTO_NATIVE=0``, the torch implementation serves. Arithmetic and activations are
float32; weights are stored in float32 or bfloat16. A row's bits do not depend on the other rows of the batch, on the
slots of its keys, or on the number of threads (``csrc/native.h`` says why).

Legend: n rows, k rows with logits, K inputs and N outputs of a linear, P panels of 2 x ``lanes`` columns.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stretto.errors import OptionError, PromptError, UnsupportedError
from stretto.models.batch import FlatBatch, ForwardResult, KVPool
from stretto.models.config import ModelConfig
from stretto.models.entries import structs
from stretto.models.moe import SparseMLP
from stretto.models.transformer import MLP, Attention, Block, Transformer

__all__ = ["NativeForward", "PackedLinear", "argmax", "linear"]

SOURCES = ("native.h", "linear.c", "attention.c", "entries.c", "forward.c")
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")
TUNE = ("-march=native", "-mcpu=native", "-O3")  # the first that the compiler takes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NO_INTS = np.empty(0, np.int32)


def _struct(*fields: tuple[Any, str]) -> type[ctypes.Structure]:
    """A structure of ``native.h``: (type, names), in order."""
    listed = [(name, kind) for kind, names in fields for name in names.split()]
    return type("Struct", (ctypes.Structure,), {"_fields_": listed})


_int, _long, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_Mat = _struct((_pointer, "w bias"), (_int, "n k bf16 gated"))
_Team = _struct((_pointer, "parallel"), (_int, "threads"))
_Layer = _struct(
    (_Mat, "qkv o gate_up down router"),
    (_pointer, "expert_gate_up expert_down norm1 norm2 q_norm k_norm"),
    (_int, "window experts top_k renormalize"),
)
_Model = _struct(
    (_Team, "team"), (_int, "layers_n H A G D V I experts top_k embed_bf16 angles"), (ctypes.c_float, "eps scale"),
    (_pointer, "embed norm cos sin layers"), (_Mat, "head"), (_pointer, "scratch"), (ctypes.c_size_t, "scratch_bytes"),
)  # fmt: skip
_Batch = _struct(
    (_long, "n contexts n_context n_local k n_embeds S kv_bf16 n_entries"),
    (_pointer, "tokens ints embeds k_pool v_pool pool_positions logits taps entries"),
    (_pointer, "positions slots context_of context_ptr local_ptr context local logit_rows embed_rows"),
)


# ---- the library ----


def _cache_dir() -> Path:
    """A writable directory of this user; a temporary one where the home is not."""
    try:
        cache = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
        path = Path(os.environ.get("XDG_CACHE_HOME") or cache) / "stretto" / "native"
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="stretto-native-"))


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "\n".join(sorted({x for x in lines if x.startswith(("flags", "Features", "model name", "CPU part"))}))


def _build() -> Path:
    """The compiled library; OSError or CalledProcessError if that is not possible."""
    found = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), "")
    compiler = shlex.split(os.environ.get("CC") or found)
    if not compiler or not shutil.which(compiler[0]):
        raise FileNotFoundError("no C compiler was found (cc, gcc or clang; CC names another)")
    folder = resources.files("stretto.models") / "csrc"
    texts = {name: (folder / name).read_text() for name in SOURCES}
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256(repr((texts, FLAGS, TUNE, version, _processor())).encode()).hexdigest()
    target = _cache_dir() / f"{key[:24]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        for name, text in texts.items():
            (Path(work) / name).write_text(text)
        for tune in TUNE:
            command = [*compiler, *FLAGS, tune, *SOURCES[1:], "-lm", "-o", "out.so"]
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300)
            if done.returncode == 0:
                os.replace(Path(work) / "out.so", target)  # other processes see the whole file or none
                return target
    lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
    told = next((line for line in lines if "error" in line), lines[0])
    raise OSError(f"the C compiler {compiler[0]!r} failed: {told}")


@lru_cache(maxsize=1)
def _library() -> tuple[Any, str | None]:
    """The loaded library, or None and the reason in one line."""
    try:
        lib = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as e:
        return None, str(e)
    for name, result, *arguments in (
        ("lanes", _int),
        ("forward", _int, _pointer, _pointer),
        ("free", None, _pointer),
        ("linear", None, _pointer, _pointer, _pointer, _long, _pointer),
        ("argmax", None, _pointer, _long, _long, _pointer),
    ):
        function = getattr(lib, f"stretto_{name}")
        function.restype, function.argtypes = result, arguments
    if not _rows_are_invariant(lib):
        return None, "the compiled kernels give a row other bits in a larger batch"
    return lib, None


def _rows_are_invariant(lib: Any) -> bool:
    """Has one row alone the bits that it has among others? A compiler may round otherwise than expected."""
    x = torch.linspace(-1, 1, 25 * 75, dtype=torch.float32).sin().view(25, 75)
    packed = PackedLinear(torch.linspace(-3, 3, 75 * 70).cos().view(70, 75), lib=lib)
    alone = torch.cat([linear(row[None], packed, threads=1) for row in x])
    return all(torch.equal(linear(x[:n], packed, threads=1), alone[:n]) for n in range(1, len(x) + 1))


@lru_cache(maxsize=1)
def _openmp() -> int | None:
    """The address of GOMP_parallel in the runtime that torch has loaded.

    Its pool of threads is used, not a second one: two pools that wait by spinning would fight for the cores.
    """
    suffix = "dylib" if sys.platform == "darwin" else "so"
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))
        return ctypes.cast(torch_cpu.GOMP_parallel, _pointer).value
    except (OSError, AttributeError):
        return None


def _team(threads: int | None) -> Any:
    return _Team(_openmp(), (threads or torch.get_num_threads()) if _openmp() else 1)


def _at(x: Tensor | np.ndarray | None) -> int | None:
    """The address of the first element."""
    if x is None:
        return None
    return x.data_ptr() if isinstance(x, Tensor) else x.__array_interface__["data"][0]


# ---- weights ----


class PackedLinear:
    """A weight [N, K] in panels for the native kernels, stored as ``dtype``; ``bias`` [N].

    ``gated``: N/2 gates, then N/2 ups; the output is silu(gate) * up, [n, N/2].
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32, *, gated: bool = False,
        lib: Any = None,
    ):
        self.lib, reason = (lib, None) if lib else _library()
        if reason:
            raise UnsupportedError(reason)
        lanes, bf16 = self.lib.stretto_lanes(), dtype == torch.bfloat16
        panels = _in_panels(weight.detach().to(dtype), lanes, gated)
        self.weight = (panels.permute(0, 3, 2, 1) if bf16 else panels.permute(0, 3, 1, 2)).contiguous()
        self.bias = None if bias is None else _in_panels(bias.detach().float()[:, None], lanes, gated).contiguous()
        self.n, self.k = len(weight) // (2 if gated else 1), weight.shape[1]
        self.mat = _Mat(_at(self.weight), _at(self.bias), self.n, self.k, bf16, gated)


def _in_panels(weight: Tensor, lanes: int, gated: bool) -> Tensor:
    """[N, K] -> [P, 2, lanes, K], missing columns zero."""
    parts = weight.chunk(2) if gated else (weight,)
    width = lanes if gated else 2 * lanes
    padded = [torch.nn.functional.pad(x, (0, 0, 0, -len(x) % width)).view(-1, width, x.shape[1]) for x in parts]
    return torch.stack(padded, 1).view(-1, 2, lanes, weight.shape[1])


def linear(x: Tensor, packed: PackedLinear, *, threads: int | None = None) -> Tensor:
    """x float32 [n, K] -> [n, N]"""
    if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != packed.k or x.device.type != "cpu":
        raise UnsupportedError(f"linear() takes float32 [n, {packed.k}] on the CPU, not {x.dtype} {tuple(x.shape)}")
    x, team = x.contiguous(), _team(threads)
    out = torch.empty((len(x), packed.n), dtype=torch.float32)
    packed.lib.stretto_linear(ctypes.byref(team), ctypes.byref(packed.mat), _at(x), len(x), _at(out))
    return out


def argmax(x: Tensor) -> Tensor:
    """x [n, V] -> int64 [n], the lowest index of the largest value."""
    lib, reason = _library()
    if reason:
        raise UnsupportedError(reason)
    x, out = x.float().contiguous(), torch.empty(len(x), dtype=torch.int64)
    lib.stretto_argmax(_at(x), *x.shape, _at(out))
    return out


def _weight(module: Any) -> Tensor:
    """The weight [N, K] of a linear, whatever runs in its place."""
    if hasattr(module, "plain"):  # reordered for oneDNN
        return torch.cat(module.plain())
    if hasattr(module, "lora_A"):
        return module.weight + module.lora_B.weight @ module.lora_A.weight * module.scale
    return module.weight


# ---- the forward ----


class NativeForward:
    """``model`` as the native code runs it: a packed copy of its weights, and ``forward``.

    ``weight_dtype``: "float32", "bfloat16", or "auto" = bfloat16 for a bfloat16 model, else float32. ``threads``:
    default, as many as torch uses. Later changes of the model's weights are not seen.
    """

    @staticmethod
    def supported(config: ModelConfig) -> str | None:
        """None, or why this machine or model cannot use it."""
        if os.environ.get("STRETTO_NATIVE") == "0":
            return "STRETTO_NATIVE=0 turns it off"
        return "only for little-endian machines" if sys.byteorder == "big" else _library()[1]

    @torch.no_grad()
    def __init__(self, model: Transformer, weight_dtype: str = "auto", threads: int | None = None):
        if weight_dtype not in ("auto", *DTYPES):
            raise OptionError("weight_dtype", weight_dtype, "auto, float32 or bfloat16")
        reason = self.supported(model.config) or _unusual(model)
        if reason:
            raise UnsupportedError(f"the native forward cannot serve this model: {reason}")
        auto = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float32
        self.weight_dtype = DTYPES.get(weight_dtype, auto)
        self.config, self.rotary, self._lib = model.config, model.rotary, _library()[0]
        self._keep: list[Any] = []  # what the structures point to
        self._lock = threading.Lock()  # one scratch memory
        self._model = self._describe(model, threads)
        self._grow_angles(min(2048, self.config.max_position_embeddings))

    @property
    def threads(self) -> int:
        return self._model.team.threads

    def _mat(self, *modules: Any, gated: bool = False) -> Any:
        """The linears of one input as one."""
        biases = [m.bias for m in modules if getattr(m, "bias", None) is not None]
        weight = torch.cat([_weight(m) for m in modules])
        self._keep.append(PackedLinear(weight, torch.cat(biases) if biases else None, self.weight_dtype, gated=gated))
        return self._keep[-1].mat

    def _mats(self, weights: list[Any], gated: bool) -> int:
        """Where the structures of several plain weights begin."""
        packed = [PackedLinear(w, None, self.weight_dtype, gated=gated) for w in weights]
        array = (_Mat * len(packed))(*(p.mat for p in packed))
        self._keep += [packed, array]
        return ctypes.addressof(array)

    def _floats(self, module: Any) -> int | None:
        if module is None:
            return None
        self._keep.append(module.weight.detach().float().clone())
        return _at(self._keep[-1])

    def _describe(self, model: Transformer, threads: int | None) -> Any:
        c, moe = model.config, model.config.moe
        table = model.model.embed_tokens.weight.detach()
        table = table if table.dtype in DTYPES.values() else table.float()
        layers = (_Layer * c.num_hidden_layers)(*map(self._layer, model.layers, c.windows))
        self._keep += [table, layers]
        head = model._packed_head or (model.model.embed_tokens if c.tie_word_embeddings else model.lm_head)
        return _Model(
            team=_team(threads), layers_n=c.num_hidden_layers, H=c.hidden_size, A=c.num_attention_heads,
            G=c.num_key_value_heads, D=c.head_dim, V=c.vocab_size, experts=moe.experts if moe else 0,
            I=max(c.intermediate_size, moe.intermediate_size if moe else 0), top_k=moe.top_k if moe else 0,
            embed_bf16=table.dtype == torch.bfloat16, eps=c.rms_norm_eps, scale=c.head_dim**-0.5, embed=_at(table),
            norm=self._floats(model.model.norm), layers=ctypes.addressof(layers), head=self._mat(head),
        )  # fmt: skip

    def _layer(self, block: Block, window: int | None) -> Any:
        a, m = block.self_attn, block.mlp
        out = _Layer(
            qkv=self._mat(a.qkv_proj) if a.qkv_proj else self._mat(a.q_proj, a.k_proj, a.v_proj),
            o=self._mat(a.o_proj), q_norm=self._floats(a.q_norm), k_norm=self._floats(a.k_norm), window=window or 0,
            norm1=self._floats(block.input_layernorm), norm2=self._floats(block.post_attention_layernorm),
        )  # fmt: skip
        if isinstance(m, SparseMLP):
            e = m.experts
            pairs = zip(e.gate_up_proj, e.down_proj) if e.packed is None else (map(_weight, pair) for pair in e.packed)
            ups, downs = zip(*pairs)
            out.router, out.experts, out.top_k, out.renormalize = self._mat(m.gate), len(ups), m.top_k, m.renormalize
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
        self._model.cos, self._model.sin = map(_at, self._angles)
        self._model.angles = size

    def forward(self, pool: KVPool, batch: FlatBatch) -> ForwardResult:
        """float32 logits of ``batch.logit_rows``, and the tapped states (float32)."""
        c, n, slots, keys, values = self.config, batch.n, len(pool.positions), pool.k, pool.v
        if keys.shape != (c.num_hidden_layers, slots, c.num_key_value_heads, c.head_dim) or keys.device.type != "cpu":
            raise UnsupportedError(f"the K/V pool is {tuple(keys.shape)} on {keys.device}: it is not of this model")
        if keys.dtype not in DTYPES.values():
            raise UnsupportedError(f"the K/V pool is {keys.dtype}: allowed are float32 and bfloat16")
        logits = torch.empty((len(batch.logit_rows), c.vocab_size), dtype=torch.float32)
        taps = (_pointer * (c.num_hidden_layers + 2))()
        hidden = {}
        for tap in batch.taps:
            if not -1 <= tap <= c.num_hidden_layers:
                raise OptionError("taps", tap, f"-1..{c.num_hidden_layers}")
            hidden[tap] = torch.empty((n, c.hidden_size), dtype=torch.float32)
            taps[tap] = _at(hidden[tap])
        embeds, embed_rows = None, NO_INTS
        if batch.embeds is not None:
            embeds, embed_rows = batch.embeds.detach().to("cpu", torch.float32).contiguous(), batch.embed_rows
        tokens, entries = np.ascontiguousarray(batch.tokens, np.int64), structs(batch.entries)
        arrays = (
            batch.positions, batch.slots, batch.context_of, batch.context_ptr, batch.local_ptr, batch.context,
            batch.local, batch.logit_rows, embed_rows,
        )  # fmt: skip
        ints = np.concatenate(arrays, dtype=np.int32, casting="same_kind")
        if [len(x) for x in arrays[:5]] != [n, n, n, len(batch.context_ptr), n + 1]:
            raise IndexError(f"the arrays of the batch do not fit its {n} rows")
        b = _Batch(
            n, len(batch.context_ptr) - 1, len(batch.context), len(batch.local), len(logits), len(embed_rows), slots,
            keys.dtype == torch.bfloat16, len(entries), _at(tokens), _at(ints), _at(embeds), _at(keys), _at(values),
            _at(pool.positions), _at(logits), ctypes.addressof(taps), ctypes.addressof(entries),
        )  # fmt: skip
        with self._lock:
            code = self._lib.stretto_forward(ctypes.addressof(self._model), ctypes.addressof(b))
            if code == 1 and batch.positions.min() >= 0:
                self._grow_angles(int(batch.positions.max()) + 1)
                code = self._lib.stretto_forward(ctypes.addressof(self._model), ctypes.addressof(b))
        if code == 2:
            raise PromptError(f"token ids must lie in 0..{c.vocab_size - 1}")
        if code < 0:
            raise MemoryError(f"no memory for a forward of {n} rows")
        if code:
            what = ("position", "token", "slot", "context", "row", "entry")[code - 1]
            raise IndexError(f"the batch names a {what} that does not exist")
        return ForwardResult(logits, hidden)

    def __del__(self) -> None:
        if hasattr(self, "_model"):
            self._lib.stretto_free(ctypes.addressof(self._model))


def _unusual(model: Transformer) -> str | None:
    """The part of ``model`` that the native code does not know, or None."""
    for block in model.layers:
        parts = type(block), type(block.self_attn), type(block.mlp)
        if parts not in ((Block, Attention, MLP), (Block, Attention, SparseMLP)):
            return "a layer is not the standard block"
    return None if model.device.type == "cpu" else f"it is on {model.device}"
