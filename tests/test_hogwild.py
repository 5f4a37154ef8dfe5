"""Workers on one live cache: the rules of steps, history, budgets and endings, on zoo:tiny with texts of the tests' own.

That the rows are computed right is tested in test_shared.py, that training computes the same in test_hogwild_training.py.
"""

import asyncio
import random
from dataclasses import replace

import pytest
import torch

from stretto import LLM, SamplingParams
from stretto.engine.types import Commit, Step
from stretto.errors import CapacityError, InputError, OptionError, UnknownNameError
from stretto.shared import Shared
from stretto.threads.hogwild import LAYOUTS, Collaboration, acollaborate, collaborate
from stretto.threads.hogwild_texts import Texts
from stretto.threads.measure_hogwild import Run, majority, read_steps, run_one
from stretto.training.nets import PackedNet
from stretto.training.worker_data import lay_traces
from stretto.training.worker_traces import TEXTS, ids, problems, simulate
from stretto.zoo.pages.workers import NAMES

OWN = Texts(**{k: tuple(v) if isinstance(v, list) else v for k, v in TEXTS.items()})
STAY = replace(OWN, leave=None)  # nobody leaves
TASK = problems("test", 1, 3)[0].task
WARM = SamplingParams(temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def llm():
    return LLM("zoo:tiny", dtype="float32", deterministic=True, enable_prefix_caching=False)


@pytest.fixture(autouse=True)
def every_slot_is_free_again(llm):
    yield
    assert llm.runner.alloc.used == 0 and not llm.engine.busy


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("workers", [1, 3])
def test_the_rules(llm, workers, layout):
    run = Collaboration(
        llm, TASK, workers=workers, layout=layout, texts=STAY, max_steps=40, sampling_params=WARM, check_every=30
    )
    told, steps, used = [""] * workers, [], []
    for event in run.events():
        if event.kind == "token":
            assert len(event.token_ids) == 1
            told[event.worker] += event.text
        if event.kind == "step":
            steps.append((event.worker, event.text))
        used.append(llm.runner.alloc.used)
    r = run.result
    assert r.workers == told and r.ended in ("length", "answer")
    assert r.steps[: len(steps)] == steps
    assert r.forwards == 40 or r.ended == "answer"
    assert all(text.rstrip().endswith((".", "?", "!")) for _, text in steps)
    assert max(used) <= r.usage.evaluated  # every token has one slot, whoever reads it
    if workers == 3 and steps:
        assert r.checks >= 1 and any(TEXTS["check"] in text for _, text in r.steps)


def test_one_forward_for_all(llm):
    """W workers cost W rows a forward, and the prompt is evaluated once."""
    before = llm.engine.forwards
    r = collaborate(llm, TASK, workers=4, texts=STAY, max_steps=12, check_every=0, finisher=False)
    prompt = llm.chat_prompt([{"role": "user", "content": OWN.user_prompt(TASK, OWN.names)}])
    assert llm.engine.forwards - before == r.usage.forwards == 12 + 3  # the prompt and two headers
    rows = len(llm.tokenizer.encode(prompt)) + 2 + 4 * (len(ids("\n Ada:")) + 11)
    steps = sum(text != "" for _, text in r.steps) - 4
    assert r.usage.evaluated == rows + steps * (len(ids("\n Ada:")) - 1)


def test_alone_or_beside_others(llm):
    """Outputs do not depend on packing: two problems and a request in shared forwards."""
    tasks = [p.task for p in problems("test", 2, 4)]
    options = dict(workers=3, texts=STAY, max_steps=24, sampling_params=WARM)
    alone = [collaborate(llm, task, **options) for task in tasks]

    async def both():
        with llm.session("Copy this list: cat") as s:
            beside = s.fork(prefixes=[", dog"]).agen(max_tokens=20, ignore_eos=True)
            return await asyncio.gather(*[acollaborate(llm, task, **options) for task in tasks], beside)

    together = asyncio.run(both())[:2]
    for a, b in zip(alone, together, strict=True):
        assert a.workers == b.workers and a.steps == b.steps and a.answer == b.answer


def test_workers_draw_their_own_numbers_and_repeat(llm):
    options = dict(workers=3, layout="interleaved", texts=STAY, max_steps=10, finisher=False)
    same = replace(STAY, step_prefix=" Ada:")  # equal views: only the noise differs
    a, b = (collaborate(llm, TASK, **options | {"texts": same, "sampling_params": SamplingParams(temperature=4.0, seed=1)})
            for _ in range(2))
    assert a.workers == b.workers and len(set(a.workers)) == 3


def test_leaving_and_the_forced_answer(llm):
    """zoo:tiny ends its turn soon: everybody leaves, and the finisher answers from the plain text."""
    r = collaborate(llm, TASK, workers=2, texts=OWN, max_steps=60)
    assert r.ended == "left" and r.finished_by is None and 0 < r.finisher_forwards <= 1 + 16
    r = collaborate(llm, TASK, workers=2, texts=OWN, max_steps=60, finisher=False)
    assert r.answer is None and r.finisher_forwards == 0
    found = replace(STAY, answer=r"(\d)")  # the first digit of anybody's is an answer
    r = collaborate(llm, TASK, workers=2, texts=found, max_steps=60)
    assert r.ended == "answer" and r.finished_by in (0, 1) and r.answer.isdigit() and r.forwards < 60


def test_nobody_writes_what_is_banned(llm):
    r = collaborate(llm, TASK, workers=2, texts=replace(STAY, banned=(" ", "a", ",")), max_steps=16, finisher=False)
    assert all("," not in text for text in r.workers)


def test_leaving_early_frees_everything(llm):
    events = Collaboration(llm, TASK, workers=3, texts=STAY, max_steps=60).events()
    for _ in range(7):
        next(events)
    assert llm.engine.busy
    events.close()

    async def cancelled():
        task = asyncio.create_task(acollaborate(llm, TASK, workers=3, texts=STAY, max_steps=200))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())


def test_a_context_that_fills_up_ends_the_run(llm):
    small = LLM("zoo:tiny", dtype="float32", max_model_len=200, enable_prefix_caching=False)
    for steps in (190, 5000):
        r = collaborate(small, TASK, workers=4, texts=STAY, max_steps=steps)
        assert r.ended == "length" and 0 < r.forwards < 40 and small.runner.alloc.used == 0


def test_bad_input(llm):
    for options, error in (
        ({"workers": 0}, OptionError), ({"workers": 2.5}, OptionError), ({"max_steps": 0}, OptionError),
        ({"check_every": -1}, OptionError), ({"layout": "mixed"}, UnknownNameError),
        ({"workers": 2, "worker_names": ("Ada",)}, OptionError), ({"worker_names": ("Ada", "Ada")}, OptionError),
        ({"workers": 5, "texts": OWN}, OptionError), ({"step_separator": ""}, OptionError),
        ({"step_separator": " "}, OptionError),
    ):
        with pytest.raises(error):
            Collaboration(llm, TASK, **options)
    with pytest.raises(CapacityError):
        Collaboration(LLM("zoo:tiny", kv_cache_tokens=256), TASK, workers=4, texts=OWN, max_steps=200)
    with llm.session("Copy this list: cat") as s, llm.session("dog") as other:
        shared, line = Shared(s), Shared(other).line("x")
        mine = shared.line("y", [s])
        for reads in ([line], [mine]):
            with pytest.raises(InputError):
                shared.read(mine, reads)
        with pytest.raises(InputError):
            shared.move(mine, s)  # nothing of it is cached yet


def test_texts_for_any_chat_model(llm):
    texts = Texts.of(llm)
    assert texts == Texts() and texts.find_answer("so \\boxed{42}.") == "42"
    r = collaborate(llm, TASK, workers=2, max_steps=6)
    assert r.forwards == 6 and r.ended == "length"


class Script:
    """Gives every worker the tokens that it has in a trace, and keeps the logits."""

    name, lossless = "script", False

    def __init__(self, trace):
        of = lambda w: [(row, token) for row, token, _ in trace.targets if trace.rows[row].line == w]
        self.left = {ids(f" {name}:")[0]: of(w) for w, name in enumerate(NAMES[: trace.workers])}
        self.rows, self.logits = [], []

    def admit(self, seq):
        pass

    def prefill(self, seq):
        return len(seq.tokens) - 1

    def propose(self, seqs):
        return [Step([seq.tokens[-1]]) for seq in seqs]

    def commit(self, seqs, steps, outcomes):
        out = []
        for seq, outcome in zip(seqs, outcomes, strict=True):
            row, token = self.left[seq.tokens[1]].pop(0)
            self.rows.append(row)
            self.logits.append(outcome.logits[0].clone())
            out.append(Commit([token], keep=range(1)))
        return out

    def release(self, seq):
        pass

    def preemptible(self, seq):
        return False


@pytest.mark.parametrize("layout,workers,check", [
    ("combined", 1, 0), ("combined", 2, 40), ("combined", 4, 0), ("interleaved", 2, 0), ("contiguous", 3, 0),
])
def test_runs_are_what_was_trained(llm, monkeypatch, layout, workers, check):
    """A trace played through the runtime: the same answer and forwards, and the log-probabilities of training."""
    problem = problems("test", 1, 8)[0]
    trace = simulate(problem, workers, layout, random.Random(2), noise=0.1, check_every=check)
    script, real = Script(trace), llm.method
    monkeypatch.setattr(llm, "method", lambda name, options=None: script if name == "ar" else real(name, options))
    r = collaborate(llm, problem.task, workers=workers, layout=layout, texts=OWN, check_every=check, finisher=False)
    assert r.answer == "all" and r.forwards == len(trace.common) and not any(script.left.values())
    batch = lay_traces([trace])
    with torch.no_grad():
        net = llm.model
        hidden = PackedNet(net).hidden(batch.tokens, batch.positions, batch.context(net.config))[0]
        want = torch.log_softmax(net.logits(hidden[script.rows]), -1)
    got = torch.log_softmax(torch.stack(script.logits), -1)[:, : want.shape[1]]
    assert torch.allclose(got, want, atol=1e-4, rtol=1e-5)  # of laws down to e^-32


def test_how_runs_are_counted():
    problem = problems("test", 1, 8, (3, 3))[0]
    a, b, c = problem.items
    wrong = (b[0], b[1], b[2] + 1)
    run = Run(problem, [(5, a), (9, wrong), (9, c), (14, b), (20, c)], "all", 21, 0.1)
    assert (run.written, run.solved, run.again) == (9, 14, 2)
    assert Run(problem, [(5, a)], None, 5, 0.1).written is None
    assert read_steps(f" Ada:{problem.step(a[0])}\n Ben: twice? no.{problem.step(b[0])}") == [a, b]
    assert majority([[a, wrong], [b], [b, c]]) == {a, b, c} and majority([[wrong], [b]]) == {wrong}


def test_the_trained_model_works_together():
    """zoo:tiny-hogwild on held-out problems: everything once, in about half and a third of the forwards."""
    trained = LLM("zoo:tiny-hogwild", dtype="float32", enable_prefix_caching=False)
    found = problems("test", 6, 21)
    runs = {w: [run_one(trained, p, workers=w) for p in found] for w in (1, 2, 4)}
    forwards = {w: sum(r.forwards for r in rs) for w, rs in runs.items()}
    assert forwards[2] < 0.65 * forwards[1] and forwards[4] < 0.45 * forwards[1]
    for rs in runs.values():
        assert sum(r.solved is not None for r in rs) >= 5 and sum(r.again for r in rs) <= 2
    cut = collaborate(trained, found[0].task, workers=2, max_steps=25)
    assert cut.ended == "length" and cut.answer == "some"  # the forced answer says that not all is there
    asked = collaborate(trained, found[0].task, workers=2, max_steps=80, check_every=40)
    assert asked.checks >= 1 and any(f"{TEXTS['check']} no." in text for _, text in asked.steps)
