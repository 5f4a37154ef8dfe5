"""llama.cpp's own server as a process: ``python -m stretto.bench.llama_server FILE --port P --threads N --slots S``.

Its program ``llama-server`` where there is one; else the same server out of the package xllamacpp. Every slot has
``--context`` tokens; requests that run at the same time share forwards (continuous batching is on).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import threading

__all__ = ["offered"]


def offered() -> str | None:
    """Which of the two there is."""
    if shutil.which("llama-server"):
        return "llama-server"
    return "xllamacpp" if importlib.util.find_spec("xllamacpp") else None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    for name, value in (("--port", 8080), ("--threads", 1), ("--slots", 16), ("--context", 1024)):
        parser.add_argument(name, type=int, default=value)
    given = parser.parse_args()
    if offered() == "llama-server":
        program = shutil.which("llama-server") or ""
        os.execv(program, [
            program, "-m", given.file, "--host", "127.0.0.1", "--port", str(given.port), "-t", str(given.threads),
            "-tb", str(given.threads), "-np", str(given.slots), "-c", str(given.slots * given.context), "--jinja",
        ])
    import xllamacpp  # pyright: ignore[reportMissingImports]

    params = xllamacpp.CommonParams()
    params.model.path, params.port = given.file, given.port
    params.n_parallel, params.n_ctx = given.slots, given.slots * given.context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given.threads
    server = xllamacpp.Server(params)
    print(server.listening_address, xllamacpp.get_system_info(), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
