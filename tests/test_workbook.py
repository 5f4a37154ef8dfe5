"""The workbook's promises (disjoint splits, seeds, scores) and those of the tokenizer that the zoo shares."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from stretto.errors import OptionError, UnknownNameError
from stretto.zoo import workbook
from stretto.zoo.workbook import FAMILIES, TASKS, encode, examples, render, stream

N = 300
VOCABULARY = 2048
ROW = 144  # tokens of a training row: the shortest row of the recipes
# Models are trained with these ids: a change here makes every shipped model useless.
IDS = {
    "<|endoftext|>": 0, "<|pad|>": 1, "<|mask|>": 2, "<|im_start|>": 3, "<|im_end|>": 4, "<|fork|>": 5, "<|join|>": 6,
    "<|thread|>": 7, "<|/thread|>": 8, "<Parallel>": 9, "</Parallel>": 10, "<Goal>": 11, "</Goal>": 12,
    "<Outline>": 13, "</Outline>": 14, "<Path>": 15, "</Path>": 16, "<Conclusion>": 17, "</Conclusion>": 18,
    **{f"<|slot_{i}|>": 19 + i for i in range(16)}, **{f"<|spare_{i}|>": 35 + i for i in range(32)},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(workbook.TOKENIZER))


@pytest.fixture(scope="module")
def fast():
    transformers = pytest.importorskip("transformers", reason="NOT CHECKED against transformers: not installed")
    return transformers.AutoTokenizer.from_pretrained(str(workbook.TOKENIZER.parent))


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_disjoint(task):
    train = {e.prompt for e in examples(task, "train", N, 0)}
    test = {e.prompt for e in examples(task, "test", N, 0)}
    assert len(train) == len(test) == N
    assert not train & test


def test_stream_keeps_to_its_split():
    for split in ("train", "test"):
        assert {workbook._split(e.prompt) for e in islice(stream(split, 0), 200)} == {split}


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides(task):
    first = examples(task, "train", 20, 7)
    assert examples(task, "train", 20, 7) == first
    assert examples(task, "train", 10, 7) == first[:10]
    assert examples(task, "train", 20, 8) != first


def test_stream_the_seed_and_the_weights_decide():
    first = list(islice(stream("train", 3), 50))
    assert list(islice(stream("train", 3), 50)) == first
    assert list(islice(stream("train", 4), 50)) != first
    only = {name: float(name == "list_sort") for name in TASKS}
    assert {e.task for e in islice(stream("train", 3, only), 20)} == {"list_sort"}


@pytest.mark.parametrize("task", TASKS)
def test_score(task):
    score = TASKS[task].score
    for e in examples(task, "test", 50, 1):
        assert score(e.prompt, e.answer, e.answer)
        assert score(e.prompt, e.answer + "\n", e.answer)
        for wrong in ("", e.answer[:-1], e.answer + " and more", e.answer[: len(e.answer) // 2]):
            assert not score(e.prompt, wrong, e.answer), wrong


def test_every_family_has_tasks():
    assert FAMILIES == ("lists", "arithmetic", "json", "python", "tables", "text")
    assert {t.family for t in TASKS.values()} == set(FAMILIES)
    assert all(name == t.name and t.purpose.isascii() for name, t in TASKS.items())


def test_unknown_names_are_refused():
    with pytest.raises(UnknownNameError, match="list_sort"):
        examples("list_sorted", "test", 1, 0)
    with pytest.raises(UnknownNameError, match="test"):
        examples("list_sort", "tests", 1, 0)
    with pytest.raises(UnknownNameError, match="train"):
        next(stream("training", 0))
    with pytest.raises(UnknownNameError, match="list_copy"):
        next(stream("train", 0, {"list_copi": 1.0}))
    with pytest.raises(OptionError):
        examples("list_sort", "test", 0, 0)


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_ascii_fit_a_row_and_round_trip(task, tokenizer):
    for e in examples(task, "train", N, 2):
        assert (e.prompt + e.answer).isascii()
        prompt, answer = encode(e)
        assert len(prompt) + len(answer) <= ROW
        assert answer[-1] == IDS["<|im_end|>"]
        assert tokenizer.decode(prompt + answer, skip_special_tokens=False) == "".join(render(e))


def test_vocabulary(tokenizer):
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    assert sorted(vocabulary.values()) == list(range(VOCABULARY))
    assert {name: vocabulary[name] for name in IDS} == IDS


@given(st.text(max_size=80))
@settings(max_examples=150, deadline=None)
def test_any_text_round_trips(text):
    ids = workbook._tokenizer().encode(text, add_special_tokens=False).ids
    assert workbook._tokenizer().decode(ids, skip_special_tokens=False) == text


def test_digits_are_single_tokens(tokenizer):
    assert tokenizer.encode("0123456789").tokens == list("0123456789")
    assert tokenizer.encode("a 1024, x17=99").tokens.count("9") == 2
    plain = [t for t in tokenizer.get_vocab(with_added_tokens=True) if t not in IDS and not t.startswith("<|spare_")]
    assert all(len(t) == 1 for t in plain if any(c in "0123456789" for c in t))


def test_transformers_gives_the_same_ids(fast, tokenizer):
    assert len(fast) == VOCABULARY
    assert (fast.eos_token, fast.pad_token, fast.mask_token, fast.bos_token) == (
        "<|im_end|>", "<|pad|>", "<|mask|>", None,
    )
    texts = ["".join(render(examples(task, "train", 1, 5)[0])) for task in TASKS]
    for text in [*texts, " caf\u00e9 \u65e5\u672c 12\u00b2\t\n  <Path>x</Path> "]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert fast(text).input_ids == ids
        assert fast.decode(ids) == text


@pytest.mark.parametrize("task", TASKS)
def test_transformers_renders_the_same_chat(fast, task):
    e = examples(task, "train", 1, 5)[0]
    prompt, answer = render(e)
    user, assistant = {"role": "user", "content": e.prompt}, {"role": "assistant", "content": e.answer}
    assert fast.apply_chat_template([user], add_generation_prompt=True, tokenize=False) == prompt
    assert fast.apply_chat_template([user, assistant], tokenize=False) == prompt + answer + "\n"


def test_the_chat_has_system_and_tools(fast):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert fast.apply_chat_template(chat, tools=[{"name": "f"}], tokenize=False) == (
        '<|im_start|>system\nTools: [{"name": "f"}]<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n'
        "<|im_start|>user\nHi<|im_end|>\n"
    )
