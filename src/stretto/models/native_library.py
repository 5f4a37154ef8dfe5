"""The native forward's C: its structures, its compilation at first use, and the threads it runs on.

The sources in ``csrc`` are compiled by the machine's C compiler and kept in the user's cache directory.
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
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Batch", "Chain", "Features", "Guesses", "Heads", "Layer", "Mat", "Model", "Team", "address", "array_address",
    "build", "team",
]

SOURCES = ("native.h", "tiles.h", "linear.c", "half.c", "attention.c", "entries.c", "forward.c", "chain.c", "heads.c")
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")
TUNE = ("-march=native", "-mcpu=native", "-O3")  # the first that the compiler takes


def _struct(*fields: tuple[Any, str]) -> type[ctypes.Structure]:
    """A structure of ``native.h``: (type, names), in order."""
    listed = [(name, kind) for kind, names in fields for name in names.split()]
    return type("Struct", (ctypes.Structure,), {"_fields_": listed})


INT, LONG, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
Mat = _struct((POINTER, "w bias"), (INT, "n k format gated"), (ctypes.c_float, "scale"))
Team = _struct((POINTER, "parallel"), (INT, "threads"))
Layer = _struct(
    (Mat, "qkv o gate_up down router"),
    (POINTER, "expert_gate_up expert_down norm1 norm2 q_norm k_norm"),
    (INT, "window experts top_k renormalize"),
)
Model = _struct(
    (Team, "team"), (INT, "layers_n H A G D V I experts top_k embed_bf16 angles"), (ctypes.c_float, "eps scale"),
    (POINTER, "embed norm cos sin layers"), (Mat, "head"), (POINTER, "scratch"), (ctypes.c_size_t, "scratch_bytes"),
)  # fmt: skip
Batch = _struct(
    (LONG, "n contexts n_context n_local k n_embeds S kv_bf16 n_entries known"),
    (POINTER, "tokens ints embeds k_pool v_pool pool_positions logits best taps entries"),
    (POINTER, "positions slots context_of context_ptr local_ptr context local logit_rows embed_rows"),
    (LONG, "n_runs"), (POINTER, "run_ptr run_start run_at sure"),
)  # fmt: skip
Chain = _struct(
    (LONG, "cached given most position classes"), (POINTER, "context slots tokens ints borders rates found"),
    (ctypes.c_float, "gain least"),
)  # fmt: skip
Guesses = _struct(
    (LONG, "most known classes"), (POINTER, "head borders rates logits tokens sure"), (ctypes.c_float, "gain least"),
)  # fmt: skip
Heads = _struct(
    (LONG, "version H A root"), (POINTER, "e keys values norm out_norm query mats work"),
    (ctypes.c_float, "eps unused"),
)  # fmt: skip
Features = _struct(
    (POINTER, "embed"), (LONG, "embed_bf16 normed"), (POINTER, "entry zeros features inputs x out final"),
)  # fmt: skip


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


def build() -> Path:
    """The compiled library; OSError or CalledProcessError if that is not possible."""
    found = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), "")
    compiler = shlex.split(os.environ.get("CC") or found)
    if not compiler or not shutil.which(compiler[0]):
        raise FileNotFoundError("no C compiler was found (cc, gcc or clang; CC names another)")
    folder = resources.files("stretto.models") / "csrc"
    texts = {name: (folder / name).read_text() for name in SOURCES}
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256(repr((texts, compiler, FLAGS, TUNE, version, _processor())).encode()).hexdigest()
    target = _cache_dir() / f"{key[:24]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        for name, text in texts.items():
            (Path(work) / name).write_text(text)
        for tune in TUNE:
            command = [*compiler, *FLAGS, tune, *(s for s in SOURCES if s.endswith(".c")), "-lm", "-o", "out.so"]
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300)
            if done.returncode == 0:
                os.replace(Path(work) / "out.so", target)  # other processes see the whole file or none
                return target
    lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
    told = next((line for line in lines if "error" in line), lines[0])
    raise OSError(f"the C compiler {compiler[0]!r} failed: {told}")


@lru_cache(maxsize=1)
def _openmp() -> int | None:
    """The address of GOMP_parallel in the runtime that torch has loaded.

    Its pool of threads is used, not a second one: two pools that wait by spinning would fight for the cores.
    """
    suffix = "dylib" if sys.platform == "darwin" else "so"
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))
        return ctypes.cast(torch_cpu.GOMP_parallel, POINTER).value
    except (OSError, AttributeError):
        return None


def team(threads: int | None) -> Any:
    return Team(_openmp(), (threads or torch.get_num_threads()) if _openmp() else 1)


def address(x: Tensor | np.ndarray | None) -> int | None:
    """The address of the first element."""
    if x is None:
        return None
    return x.data_ptr() if isinstance(x, Tensor) else array_address(x)


def array_address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]
