"""The decoder's forward in C: one call a forward, weights repacked once, no Python between the layers.

The sources in ``csrc`` are compiled by the machine's C compiler at first use and kept in the user's cache directory.
Without a compiler, or with ``STRETTO_NATIVE=0``, the torch implementation serves. Arithmetic and activations are
float32; weights are stored in float32 or bfloat16. A row's bits do not depend on the other rows of the batch, on the
slots of its keys, or on the number of threads (``csrc/native.h`` says why).

Legend: n rows, k rows with logits, K inputs and N outputs of a linear, P panels, W columns of a panel.
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
from stretto.models.moe import SparseMLP
from stretto.models.transformer import MLP, Attention, Block, Transformer

__all__ = ["NativeForward", "PackedLinear", "argmax", "linear"]

SOURCES = ("native.h", "linear.c", "attention.c", "forward.c")
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")
TUNE = ("-march=native", "-mcpu=native", "")  # the first that the compiler takes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _struct(name: str, **fields: str) -> type[ctypes.Structure]:
    """A structure of ``native.h``: type -> names, in order (``_2`` behind a type repeats it)."""
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "q": ctypes.c_int64, "f": ctypes.c_float, "z": ctypes.c_size_t}
    listed = [(f, types.get(t.split("_")[0]) or _TYPES[t]) for t, names in fields.items() for f in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": listed})


_Mat = _struct("_Mat", p="w bias", i="n k bf16 gated")
_Team = _struct("_Team", p="parallel", i="threads")
_TYPES = {"mat": _Mat, "team": _Team}
_Layer = _struct(
    "_Layer", mat="qkv o gate_up down router", p="expert_gate_up expert_down norm1 norm2 q_norm k_norm",
    i="window experts top_k renormalize",
)
_Model = _struct(
    "_Model", team="team", i="layers_n H A G D V I experts top_k embed_bf16 angles", f="eps scale",
    p="embed norm cos sin layers", mat="head", p_2="scratch", z="scratch_bytes",
)
_Batch = _struct(
    "_Batch", q="n contexts k n_embeds slots_n",
    p="tokens positions slots context_of context context_ptr local local_ptr logit_rows embed_rows embeds k_pool "
    "v_pool pool_positions logits taps",
    i="kv_bf16",
)


# ---- the library ----


def _compiler() -> list[str] | None:
    chosen = shlex.split(os.environ.get("CC", ""))
    for command in [chosen] if chosen else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    return None


def _cache_dir() -> Path:
    home = Path.home()
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    path = base / "stretto" / "native"
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(path)
    return path


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        keys = ("flags", "Features", "model name", "CPU part")
        return "\n".join(sorted({line for line in lines if line.startswith(keys)}))
    except OSError:
        return platform.processor()


def _build() -> Path:
    """The compiled library; OSError or CalledProcessError if that is not possible."""
    compiler = _compiler()
    if compiler is None:
        raise FileNotFoundError("no C compiler was found (cc, gcc or clang; CC names another)")
    source = resources.files("stretto.models") / "csrc"
    texts = {name: (source / name).read_text() for name in SOURCES}
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256(repr((texts, FLAGS, TUNE, version, _processor(), platform.machine())).encode())
    try:
        folder = _cache_dir()
    except (OSError, RuntimeError):
        folder = Path(tempfile.mkdtemp(prefix="stretto-native-"))
    target = folder / f"{key.hexdigest()[:24]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for name, text in texts.items():
            (Path(work) / name).write_text(text)
        files, error = [n for n in SOURCES if n.endswith(".c")], None
        for tune in TUNE:
            command = [*compiler, *FLAGS, *filter(None, [tune]), *files, "-lm", "-o", "out.so"]
            try:
                subprocess.run(command, cwd=work, check=True, capture_output=True, text=True, timeout=300)
            except subprocess.CalledProcessError as e:
                error = error or e
                continue
            os.replace(Path(work) / "out.so", target)  # other processes see the whole file or none
            return target
    assert error is not None, "no flags were tried"
    raise error


@lru_cache(maxsize=1)
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    """The loaded library, or None and the reason in one line."""
    try:
        lib = ctypes.CDLL(str(_build()))
    except subprocess.CalledProcessError as e:
        lines = (e.stderr or "").strip().splitlines() or [f"exit status {e.returncode}"]
        told = next((line for line in lines if "error" in line), lines[0])
        return None, f"the C compiler {e.cmd[0]!r} failed: {told}"
    except (OSError, subprocess.SubprocessError) as e:
        return None, f"the native kernels could not be built: {e}"
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, result, arguments in (
        ("stretto_lanes", number, []),
        ("stretto_forward", number, [pointer, pointer]),
        ("stretto_free", None, [pointer]),
        ("stretto_linear", None, [pointer, pointer, pointer, size, pointer]),
        ("stretto_argmax", None, [pointer, size, size, pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib, None if _rows_are_invariant(lib) else "the compiled kernels give a row other bits in a larger batch"


def _rows_are_invariant(lib: ctypes.CDLL) -> bool:
    """One row alone has the bits that it has among others: compilers may round differently than expected."""
    x = torch.linspace(-1, 1, 25 * 75).sin().view(25, 75)
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
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def _team(threads: int | None) -> _Team:
    parallel = _openmp()
    return _Team(parallel, (threads or torch.get_num_threads()) if parallel else 1)


# ---- weights ----


class PackedLinear:
    """A weight [N, K] in panels for the native kernels, stored as ``dtype``; ``bias`` [N].

    ``gated``: N/2 gates, then N/2 ups; the output is silu(gate) * up, [n, N/2].
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32, *, gated: bool = False,
        lib: ctypes.CDLL | None = None,
    ):
        self.lib = lib or _library()[0]
        if self.lib is None:
            raise UnsupportedError(_library()[1])
        lanes = self.lib.stretto_lanes()
        with torch.no_grad():
            panels = _in_panels(weight.detach().to(dtype), lanes, gated)  # [P, 2, lanes, K]
            bf16 = dtype == torch.bfloat16
            self.weight = (panels.permute(0, 3, 2, 1) if bf16 else panels.permute(0, 3, 1, 2)).contiguous()
            self.bias = None
            if bias is not None:
                self.bias = _in_panels(bias.detach().float()[:, None], lanes, gated).contiguous()
        self.n, self.k = len(weight) // (2 if gated else 1), weight.shape[1]
        self.mat = _Mat(_at(self.weight), _at(self.bias), self.n, self.k, bf16, gated)


def _in_panels(weight: Tensor, lanes: int, gated: bool) -> Tensor:
    """[N, K] -> [P, 2, lanes, K], missing columns zero."""
    if gated:
        return torch.stack([_in_panels(w, lanes // 2, False).flatten(1, 2) for w in weight.chunk(2)], 1)
    n, width = len(weight), 2 * lanes
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -n % width))
    return padded.view(-1, 2, lanes, weight.shape[1])


def linear(x: Tensor, packed: PackedLinear, *, threads: int | None = None) -> Tensor:
    """x float32 [n, K] -> [n, N]"""
    if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != packed.k or x.device.type != "cpu":
        raise UnsupportedError(f"linear() takes float32 [n, {packed.k}] on the CPU, not {x.dtype} {tuple(x.shape)}")
    x = x.contiguous()
    out = torch.empty(len(x), packed.n)
    team = _team(threads)
    packed.lib.stretto_linear(ctypes.byref(team), ctypes.byref(packed.mat), _at(x), len(x), _at(out))
    return out


def argmax(x: Tensor) -> Tensor:
    """x float32 [n, V] -> int64 [n], the lowest index of the largest value."""
    lib, reason = _library()
    if lib is None:
        raise UnsupportedError(reason)
    x = x.float().contiguous()
    out = torch.empty(len(x), dtype=torch.int64)
    lib.stretto_argmax(_at(x), *x.shape, _at(out))
    return out


def _at(x: Tensor | np.ndarray | None) -> int | None:
    if x is None:
        return None
    return x.data_ptr() if isinstance(x, Tensor) else x.__array_interface__["data"][0]


def _weight(module: Any) -> Tensor:
    """The weight [N, K] of a linear, whatever runs in its place."""
    if hasattr(module, "plain"):  # reordered for oneDNN
        return torch.cat(module.plain())
    if hasattr(module, "lora_A"):
        return module.weight + module.lora_B.weight @ module.lora_A.weight * module.scale
    return module.weight


def _joined(fused: Any, *modules: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the linears of one input, ``fused`` if they were packed."""
    if fused is not None:
        return _weight(fused), fused.bias
    biases = [m.bias for m in modules]
    return torch.cat([_weight(m) for m in modules]), None if biases[0] is None else torch.cat(biases)


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
        if sys.byteorder != "little":
            return "only for little-endian machines"
        return _library()[1]

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

    def _pack(self, weight: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> Any:
        packed = PackedLinear(weight, bias, self.weight_dtype, gated=gated)
        self._keep.append(packed)
        return packed.mat

    def _floats(self, module: Any) -> int | None:
        if module is None:
            return None
        self._keep.append(module.weight.detach().float().clone())
        return _at(self._keep[-1])

    def _describe(self, model: Transformer, threads: int | None) -> Any:
        c, moe = model.config, model.config.moe
        table = model.model.embed_tokens.weight.detach()
        if table.dtype not in DTYPES.values():
            table = table.float()
        layers = (_Layer * c.num_hidden_layers)(*(self._layer(b, w) for b, w in zip(model.layers, c.windows)))
        self._keep += [table, layers]
        head = model._packed_head or (model.model.embed_tokens if c.tie_word_embeddings else model.lm_head)
        dense = c.intermediate_size if moe is None or not all(moe.sparse) else 0
        return _Model(
            team=_team(threads), layers_n=c.num_hidden_layers, H=c.hidden_size, A=c.num_attention_heads,
            G=c.num_key_value_heads, D=c.head_dim, V=c.vocab_size,
            I=max(dense, moe.intermediate_size if moe else 0), experts=moe.experts if moe else 0,
            top_k=moe.top_k if moe else 0, embed_bf16=table.dtype == torch.bfloat16, eps=c.rms_norm_eps,
            scale=c.head_dim**-0.5, embed=_at(table), norm=self._floats(model.model.norm),
            layers=ctypes.addressof(layers), head=self._pack(_weight(head)),
        )

    def _layer(self, block: Block, window: int | None) -> Any:
        a, m = block.self_attn, block.mlp
        packed = a.qkv_proj is not None
        out = _Layer(
            qkv=self._pack(*_joined(a.qkv_proj, *(() if packed else (a.q_proj, a.k_proj, a.v_proj)))),
            o=self._pack(_weight(a.o_proj), a.o_proj.bias),
            norm1=self._floats(block.input_layernorm), norm2=self._floats(block.post_attention_layernorm),
            q_norm=self._floats(a.q_norm), k_norm=self._floats(a.k_norm), window=window or 0,
        )
        if not isinstance(m, SparseMLP):
            pair = () if m.gate_up_proj is not None else (m.gate_proj, m.up_proj)
            out.gate_up = self._pack(*_joined(m.gate_up_proj, *pair), gated=True)
            out.down = self._pack(_weight(m.down_proj), m.down_proj.bias)
            return out
        e = m.experts
        if e.packed is not None:
            pairs = [(_weight(a), _weight(b)) for a, b in e.packed]
        else:
            pairs = list(zip(e.gate_up_proj, e.down_proj))
        ups = (_Mat * len(pairs))(*(self._pack(up, gated=True) for up, _ in pairs))
        downs = (_Mat * len(pairs))(*(self._pack(down) for _, down in pairs))
        self._keep += [ups, downs]
        out.expert_gate_up, out.expert_down = ctypes.addressof(ups), ctypes.addressof(downs)
        out.router, out.experts = self._pack(m.gate.weight), len(pairs)
        out.top_k, out.renormalize = m.top_k, m.renormalize
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
        c, n, h = self.config, batch.n, self.config.hidden_size
        shape = (c.num_hidden_layers, pool.slots, c.num_key_value_heads, c.head_dim)
        if pool.k.shape != shape or pool.k.dtype not in DTYPES.values() or pool.k.device.type != "cpu":
            raise UnsupportedError(f"the K/V pool is {pool.k.dtype} {tuple(pool.k.shape)} on {pool.k.device}")
        logits = torch.empty(len(batch.logit_rows), c.vocab_size)
        hidden = {tap: torch.empty(n, h) for tap in batch.taps}
        taps = (ctypes.c_void_p * (c.num_hidden_layers + 2))()
        for tap, out in hidden.items():
            if not -1 <= tap <= c.num_hidden_layers:
                raise OptionError("taps", tap, f"-1..{c.num_hidden_layers}")
            taps[tap] = out.data_ptr()
        arrays = [
            np.ascontiguousarray(x, np.int32)
            for x in (
                batch.positions, batch.slots, batch.context_of, batch.context, batch.context_ptr, batch.local,
                batch.local_ptr, batch.logit_rows,
            )
        ]
        tokens, embeds, rows, count = np.ascontiguousarray(batch.tokens, np.int64), None, None, 0
        if batch.embeds is not None:
            embeds, count = batch.embeds.detach().to("cpu", torch.float32).contiguous(), len(batch.embeds)
            rows = np.ascontiguousarray(batch.embed_rows, np.int32)
        b = _Batch(
            n, len(batch.context_ptr) - 1, len(logits), count, pool.slots, _at(tokens), *map(_at, arrays), _at(rows),
            _at(embeds), _at(pool.k), _at(pool.v), _at(pool.positions), _at(logits), ctypes.addressof(taps),
            pool.k.dtype == torch.bfloat16,
        )
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
            what = ("position", "", "slot", "context", "row")[code - 1]
            raise IndexError(f"the batch names a {what} that does not exist")
        return ForwardResult(logits, hidden)

    def __del__(self) -> None:
        if hasattr(self, "_model"):
            self._lib.stretto_free(ctypes.addressof(self._model))


def _unusual(model: Transformer) -> str | None:
    """The part of ``model`` that the native code does not know, or None."""
    if model.device.type != "cpu":
        return f"it is on {model.device}"
    for block in model.layers:
        parts = type(block), type(block.self_attn), type(block.mlp)
        if parts not in ((Block, Attention, MLP), (Block, Attention, SparseMLP)):
            return "a layer is not the standard block"
    return None
