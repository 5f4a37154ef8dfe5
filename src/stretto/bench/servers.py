"""``stretto bench --servers``: other servers beside ours, same weights, same load, in turns.

Every server runs in a process of its own and waits while another one is asked. A full run is kept in
``evidence/servers.json``.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from stretto.bench import llama_server
from stretto.bench.gguf_file import write_gguf
from stretto.bench.load import Load, fire
from stretto.bench.peers import SHAPES, compared
from stretto.bench.peers_engines import write_checkpoint
from stretto.bench.provenance import provenance
from stretto.zoo.models import resolve
from stretto.zoo.workbook import TASKS, examples

__all__ = ["STREAMS", "Running", "measure_servers"]

STREAMS = (1, 4, 16)  # requests at the same time
TOKENS = 32  # of an answer at most
STARTS = 180.0  # seconds that a server may take to answer first
ALL_AT_ONCE = "transformers serve, continuous batching"
LLAMA = "llama.cpp server"


class Running:
    """A server process on a free port; ``url``. Raises RuntimeError where it does not come up."""

    def __init__(self, command: Sequence[str], ready: str, threads: int, log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{port}", log
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        with log.open("wb") as out:
            self._process = subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=out, env=env)
        self._wait(ready)

    def _wait(self, ready: str) -> None:
        import urllib.error
        import urllib.request

        end = time.monotonic() + STARTS
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with urllib.request.urlopen(self.url + ready, timeout=5):
                    return
            except (OSError, urllib.error.URLError):
                time.sleep(0.2)
        self.close()
        tail = self._log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise RuntimeError(f"the server did not come up: {tail[0][:200]}")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _commands(path: str, threads: int, folder: Path) -> dict[str, tuple[list[str], str] | str]:
    """Name -> (command, path that answers when it is up), or why there is none. ``folder``: for a peer's files."""
    ours = [sys.executable, "-m", "stretto", "serve", path, "--method", "ar", "--threads", str(threads)]
    out: dict[str, tuple[list[str], str] | str] = {"stretto": (ours, "/ready")}
    beside = Path(sys.executable).with_name("transformers")
    theirs = str(beside) if beside.exists() else shutil.which("transformers")
    absent = "not installed: pip install 'transformers[serving]'"
    plain = [theirs or "", "serve", path, "--host", "127.0.0.1", "--device", "cpu", "--dtype", "bfloat16"]
    out["transformers serve"] = (plain, "/health") if theirs else absent
    out[ALL_AT_ONCE] = ([*plain, "--continuous-batching"], "/health") if theirs else absent
    out[LLAMA] = "not installed: pip install xllamacpp, or llama-server on the PATH"
    if llama_server.offered():
        file = folder / "model.gguf"
        write_gguf(Path(path), file)
        out[LLAMA] = (
            [sys.executable, "-m", "stretto.bench.llama_server", str(file), "--threads", str(threads)], "/health",
        )
    return out


def _asked(url: str, model: str, streams: int, seed: int) -> float:
    """Tokens a second of ``streams`` requests at the same time, twice in a row."""
    names = list(TASKS)
    texts = [examples(names[i % len(names)], "test", 1, seed + i)[0].prompt for i in range(2 * streams)]
    load = Load(requests=len(texts), rate=0, concurrency=streams, max_tokens=TOKENS)
    shots = fire(url, load, texts, model=model)
    errors = [s.error for s in shots if s.error]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(texts)} requests failed: {errors[0]}")
    seconds = max(s.ended for s in shots) - min(s.sent for s in shots)
    return sum(s.tokens for s in shots) / seconds  # random weights may end at once, without any text


def measure_servers(
    *, shapes: Sequence[str] = (), quick: bool = False, threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """{"rows", "absent", "provenance"}: tokens a second of our server beside each other one at 1, 4 and 16 streams;
    ``ratio`` above 1 = ours is faster, with its range over the rounds.

    ``shapes``: "zoo:tiny" (its trained weights), or names of SHAPES (random weights); default both tiny and 125M.
    """
    import torch

    say, count = progress or (lambda text: None), threads or torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    absent: dict[tuple[str, str], str] = {}
    for shape in shapes or (("zoo:tiny",) if quick else ("zoo:tiny", "125M")):
        with tempfile.TemporaryDirectory(prefix="stretto-servers-") as folder, ExitStack() as stack:
            path = _weights(shape, Path(folder))
            running: dict[str, Running] = {}
            for name, command in _commands(path, count, Path(folder)).items():
                say(f"servers: {name} starts with {shape}")
                if isinstance(command, str):
                    absent[name, "all"] = command
                    continue
                try:
                    running[name] = Running(*command, count, Path(folder) / f"{len(running)}.log")
                except RuntimeError as error:
                    absent[name, shape] = str(error)
                    continue
                stack.callback(running[name].close)
            rows += _beside(running, path, shape, 1 if quick else 3, absent, say)
    gone = [{"peer": name, "what": what, "reason": reason} for (name, what), reason in absent.items()]
    about = provenance(threads=count, tokens=TOKENS, quick=quick, llama=llama_server.offered())
    return {"rows": rows, "absent": gone, "provenance": about}


def _weights(shape: str, folder: Path) -> str:
    if shape.startswith("zoo:"):
        return str(resolve(shape))
    return str(write_checkpoint(folder / "model", SHAPES[shape] | {"vocab_size": SHAPES["tiny"]["vocab_size"]}))


def _beside(
    running: dict[str, Running], model: str, shape: str, rounds: int, absent: dict[tuple[str, str], str],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    out = []
    for streams in STREAMS:
        say(f"servers: {streams} streams at {shape}")
        found: dict[str, list[float]] = {name: [] for name in running}
        for turn in range(rounds + 1):  # the first is a warm-up
            for name, server in list(running.items()):
                if name not in found:
                    continue
                try:
                    speed = _asked(server.url, model, streams, 100 * turn)
                except RuntimeError as error:
                    absent[name, f"{streams} streams at {shape}"] = str(error)
                    del found[name]
                    continue
                if turn:
                    found[name].append(speed)
        ours = found.pop("stretto", [])
        out += [
            compared(f"{streams} streams", shape, "tokens/s", name, ours, theirs)
            for name, theirs in found.items() if ours and theirs
        ]
    return out
