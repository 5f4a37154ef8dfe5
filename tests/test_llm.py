"""The offline face: LLM.generate, stream, logits, grammars, logprobs, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import stretto.zoo
from stretto.engine.params import SamplingParams
from stretto.errors import CapacityError, CheckpointError, InputError, OptionError, PromptError, UnknownNameError
from stretto.llm import LLM
from stretto.models.checkpoint import save
from tiny import model

TOKENIZER = Path(stretto.zoo.__file__).parent / "tokenizer"
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    save(model(vocab_size=2048, eos_token_id=4), path)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, path / file.name)
    return path


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, dtype="float32", kv_cache_tokens=4096)


def test_generate_has_vllms_shape(llm):
    (out,) = llm.generate("Copy this list: red, blue", GREEDY)
    choice = out.outputs[0]
    assert out.prompt == "Copy this list: red, blue" and out.prompt_token_ids == llm.tokenizer.encode(out.prompt)
    assert len(choice.token_ids) == 12 and choice.finish_reason == "length" and choice.logprobs is None
    assert choice.text == llm.tokenizer.decode(choice.token_ids)
    assert out.metrics.forwards == 12 and out.metrics.tokens_per_forward == 1.0 and out.metrics.seconds > 0


def test_prompts_of_every_form_share_a_batch(llm):
    ids = llm.tokenizer.encode("Sort 3, 1, 2")
    outs = llm.generate(["Sort 3, 1, 2", ids], GREEDY, method=["ar", "ngram"])
    assert outs[0].outputs[0].token_ids == outs[1].outputs[0].token_ids
    assert llm.generate(ids, GREEDY)[0].outputs[0].token_ids == outs[0].outputs[0].token_ids


def test_choices_differ_and_repeat(llm):
    params = SamplingParams(max_tokens=10, temperature=1.0, n=3, seed=5, ignore_eos=True)
    first, again = (llm.generate("abc", params)[0].outputs for _ in range(2))
    assert [o.token_ids for o in first] == [o.token_ids for o in again]
    assert len({tuple(o.token_ids) for o in first}) == 3


def test_streamed_text_is_the_text(llm):
    whole = llm.generate("Write a notice.", GREEDY)[0].outputs[0].text
    assert "".join(llm.stream("Write a notice.", GREEDY)) == whole
    pieces = llm.stream("Write a notice.", GREEDY)
    next(pieces)
    pieces.close()
    assert not llm.engine.busy


def test_logits_and_logprobs_are_the_models(llm):
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=2)
    (out,) = llm.generate("abc", params)
    choice = out.outputs[0]
    logits = llm.logits(out.prompt_token_ids + choice.token_ids)
    law = torch.log_softmax(logits[len(out.prompt_token_ids) - 1 : -1].double(), -1)
    for i, (token, found) in enumerate(zip(choice.token_ids, choice.logprobs, strict=True)):
        assert len(found) == 2, "greedy: the chosen token is one of the two most likely"
        assert abs(found[token] - float(law[i, token])) < 1e-4


@pytest.mark.parametrize("method", ["ar", "ngram", "jacobi"])
def test_json_schema_is_followed_across_commits(llm, method):
    pytest.importorskip("llguidance", reason="extra 'grammar' is not installed")
    schema = {
        "type": "object", "required": ["a", "b"], "additionalProperties": False,
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["red", "blue"]}},
    }
    params = SamplingParams(max_tokens=60, temperature=0.7, seed=1, json_schema=schema)
    text = llm.generate("Give me JSON.", params, method=method)[0].outputs[0].text
    assert set(json.loads(text)) == {"a", "b"}
    params = SamplingParams(max_tokens=60, temperature=0.0, regex="(ab|cd){3}")
    assert len(llm.generate("x", params, method=method)[0].outputs[0].text) == 6


def test_what_is_refused_names_the_reason(llm, folder, tmp_path):
    cases = [
        (lambda: llm.generate("", GREEDY), PromptError, "empty"),
        (lambda: llm.generate([], GREEDY), PromptError, "no prompt"),
        (lambda: llm.generate([[5, 999999]], GREEDY), PromptError, "999999"),
        (lambda: llm.generate("a " * 600, GREEDY), PromptError, "max_model_len"),
        (lambda: llm.generate("a", GREEDY, method="ngarm"), UnknownNameError, "ngram"),
        (lambda: llm.generate("a", GREEDY, method="ngram", options={"k": 1}), UnknownNameError, "allowed"),
        (lambda: llm.generate("a", GREEDY, method="ngram", options={"max_ngram": -1}), OptionError, "max_ngram"),
        (lambda: llm.generate("a", [GREEDY, GREEDY]), OptionError, "one for each"),
        (lambda: llm.generate("a", GREEDY, method="diffusion"), InputError, "attention"),
        (lambda: llm.generate("a", SamplingParams(json_schema="{")), OptionError, "json_schema"),
        (lambda: LLM(folder, threads=0), OptionError, "threads"),
        (lambda: LLM(folder, backend="gpu"), OptionError, "backend"),
        (lambda: LLM("zoo:tinny"), UnknownNameError, "zoo"),
        (lambda: LLM(tmp_path / "nothing"), CheckpointError, "nothing"),
        (lambda: LLM(folder, kv_cache_tokens=70).generate("abc", GREEDY), CapacityError, "70"),
    ]
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()
    assert not llm.engine.busy, "a refused request leaves nothing behind"
