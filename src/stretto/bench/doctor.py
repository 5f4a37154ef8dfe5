"""What this machine can do: processor, threads, fast paths, the shipped models; measured, not assumed."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stretto.errors import OptionError, StrettoError
from stretto.zoo.models import MODELS, available

__all__ = ["doctor"]

# extra -> the module that only it brings
EXTRAS = {
    "serve": "fastapi",
    "grammar": "llguidance",
    "bench": "matplotlib",
    "cluster": "ray",
    "dev": "pytest",
}
ROWS = (1, 2, 7, 8, 15, 16, 17, 31)  # numbers of rows whose bits are compared with those of 32
STREAM_BYTES = 1 << 26  # weights of the bandwidth probe: more than a processor's cache

Probe = Callable[[], tuple[bool, str]]


def doctor(threads: int | None = None) -> dict[str, Any]:
    """{"ok", "checks": [{"name", "ok", "needed", "value"}]}: ``ok`` while everything needed is there.

    A check that is not needed only says what could be faster or is not installed. Raises OptionError
    for an absurd number of threads.
    """
    if threads is not None and threads < 1:
        raise OptionError("threads", threads, "a whole number from 1")
    import torch

    if threads:
        torch.set_num_threads(threads)
    checks: list[dict[str, Any]] = []

    def add(name: str, probe: Probe, *, needed: bool = False) -> None:
        try:
            ok, value = probe()
        except (StrettoError, RuntimeError, OSError, AttributeError, ImportError) as error:
            ok, value = False, (str(error).splitlines() or [type(error).__name__])[0]
        checks.append({"name": name, "ok": ok, "needed": needed, "value": value})

    add("python", lambda: (sys.version_info >= (3, 11), platform.python_version()), needed=True)
    add(
        "torch",
        lambda: (True, f"{torch.__version__}, {torch.get_num_threads()} threads"),
        needed=True,
    )
    add("processor", _processor)
    add("bfloat16 in hardware", _bf16)
    add("gpu", _gpu)
    add("free memory", _memory)
    add("native forward", _native)
    add("packed linears", _packed)
    with torch.inference_mode():
        add("native linears", _native_linears)
        add("bandwidth of linears", _bandwidth)
        add("row bits, plain linear", lambda: _row_bits(packed=False))
        add("row bits, packed linear", lambda: _row_bits(packed=True))
    for extra, module in EXTRAS.items():
        add(f"extra {extra}", lambda m=module: _installed(m))
    for name in MODELS:
        add(f"zoo:{name}", lambda n=name: _model(n), needed=name in available())
    return {"ok": all(c["ok"] for c in checks if c["needed"]), "checks": checks}


def _processor() -> tuple[bool, str]:
    import torch

    from stretto.bench.provenance import machine

    found = machine()
    return (
        True,
        f"{found['cpu']}, {found['cores']} cores, {torch.backends.cpu.get_cpu_capability()}",
    )


def _bf16() -> tuple[bool, str]:
    import torch

    from stretto.models.checkpoint import auto_dtype

    good = auto_dtype("cpu") is torch.bfloat16
    name = "bfloat16" if good else "float32"
    return good, f"{'multiplied natively' if good else 'missing'}: dtype 'auto' means {name} here"


def _gpu() -> tuple[bool, str]:
    import torch

    return (
        torch.cuda.is_available(),
        torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    )


def _memory() -> tuple[bool, str]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = int(next(x for x in lines if x.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free > 2 << 30, f"{free / 2**30:.1f} GiB"


def _native() -> tuple[bool, str]:
    """Whether a shipped model runs on the compiled forward, or why not."""
    from stretto.models.checkpoint import load_config
    from stretto.models.native import NativeForward

    if not available():
        return False, "no model to try it on"
    reason = NativeForward.supported(load_config(MODELS[available()[0]].folder))
    return reason is None, reason or "compiled and usable"


def _packed() -> tuple[bool, str]:
    import torch

    from stretto.models.linear import can_pack

    have = [str(d).removeprefix("torch.") for d in (torch.float32, torch.bfloat16) if can_pack(d)]
    return bool(have), ", ".join(have) or "oneDNN has no packed kernel here"


def _linear(inputs: int, outputs: int, *, packed: bool) -> tuple[Any, Callable[[Any], Any]]:
    """32 random rows, and a linear layer in the dtype that "auto" means here."""
    import torch

    from stretto.models.checkpoint import auto_dtype
    from stretto.models.linear import InferenceLinear

    kind = auto_dtype("cpu")
    make = torch.Generator().manual_seed(0)
    weight = torch.randn(128, inputs, generator=make).to(kind).repeat(outputs // 128, 1)
    x = torch.randn(32, inputs, generator=make).to(kind)
    if not packed:
        return x, lambda rows: torch.nn.functional.linear(rows, weight)
    layer = InferenceLinear([weight])
    if not layer.packed:
        raise StrettoError("oneDNN has no packed kernel for this dtype here")
    return x, layer


def _row_bits(*, packed: bool) -> tuple[bool, str]:
    """Do a row's bits depend on how many rows there are, or on its place among them?"""
    import torch

    x, linear = _linear(768, 1024, packed=packed)
    whole = linear(x)
    count = [n for n in ROWS if not torch.equal(linear(x[:n]), whole[:n])]
    place = not torch.equal(linear(x.flip(0)).flip(0), whole)
    if not count and not place:
        return True, "equal for any number of rows, at any place"
    below = [n for n in count if n >= 16]
    text = (
        f"differ at {', '.join(map(str, count))} rows" if count else "equal for any number of rows"
    )
    text += "; the place matters" if place else "; the place does not matter"
    return False, text + (
        "; from 16 rows on they are equal" if count and not below and not place else ""
    )


def _bandwidth() -> tuple[bool, str]:
    """Speed at which weights are read by a linear of one row, plain and packed, and what 16 rows cost."""
    parts, best = [], {}
    for name, packed in (("plain", False), ("packed", True)):
        try:
            x, linear = _linear(4096, STREAM_BYTES // 4096 // _width(), packed=packed)
        except StrettoError:
            parts.append("packed: no kernel")
            continue
        one, many = _seconds(linear, x[:1]), _seconds(linear, x[:16])
        best[name] = one
        parts.append(
            f"{name} {STREAM_BYTES / one / 1e9:.0f} GB/s, 16 rows cost {many / one:.1f} times one"
        )
    return "packed" in best and best["packed"] <= best["plain"] * 1.05, "; ".join(parts)


def _native_linears() -> tuple[bool, str]:
    """How fast the native forward reads weights of one row, and what 16 rows cost, by arithmetic."""
    import torch

    from stretto.models.native_linear import PackedLinear, linear, multiplies_halves

    rows, parts, fastest = torch.randn(16, 4096, generator=torch.Generator().manual_seed(0)), [], {}
    kinds = {"float32": (torch.float32, False), "bfloat16 in float32 arithmetic": (torch.bfloat16, False)}
    if multiplies_halves():
        kinds["bfloat16 in half precision"] = (torch.bfloat16, True)
    for name, (dtype, halves) in kinds.items():
        outputs = STREAM_BYTES // 4096 // dtype.itemsize
        packed = PackedLinear(torch.zeros(1, 4096).expand(outputs, -1), dtype=dtype, halves=halves)
        one, many = (_seconds(lambda x, p=packed: linear(x, p), rows[:n]) for n in (1, 16))
        fastest[name] = many / outputs
        parts.append(f"{name} {STREAM_BYTES / one / 1e9:.0f} GB/s, 16 rows cost {many / one:.1f} times one")
    return True, f"{'; '.join(parts)}; fastest for 16 rows: {min(fastest, key=fastest.__getitem__)}"


def _width() -> int:
    from stretto.models.checkpoint import auto_dtype

    return auto_dtype("cpu").itemsize


def _seconds(function: Callable[[Any], Any], x: Any, runs: int = 4) -> float:
    """The quickest of some runs after a warm-up."""
    function(x)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function(x)
        times.append(time.perf_counter() - start)
    return min(times)


def _installed(module: str) -> tuple[bool, str]:
    found = importlib.util.find_spec(module) is not None
    return found, f"{module} is {'' if found else 'not '}installed"


def _model(name: str) -> tuple[bool, str]:
    from stretto.models.checkpoint import load
    from stretto.zoo.models import resolve

    model = load(resolve(f"zoo:{name}"))
    count = sum(p.numel() for p in model.parameters())
    return True, f"{count / 1e6:.1f} M parameters, {model.config.attention} attention"
