"""The workbook as something to measure with: prompts of its test split, how long answers may be, who checks them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

from stretto.bench.measure import Item
from stretto.errors import OptionError
from stretto.zoo.workbook import FAMILIES, TASKS, Example, Task, encode, examples, render, tasks_of

__all__ = ["answer_room", "chat_prompt", "load_items", "one_per_family", "pick_tasks"]


def pick_tasks(names: str | Sequence[str]) -> list[Task]:
    """Tasks by task or family name, in the order given; all of them for nothing or "all"."""
    return tasks_of([names] if isinstance(names, str) else list(names))


def one_per_family() -> list[Task]:
    """The first task of every family: the short programme."""
    return [next(t for t in TASKS.values() if t.family == family) for family in FAMILIES]


def load_items(
    tasks: Sequence[Task], n: int, seed: int, max_tokens: int | None = None, tokenizer: Any = None
) -> list[Item]:
    """``n`` prompts of each task from the test split, the same for the same seed.

    ``tokenizer`` (of the model to measure) decides how a prompt is written; None = the zoo's way.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise OptionError("seed", seed, "a whole number")
    return [
        Item(
            task.name, task.family, chat_prompt(example, tokenizer), max_tokens or answer_room(task.name),
            partial(_score, task, example), example.prompt,
        )
        for task in tasks for example in examples(task.name, "test", n, seed)
    ]


@lru_cache(maxsize=256)
def answer_room(task: str) -> int:
    """Tokens that an answer may take: a quarter more than the longest of 48 training answers, a multiple of 8."""
    longest = max(len(encode(e)[1]) for e in examples(task, "train", 48, 0))
    return -(-longest * 5 // 32) * 8


def chat_prompt(example: Example, tokenizer: Any = None) -> str:
    """The prompt as the model reads it: the zoo's chat form where its tokens exist, else the model's own template."""
    if tokenizer is None or tokenizer.token_id("<|im_start|>") is not None:
        return render(example)[0]
    if tokenizer.templates:
        return tokenizer.chat([{"role": "user", "content": example.prompt}], add_generation_prompt=True)
    return example.prompt + "\n"


def _score(task: Task, example: Example, answer: str) -> float:
    return float(task.score(example.prompt, answer, example.answer))
