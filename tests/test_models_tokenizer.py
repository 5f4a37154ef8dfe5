"""Tokenizers: ids, text bit by bit, chat templates as transformers renders them."""

import json
import random

import pytest
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from stretto.errors import (
    CheckpointError,
    PromptError,
    UnknownNameError,
    UnsupportedError,
    WeightsError,
)
from stretto.models.config import ModelConfig
from stretto.models.tokenizer import Tokenizer

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if tools %}{{ tools | tojson(indent=1) }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]
MESSAGES = [{"role": "user", "content": "héllo ☃"}, {"role": "assistant", "content": "<|im_end|>"}]


def byte_level() -> Backend:
    """Every byte a token, some merges, three specials, BOS in front of every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    merges = [("h", "e"), ("l", "l"), ("Ġ", "w"), ("Ã", "©")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    out = Backend(models.BPE(vocab=vocab, merges=merges))
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    out.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    out.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", out.token_to_id("<s>"))]
    )
    return out


def byte_fallback() -> Backend:
    """Sentencepiece style: words with a leading mark, unknown characters as bytes."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁hello",
        "▁wor",
        "ld",
        "▁",
    ]
    out = Backend(
        models.Unigram([(p, -1.0 - i / 100) for i, p in enumerate(pieces)], 0, byte_fallback=True)
    )
    out.pre_tokenizer = pre_tokenizers.Metaspace()
    out.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return out


def write(path, backend, **config):
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    data = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"} | config
    (path / "tokenizer_config.json").write_text(json.dumps(data))
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "tok", byte_level(), chat_template=CHATML, eos_token="<|im_end|>")


def random_text(rng):
    pools = [
        "hello world ",
        "é☃",
        "\U0001f600\U0001f468‍\U0001f469",
        "\N{REPLACEMENT CHARACTER}",
        "\n ",
    ]
    return "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 40)))


# --- ids


def test_ids(path):
    t = Tokenizer(path)
    bos = t.token_id("<s>")
    assert t.encode("hello")[0] == bos
    assert t.encode("hello", add_special_tokens=False) == t.encode("hello")[1:]
    assert t.decode(t.encode("hello wörld")) == "hello wörld"
    assert t.decode(t.encode("a<|im_end|>"), skip_special_tokens=False) == "<s>a<|im_end|>"
    assert t.special_ids == {t.token_id(s) for s in SPECIAL}
    assert len(t) == 256 + 4 + 3
    assert t.token(bos) == "<s>"
    assert t.special_id("eos") == t.token_id("<|im_end|>")
    assert t.special_id("pad") is None


def test_bos_is_not_added_twice(path):
    t = Tokenizer(path)
    assert t.encode("<s>hi") == t.encode("hi")


def test_stop_ids(path):
    t = Tokenizer(path)
    config = ModelConfig("llama", 300, 8, 8, 1, 2, 1, 4, eos_token_ids=(7, 9))
    assert t.stop_ids(config) == (7, 9, t.token_id("<|im_end|>"))
    assert t.stop_ids(config.changed(eos_token_ids=(), stop_token_ids=())) == (t.special_id("eos"),)


def test_rows_of_the_model(path):
    t = Tokenizer(path)
    assert t.surplus(270) == range(263, 270)
    assert not t.surplus(263)
    t.check_fits(263)
    with pytest.raises(WeightsError, match="ids up to 262, but the model has only 200"):
        t.check_fits(200)


def test_added_token_beyond_a_hole(path):
    data = json.loads((path / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][-1], "id": 300, "content": "<far>"})
    (path / "tokenizer.json").write_text(json.dumps(data))
    t = Tokenizer(path)
    assert len(t) >= 264
    assert t.decode([t.token_id("<far>")], skip_special_tokens=False) == "<far>"


# --- bit by bit


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
def test_pieces_join_to_the_whole(tmp_path, kind, seed):
    """For any text and any chunks; and no piece ever holds half a character."""
    rng = random.Random(seed)
    t = Tokenizer(write(tmp_path / "tok", kind()))
    text = random_text(rng)
    ids = t.encode(text)
    decoder, pieces, at = t.decoder(), [], 0
    while at < len(ids):
        n = rng.randint(1, 4)
        pieces.append(decoder.push(ids[at : at + n]))
        at += n
    assert "".join(pieces) + decoder.flush() == t.decode(ids)
    real = text.count("\N{REPLACEMENT CHARACTER}")
    assert "".join(pieces).count("\N{REPLACEMENT CHARACTER}") <= real


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_never_stall(tmp_path, seed):
    """Broken UTF-8 comes out too, at most one unfinished character late, and joins to the whole."""
    rng = random.Random(seed)
    t = Tokenizer(write(tmp_path / "tok", byte_level()))
    ids = [rng.randrange(256) for _ in range(60)]
    decoder, out = t.decoder(), ""
    for i, token in enumerate(ids):
        out += decoder.push([token])
        assert len(t.decode(ids[: i + 1])) - len(out) <= 1
    assert out + decoder.flush() == t.decode(ids)


def test_a_character_of_four_tokens(path):
    t = Tokenizer(path)
    ids = t.encode("a\U0001f600b", add_special_tokens=False)
    decoder = t.decoder()
    assert [decoder.push([i]) for i in ids] == ["a", "", "", "", "\U0001f600", "b"]
    assert decoder.push(ids[1:3]) == ""
    assert decoder.flush() == "\N{REPLACEMENT CHARACTER}"
    assert decoder.flush() == ""
    assert decoder.push(ids[:1]) == "a"


def test_special_tokens_in_the_stream(path):
    t = Tokenizer(path)
    ids = t.encode("a<|im_end|>b")
    for skip in (True, False):
        decoder = t.decoder(skip)
        got = "".join(decoder.push([i]) for i in ids) + decoder.flush()
        assert got == t.decode(ids, skip_special_tokens=skip)


# --- chat


TOOLS = [{"type": "function", "function": {"name": "é", "parameters": {"b": 1, "a": 2}}}]


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("add", [True, False])
def test_chat_as_transformers(path, add, tools):
    t = Tokenizer(path)
    hf = transformers.AutoTokenizer.from_pretrained(path)
    options = dict(add_generation_prompt=add, tools=tools)
    want = hf.apply_chat_template(MESSAGES, tokenize=False, **options)
    assert t.chat(MESSAGES, **options) == want
    ids = hf.apply_chat_template(MESSAGES, return_dict=False, **options)
    assert t.chat_ids(MESSAGES, **options) == ids
    assert ids.count(t.token_id("<s>")) == 1


def test_template_file_wins(path):
    (path / "chat_template.jinja").write_text("file {{ messages | length }} {{ style }}")
    t = Tokenizer(path)
    assert t.chat(MESSAGES, style="x") == "file 2 x"


def test_named_templates(path):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    t = Tokenizer(write(path, byte_level(), chat_template=named))
    assert t.chat(MESSAGES) == "D"
    assert t.chat(MESSAGES, tools=TOOLS) == "T"
    assert t.chat(MESSAGES, template="tool_use") == "T"
    with pytest.raises(UnknownNameError, match="did you mean 'tool_use'"):
        t.chat(MESSAGES, template="tool_us")


def test_special_tokens_map(path):
    (path / "tokenizer_config.json").unlink()
    (path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert Tokenizer(path).special_token("eos") == "<|im_end|>"


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("{% if %}", CheckpointError, "line 1"),
        (
            "{{ raise_exception('only one system message') }}",
            PromptError,
            "only one system message",
        ),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", PromptError, "refuses"),
        ("{{ messages.append(1) }}", PromptError, "refuses"),
        ("{{ messages[9].role }}", PromptError, "refuses"),
    ],
)
def test_templates_that_fail(path, template, error, message):
    (path / "chat_template.jinja").write_text(template)
    with pytest.raises(error, match=message):
        Tokenizer(path).chat(MESSAGES)


def test_strftime_now(path):
    (path / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}")
    assert int(Tokenizer(path).chat(MESSAGES)) >= 2020


# --- bad files


def test_no_template(tmp_path):
    with pytest.raises(UnsupportedError, match="no chat template"):
        Tokenizer(write(tmp_path / "t", byte_level())).chat(MESSAGES)


def test_bad_files(path):
    (path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer_config"):
        Tokenizer(path)
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer(path)
