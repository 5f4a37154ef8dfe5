"""The workbook: generated tasks with disjoint training and test prompts, on which the zoo is trained and measured.

An example belongs to the test split if and only if a hash of its prompt says so (one in 32), so that no test prompt can
occur in training, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from stretto.errors import OptionError, UnknownNameError
from stretto.zoo.pages import arithmetic, calls, lists, python, tables, text

__all__ = ["FAMILIES", "TASKS", "Example", "Task", "encode", "examples", "render", "stream"]

SPLITS = ("train", "test")
TOKENIZER = Path(__file__).parent / "tokenizer" / "tokenizer.json"

Generate = Callable[[random.Random], tuple[str, str]]
Score = Callable[[str, str, str], bool]


@dataclass(frozen=True, slots=True)
class Example:
    task: str
    family: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    """``score(prompt, answer, reference)``: whether an answer is right."""

    name: str
    family: str
    purpose: str
    generate: Generate
    score: Score


def exact(prompt: str, answer: str, reference: str) -> bool:
    return answer.strip() == reference.strip()


_PAGES = {
    "lists": lists, "arithmetic": arithmetic, "json": calls, "python": python, "tables": tables, "text": text,
}
FAMILIES = tuple(_PAGES)
TASKS: dict[str, Task] = {
    name: Task(name, family, purpose, generate, score or exact)
    for family, page in _PAGES.items()
    for name, (purpose, generate, score) in page.TASKS.items()
}


def _split(prompt: str) -> str:
    return "test" if hashlib.blake2b(prompt.encode(), digest_size=1).digest()[0] % 32 == 0 else "train"


def _draw(task: Task, split: str, rng: random.Random) -> Example:
    while True:
        prompt, answer = task.generate(rng)
        if _split(prompt) == split:
            return Example(task.name, task.family, prompt, answer)


def _check(split: str) -> None:
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)


def tasks_of(names: list[str] | None) -> list[Task]:
    """Tasks by task or family name; None or "all" means every task."""
    if not names or names == ["all"]:
        return list(TASKS.values())
    out: list[Task] = []
    for name in names:
        found = [t for t in TASKS.values() if name in (t.name, t.family)]
        if not found:
            raise UnknownNameError("task", name, [*FAMILIES, *TASKS, "all"])
        out += [t for t in found if t not in out]
    return out


def examples(task: str, split: str, n: int, seed: int) -> list[Example]:
    """``n`` different examples of one task, the same for the same seed."""
    _check(split)
    if task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    if n < 1:
        raise OptionError("n", n, "a whole number from 1")
    rng = random.Random(f"{split}/{task}/{seed}")
    out: dict[str, Example] = {}
    while len(out) < n:
        example = _draw(TASKS[task], split, rng)
        out.setdefault(example.prompt, example)
    return list(out.values())


def stream(split: str, seed: int, weights: Mapping[str, float] | None = None) -> Iterator[Example]:
    """An endless mix over tasks; ``weights`` by task name, default 1."""
    _check(split)
    names = list(TASKS)
    unknown = set(weights or {}) - set(names)
    if unknown:
        raise UnknownNameError("task", min(unknown), names)
    odds = [(weights or {}).get(name, 1.0) for name in names]
    rng = random.Random(f"{split}/stream/{seed}")
    while True:
        yield _draw(TASKS[rng.choices(names, odds)[0]], split, rng)


def render(example: Example) -> tuple[str, str]:
    """(chat prompt up to the assistant's turn, answer with the end of the turn)."""
    prompt = f"<|im_start|>user\n{example.prompt}<|im_end|>\n<|im_start|>assistant\n"
    return prompt, example.answer + "<|im_end|>"


@lru_cache(maxsize=1)
def _tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(TOKENIZER))


def encode(example: Example) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids) with the shipped tokenizer."""
    prompt, answer = render(example)
    t = _tokenizer()
    return t.encode(prompt, add_special_tokens=False).ids, t.encode(answer, add_special_tokens=False).ids
