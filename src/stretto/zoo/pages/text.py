"""Templated text: letters, notices, and a word exchanged in a sentence."""

from __future__ import annotations

import random

from stretto.zoo.pages.words import CITIES, COLOURS, DAYS, FRUIT, NAMES, ROOMS, TOPICS


def letter(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(NAMES, 2)
    day, room, topic, hour = rng.choice(DAYS), rng.choice(ROOMS), rng.choice(TOPICS), rng.randint(8, 19)
    prompt = f"Write an invitation. From: {a}. To: {b}. Topic: {topic}. Day: {day}. Hour: {hour}. Room: {room}."
    answer = (
        f"Dear {b},\nplease come to our meeting about {topic} on {day} at {hour} o'clock. We meet in the "
        f"{room}. Let me know if {day} does not suit you.\nKind regards,\n{a}"
    )
    return prompt, answer


def notice(rng: random.Random) -> tuple[str, str]:
    city, day = rng.choice(CITIES), rng.choice(DAYS)
    name, thing, color = rng.choice(NAMES), rng.choice(FRUIT), rng.choice(COLOURS)
    n = rng.randint(2, 99)
    prompt = f"Write a notice. Shop: {name}. City: {city}. Product: {thing}. Price: {n}. Day: {day}. Sign: {color}."
    answer = (
        f"News from {city}! On {day} the shop of {name} sells every {thing} for {n} coins. Look for the "
        f"{color} sign. {name} is happy to see you in {city}."
    )
    return prompt, answer


def exchange(rng: random.Random) -> tuple[str, str]:
    old, new = rng.sample(FRUIT, 2)
    name, room, color = rng.choice(NAMES), rng.choice(ROOMS), rng.choice(COLOURS)
    n, day = rng.randint(2, 99), rng.choice(DAYS)
    shape = rng.choice(
        (
            "{name} put {n} {w}s into the {room}, and on {day} the {w}s were {color}.",
            "On {day} {name} found a {color} {w} in the {room}; it was one {w} of {n}.",
            "In the {room} there are {n} {w}s. Every {w} is {color}, says {name} on {day}.",
        )
    )
    fields = {"name": name, "room": room, "color": color, "n": n, "day": day}
    prompt = f"Replace {old} by {new}: {shape.format(w=old, **fields)}"
    return prompt, shape.format(w=new, **fields)


TASKS = {
    "text_letter": ("An invitation from its fields.", letter, None),
    "text_notice": ("A shop's notice from its fields.", notice, None),
    "text_replace": ("Exchange a word in a sentence.", exchange, None),
}
