"""Training of threads: units as the state machine makes them, isolation in the pack, the account of tokens, the stages."""

import copy
import json
import re

import pytest
import torch

from stretto.errors import InputError, OptionError, StrettoError
from stretto.machine import Script, drive, machine
from stretto.models import checkpoint
from stretto.models.context import plain_logits
from stretto.models.transformer import Transformer
from stretto.tags import THREADWEAVER, read_tags
from stretto.training import thread_units as tu
from stretto.training import threads_run
from stretto.training.nets import PackedNet, initialise
from stretto.training.parallel_units import grammar_of, pair_of
from stretto.training.recipes import Recipe, run_recipe
from stretto.training.run import config_of, write_model
from stretto.training.trie import TrieLoss, logps, pack_tries
from stretto.zoo import workbook

GRAMMAR = grammar_of(THREADWEAVER)


def text(ids):
    return workbook._tokenizer().decode(list(ids), skip_special_tokens=False)


@pytest.fixture(scope="module")
def pairs():
    found = [*tu.cases("train", 3, 5, "tree"), *tu.cases("train", 3, 5, "rows"), *tu.cases("train", 1, 5, "serial")]
    return [pair_of(c, "parallel", GRAMMAR) for c in found]


@pytest.fixture(scope="module")
def model():
    """Two layers, with the zoo's vocabulary."""
    recipe = Recipe(name="t", purpose="", hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=48)
    net = Transformer(config_of(recipe))
    initialise(net, 0, layers=2)
    return net


def test_what_is_learnt_is_what_the_model_would_write_each_token_once(pairs):
    for prompt, answer in pairs:
        units = tu.units_of(prompt, answer)
        tree = GRAMMAR.parse(answer)
        forced = GRAMMAR.layout([*prompt, *answer], start=len(prompt)).forced[len(prompt) :]
        assert sum(len(u.tokens) - u.learnt for u in units) == len(answer) - forced.sum()
        if not tree.blocks:
            assert len(units) == 1
            continue
        (block,) = tree.blocks
        whole, *rest = units
        assert list(whole.tokens) == [*prompt, *answer] and whole.learnt == len(prompt) + block.paths[-1].stop
        threads = [u for u in rest if u.tokens[-1] == GRAMMAR.ids["path_close"]]
        for unit, path in zip(sorted(threads, key=lambda u: text(u.tokens[block.goal + len(prompt) :])), block.paths,
                              strict=True):  # fmt: skip
            assert list(unit.tokens[unit.learnt :]) == answer[path.body : path.stop]
            assert list(unit.tokens[: unit.learnt]) == [*prompt, *answer[: block.goal + 1], *GRAMMAR.header(path.number)]


def test_a_tag_starts_as_the_one_that_the_base_knows_in_its_role(model):
    from stretto.tags import MULTIVERSE
    from stretto.training.parallel_units import initialise_tags

    net, known = copy.deepcopy(model), grammar_of(MULTIVERSE).ids
    before = net.model.embed_tokens.weight.detach().clone()
    initialise_tags(net, GRAMMAR, known)
    after = net.model.embed_tokens.weight.detach()
    assert GRAMMAR.ids["path_open"] != known["path_open"]
    for role, i in GRAMMAR.ids.items():
        assert torch.equal(after[i], before[known[role]])
    initialise_tags(net, GRAMMAR)
    words = GRAMMAR.encode("thread")
    assert torch.allclose(net.model.embed_tokens.weight[GRAMMAR.ids["path_open"]], after[words].mean(0), atol=1e-6)


def test_an_answer_that_no_machine_writes_is_refused(pairs):
    prompt, answer = pairs[0]
    with pytest.raises(InputError):
        tu.units_of(prompt, [t for t in answer if t != GRAMMAR.ids["path_open"]])


def test_the_pack_gives_each_token_the_law_of_its_own_separate_text(pairs, model):
    """Every judged token of the pack has the log-probability of a plain causal forward of its unit: so no thread sees a
    sibling, the joined line sees all, and the loss is the mean of the separate ones."""
    examples = [tu.units_of(*p) for p in pairs]
    packed = pack_tries(examples, 800, pad_id=1)
    judged = (packed.weight > 0) & (packed.parent >= 0)
    with torch.no_grad():
        got = logps(PackedNet(model), packed, judged)
        loss = TrieLoss()(PackedNet(model), packed, torch.Generator())
    want = []
    for units in examples:
        for u in units:
            law = torch.log_softmax(plain_logits(model, list(u.tokens)), -1)
            want += [float(law[i - 1, u.tokens[i]]) for i in range(u.learnt, len(u.tokens))]
    assert torch.allclose(got.sort().values, torch.tensor(want).sort().values, atol=1e-4)
    assert loss.labels == len(want) and float(loss.value) == pytest.approx(-sum(want) / len(want), abs=1e-5)


def lengths_of(said):
    """(total, longest) by another reader: regular expressions on the text; tags of threads count as serial."""
    size = lambda s: len(workbook._tokenizer().encode(s, add_special_tokens=False).ids)
    total, longest = size(said), 0
    for part in re.split(r"(<Parallel>.*?</Parallel>)", said, flags=re.S):
        threads = re.findall(r"<\|thread\|>(.*?)<\|/thread\|>", part, flags=re.S)
        longest += size(part) - sum(map(size, threads)) + max(map(size, threads), default=0)
    return total, longest


def test_the_account_agrees_with_another_reader(pairs):
    for _, answer in pairs:
        lengths = GRAMMAR.lengths(answer, tags_serial=True)
        total, longest = lengths_of(text(answer))
        assert (lengths.total, lengths.longest) == (total, longest) and total == len(answer)


def test_rollouts_share_forwards_differ_and_are_what_the_machine_made(model):
    found = tu.cases("train", 2, 1)
    groups = tu.roll_out(model, [tu.prompt_of(c) for c in found], 3, 1, max_tokens=12)
    assert [len(g) for g in groups] == [3, 3]
    everything = [tuple(r.tokens) for g in groups for r in g]
    assert len(set(everything)) == len(everything), "each draws its own"
    again = tu.roll_out(model, [tu.prompt_of(c) for c in found], 3, 1, max_tokens=12)
    assert [tuple(r.tokens) for g in again for r in g] == everything
    for r in (r for g in groups for r in g):
        assert r.total == len(r.tokens) and r.longest <= r.total and not r.complete
        assert sum(len(u.tokens) - u.learnt for u in r.units) == len(r.tokens)


def test_stages_run_one_after_the_other_resume_and_ship(model, tmp_path, monkeypatch):
    monkeypatch.setattr(threads_run, "POOL", 8)
    base, out = tmp_path / "base", tmp_path / "made"
    write_model(copy.deepcopy(model), dict(model.named_parameters()), base)
    small = {"rows": 1, "prompts": 1, "average": 0.0, "max_tokens": 8}
    run = lambda steps, stages, **more: run_recipe(
        "tiny-threads", out=out, steps=steps, base=base, changes={**small, "stages": stages}, report=lambda r: None, **more
    )
    first = run(2, ("sft",))
    assert first["stages"]["sft"]["steps"] == 2
    both = run(2, ("sft", "rl"))
    assert both["stages"]["sft"]["steps"] == both["stages"]["rl"]["steps"] == 2, "sft was there, only rl ran"
    assert len((tmp_path / "made.training" / "sft" / "log.jsonl").read_text().splitlines()) == 1
    assert read_tags(out)[0] == THREADWEAVER and json.loads((out / "training.json").read_text())["base"] == str(base)
    loaded = checkpoint.load(out, dtype="float32")
    assert any(not torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))
    with pytest.raises(StrettoError, match="no own answer is right"):
        run(1, ("sft", "self"))
    with pytest.raises(OptionError, match="stages"):
        run(1, ("fast",))


def test_own_answers_that_are_right_and_well_formed_are_learnt(model, monkeypatch):
    found = tu.cases("train", 3, 2, "tree")
    answers = [pair_of(c, "parallel", GRAMMAR)[1] for c in found]
    wrong = answers[1][:-3] + answers[1][-1:]
    broken = [t for t in answers[2] if t != GRAMMAR.ids["close"]]
    rolls = []
    for case, ids in zip(found, (answers[0], wrong, broken), strict=True):
        prompt = tu.prompt_of(case)
        spec = tu.spec_of(prompt)
        rolls.append([tu.rollout_of(drive(machine(prompt, spec), Script(prompt, ids, spec.ends)), GRAMMAR)])
    monkeypatch.setattr(tu, "roll_out", lambda *a, **k: rolls)
    (kept,) = tu.own_answers(model, found, 0)
    assert kept == tu.units_of(tu.prompt_of(found[0]), answers[0])
