"""By hand: ``python tests/stress_serving.py [MINUTES] [CLIENTS]``: mixed methods, aborts and disconnects for minutes.

Every request that was waited for is answered once and equals its solo run; at the end no slot is held and the memory of the
engine has not grown since the first minute. Prints one JSON object; exit code 1 when anything is wrong.
"""

import http.client
import json
import random
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from serving import Server

METHODS = ["ar", "ngram", "suffix", "jacobi", "lookahead"]
TEXTS = [f"Reverse: {a} {b} 7 {a}" for a in range(6) for b in range(4)]


def body(i: int) -> dict:
    """Request ``i`` of 48: half of them sampled, with a seed."""
    warm = {"temperature": 0.8, "seed": i} if i % 2 else {"temperature": 0}
    return {"model": "zoo:tiny", "prompt": TEXTS[i % len(TEXTS)], "max_tokens": 16 + i % 64, "ignore_eos": True, **warm}


def rss(pid: int) -> float:
    """MiB of resident memory."""
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


class Clients:
    def __init__(self, server: Server, solo: list[str]):
        self.server, self.solo = server, solo
        self.counts = dict(whole=0, streamed=0, left=0, refused=0, wrong=0, unhealthy=0)
        self.lock, self.stop, self.first = threading.Lock(), False, None

    def count(self, name: str) -> None:
        with self.lock:
            self.counts[name] += 1

    def run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.stop:
            i, way = rng.randrange(48), rng.choice(["wait", "stream", "stream", "leave", "leave waiting"])
            try:
                self.one(i, rng.choice(METHODS), way, rng)
            except Exception as error:  # a client that fails is a wrong answer, never one fewer client
                self.count("wrong")
                self.first = self.first or f"{way}: {type(error).__name__}: {error}"

    def one(self, i: int, method: str, way: str, rng: random.Random) -> None:
        connection = http.client.HTTPConnection(urlsplit(self.server.url).netloc, timeout=300)
        sent = {**body(i), "method": method, "stream": way in ("stream", "leave")}
        connection.request("POST", "/v1/completions", json.dumps(sent), {"Content-Type": "application/json"})
        if way == "leave waiting":
            time.sleep(rng.random() * 0.3)
            connection.close()
            return self.count("left")
        answer = connection.getresponse()
        if answer.status != 200:
            answer.read()
            self.count("refused" if answer.status == 429 else "wrong")
        elif way == "leave":
            for _ in range(rng.randrange(6)):
                answer.readline()
            self.count("left")
        elif way == "wait":
            text = json.loads(answer.read())["choices"][0]["text"]
            self.count("whole" if text == self.solo[i] else "wrong")
        else:
            events = [e for e in answer.read().decode().split("\n\n") if e.startswith("data: ")]  # not the pings
            chunks = [c for e in events[:-1] for c in json.loads(e[6:])["choices"]]
            text, ends = "".join(c["text"] for c in chunks), sum(bool(c["finish_reason"]) for c in chunks)
            self.count("streamed" if text == self.solo[i] and ends == 1 and events[-1] == "data: [DONE]" else "wrong")
        connection.close()


def main(minutes: float, clients: int) -> int:
    server = Server("--deterministic", "--max-num-seqs", "64", "--max-queued-requests", str(clients))
    solo = [server.post("/v1/completions", {**body(i), "method": "ar"})[2]["choices"][0]["text"] for i in range(48)]
    crowd = Clients(server, solo)
    threads = [threading.Thread(target=crowd.run, args=(k,), daemon=True) for k in range(clients)]
    for thread in threads:
        thread.start()
    start, memory = time.monotonic(), []
    while time.monotonic() - start < 60 * minutes:
        time.sleep(min(15, 60 * minutes / 8))
        status, _, health = server.get("/health", timeout=120)
        crowd.count("unhealthy") if status != 200 else memory.append(rss(health["pid"]))
    crowd.stop = True
    for thread in threads:
        thread.join(300)
    end = time.monotonic() + 30
    while (health := server.get("/health")[2])["requests"] and time.monotonic() < end:
        time.sleep(0.1)
    clean = health["running"] == health["waiting"] == health["requests"] == 0 and health["used"] == health["prefix"]
    code = server.stop()
    half = max(1, len(memory) // 2)
    grown = max(memory[half:], default=0.0) - max(memory[:half], default=0.0)
    bad = crowd.counts["wrong"] + crowd.counts["unhealthy"] + sum(t.is_alive() for t in threads)
    good = clean and code == 0 and not bad and grown < 64
    print(json.dumps({"good": good, "clients": clients, "minutes": minutes, **crowd.counts, "slots_free": clean, "first_failure": crowd.first,
                      "engine_mib": [round(m) for m in memory], "grown_mib": round(grown, 1), "exit": code}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 3, int(sys.argv[2]) if len(sys.argv) > 2 else 500))
