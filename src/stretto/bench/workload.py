"""The workbook as something to measure with: prompts of its test split, how long answers may be, who checks them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

from stretto.bench.measure import Item
from stretto.bench.parallel_tasks import PARALLEL_TASKS, ParallelTask
from stretto.bench.parallelbench import FAMILIES as PARALLEL_FAMILIES
from stretto.bench.parallelbench import GROUP, parallel_items, pick_parallel
from stretto.errors import OptionError, UnknownNameError
from stretto.zoo.workbook import FAMILIES, TASKS, Example, Task, encode, examples, render, tasks_of

__all__ = ["answer_room", "chat_prompt", "load_items", "one_per_family", "pick_tasks"]


def pick_tasks(names: str | Sequence[str]) -> list[Task | ParallelTask]:
    """Tasks by task or family name, in the order given, of the workbook and of ParallelBench; the whole workbook for
    nothing or "all"."""
    wanted = [names] if isinstance(names, str) else list(names)
    if not wanted or wanted == ["all"]:
        return list(TASKS.values())
    out: list[Task | ParallelTask] = []
    for name in wanted:
        found = pick_parallel(name) or _of_the_workbook(name)
        out += [t for t in found if t not in out]
    return out


def _of_the_workbook(name: str) -> list[Task]:
    try:
        return tasks_of([name])
    except UnknownNameError:
        known = [*FAMILIES, *TASKS, "all", GROUP, *PARALLEL_FAMILIES, *PARALLEL_TASKS]
        raise UnknownNameError("task", name, known) from None


def one_per_family() -> list[Task | ParallelTask]:
    """The first task of every family: the short programme."""
    return [next(t for t in TASKS.values() if t.family == family) for family in FAMILIES]


def load_items(
    tasks: Sequence[Task | ParallelTask], n: int, seed: int, max_tokens: int | None = None, tokenizer: Any = None
) -> list[Item]:
    """``n`` prompts of each task, the same for the same seed; of the workbook from the test split.

    ``tokenizer`` (of the model to measure) decides how a prompt is written; None = the zoo's way.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise OptionError("seed", seed, "a whole number")
    out: list[Item] = []
    for task in tasks:
        if isinstance(task, ParallelTask):
            out += parallel_items(task, n, seed, max_tokens, tokenizer)
            continue
        room = max_tokens or answer_room(task.name)
        out += [
            Item(
                task.name, task.family, chat_prompt(e, tokenizer), room, partial(_score, task, e), e.prompt,
            )
            for e in examples(task.name, "test", n, seed)
        ]
    return out


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
