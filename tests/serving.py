"""A running ``stretto serve`` for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Server:
    """``stretto serve`` on a free port; ``url``, ``pid``."""

    def __init__(self, *args: str, model: str = "zoo:tiny"):
        env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stretto", "serve", model, "--port", "0", "--json", *args],
            stdout=subprocess.PIPE, env=env, text=True,
        )
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"the server ended with code {self.process.wait()}")
        self.facts = json.loads(line)
        self.url = self.facts["url"]

    def get(self, path: str, timeout: float = 60, **headers: str):
        return self._open(urllib.request.Request(self.url + path, headers=headers), timeout)

    def post(self, path: str, body, timeout: float = 120, **headers: str):
        """(status, headers, JSON or text)"""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        return self._open(request, timeout)

    def _open(self, request, timeout: float):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, answer.headers, _read(answer)
        except urllib.error.HTTPError as error:
            return error.code, error.headers, _read(error)

    def chat(self, text: str, **more):
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", {"model": "zoo:tiny", "messages": messages, "temperature": 0, **more})

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout)
        finally:
            self.process.kill()
            self.process.stdout.close()


def _read(answer):
    text = answer.read().decode()
    return json.loads(text) if "json" in answer.headers.get("content-type", "") else text
