"""Text to tokens and back: tokenizer.json, its special ids, chat templates, and text that is
complete bit by bit.

The ``tokenizers`` library does the work; jinja2 renders templates, sandboxed, as transformers does.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as Backend

from stretto.errors import (
    CheckpointError,
    MissingExtraError,
    PromptError,
    UnknownNameError,
    UnsupportedError,
    WeightsError,
)
from stretto.zoo.models import base_folder

if TYPE_CHECKING:
    from stretto.models.config import ModelConfig

__all__ = ["Detokenizer", "Tokenizer"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """The tokenizer of the checkpoint in directory ``path``; ``inner`` is the library's object.

    ``len()`` is one more than the largest id. A model may have more rows than that (``surplus``),
    never fewer (``check_fits``).
    """

    def __init__(self, path: str | os.PathLike):
        self.path = base_folder(Path(path))
        file = self.path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{self.path} has no tokenizer.json: older formats must be converted first"
            )
        try:
            self.inner = Backend.from_file(str(file))
        except Exception as e:  # the library raises plain Exception
            raise CheckpointError(f"{file} cannot be read as a tokenizer: {e}") from e
        self.inner.no_padding()
        self.inner.no_truncation()
        self.config = self._json("tokenizer_config.json") | self._extra_config()
        self._vocabulary = self.inner.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(self._vocabulary.values(), default=-1)

    def __len__(self) -> int:
        return self.vocab_size

    def check_fits(self, rows: int) -> None:
        """WeightsError when there are more ids than ``rows``, the embedding rows of the model."""
        if self.vocab_size > rows:
            raise WeightsError(
                f"the tokenizer of {self.path} has ids up to {self.vocab_size - 1}, "
                f"but the model has only {rows} embedding rows"
            )

    def surplus(self, rows: int) -> range:
        """Ids below ``rows`` that no text can produce: never sample them."""
        return range(self.vocab_size, max(rows, self.vocab_size))

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        if not file.is_file():
            return {}
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{file} cannot be read as JSON: {e}") from e
        return data if isinstance(data, dict) else {}

    def _extra_config(self) -> dict[str, Any]:
        """Special tokens of special_tokens_map.json, where tokenizer_config.json has none."""
        known = self._json("tokenizer_config.json")
        return {k: v for k, v in self._json("special_tokens_map.json").items() if k not in known}

    # --- ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with what the tokenizer puts around a text (BOS, mostly; not twice if the text
        has it).
        """
        ids = self.inner.encode(text, add_special_tokens=add_special_tokens).ids
        bos = self.special_id("bos")
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; ids without a token give nothing."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def decoder(self, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental decoder."""
        return Detokenizer(self, skip_special_tokens=skip_special_tokens)

    def stop_ids(self, config: ModelConfig) -> tuple[int, ...]:
        """Every id that ends a text: those of the model's files first, then the tokenizer's own
        EOS.
        """
        own = self.special_id("eos")
        more = () if own is None or own in config.stop_token_ids else (own,)
        return (*config.stop_token_ids, *more)

    def token_id(self, token: str) -> int | None:
        return self._vocabulary.get(token)

    def token(self, token_id: int) -> str | None:
        """The token's name in the vocabulary (not its text)."""
        return self.inner.id_to_token(int(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, which need not be whole characters."""
        name = self.token(token_id) or ""
        if token_id in self._added:
            return name.encode()
        if self.byte_level:
            return bytes(_BYTES[c] for c in name if c in _BYTES)
        match = _BYTE_TOKEN.fullmatch(name)
        return bytes([int(match[1], 16)]) if match else name.encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.inner.get_added_tokens_decoder())

    @cached_property
    def byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self.inner.to_str()).get("decoder"))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that ``skip_special_tokens`` leaves out."""
        added = self.inner.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    def special_token(self, kind: str) -> str | None:
        """The text of the "bos", "eos", "pad", "unk" or "mask" token."""
        value = self.config.get(f"{kind}_token")
        return value.get("content") if isinstance(value, Mapping) else value

    def special_id(self, kind: str) -> int | None:
        token = self.special_token(kind)
        return None if token is None else self.token_id(token)

    # --- chat

    @cached_property
    def templates(self) -> dict[str, str]:
        """Chat templates by name; "default" is the usual one."""
        found = self.config.get("chat_template")
        if isinstance(found, list):
            out = {t["name"]: t["template"] for t in found}
        else:
            out = {"default": found} if found else {}
        for file in sorted((self.path / "additional_chat_templates").glob("*.jinja")):
            out[file.stem] = file.read_text(encoding="utf-8")
        if (self.path / "chat_template.jinja").is_file():
            out["default"] = (self.path / "chat_template.jinja").read_text(encoding="utf-8")
        return out

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: str = "default",
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation. ``template``: a name in ``templates``; ``variables``
        go to it.
        """
        if not self.templates:
            raise UnsupportedError(
                f"{self.path} has no chat template: give a prompt text instead of messages"
            )
        if template == "default" and tools and "tool_use" in self.templates:
            template = "tool_use"
        if template not in self.templates:
            raise UnknownNameError("chat template", template, self.templates)
        tokens = {f"{k}_token": self.special_token(k) or "" for k in ("bos", "eos", "pad", "unk")}
        return _render(
            self.templates[template],
            messages=list(messages),
            tools=list(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
            **(tokens | variables),
        )

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Ids of ``chat(...)``; templates hold BOS themselves, so none is added."""
        return self.encode(self.chat(messages, **options), add_special_tokens=False)


class Detokenizer:
    """Tokens to text bit by bit; a character is given out only when all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[
            int
        ] = []  # a window: tokens already given out as context, then the open ones
        self._open = 0  # where the open ones start
        self._sent = 0  # characters of the window's text that were given out

    def push(self, ids: Iterable[int]) -> str:
        """Add ``ids``; the text that is now certain."""
        return "".join(self._step(int(token)) for token in ids)

    def flush(self) -> str:
        """What is left, with incomplete characters as U+FFFD; the detokenizer is then empty."""
        out = self._text(self._ids)[self._sent :]
        self._utf8.reset()
        self._ids, self._open, self._sent = [], 0, 0
        return out

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def _step(self, token: int) -> str:
        self._ids.append(token)
        if not (self._skip and token in self._tokenizer.special_ids):
            self._utf8.decode(self._tokenizer.token_bytes(token))
        if self._utf8.getstate()[0]:  # the bytes so far end inside a character
            return self._before_open_character()
        out = self._text(self._ids)[self._sent :]
        if out:  # else these tokens have no text yet: they stay, the next one may need them
            self._ids = self._ids[self._open :]
            self._open, self._sent = len(self._ids), len(self._text(self._ids))
        return out

    def _before_open_character(self) -> str:
        """Broken characters before the open one are certain, where bytes are decoded one by one."""
        if not self._tokenizer.byte_level:
            return ""
        text = self._text(self._ids)
        sure = max(self._sent, len(text) - 1)  # the open character is one U+FFFD
        out, self._sent = text[self._sent : sure], sure
        return out


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes: printable ones as they are, the
    rest from U+0100.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


@lru_cache(maxsize=32)  # compiling a template takes as long as ten tokens of a small model
def _compiled(template: str) -> Any:
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as e:
        raise MissingExtraError("jinja2", "chat") from e

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as e:
        raise CheckpointError(
            f"the chat template has an error in line {e.lineno}: {e.message}"
        ) from e


def _render(template: str, **variables: Any) -> str:
    compiled = _compiled(template)
    try:
        return compiled.render(**variables)
    except Exception as e:  # anything that a template of another party may do
        raise PromptError(f"the chat template refuses these messages: {e}") from e


_BYTES = _byte_alphabet()
