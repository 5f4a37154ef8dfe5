"""A drafter that learns while the server runs: samples, training, versions, the way back, and unchanged texts."""

import itertools
import os
import signal
import time

import pytest
import torch

from serving import Server
from stretto import LLM, SamplingParams, load
from stretto.decoding.planner import RESTED, Planner
from stretto.decoding.registry import METHODS
from stretto.engine.types import Step
from stretto.models.adapter import Adapter, Base, load_adapter, save_adapter
from stretto.serving.drafters import Drafters
from stretto.serving.loop import Loop
from stretto.serving.online import LATEST, Settings, Trainer, simulated
from stretto.serving.samples import Recorder, Sample, read_samples
from stretto.training.parts import FrozenNet, make_part
from stretto.training.run import write_json
from stretto.zoo.workbook import examples

PROMPTS = [e.prompt for e in examples("json_call", "test", 40, 3)]


@pytest.fixture(scope="module")
def llm():
    return LLM("zoo:tiny", deterministic=True, plan=False)


def serve(llm, folder, prompts, method="ar"):
    """Samples of ``prompts`` as a served engine records them, and the texts."""
    recorder = Recorder(llm.runner, folder, lambda stream: True)
    llm.host.taps, llm.engine.watchers = (-1,), [recorder]
    texts = [llm.chat_prompt([{"role": "user", "content": p}]) for p in prompts]
    outs = llm.generate(texts, SamplingParams(max_tokens=48, temperature=0), method=method)
    llm.host.taps, llm.engine.watchers = (), []
    end = time.monotonic() + 20
    while recorder.recorded < len(prompts) and time.monotonic() < end:
        time.sleep(0.01)
    assert recorder.recorded == len(prompts) and recorder.dropped == 0
    return read_samples(folder, 1000), outs


def trainer(llm, folder, **options):
    given = {"model": "zoo:tiny", "folder": str(folder), "heads": 3, **options}
    return Trainer(Settings(**given), load("zoo:tiny", dtype="float32"))


def as_plain_forwards_say(llm, samples, outs):
    """The recorded states are those that plain forwards of the texts give (they are kept in bfloat16)."""
    head = llm.model.model.embed_tokens.weight.detach().float()
    for sample, out in zip(sorted(samples, key=lambda s: s.tokens.tolist()), sorted(outs, key=lambda o: [o.prompt_token_ids[-1], *o.outputs[0].token_ids]), strict=True):
        ids, n = out.prompt_token_ids + out.outputs[0].token_ids, len(out.prompt_token_ids)
        assert sample.tokens.tolist() == ids[n - 1 :]
        want = llm.logits(ids)[n - 1 : n - 1 + len(sample.states)]
        got = sample.states @ head.T
        said = sample.tokens[1 : 1 + len(got)]
        assert (got.argmax(-1)[: len(said)] == said).float().mean() > 0.95
        assert (got[:, :2048].softmax(-1) - want.softmax(-1)).abs().max() < 0.05


def test_recorded_states_are_those_of_a_plain_forward_and_give_the_targets_laws(llm, tmp_path):
    as_plain_forwards_say(llm, *serve(llm, tmp_path, PROMPTS[:4]))
    assert not list(tmp_path.iterdir())  # read samples are gone


@pytest.mark.parametrize("method, asleep", [("medusa", 1), ("medusa", 3), ("eagle", 3)])
def test_states_are_recorded_while_a_method_sleeps(llm, tmp_path, monkeypatch, method, asleep):
    """It needs none then, but somebody else does. ``asleep``: in every step, or in two of three."""
    looks = itertools.count(1)

    def rest(self, seqs, paces):
        awake = asleep > 1 and next(looks) % asleep == 0
        return None if awake else [Step([seq.tokens[-1]], extra=RESTED) for seq in seqs]

    monkeypatch.setattr(Planner, "rest", rest)
    monkeypatch.setattr(Planner, "napping", property(lambda self: True))
    as_plain_forwards_say(llm, *serve(llm, tmp_path, PROMPTS[:4], method=method))


def test_the_pool_drops_the_oldest_and_counts(llm, tmp_path):
    recorder = Recorder(llm.runner, tmp_path, lambda stream: True, most=3)
    llm.host.taps, llm.engine.watchers = (-1,), [recorder]
    llm.generate(["Sort: 3 1 2"] * 5, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    llm.host.taps, llm.engine.watchers = (), []
    end = time.monotonic() + 20
    while recorder.recorded < 5 and time.monotonic() < end:
        time.sleep(0.01)
    assert (recorder.recorded, recorder.dropped) == (5, 2) and len(list(tmp_path.iterdir())) == 3


def test_training_learns_and_the_simulated_length_is_the_measured_one(llm, tmp_path):
    samples, _ = serve(llm, tmp_path / "samples", PROMPTS[:32])
    made = trainer(llm, tmp_path, threshold=8, batch=8)
    made.feed(samples)
    start, before = simulated(made.accuracy), made.loss(samples[:8]).item()
    for _ in range(60):
        made.step()
    assert made.loss(samples[:8]).item() < 0.8 * before
    made._right.zero_(), made._asked.zero_()
    made.feed(serve(llm, tmp_path / "samples", PROMPTS[32:])[0])
    promised = simulated(made.accuracy)
    assert promised > max(1.3, start)
    about = made.publish()
    assert about["version"] == 1 and about["metric"] == pytest.approx(promised, abs=1e-3)
    again = trainer(llm, tmp_path)  # a trainer that starts again goes on from the last version
    assert again.version == 1 and torch.equal(again.module.weight, made.module.weight)
    if "medusa" not in METHODS:
        return
    adapter = load_adapter(about["path"])
    llm.host.parts = lambda kind, name: adapter
    llm._methods.clear()
    texts = [llm.chat_prompt([{"role": "user", "content": p}]) for p in PROMPTS[32:]]
    params = SamplingParams(max_tokens=48, temperature=0)
    plain, fast = (llm.generate(texts, params, method=m) for m in ("ar", "medusa"))
    assert [o.outputs[0].token_ids for o in plain] == [o.outputs[0].token_ids for o in fast]
    measured = sum(o.metrics.tokens for o in fast) / sum(o.metrics.forwards for o in fast)
    assert measured == pytest.approx(promised, rel=0.25)  # by sequence and not by place, so not the same number
    llm.host.parts = None


def test_what_must_not_be_published(llm, tmp_path):
    made = trainer(llm, tmp_path, min_gain=1.5)
    made.feed([Sample(torch.tensor([5, 6, 7, 8, 9]), torch.randn(4, 192))])
    assert made.publish() is None  # promises too little
    with torch.no_grad():
        made.module.weight[0, 0] = float("nan")
    made._right += 10
    made._asked += 10
    assert made.publish() is None and not (tmp_path / LATEST).exists()


def version(llm, folder, number, scale):
    made = make_part("medusa", FrozenNet(load("zoo:tiny", dtype="float32")), heads=2)
    torch.manual_seed(number)
    for p in made.module.parameters():
        torch.nn.init.normal_(p, std=scale)
    path = folder / f"v{number}"
    save_adapter(path, Adapter("medusa", Base.of(llm.runner.model, "zoo:tiny"), dict(made.module.state_dict()), made.config))
    write_json(folder / LATEST, {"version": number, "path": str(path), "metric": 1.5})


def test_swaps_between_requests_leave_the_text_alone(llm, tmp_path):
    """A new version every few steps while requests run; the text is plain decoding's, and each names its version."""
    said = []
    ids = llm.tokenizer.encode(llm.chat_prompt([{"role": "user", "content": PROMPTS[0]}]))
    want = llm.generate([ids], SamplingParams(max_tokens=40, temperature=0))[0].outputs[0].token_ids
    loop = Loop(llm, said.append)
    loop.learn(tmp_path, "ar", 1.0)
    for number in range(8):
        add = {"op": "add", "id": f"r{number}", "prompt": ids, "params": {"max_tokens": 40, "temperature": 0}, "method": "online"}
        loop._obey(add | {"store": number != 5})
        for _ in range(5):
            loop._tell(llm.engine.step())
        version(llm, tmp_path, number + 1, 0.02 * number)
        assert loop.drafters.update()
    while llm.engine.busy:
        loop._tell(llm.engine.step())
    tokens, costs = {}, {}
    for event in [e for m in said if m["op"] == "step" for e in m["events"]]:
        tokens.setdefault(event["id"], []).extend(event["tokens"])
        if "cost" in event:
            costs[event["id"]] = event["cost"]
    assert all(tokens[f"r{i}"] == want for i in range(8))
    assert costs["r0"]["method"] == "ar" and "no drafter" in costs["r0"]["notes"][0]
    assert [costs[f"r{i}"]["options"]["adapter"] for i in range(1, 8)] == [f"online:{i}" for i in range(1, 8)]
    end = time.monotonic() + 20
    while loop.recorder.recorded < 7 and time.monotonic() < end:
        time.sleep(0.01)
    assert loop.recorder.recorded == 7  # r5 said store=false
    llm.host.taps, llm.engine.watchers, llm.host.parts = (), [], None


def test_a_damaged_or_worse_version_is_not_kept(llm, tmp_path):
    drafters = Drafters(llm, tmp_path, enough=4)
    version(llm, tmp_path, 1, 0.01)
    assert drafters.update() and drafters.resolve()[1] == {"adapter": "online:1"}
    version(llm, tmp_path, 2, 0.01)
    (tmp_path / "v2" / "adapter.safetensors").write_bytes(b"damaged")
    assert not drafters.update() and drafters.current.number == 1 and "not used" in drafters.alarm
    version(llm, tmp_path, 3, 0.01)
    assert drafters.update() and drafters.alarm is None
    asked = [drafters.resolve()[1]["adapter"] for _ in range(6)]
    assert asked.count("online:3") == 4 and asked.count("online:1") == 2  # the same traffic for both
    version(llm, tmp_path, 4, 0.01)
    assert not drafters.poll() and drafters.current.number == 3  # it waits for the verdict
    for number, length, times in ((1, 2.0, 3), (3, 1.5, 4)):
        for _ in range(times):
            drafters.judge(ended(length), f"online:{number}")
    assert drafters.current.number == 1 and drafters.rollbacks == 1 and "taken back" in drafters.alarm
    assert drafters.update() and drafters.current.number == 4
    llm.host.parts = None


def ended(length):
    metrics = type("M", (), {"forwards": 10, "tokens_per_forward": length})()
    return type("E", (), {"seq": type("S", (), {"metrics": metrics})()})()


def test_other_traffic_is_not_blamed_on_a_version_and_pauses_one_that_gives_nothing(llm, tmp_path):
    drafters = Drafters(llm, tmp_path, enough=4)
    version(llm, tmp_path, 1, 0.01)
    drafters.update()
    for _ in range(50):
        drafters.judge(ended(3.0), "online:1")
    version(llm, tmp_path, 2, 0.01)
    drafters.update()
    for _ in range(4):  # both do badly now: the traffic is another
        drafters.judge(ended(1.3), "online:1")
        drafters.judge(ended(1.3), "online:2")
    assert drafters.current.number == 2 and not drafters.rollbacks and not drafters.state()["trial"]
    for _ in range(4):
        drafters.judge(ended(1.02), "online:2")
    method, _, note = drafters.resolve()
    assert method == "ar" and "version 2 gave 1.09 tokens a forward, less than 1.1" in note and drafters.state()["pauses"] == 1
    version(llm, tmp_path, 3, 0.01)
    assert drafters.update() and drafters.resolve()[1] == {"adapter": "online:3"} and not drafters.state()["trial"]
    llm.host.parts = None


def test_a_batch_is_the_mean_of_its_texts(llm, tmp_path):
    """Against the loss written out text by text, also for texts too short for the last head."""
    made = trainer(llm, tmp_path, cross_entropy=0.3)
    with torch.no_grad():
        made.module.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(0)
    sizes = ((4, 5), (9, 9), (3, 4), (12, 13))
    batch = [Sample(torch.randint(2048, (t,), generator=rng), torch.randn(m, 192, generator=rng)) for m, t in sizes]

    def alone(sample):
        guess, law = made._logits(sample.states).log_softmax(-1), (sample.states @ made.head.T).log_softmax(-1)
        out = 0.0
        for i in range(3):
            places = range(min(len(sample.states) - 1 - i, len(sample.tokens) - 2 - i))
            each = [
                0.7 * (law[n + 1 + i].exp() * (law[n + 1 + i] - guess[n, i])).sum() - 0.3 * guess[n, i, sample.tokens[n + 2 + i]]
                for n in places
            ]
            out += 0.8**i * sum(each) / len(each) if each else 0.0
        return out

    assert made.loss(batch).item() == pytest.approx(sum(alone(s).item() for s in batch) / 4, rel=1e-4)


def test_after_a_change_of_traffic_the_new_texts_are_learnt_though_training_was_behind(llm, tmp_path):
    """Far more old texts than training could take: it must not work off a queue before it sees the new ones."""
    old, _ = serve(llm, tmp_path / "samples", PROMPTS[:24])
    new, _ = serve(llm, tmp_path / "samples", [e.prompt for e in examples("text_letter", "test", 16, 3)])
    made = trainer(llm, tmp_path, batch=8, fresh=8)
    for _ in range(20):
        made.feed(old)
    for _ in range(10):
        made.step()
    made.feed(new[:8])
    before = made.loss(new[8:]).item()
    for _ in range(12):
        made.step()
    assert made.loss(new[8:]).item() < 0.9 * before and len(made._new) == 0 and len(made._old) <= made.settings.pool


def test_a_server_learns_from_its_traffic_and_survives_its_trainer():
    server = Server("--online-training", "--online-share", "1", "--sync-interval", "15", "--deterministic")
    try:
        first = server.chat(PROMPTS[0], max_tokens=48)[2]
        assert first["stretto"]["method"] == "ar" and any("no drafter" in n for n in first["stretto"]["notes"])
        end, state = time.monotonic() + 400, {}
        while time.monotonic() < end and not state.get("current"):
            for prompt in PROMPTS[:12]:
                server.chat(prompt, max_tokens=48)
            state = server.get("/v1/drafters")[2]
        assert state["current"] >= 1 and state["trainer"]["alive"] and state["recorded"] >= 32
        last = server.chat(PROMPTS[0], max_tokens=48)[2]
        assert last["stretto"]["method"] == "medusa" and last["stretto"]["options"]["adapter"].startswith("online:")
        assert last["choices"][0]["message"]["content"] == first["choices"][0]["message"]["content"]
        session = server.post("/v1/sessions", {"model": "zoo:tiny", "prompt": "Copy: 1 2 3"})[2]["id"]
        said = server.post(f"/v1/sessions/{session}/gen", {"model": "zoo:tiny", "max_tokens": 4})[2]
        assert said["generated"][0]["cost"]["method"] == "medusa"  # threads of sessions use the drafter too
        assert server.post("/v1/drafters/update", {})[0] == 200
        for child in _children(server.process.pid):
            if "serving.online" in child[1]:
                os.kill(child[0], signal.SIGKILL)
        time.sleep(0.2)
        assert server.chat(PROMPTS[1], max_tokens=8)[0] == 200
        assert server.get("/v1/drafters")[2]["trainer"]["starts"] == 2
    finally:
        assert server.stop() == 0


def _children(pid):
    import subprocess

    rows = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [(int(r.split()[0]), r) for r in rows.splitlines()]
