"""The engine process: a model, the engine's thread, and a socket to the front.

Run by the front as ``python -m stretto.serving.worker FD``. The main thread runs ``Loop``; one thread reads the socket,
one writes it, a third compiles grammars: none of them touches the engine. When the front is gone, so is this process;
when the engine dies, its exit code is 1.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stretto.engine.grammar import compile_constraint
from stretto.engine.params import SamplingParams
from stretto.errors import StrettoError, UnsupportedError
from stretto.llm import LLM
from stretto.serving.loop import Loop, error_of
from stretto.serving.protocol import encode, merge, receive

__all__ = ["Prepare", "main", "open_llm"]


def open_llm(message: dict[str, Any]) -> LLM:
    """The model of an "open" message."""
    return LLM(message["model"], **message.get("options", {}))


def facts(llm: LLM) -> dict[str, Any]:
    """What the front must know of the model."""
    return {
        "op": "ready", "pid": os.getpid(), "model": llm.model_name, "max_model_len": llm.max_model_len,
        "vocabulary": llm.runner.vocabulary, "attention": llm.config.attention, "backend": llm.runner.backend,
        "deterministic": llm.deterministic, "slots": llm.runner.alloc.total, "stop_ids": list(llm.host.stop_ids),
    }


class Prepare:
    """Turns the messages of the socket into those of the inbox; what takes long is done beside, not in the engine."""

    def __init__(self, llm: LLM, loop: Loop):
        self._llm, self._loop = llm, loop
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiling: set[str] = set()
        self._lock = threading.Lock()  # an abort is seen before its request is posted, or after: never in between

    def __call__(self, message: dict[str, Any]) -> None:
        given = message.get("params") or {}
        if message["op"] == "add" and (given.get("regex") is not None or given.get("json_schema") is not None):
            with self._lock:
                self._compiling.add(message["id"])
            self._pool.submit(self._compile, message)
            return
        with self._lock:
            if message["op"] == "abort" and message["id"] in self._compiling:
                self._compiling.discard(message["id"])
                return
            self._loop.post(message)

    def _compile(self, message: dict[str, Any]) -> None:
        try:
            params = SamplingParams.make(**message["params"])
            llm = self._llm
            constraint = compile_constraint(llm.tokenizer, params, llm.host.stop_ids, llm.config.vocab_size)
        except Exception as error:  # a compiler of another party
            refused = error if isinstance(error, StrettoError) else UnsupportedError(f"the grammar: {error}")
            done = {"op": "refuse", "id": message["id"], "error": error_of(refused)}
        else:
            done = {**message, "made": params, "constraint": constraint}
        with self._lock:
            if message["id"] in self._compiling:
                self._compiling.discard(message["id"])
                self._loop.post(done)


def main(fd: int) -> int:
    """Serve the socket ``fd``; the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=fd)
    opened = receive(sock)
    if opened is None:
        return 0
    out: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    writer = threading.Thread(target=_write, args=(sock, out), name="writer", daemon=True)
    writer.start()
    code = 0
    try:
        llm = open_llm(opened)
        if opened.get("warm", True):
            llm.generate([[0]], SamplingParams(max_tokens=1, temperature=0), method=opened.get("plain", "ar"))
            llm.runner.curve()
        loop = Loop(llm, out.put, opened.get("sessions"))
        if opened.get("online"):
            learn = opened["online"]
            loop.learn(Path(learn["folder"]), opened.get("plain", "ar"), learn["record"], learn["min_gain"])
        threading.Thread(target=_read, args=(sock, Prepare(llm, loop)), name="reader", daemon=True).start()
        out.put(facts(llm))
        loop.run()
    except StrettoError as error:
        out.put({"op": "failed", "error": error_of(error)})
        code = 1
    finally:
        out.put(None)
        writer.join(5)
    return code


def _read(sock: socket.socket, deliver: Prepare) -> None:
    while (message := receive(sock)) is not None:
        deliver(message)
    os._exit(0)  # nobody is left to answer


def _write(sock: socket.socket, out: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Send what there is. While the front is slow messages wait, and go as one: what waits is bounded by what runs."""
    ended = False
    while not ended:
        messages = [out.get()]
        while not out.empty():
            messages.append(out.get())
        ended = None in messages
        try:
            sock.sendall(b"".join(map(encode, merge([m for m in messages if m is not None]))))
        except OSError:
            os._exit(0)


if __name__ == "__main__":
    try:
        code = main(int(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)
