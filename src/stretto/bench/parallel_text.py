"""Sentences for the writing tasks of ParallelBench, and measures of text: rules of form, BLEU, chrF, ROUGE-L.

``grammatical`` and ``chrf`` replace the paper's grammar checker and BERTScore, which need Java and a large model.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from itertools import pairwise

from stretto.zoo.pages.words import ANIMALS, CITIES, COLOURS, DAYS, FRUIT, NAMES, ROOMS, TOOLS

__all__ = [
    "bleu", "chrf", "fact_sentence", "grammatical", "news", "paraphrase_score", "rouge_l", "summary_score", "word_set",
]

SETTINGS = (
    ("kitchen", "pot", "cook", "soup", "spoon", "table"), ("garden", "tree", "plant", "flower", "water", "spade"),
    ("school", "teacher", "book", "learn", "lesson", "pencil"), ("harbour", "boat", "sail", "rope", "wind", "captain"),
    ("market", "apple", "buy", "basket", "price", "farmer"), ("street", "car", "drive", "light", "corner", "wheel"),
)
ODD = (
    "justice velvet gravity pickle algebra thunder sofa mercy photon cactus treaty violin marsh invoice comet "
    "ladder empathy gravel opera magnet".split()
)
VERBS = (
    "is are was were has have had can will may do does did go make see take buy went made saw took bought said"
).split()


def word_set(rng: random.Random, level: str, n: int) -> list[str]:
    """``n`` words: of one setting (easy), of two (medium), unrelated (hard)."""
    if level == "hard":
        return rng.sample(ODD, n)
    sets = rng.sample(SETTINGS, 1 if level == "easy" else 2)
    pool = [w for s in sets for w in s]
    return rng.sample(pool, min(n, len(pool)))


def fact_sentence(rng: random.Random) -> str:
    name, thing, room, color = rng.choice(NAMES), rng.choice(FRUIT), rng.choice(ROOMS), rng.choice(COLOURS)
    forms = (
        f"{name} left {rng.randint(2, 9)} {color} {thing}s in the {room} on {rng.choice(DAYS)}.",
        f"On {rng.choice(DAYS)} the old {rng.choice(TOOLS)} of {name} was found in the {room}.",
        f"{name} saw a {color} {rng.choice(ANIMALS)} near the market of {rng.choice(CITIES)}.",
    )
    return rng.choice(forms)


def news(rng: random.Random) -> tuple[str, str]:
    """(four sentences, the one that says it all)."""
    name, city, day, thing = rng.choice(NAMES), rng.choice(CITIES), rng.choice(DAYS), rng.choice(FRUIT)
    n, color = rng.randint(20, 90), rng.choice(COLOURS)
    gist = f"{name} opened a {thing} shop in {city} on {day}."
    text = (
        f"On {day} {name} opened a new shop in {city}. The shop sells only {thing}s. On the first day {n} people "
        f"came to look at the {color} shelves. {name} was tired but happy."
    )
    return text, gist


def grammatical(text: str) -> bool:
    """One sentence by form: a capital first, a full stop, question or exclamation mark at the end and nowhere else, at
    least four words, none twice in a row, no space before punctuation, quotes and brackets in pairs."""
    s = text.strip()
    words = re.findall(r"[A-Za-z']+", s.lower())
    if not re.fullmatch(r"[A-Z\"'(0-9].*[.!?][\"')]?", s, re.S) or len(words) < 4:
        return False
    if re.search(r"\s[,.;:!?]|\s\s|[,.;:!?]{2}|[.!?]\s+[A-Z]", s):
        return False
    if any(a == b for a, b in pairwise(words) if a not in ("had", "that")):
        return False
    if s.count('"') % 2 or s.count("(") != s.count(")"):
        return False
    return any(w in VERBS or w.endswith(("ed", "s", "ing")) for w in words[1:])


def _ngrams(items: list[str] | str, n: int) -> Counter:
    return Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def bleu(reference: str, text: str) -> float:
    """Sentence BLEU-4 with add-one smoothing from bigrams on (Lin & Och, 2004), in 0..1."""
    ref, got = re.findall(r"\w+", reference.lower()), re.findall(r"\w+", text.lower())
    if not got:
        return 0.0
    logs = 0.0
    for n in range(1, 5):
        a, b = _ngrams(ref, n), _ngrams(got, n)
        hit, total = sum((a & b).values()), sum(b.values())
        hit, total = (hit, total) if n == 1 else (hit + 1, total + 1)
        if not hit:
            return 0.0
        logs += math.log(hit / total) / 4
    return min(1.0, math.exp(1 - len(ref) / len(got))) * math.exp(logs)


def chrf(reference: str, text: str, *, order: int = 6, beta: float = 2.0) -> float:
    """Character n-gram F-score (Popovic, 2015), blanks left out, in 0..1."""
    ref, got = re.sub(r"\s", "", reference), re.sub(r"\s", "", text)
    precision, recall, used = 0.0, 0.0, 0
    for n in range(1, order + 1):
        a, b = _ngrams(ref, n), _ngrams(got, n)
        if not a or not b:
            continue
        hit = sum((a & b).values())
        precision, recall, used = precision + hit / sum(b.values()), recall + hit / sum(a.values()), used + 1
    if not used or not precision or not recall:
        return 0.0
    p, r = precision / used, recall / used
    return (1 + beta**2) * p * r / (beta**2 * p + r)


def rouge_l(reference: str, text: str) -> float:
    """F1 of the longest common subsequence of words, in 0..1."""
    a, b = re.findall(r"\w+", reference.lower()), re.findall(r"\w+", text.lower())
    row = [0] * (len(b) + 1)
    for x in a:
        last = row
        row = [0]
        for j, y in enumerate(b):
            row.append(last[j] + 1 if x == y else max(row[j], last[j + 1]))
    return 2 * row[-1] / (len(a) + len(b)) if row[-1] else 0.0


def paraphrase_score(original: str, text: str) -> float:
    """Different words (1 - BLEU), the same content (chrF for BERTScore), a sentence by form."""
    return (1 - bleu(original, text)) * chrf(original, text) * grammatical(text)


def summary_score(reference: str, text: str) -> float:
    return rouge_l(reference, text) * grammatical(text)
