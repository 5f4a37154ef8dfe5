"""Function calls with several tools at hand: for models that fill the fields of a call at the same time.

A case is one prompt with one to three tools, of which the sentence calls one, and its arguments as values by name. The
prompt is the workbook's; the answer has two forms: JSON, and one short stream for each field (``streams``).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from stretto.zoo.pages.calls import SCHEMAS, _value

__all__ = ["ARGUMENTS", "MORE", "ToolCase", "case", "spoken"]

ARGUMENTS = 6  # the most parameters of a tool
KINDS = {  # kind of a value -> type in the schema
    "topic": "string", "room": "string", "day": "string", "name": "string", "city": "string", "color": "string",
    "fruit": "string", "flag": "boolean", "hour": "integer", "minute": "integer", "count": "integer",
    "percent": "integer", "degrees": "integer",
}
MORE: dict[str, tuple[tuple[str, str], ...]] = {
    "stop_music": (),
    "lock_doors": (),
    "open_window": (("room", "room"),),
    "water_plant": (("amount", "count"),),
    "find_shop": (("city", "city"), ("item", "fruit")),
    "paint_room": (("room", "room"), ("color", "color"), ("day", "day")),
    "rent_car": (("city", "city"), ("day", "day"), ("days", "count"), ("color", "color")),
    "order_food": (("item", "fruit"), ("amount", "count"), ("name", "name"), ("city", "city"), ("organic", "flag")),
    "plan_party": (
        ("name", "name"), ("room", "room"), ("day", "day"), ("hour", "hour"), ("people", "count"), ("loud", "flag"),
    ),
    "hold_talk": (
        ("topic", "topic"), ("room", "room"), ("day", "day"), ("hour", "hour"), ("minute", "minute"),
        ("people", "count"),
    ),
}
TOOLS = SCHEMAS | MORE


@dataclass(frozen=True, slots=True)
class ToolCase:
    """``tools``: name -> ((parameter, type), ...) in the order of the prompt; ``name`` is called with ``arguments``."""

    tools: dict[str, tuple[tuple[str, str], ...]]
    prompt: str
    name: str
    arguments: dict[str, str | int | bool]

    @property
    def answer(self) -> str:
        """The call as JSON."""
        return json.dumps({"name": self.name, "arguments": self.arguments})

    @property
    def fields(self) -> list[str | None]:
        """The text of every field: the name, then ``ARGUMENTS`` values in the order of the schema; None = unused."""
        values = [spoken(v) for v in self.arguments.values()]
        return [self.name, *values, *[None] * (ARGUMENTS - len(values))]


def spoken(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def case(rng: random.Random, at_hand: tuple[str, ...] = ()) -> ToolCase:
    """One case; the tool that is called has more parameters more often. ``at_hand``: these tools, in this order."""
    names = list(at_hand or TOOLS)
    name = rng.choices(names, [1 + len(TOOLS[n]) for n in names])[0]
    chosen = names
    if not at_hand:
        others = rng.sample([n for n in names if n != name], rng.randint(0, 2))
        chosen = [name, *others]
        rng.shuffle(chosen)
    arguments = {key: _value(rng, kind) for key, kind in TOOLS[name]}
    said = list(arguments.items())
    rng.shuffle(said)
    words = ", ".join(f"{k} {spoken(v)}" for k, v in said)
    lines = [f"Tool: {n}({', '.join(f'{k}: {KINDS[kind]}' for k, kind in TOOLS[n])})" for n in chosen]
    prompt = "\n".join([*lines, f"Call {name} with {words}." if said else f"Call {name}."])
    tools = {n: tuple((k, KINDS[kind]) for k, kind in TOOLS[n]) for n in chosen}
    return ToolCase(tools, prompt, name, arguments)
