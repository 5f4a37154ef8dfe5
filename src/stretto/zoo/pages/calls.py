"""JSON function calls from one sentence and a signature."""

from __future__ import annotations

import json
import random

from stretto.zoo.pages.words import CITIES, COLOURS, DAYS, FRUIT, NAMES, ROOMS, TOPICS

SCHEMAS: dict[str, tuple[tuple[str, str], ...]] = {
    "set_alarm": (("hour", "hour"), ("minute", "minute"), ("label", "topic")),
    "book_room": (("room", "room"), ("day", "day"), ("people", "count")),
    "send_mail": (("to", "name"), ("subject", "topic"), ("urgent", "flag")),
    "buy_train": (("origin", "city"), ("target", "city"), ("day", "day"), ("seats", "count")),
    "set_light": (("room", "room"), ("color", "color"), ("level", "percent")),
    "add_item": (("item", "fruit"), ("amount", "count"), ("organic", "flag")),
    "get_weather": (("city", "city"), ("day", "day")),
    "set_heat": (("room", "room"), ("degrees", "degrees"), ("hour", "hour")),
    "call_taxi": (("name", "name"), ("city", "city"), ("hour", "hour"), ("minute", "minute")),
    "play_song": (("topic", "topic"), ("room", "room"), ("volume", "percent"), ("loop", "flag")),
    "plan_trip": (("name", "name"), ("city", "city"), ("days", "count"), ("hotel", "flag"), ("color", "color")),
}


def _value(rng: random.Random, kind: str) -> str | int | bool:
    pools = {"topic": TOPICS, "room": ROOMS, "day": DAYS, "name": NAMES, "city": CITIES, "color": COLOURS,
             "fruit": FRUIT}
    if kind in pools:
        return rng.choice(pools[kind])
    if kind == "flag":
        return rng.random() < 0.5
    low, high = {"hour": (0, 23), "minute": (0, 59), "count": (1, 20), "percent": (0, 100),
                 "degrees": (10, 30)}[kind]
    return rng.randint(low, high)


def _type(value: str | int | bool) -> str:
    return {str: "string", int: "integer", bool: "boolean"}[type(value)]


def call(rng: random.Random) -> tuple[str, str]:
    name = rng.choice(list(SCHEMAS))
    args = {key: _value(rng, kind) for key, kind in SCHEMAS[name]}
    said = list(args.items())
    rng.shuffle(said)
    words = ", ".join(f"{k} {str(v).lower() if isinstance(v, bool) else v}" for k, v in said)
    signature = ", ".join(f"{k}: {_type(v)}" for k, v in args.items())
    return f"Tool: {name}({signature})\nCall it with {words}.", json.dumps({"name": name, "arguments": args})


def batch(rng: random.Random) -> tuple[str, str]:
    room = rng.sample(ROOMS, rng.randint(2, 3))
    color, level = rng.choice(COLOURS), rng.randint(0, 100)
    answer = [
        {"name": "set_light", "arguments": {"room": r, "color": color, "level": level}} for r in room
    ]
    return (
        f"Tool: set_light(room: string, color: string, level: integer)\nSet {', '.join(room)} to {color} "
        f"at level {level}.",
        json.dumps(answer),
    )


def score(prompt: str, answer: str, reference: str) -> bool:
    """Right if it parses to the same value; true is not 1 and 7 is not 7.0, as the signature gives types."""
    try:
        given = json.loads(answer)
        return json.dumps(given, sort_keys=True) == json.dumps(json.loads(reference), sort_keys=True)
    except (ValueError, RecursionError):  # RecursionError: an endless "[[[["
        return False


TASKS = {
    "json_call": ("One function call with 2 to 5 typed arguments.", call, score),
    "json_batch": ("The same call for several rooms.", batch, score),
}
