"""From a request body to what the engine is asked: prompt ids, sampling parameters, method, grammar. Free of torch."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stretto.decoding.registry import METHODS, get
from stretto.engine.params import SamplingParams
from stretto.errors import InputError, OptionError, PromptError, UnsupportedError
from stretto.models.tokenizer import Tokenizer
from stretto.serving import tools as tool_calls
from stretto.serving.schemas import ChatBody, CompletionBody, GenBody, Message, ResponseFormat, SamplingBody

__all__ = ["Job", "Model", "chat_job", "completion_jobs", "gen_message", "salt_of", "token_ids"]

EXTENSIONS = (
    "temperature", "top_p", "presence_penalty", "frequency_penalty", "top_k", "min_p", "repetition_penalty",
    "min_tokens", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens", "ignore_eos", "regex", "stop",
)


class ContextError(PromptError):
    """The prompt and what is asked for do not fit into the context."""

    code = "context_length_exceeded"


@dataclass(frozen=True, slots=True)
class Model:
    """What the front knows of the served model. ``auto``: (method, options, note) that "auto" stands for;
    ``paths``: models that a request may name in an option, beside those of the zoo."""

    name: str
    tokenizer: Tokenizer
    max_model_len: int
    vocabulary: int
    attention: str
    plain: str
    auto: tuple[str, Mapping[str, Any], str]
    max_choices: int = 16
    paths: frozenset[str] = frozenset()
    online: bool = False  # a drafter is learnt while serving: method "online"


@dataclass(slots=True)
class Job:
    """One prompt of a request. ``prompt``: token ids; ``params``: keys of SamplingParams."""

    prompt: list[int]
    params: dict[str, Any]
    method: str
    options: dict[str, Any]
    salt: str
    priority: int
    timeout: float | None
    store: bool = True
    note: str | None = None
    tools: frozenset[str] = frozenset()
    forced: bool = False
    top: int | None = None  # log-probabilities asked for beside the token's own
    echo: bool = False
    ids: bool = False  # completions: the tokens' ids and the stop token are asked for
    text: str | None = None  # the prompt, where echo needs it
    drop: bool = False  # max_tokens was 0: what is generated is not wanted
    scores: list[dict[int, float]] | None = None  # log-probabilities of the prompt's tokens from the second on

    def message(self, request: str) -> dict[str, Any]:
        return {
            "id": request, "prompt": self.prompt, "params": self.params, "method": self.method,
            "options": self.options, "salt": self.salt, "priority": self.priority, "deadline": self.timeout,
            "store": self.store,
        }


def chat_job(body: ChatBody, model: Model, tenant: str) -> Job:
    """InputError (HTTP 400) names what cannot be served."""
    listed = [plain_message(m, model.tokenizer) for m in body.messages]
    offered = [t.function.model_dump(exclude_none=True) for t in body.tools or []]
    choice = body.tool_choice or ("auto" if offered else "none")
    if choice != "none" and not offered:
        raise OptionError("tool_choice", _shown(choice), "a list of tools beside it")
    use = offered if choice != "none" else []
    text = model.tokenizer.chat(listed, tools=[{"type": "function", "function": t} for t in use] or None)
    prompt = model.tokenizer.encode(text, add_special_tokens=False)
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    job = _job(body, model, tenant, prompt, wanted, room=True)
    _format(job, body.response_format)
    if use:
        _force(job, use, choice, bool(body.parallel_tool_calls))
    if body.top_logprobs is not None and not body.logprobs:
        raise OptionError("top_logprobs", body.top_logprobs, "only together with logprobs=true")
    if body.logprobs:
        job.top = job.params["logprobs"] = body.top_logprobs or 0
    return _checked(job)


def completion_jobs(body: CompletionBody, model: Model, tenant: str) -> list[Job]:
    """One job a prompt. InputError (HTTP 400) names what cannot be served."""
    if body.suffix:
        raise OptionError("suffix", body.suffix, "nothing: this model does not fill in")
    if body.best_of is not None and body.best_of != body.n:
        raise OptionError("best_of", body.best_of, f"the same as n ({body.n})")
    jobs = []
    for ids, text in _prompts(body.prompt, model):
        wanted = 16 if body.max_tokens is None else body.max_tokens
        job = _job(body, model, tenant, ids, wanted, room=False)
        _format(job, body.response_format)
        job.top = body.logprobs
        if body.logprobs is not None:
            job.params["logprobs"] = body.logprobs
        job.echo, job.ids = body.echo, body.return_token_ids
        job.text = text if text is not None or not body.echo else model.tokenizer.decode(ids, skip_special_tokens=False)
        jobs.append(_checked(job))
    return jobs


def _prompts(given: Any, model: Model) -> list[tuple[list[int], str | None]]:
    if isinstance(given, str) or (given and all(isinstance(t, int) for t in given)):
        given = [given]
    if not given:
        raise PromptError("prompt is empty: give a text, token ids, or a list of either")
    if len(given) > 256:
        raise PromptError(f"{len(given)} prompts in one request: at most 256")
    out = []
    for one in given:
        if isinstance(one, str):
            clean("prompt", one)
            out.append((model.tokenizer.encode(one), one))
        else:
            out.append((list(one), None))
    return out


def _job(
    body: SamplingBody, model: Model, tenant: str, prompt: list[int], wanted: int | None, *, room: bool
) -> Job:
    if not prompt:
        raise PromptError("the prompt is empty: give at least one token")
    _in_vocabulary(prompt, model)
    left = model.max_model_len - len(prompt)
    if left < 1 or (wanted is not None and wanted > left):
        asked = f" and {wanted} more were asked for" if wanted is not None else ""
        raise ContextError(
            f"this model's context is {model.max_model_len} tokens; the prompt has {len(prompt)}{asked}: "
            "shorten the prompt or lower max_tokens"
        )
    params = _params(body, model, wanted if wanted is not None else (left if room else 16))
    method, options, note = _method(body, model)
    return Job(
        prompt, params, method, options, salt_of(tenant, body.cache_salt), body.priority, body.timeout,
        body.store is not False, note,
    )


def _params(body: SamplingBody, model: Model, most: int) -> dict[str, Any]:
    """Keys of SamplingParams."""
    if not 1 <= body.n <= model.max_choices:
        raise OptionError("n", body.n, f"a whole number from 1 to {model.max_choices}")
    if isinstance(body.stop, list) and len(body.stop) > 4:
        raise OptionError("stop", f"{len(body.stop)} strings", "at most 4")
    values = {k: v for k in EXTENSIONS if (v := getattr(body, k)) is not None}
    for text in [values["stop"]] if isinstance(values.get("stop"), str) else values.get("stop", ()):
        clean("stop", text)
    params = values | {
        "n": body.n, "max_tokens": most, "seed": secrets.randbits(62) if body.seed is None else body.seed,
    }
    if body.logit_bias:
        params["logit_bias"] = _bias(body.logit_bias, model.vocabulary)
    return params


def salt_of(tenant: str, salt: str | None) -> str:
    """What keeps the prefixes of one tenant from another."""
    text = f"{tenant}\0{clean('cache_salt', salt or '')}"
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def gen_message(body: GenBody, model: Model) -> dict[str, Any]:
    """What threads of a session are to do together. InputError (HTTP 400) names what cannot be served."""
    if body.n != 1:
        raise OptionError("n", body.n, "1 in a session: fork instead")
    if body.regex is not None:
        raise OptionError("regex", body.regex[:80], "none in a session over HTTP")
    params = _params(body, model, 16 if body.max_tokens is None else body.max_tokens)
    SamplingParams.make(**params)
    method, options, _ = _method(body, model)
    return {"threads": body.threads, "params": params, "method": method, "options": options, "deadline": body.timeout}


def token_ids(name: str, given: str | list[int], model: Model) -> list[int]:
    """Ids of a text, or those given, checked."""
    if isinstance(given, str):
        return model.tokenizer.encode(clean(name, given))
    _in_vocabulary(given, model)
    return given


def _in_vocabulary(ids: Sequence[int], model: Model) -> None:
    bad = next((t for t in ids if not 0 <= t < model.vocabulary), None)
    if bad is not None:
        raise PromptError(f"token id {bad} is not in the vocabulary: ids go from 0 to {model.vocabulary - 1}")


def _checked(job: Job) -> Job:
    """Raise now what the engine would refuse; max_tokens 0 is allowed where a text is only echoed."""
    if job.params["max_tokens"] == 0 and job.echo:
        job.params.update(max_tokens=1, min_tokens=0, n=1)
        job.drop = True
    SamplingParams.make(**job.params)
    return job


def _method(body: SamplingBody, model: Model) -> tuple[str, dict[str, Any], str | None]:
    name, options = body.method or "auto", dict(body.options or {})
    if name == "auto":
        if options:
            raise OptionError("options", _shown(options), "none together with method 'auto': name the method")
        return model.auto[0], dict(model.auto[1]), model.auto[2]
    if name == "online" and model.online:
        if options:
            raise OptionError("options", _shown(options), "none together with method 'online'")
        return name, {}, None
    info = get(clean("method", name))
    if model.attention not in info.kinds:
        fits = [m.name for m in METHODS.values() if model.attention in m.kinds]
        raise UnsupportedError(
            f"method {info.name!r} does not serve this model, whose attention is {model.attention!r}: "
            f"use one of {', '.join(fits)}"
        )
    known = {o.name: o for o in info.options}
    for key, value in options.items():
        found = known.get(key)
        if found is not None and isinstance(value, str) and found.type.startswith("str") and not found.choices:
            allowed = value == found.default or value.startswith("zoo:") or value in model.paths
            if not allowed:
                raise OptionError(
                    f"options.{key}", value, "a zoo name, or one that the server allows with --allow-model"
                )
        clean(f"options.{key}", value)
    return info.name, options, None


def _format(job: Job, form: ResponseFormat | None) -> None:
    if form is None or form.type == "text":
        return
    if form.type == "json_object":
        schema: Any = {"type": "object"}
    elif form.json_schema is None or form.json_schema.schema_ is None:
        raise OptionError("response_format", "json_schema", "json_schema: {name, schema} beside it")
    else:
        schema = form.json_schema.schema_
    if "regex" in job.params:
        raise OptionError("regex", job.params["regex"], "regex or response_format, not both")
    job.params["json_schema"] = schema if isinstance(schema, dict) else {}


def _force(job: Job, use: Sequence[Mapping[str, Any]], choice: Any, many: bool) -> None:
    job.tools = frozenset(t["name"] for t in use)
    if choice == "auto":
        return
    if "json_schema" in job.params or "regex" in job.params:
        raise OptionError("tool_choice", _shown(choice), "'auto' or 'none' where the format is fixed already")
    only = None if choice == "required" else choice.function.name
    if only is not None and only not in job.tools:
        raise OptionError("tool_choice", only, f"one of the tools: {', '.join(sorted(job.tools))}")
    job.params["json_schema"] = tool_calls.schema(use, only, many=many)
    job.forced = True


def plain_message(message: Message, tokenizer: Tokenizer) -> dict[str, Any]:
    """A message as chat templates expect it: content is a text."""
    out = message.model_dump(exclude_none=True)
    content = message.content
    if isinstance(content, list):
        parts = []
        for part in content:
            if part.get("type") not in ("text", "input_text") or not isinstance(part.get("text"), str):
                kind = str(part.get("type"))[:40]
                raise UnsupportedError(f"content of type {kind!r}: this model reads type 'text' with 'text' only")
            parts.append(part["text"])
        content = "".join(parts)
    if message.tool_calls and not any("tool_calls" in t for t in tokenizer.templates.values()):
        content = (content or "") + tool_calls.as_text(message.tool_calls)
    out["content"] = clean("messages.content", content or "")
    out["role"] = clean("messages.role", message.role)
    return out


def _bias(given: Mapping[str, float], vocabulary: int) -> dict[int, float]:
    out = {}
    for key, value in given.items():
        if not key.strip().isdecimal() or not key.isascii() or int(key) >= vocabulary:
            raise OptionError("logit_bias", key[:40], f"token ids from 0 to {vocabulary - 1}")
        if not -100 <= value <= 100:
            raise OptionError("logit_bias", value, "a number from -100 to 100")
        out[int(key)] = value
    return out


def clean(name: str, value: Any) -> Any:
    """``value``, or InputError where a text cannot be written as UTF-8."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{name} holds half of a character (position {error.start}): send valid Unicode") from None
    return value


def _shown(value: Any) -> str:
    return str(value)[:80]


