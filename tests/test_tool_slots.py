"""Calls whose fields are decoded at the same time: exact on any weights (here a model that was never trained for it)."""

import json

import pytest

from stretto import LLM, SamplingParams
from stretto.errors import InputError, OptionError, UnsupportedError
from stretto.threads.control import control_loop
from stretto.threads.slots import Slots, call_tool, stream_call
from stretto.threads.tools import Parameter, convert, parse_tools, prompt_of

TOOLS = [
    {"type": "function", "function": {"name": "set_alarm", "parameters": {"type": "object", "properties": {
        "hour": {"type": "integer"}, "label": {"type": "string"}, "loud": {"type": "boolean"},
        "tone": {"type": "string", "enum": ["low", "high"]}}, "required": ["hour", "label"]}}},
    {"type": "function", "function": {"name": "stop", "parameters": {}}},
]
QUERY = "Call set_alarm with hour 12, label budget, loud true."


@pytest.fixture(scope="module")
def llm():
    return LLM("zoo:tiny", dtype="float32", deterministic=True)


@pytest.fixture(scope="module")
def slots(llm):
    ids = [llm.tokenizer.inner.token_to_id(f"<|slot_{i}|>") for i in range(16)]
    return Slots(tuple(ids[:7]), tuple(ids[8:15]), llm.tokenizer.inner.token_to_id("<|spare_0|>"))


def prompt_ids(llm):
    return llm.tokenizer.encode(
        llm.chat_prompt([{"role": "user", "content": prompt_of(parse_tools(TOOLS), QUERY)}])
    )


def test_each_field_is_its_own_greedy_text_and_the_prompt_is_evaluated_once(llm, slots):
    call = call_tool(llm, QUERY, TOOLS, slots=slots, max_slot_tokens=6, tool_choice="set_alarm")
    ids, ends = prompt_ids(llm), [*slots.closers, slots.null]
    total = 0
    for field, opener in zip(call.fields, slots.openers, strict=False):
        params = SamplingParams(max_tokens=6, temperature=0.0, stop_token_ids=ends)
        alone = llm.generate([[*ids, opener]], params)[0].outputs[0].token_ids
        if field != "name":
            kept = [t for t in alone if t not in slots.closers]
            want = None if not kept or slots.null in kept else llm.tokenizer.decode(kept, skip_special_tokens=True).strip()
            assert call.fields[field] == want
    total = call.usage.generated
    heads = 5
    assert call.usage.evaluated == len(ids) + heads + total - heads
    assert call.usage.forwards <= 1 + 6


def test_a_field_does_not_depend_on_which_others_are_decoded(llm, slots):
    wide = [*TOOLS, {"function": {"name": "wide", "parameters": {"properties": {f"p{i}": {} for i in range(6)}}}}]
    ids = prompt_ids(llm)
    with llm.session(ids) as s:
        few = s.fork(prefixes=[[t] for t in slots.openers[:2]]).gen(max_tokens=5, ignore_eos=True)
    with llm.session(ids) as s:
        all_ = s.fork(prefixes=[[t] for t in slots.openers]).gen(max_tokens=5, ignore_eos=True)
    assert [o.token_ids for o in few] == [o.token_ids for o in all_[:2]]
    assert call_tool(llm, QUERY, wide, slots=slots, max_slot_tokens=2).usage.critical_path <= 2


@pytest.mark.parametrize("coupling", ["independent", "after_function"])
def test_with_the_grammar_every_call_fits_its_schema(llm, slots, coupling):
    for query in (QUERY, "Something else entirely.", "Stop."):
        call = call_tool(
            llm, query, TOOLS, slots=slots, grammar=True, tool_choice="set_alarm", coupling="after_function",
        )
        assert call.name == "set_alarm"
        assert set(call.arguments) | set(call.problems) == {"hour", "label", "loud", "tone"}
        for key, kind in (("hour", int), ("label", str), ("loud", bool)):
            if key in call.arguments:
                assert type(call.arguments[key]) is kind
        assert call.arguments.get("tone", "low") in ("low", "high")
    named = call_tool(llm, QUERY, TOOLS, slots=slots, grammar=True, tool_choice="required", coupling=coupling)
    assert named.name in ("set_alarm", "stop")


def test_the_streamed_pieces_are_the_call(llm, slots):
    options = dict(slots=slots, grammar=True, tool_choice="set_alarm", coupling="after_function")
    call = call_tool(llm, QUERY, TOOLS, **options)
    name, *pieces = stream_call(llm, QUERY, TOOLS, **options)
    assert name == call.name and "".join(pieces) == call.json and json.loads(call.json) == call.arguments
    empty = dict(slots=slots, tool_choice="stop")
    assert list(stream_call(llm, QUERY, TOOLS, **empty)) == ["stop", "{}"]
    assert list(stream_call(llm, QUERY, TOOLS, slots=slots, tool_choice="none")) == []


def test_values_have_the_type_of_the_schema_not_of_their_looks():
    assert convert("12", Parameter("a", "string")) == "12"
    assert convert("12", Parameter("a", "integer")) == 12
    assert convert("Paris", Parameter("a", "string", ("Paris",))) == "Paris"
    assert convert("true", Parameter("a", "boolean")) is True
    assert convert("[1, 2]", Parameter("a", "array")) == [1, 2]
    for text, p in (("12.5", "integer"), ("yes", "boolean"), ("nan", "number"), ("{}", "array"), ("", "integer")):
        with pytest.raises(ValueError):
            convert(text, Parameter("a", p))
    with pytest.raises(ValueError):
        convert("x", Parameter("a", "string", ("y",)))


def test_wrong_requests_are_named(llm, slots):
    seven = [{"function": {"name": "seven", "parameters": {"properties": {f"p{i}": {} for i in range(7)}}}}]
    with pytest.raises(InputError, match="'seven' has 7 parameters, the model has fields for 6"):
        call_tool(llm, QUERY, seven, slots=slots)
    with pytest.raises(InputError, match="two tools are called 'stop'"):
        call_tool(llm, QUERY, [TOOLS[1], TOOLS[1]], slots=slots)
    with pytest.raises(InputError, match="no tool"):
        call_tool(llm, QUERY, [], slots=slots)
    with pytest.raises(InputError, match="'date'"):
        call_tool(llm, QUERY, [{"function": {"name": "x", "parameters": {"properties": {"a": {"type": "date"}}}}}], slots=slots)
    with pytest.raises(OptionError, match="tool_choice"):
        call_tool(llm, QUERY, TOOLS, slots=slots, tool_choice="set_alrm")
    with pytest.raises(OptionError, match="coupling"):
        call_tool(llm, QUERY, TOOLS, slots=slots, coupling="loose")
    with pytest.raises(UnsupportedError, match=r"tool_slots\.json"):
        call_tool(llm, QUERY, TOOLS)
    cut = call_tool(llm, QUERY, TOOLS, slots=slots, max_slot_tokens=1, tool_choice="set_alarm")
    assert cut.finish_reason == "length" and cut.problems


def test_a_control_loop_keeps_its_rate_and_counts_latency_from_when_a_tick_was_due():
    now, said = [100.0], []

    def decide(state):
        said.append((state, now[0]))
        now[0] += state

    pause = lambda t: now.__setitem__(0, now[0] + t)
    ticks = control_loop(decide, [0.01, 0.03, 0.25, 0.01, 0.01], 10.0, clock=lambda: now[0], sleep=pause)
    assert [round(at - 100, 6) for _, at in said] == [0.0, 0.1, 0.2, 0.45, 0.46]  # the slow one takes two ticks with it
    assert ticks.latencies == pytest.approx((0.01, 0.03, 0.25, 0.16, 0.07))
    assert ticks.at(0.5) == pytest.approx(0.07) and ticks.at(0.99) == pytest.approx(0.25) and ticks.in_time == 0.6
    with pytest.raises(OptionError, match="rate"):
        control_loop(decide, [1], 0)
    with pytest.raises(OptionError, match="states"):
        control_loop(decide, [], 1.0)
