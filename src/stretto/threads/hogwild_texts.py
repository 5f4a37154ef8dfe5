"""What is said to and by workers on one live cache, as data: of a trained model (``hogwild.json`` beside its weights),
or for any chat model."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stretto.errors import CheckpointError, OptionError, UnsupportedError
from stretto.zoo.models import resolve

__all__ = ["FILE", "Texts"]

FILE = "hogwild.json"

PROMPT = """{task}

You are one of {count} assistants who solve this together: {names}. You share one page. First on it stand the finished \
paragraphs of everybody, then what the others are writing at this moment, below it your own paragraph.
- Say at once what you take, so that the others can take something else. Split what can be split.
- Read what the others write while you write. Never repeat what is there; if somebody is ahead of you, stop and check \
their result, or take the next part.
- If two results differ, find out together which is right.
Example: "{first} takes the cases with n even." - "{second} takes n odd then." - "{first}: even gives 12." - \
"{second}: I was doing even cases as well, that is redundant; I check n = 7 instead."
Whoever knows the answer writes it as \\boxed{{answer}}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """``prompt``: the user's message, with {task}, {names}, {count}, {first}, {second}. ``openings``: how the first
    step of each worker goes on behind its prefix (the last one holds for the rest). ``answer``: a regular expression
    whose first group is the answer. ``banned``: texts of single tokens that nobody may write; ``leave``: the token
    with which a worker leaves, None = nobody can (end tokens are then banned too). ``check``: asked now and then in
    front of a step. ``unfinished`` ends cut steps, ``finisher`` begins the forced answer."""

    names: tuple[str, ...] = ("Alice", "Bob", "Carol", "David", "Erin", "Frank", "Grace", "Henry")
    prompt: str = PROMPT
    step_prefix: str = "**{name} [{step}]:** "
    step_separator: str = "\n\n"
    others_header: str = "\n\n<others_in_progress>\n\n"
    own_header: str = "\n\n<own_in_progress>\n\n"
    openings: tuple[str, ...] = ("Hi, I am {name}. I suggest this plan: ", "Hi, I am {name}. ")
    check: str = "Quick check: am I doing work that somebody else has done or is doing (yes or no)? "
    unfinished: str = "..."
    finisher: str = "\n\nThe time is over; the final answer is \\boxed{"
    answer: str = r"\\boxed\{([^{}]+)\}"
    banned: tuple[str, ...] = ("#", "##", "###", "</think>")
    leave: str | None = None

    @classmethod
    def of(cls, llm: Any) -> Texts:
        """Those that the model was trained with, else the ones for any chat model."""
        path = Path(resolve(llm.model_name)) / FILE
        if not path.is_file():
            return cls()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})
        except (OSError, ValueError, TypeError) as e:
            known = ", ".join(f.name for f in fields(cls))
            raise CheckpointError(f"{path} cannot be read ({e}); its keys are {known}") from e

    def user_prompt(self, task: str, names: tuple[str, ...]) -> str:
        return self.prompt.format(
            task=task, names=", ".join(names), count=len(names), first=names[0], second=names[-1],
        )

    def check_separator(self, llm: Any) -> None:
        """OptionError unless the separator is where tokens end and begin."""
        encode, sep = llm.tokenizer.encode, self.step_separator
        if not sep or encode(f"a.{sep}B") != [*encode(f"a.{sep}"), *encode("B")]:
            raise OptionError("step_separator", sep, "a text behind which a token always ends")

    def find_answer(self, text: str) -> str | None:
        found = re.search(self.answer, text)
        return found.group(1) if found else None

    def banned_ids(self, llm: Any) -> dict[int, float]:
        """Bias for tokens that nobody may write. UnsupportedError for a text that is no single token."""
        ids = []
        for text in self.banned:
            found = llm.tokenizer.encode(text)
            if len(found) == 1:
                ids += found
            elif text not in Texts().banned:
                raise UnsupportedError(f"banned text {text!r} is {len(found)} tokens of this model: only single ones")
        if self.leave is None:
            ids += llm.host.stop_ids
        return dict.fromkeys(ids, -100.0)
