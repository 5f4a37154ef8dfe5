"""Parts of the server by themselves: calls in text that comes piece by piece, channels, frames, Retry-After."""

import asyncio
import json
import socket

import pytest

from stretto.errors import CapacityError, EngineError
from stretto.serving.link import Channel
from stretto.serving.protocol import encode, merge, receive
from stretto.serving.tools import Reader, as_text, schema

CALLS = [{"name": "f", "arguments": {"a": "}]\"{", "b": [1, {"c": 2}]}}, {"name": "g", "arguments": {}}]
ONE, MANY = json.dumps(CALLS[0]), json.dumps(CALLS)


def read(text: str, size: int):
    """(content, calls) when ``text`` comes in pieces of ``size``."""
    reader, content, calls = Reader(frozenset({"f", "g"})), "", {}
    pieces = [d for i in range(0, len(text), size) for d in reader.push(text[i : i + size])] + reader.finish()
    for piece in pieces:
        if isinstance(piece, str):
            content += piece
        else:
            call = calls.setdefault(piece["index"], {"name": "", "arguments": "", "ids": []})
            call["name"] += piece.get("name", "")
            call["arguments"] += piece["arguments"]
            call["ids"] += [piece["id"]] if "id" in piece else []
    return content, calls


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    "text, names",
    [(ONE, "f"), (MANY, "fg"), (f"<tool_call>\n{ONE}\n</tool_call>", "f"), (f" {ONE} trailing words", "f")],
    ids=["one", "list", "tagged", "noise"],
)
def test_calls_are_found_in_pieces_of_any_size(text, names, size):
    content, calls = read(text, size)
    assert content == "" and "".join(c["name"] for c in calls.values()) == names
    assert all(len(c["ids"]) == 1 for c in calls.values())
    assert [json.loads(c["arguments"]) for c in calls.values()] == [c["arguments"] for c in CALLS[: len(names)]]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("text", ["plain words", '{"name": "h", "arguments": {}}', '{"name": "f"', "[1, 2]", "", "<tool", "{}"])
def test_what_is_no_call_is_content(text, size):
    assert read(text, size) == (text, {})


def test_a_call_that_was_cut_keeps_what_there_is():
    assert read(ONE[:-8], 5)[1][0]["arguments"] == ONE[len('{"name": "f", "arguments": ') : -8]


def test_schema_and_text_of_calls():
    tools = [{"name": "f", "parameters": {"type": "object", "$defs": {"x": {"type": "integer"}}}}, {"name": "g"}]
    both = schema(tools)
    assert len(both["anyOf"]) == 2 and both["$defs"]["x"] and schema(tools, "g")["properties"]["name"] == {"const": "g"}
    assert schema(tools, many=True)["items"]["anyOf"] and schema(tools, many=True)["$defs"]["x"]
    calls = [{"function": {"name": c["name"], "arguments": json.dumps(c["arguments"])}} for c in CALLS]
    assert as_text(calls) == MANY and as_text(calls[:1]) == ONE


def event(text, choice=0, **more):
    return {"id": "r", "choice": choice, "text": text, "tokens": [1] * len(text), "forwards": [0] * len(text), **more}


def test_a_slow_reader_gets_bigger_pieces_and_is_given_up_at_the_cap():
    async def scenario():
        channel = Channel("r", choices=2, cap=400)
        for piece in ("ab", "c", "d"):
            channel.push(event(piece))
        channel.push(event("x", choice=1, finish="stop"))
        first, second = await channel.take()
        assert first["text"] == "abcd" and len(first["tokens"]) == 4 and second["finish"] == "stop"
        assert await channel.take(0.01) == [] and not channel.done
        channel.push(event("e" * 30))
        assert channel.overflown
        channel.fail(CapacityError("full"))
        assert (await channel.take())[0]["text"] == "e" * 30  # what was final before comes first
        with pytest.raises(CapacityError):
            await channel.take()

    asyncio.run(scenario())


def test_what_waits_for_a_slow_front_goes_as_one_message():
    def step(*events):
        return {"op": "step", "events": list(events), "stats": {"running": len(events)}}

    messages = [
        {"op": "added", "id": "r"}, step(event("a"), event("x", 1)), {"op": "result", "call": 1, "value": 2},
        step(event("b", finish="stop", cost={"forwards": 2})), {"op": "error", "id": "q", "error": {}}, step(event("y", 1)),
    ]
    added, result, one, error = merge(messages)
    assert (added["op"], result["op"], error["op"]) == ("added", "result", "error") and one["stats"] == {"running": 1}
    first, second = one["events"]
    assert (first["text"], first["tokens"], first["finish"], second["text"]) == ("ab", [1, 1], "stop", "xy")
    assert messages[1]["events"][0]["text"] == "a" and merge(messages[:3]) == messages[:3]  # the originals stay


def test_a_refused_request_raises_before_its_first_event():
    async def scenario():
        channel = Channel("r", choices=1, cap=100)
        asyncio.get_running_loop().call_later(0.01, channel.fail, EngineError("gone"))
        with pytest.raises(EngineError):
            await channel.accepted()

    asyncio.run(scenario())


def test_frames_survive_a_socket_and_its_end():
    ours, theirs = socket.socketpair()
    messages = [{"op": "add", "prompt": list(range(3000))}, {"text": "\u00e9\ud800"}]
    with ours, theirs:
        for message in messages:
            ours.sendall(encode(message))
        assert [receive(theirs) for _ in messages] == messages
        ours.sendall(encode({"a": 1})[:5])
        ours.close()
        assert receive(theirs) is None
