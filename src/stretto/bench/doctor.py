"""What this machine can do: processor, threads, fast paths, the shipped models; measured, not assumed."""

from __future__ import annotations

import importlib.util
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

from stretto.errors import OptionError, StrettoError
from stretto.zoo.models import available, resolve

__all__ = ["doctor"]

EXTRAS = {
    "serve": "fastapi", "grammar": "llguidance", "bench": "matplotlib", "cluster": "ray", "dev": "pytest",
}


def doctor(threads: int | None = None) -> dict[str, Any]:
    """{"ok", "checks": [{"name", "ok", "value"}]}; a failed check that only costs speed does not make ``ok`` false.

    Raises OptionError for an absurd number of threads.
    """
    if threads is not None and threads < 1:
        raise OptionError("threads", threads, "a whole number from 1")
    import torch

    if threads:
        torch.set_num_threads(threads)
    checks: list[dict[str, Any]] = []

    def add(name: str, probe: Callable[[], tuple[bool, str]]) -> None:
        try:
            ok, value = probe()
        except (StrettoError, RuntimeError, OSError, AttributeError, NotImplementedError) as error:
            ok, value = False, str(error).splitlines()[0]
        checks.append({"name": name, "ok": ok, "value": value})

    add("python", lambda: (sys.version_info >= (3, 11), platform.python_version()))
    add("torch", lambda: (True, f"{torch.__version__}, {torch.get_num_threads()} threads"))
    add("processor", lambda: (True, f"{_cpu()}, {torch.backends.cpu.get_cpu_capability()}"))
    add("bfloat16 in hardware", _bf16)
    add("cuda", lambda: (torch.cuda.is_available(), _cuda()))
    add("free memory", _memory)
    add("native forward", _native)
    add("packed linears", _packed)
    add("row bits, plain linear", lambda: _row_bits(_plain_linear))
    add("row bits, packed linear", lambda: _row_bits(_packed_linear))
    for extra, module in EXTRAS.items():
        found = importlib.util.find_spec(module) is not None
        add(f"extra {extra}", lambda f=found, m=module: (f, m if f else f"{m} is not installed"))
    for name in available():
        add(f"zoo:{name}", lambda n=name: _model(resolve(f"zoo:{n}")))
    needed = ("python", "torch", *(f"zoo:{n}" for n in available()))
    return {"ok": all(c["ok"] for c in checks if c["name"] in needed), "checks": checks}


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _bf16() -> tuple[bool, str]:
    import torch

    from stretto.models.checkpoint import auto_dtype

    dtype = auto_dtype("cpu")
    why = "multiplied natively" if dtype is torch.bfloat16 else "missing: dtype 'auto' means float32 here"
    return dtype is torch.bfloat16, why


def _cuda() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _memory() -> tuple[bool, str]:
    with open("/proc/meminfo", encoding="utf-8") as file:
        found = dict(line.split(":", 1) for line in file)
    free = int(found["MemAvailable"].split()[0]) / (1 << 20)
    return free > 2, f"{free:.1f} GiB"


def _native() -> tuple[bool, str]:
    from stretto.models.config import ModelConfig
    from stretto.models.native import NativeForward

    folder = next((resolve(f"zoo:{n}") for n in available()), None)
    if folder is None:
        return False, "no model to ask for"
    from stretto.models.checkpoint import load_config

    config: ModelConfig = load_config(folder)
    reason = NativeForward.supported(config)
    return reason is None, reason or "compiled and usable"


def _packed() -> tuple[bool, str]:
    import torch

    from stretto.models.linear import can_pack

    have = [str(d).removeprefix("torch.") for d in (torch.float32, torch.bfloat16) if can_pack(d)]
    return bool(have), ", ".join(have) or "oneDNN has no packed kernel here"


def _plain_linear() -> tuple[Any, Any]:
    import torch

    x, w = torch.randn(32, 768), torch.randn(1024, 768)
    return x, lambda rows: torch.nn.functional.linear(rows, w)


def _packed_linear() -> tuple[Any, Any]:
    import torch

    from stretto.models.linear import InferenceLinear

    x, layer = torch.randn(32, 768), InferenceLinear([torch.randn(1024, 768)])
    if not layer.packed:
        raise StrettoError("oneDNN has no packed kernel here")
    return x, layer


def _row_bits(make: Callable[[], tuple[Any, Any]]) -> tuple[bool, str]:
    """Do a row's bits depend on how many rows there are? Also says the time of 16 rows against one."""
    import torch

    x, linear = make()
    whole = linear(x)
    differ = [n for n in (1, 2, 7, 8, 15, 16, 17) if not torch.equal(linear(x[:n]), whole[:n])]
    times = []
    for n in (1, 16):
        best = 1e9
        for _ in range(20):
            start = time.perf_counter()
            linear(x[:n])
            best = min(best, time.perf_counter() - start)
        times.append(best)
    text = f"16 rows cost {times[1] / times[0]:.1f} times one row; "
    return not differ, text + ("bits equal for any number of rows" if not differ else f"bits differ at {differ} rows")


def _model(folder: Any) -> tuple[bool, str]:
    from stretto.models.checkpoint import load

    model = load(folder)
    count = sum(p.numel() for p in model.parameters())
    return True, f"{count / 1e6:.1f} M parameters, {model.config.attention} attention"
