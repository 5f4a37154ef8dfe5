"""Sessions over HTTP against the same sessions in Python, and beside requests that know nothing of them."""

import http.client
import json
import random
import threading
import time
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from serving import Server
from stretto.llm import LLM

MODEL = "zoo:tiny"
ASK = [{"role": "user", "content": "Mia has 12 apples. Ben brings 7 more. Then Mia gives away 4. How many apples are left?"}]
KEY, OTHER = {"Authorization": "Bearer one"}, {"Authorization": "Bearer two"}


@pytest.fixture(scope="module")
def server():
    running = Server("--deterministic", "--api-key", "one", "--api-key", "two", "--session-timeout", "600")
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def llm():
    return LLM(MODEL, deterministic=True)


class Client:
    def __init__(self, server, headers=KEY, **body):
        self.server, self.headers = server, headers
        status, _, said = server.post("/v1/sessions", {"model": MODEL, "messages": ASK, **body}, **headers)
        assert status == 200, said
        self.id, self.said = said["id"], said

    def do(self, verb, want=200, **body):
        more = {"model": MODEL} if verb == "gen" else {}
        status, _, said = self.server.post(f"/v1/sessions/{self.id}/{verb}", {**more, **body}, **self.headers)
        assert status == want, said
        return said

    def close(self):
        return _delete(self.server, f"/v1/sessions/{self.id}", self.headers)


def _delete(server, path, headers):
    at = urlsplit(server.url)
    line = http.client.HTTPConnection(at.hostname, at.port, timeout=30)
    line.request("DELETE", path, headers=headers)
    answer = line.getresponse()
    return answer.status, json.loads(answer.read())


def _idle(server):
    end = time.monotonic() + 20
    while (stats := server.get("/health")[2])["requests"] or stats["sessions"] or stats["used"] > stats["prefix"]:
        assert time.monotonic() < end, stats
        time.sleep(0.05)


def test_the_same_program_gives_the_same_texts(server, llm):
    with llm.session(llm.tokenizer.chat_ids(ASK)) as s:
        s.gen(max_tokens=6)
        kids = s.fork(prefixes=[" Yes", " No, 3"])
        kids.gen(max_tokens=9)
        mine = [k.text for k in kids]
        s.join(kids, "reencode", separator="\n")
        s.gen(max_tokens=8)
        scores = s.score(" 15")
        text, usage = s.text, replace(s.usage)
        s.gen(max_tokens=9, method="suffix")
        whole = s.text
    c = Client(server)
    c.do("gen", max_tokens=6)
    kids = c.do("fork", prefixes=[" Yes", " No, 3"])["children"]
    said = c.do("gen", threads=kids, max_tokens=9)
    assert [t["text"] for t in said["threads"] if t["id"] in kids] == mine
    assert c.do("join", children=kids, mode="reencode", separator="\n")["texts"] == mine
    said = c.do("gen", max_tokens=8)
    assert said["threads"][0]["text"] == text and said["generated"][0]["finish_reason"] == "stop"
    scored = c.do("score", text=" 15")
    assert scored["logprobs"] == pytest.approx(scores, abs=1e-6)
    counted = ("evaluated", "generated", "critical_path")
    assert [scored["usage"][k] for k in counted] == [getattr(usage, k) for k in counted]
    assert c.do("gen", max_tokens=9, method="suffix")["threads"][0]["text"] == whole  # how much it drafts depends on time
    c.do("truncate", length=40)
    assert c.do("append", text=" done")["threads"][0]["tokens"] == 40 + len(llm.tokenizer.encode(" done"))
    assert c.close()[0] == 200
    _idle(server)


def test_streamed_threads_say_whose_news_they_bring(server):
    c = Client(server)
    kids = c.do("fork", prefixes=["One", "Two", "Three"])["children"]
    events = c.do("gen", threads=kids, max_tokens=12, stream=True, include_steps=True)
    chunks = [json.loads(e[6:]) for e in events.split("\n\n") if e.startswith("data: {")]
    last = chunks.pop()
    assert last["object"] == "session.end"
    whole = {k: "".join(x["text"] for x in chunks if x["thread"] == k) for k in kids}
    texts = {t["id"]: t["text"] for t in last["threads"]}
    assert [texts[k] for k in kids] == [p + whole[k] for p, k in zip(("One", "Two", "Three"), kids, strict=True)]
    tokens = [t for x in chunks if x["thread"] == kids[0] for t in x["stretto"]["tokens"]]
    assert len(tokens) == 12 and len({f for _, f in tokens}) == 12
    c.close()
    _idle(server)


def test_requests_beside_a_session_are_answered_as_ever(server):
    alone = server.post("/v1/chat/completions", {"model": MODEL, "messages": ASK, "temperature": 0}, **KEY)[2]
    c = Client(server)
    out = []

    def ask():
        out.append(server.post("/v1/chat/completions", {"model": MODEL, "messages": ASK, "temperature": 0}, **KEY)[2])

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for t in threads:
        t.start()
    for _ in range(4):
        kids = c.do("fork", n=3)["children"]
        c.do("gen", threads=kids, max_tokens=6, temperature=1.0, seed=1)
        c.do("join", children=kids, mode="rotate", separator=" ")
    for t in threads:
        t.join(60)
    assert [o["choices"][0]["message"]["content"] for o in out] == [alone["choices"][0]["message"]["content"]] * 6
    c.close()
    _idle(server)


def test_a_client_that_leaves_leaves_the_thread_as_it_was(server):
    c = Client(server)
    before = c.said["threads"][0]["tokens"]
    at = urlsplit(server.url)
    line = http.client.HTTPConnection(at.hostname, at.port, timeout=30)
    body = json.dumps({"model": MODEL, "max_tokens": 900, "stream": True, "ignore_eos": True})
    line.request("POST", f"/v1/sessions/{c.id}/gen", body, {"Content-Type": "application/json", **KEY})
    line.getresponse().read(200)
    assert "generating" in c.do("fork", 400, n=2)["error"]["message"]
    line.close()
    end = time.monotonic() + 20
    while server.get("/health")[2]["requests"]:
        assert time.monotonic() < end
        time.sleep(0.02)
    said = c.do("gen", max_tokens=3)
    assert said["threads"][0]["tokens"] == before + 3
    c.close()
    _idle(server)


def test_closing_ends_what_runs(server):
    c = Client(server)
    got = []
    run = threading.Thread(target=lambda: got.append(c.do("gen", 400, max_tokens=900, ignore_eos=True)))
    run.start()
    while not server.get("/health")[2]["running"]:
        time.sleep(0.01)
    assert c.close()[0] == 200
    run.join(30)
    assert "closed" in got[0]["error"]["message"]
    _idle(server)


def test_a_session_is_its_owners_alone(server):
    c = Client(server)
    for status, said in (_delete(server, f"/v1/sessions/{c.id}", OTHER), _delete(server, "/v1/sessions/sess-no", KEY)):
        assert status == 404 and said["error"]["code"] == "session_not_found"
    status, _, said = server.post(f"/v1/sessions/{c.id}/gen", {"model": MODEL}, **OTHER)
    assert status == 404 and said["error"]["code"] == "session_not_found"
    assert c.close()[0] == 200
    _idle(server)


@pytest.mark.parametrize(("verb", "body", "named"), [
    ("fork", {"n": 0}, "n"), ("fork", {}, "either n or prefixes"), ("fork", {"n": 9}, "max_threads"),
    ("fork", {"thread": 7, "n": 1}, "thread 7"), ("join", {"children": [3]}, "thread 3"),
    ("join", {"children": [0], "mode": "glue"}, "join mode"), ("gen", {"threads": [0, 0]}, "once"),
    ("gen", {"n": 2}, "fork"), ("gen", {"regex": "a"}, "regex"), ("gen", {"max_tokens": 0}, "max_tokens"),
    ("gen", {"method": "nonsense"}, "nonsense"), ("gen", {"max_tokens": 10**6}, "slots"), ("end", {}, "thread 0"),
    ("append", {"text": [10**6]}, "vocabulary"), ("truncate", {"length": 0}, "truncate"),
    ("append", {"text": [5] * 5000}, "context"),
])  # fmt: skip
def test_what_cannot_be_is_refused(server, verb, body, named):
    c = Client(server, max_threads=4)
    said = c.do(verb, 400, **body)
    assert named in said["error"]["message"]
    assert c.close()[1]["threads"][0]["tokens"] == c.said["threads"][0]["tokens"]


def test_budgets_and_limits():
    running = Server("--max-sessions", "2", "--session-timeout", "1", "--kv-cache-tokens", "1024")
    try:
        first = Client(running, {}, max_path=5)
        assert first.do("gen", max_tokens=50)["usage"]["critical_path"] == 5
        assert "max_path" in first.do("gen", 400)["error"]["message"]
        assert "slots" in first.do("gen", 400, max_tokens=800)["error"]["message"]
        Client(running, {})
        status, _, said = running.post("/v1/sessions", {"model": MODEL, "messages": ASK})
        assert status == 400 and "at most 2" in said["error"]["message"]
        end = time.monotonic() + 20
        while running.get("/health")[2]["sessions"]:
            assert time.monotonic() < end
            time.sleep(0.1)
        first.do("gen", 404)
    finally:
        assert running.stop() == 0


VALUES = [
    None, 0, 1, -1, 3, 10**9, 1.5, True, "", "a", "\ud800", "same", "share", "rotate", "select", "index", [], [0], [0, 0], [10**9],
    ["a", [5]], {}, {"a": 1}, "ar", "suffix",
]  # fmt: skip
FIELDS = """prompt messages max_threads max_path thread text length n prefixes positions children mode order separator select
threads max_tokens temperature stop seed method options stream logit_bias regex timeout""".split()


def test_no_body_makes_an_error_inside(server):
    """Random bodies to every route; half of them nearly right. Afterwards nothing is held."""
    rng, c = random.Random(0), Client(server)
    seen = set()
    for i in range(600):
        if i % 100 == 0:
            c.close()
            c = Client(server)
        verb = rng.choice(("fork", "join", "gen", "append", "truncate", "score", "end", ""))
        body = {"model": MODEL, **{k: rng.choice(VALUES) for k in rng.sample(FIELDS, rng.randint(0, 3))}}
        if rng.random() < 0.5:
            body = {
                "fork": {"n": rng.randint(1, 3)}, "join": {"children": [1, 2], "mode": rng.choice(("share", "rotate", "gather"))},
                "gen": {"model": MODEL, "threads": [rng.randint(0, 2)], "max_tokens": 3}, "append": {"text": "a"},
            }.get(verb, body)  # fmt: skip
        status, _, said = server.post(f"/v1/sessions/{c.id}/{verb}" if verb else "/v1/sessions", body, **KEY)
        assert status in (200, 400, 404), (status, verb, body, said)
        if not verb and status == 200:
            _delete(server, f"/v1/sessions/{said['id']}", KEY)
        seen.add((verb, status))
    c.close()
    assert {("fork", 200), ("gen", 200), ("join", 200), ("append", 200), ("join", 400), ("", 400)} <= seen
    _idle(server)
