"""Request bodies, with OpenAI's names. What is not here is ignored and named in a header; ``--strict`` refuses it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "AppendBody", "ChatBody", "CompletionBody", "DetokenizeBody", "ForkBody", "GenBody", "JoinBody", "SamplingBody",
    "SessionBody", "ThreadBody", "TokenizeBody", "TruncateBody",
]


class Body(BaseModel):
    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": True})


class StreamOptions(Body):
    include_usage: bool = False


class SamplingBody(Body):
    """What both kinds of completion share. Ranges that OpenAI states are checked where the parameters are made."""

    model: str
    n: int = 1
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    store: bool | None = Field(None, description="false: never kept for training a drafter")
    top_k: int | None = Field(None, description="extension: 0 = all")
    min_p: float | None = Field(None, description="extension")
    repetition_penalty: float | None = Field(None, description="extension")
    min_tokens: int | None = Field(None, description="extension")
    stop_token_ids: list[int] | None = Field(None, description="extension")
    include_stop_str_in_output: bool | None = Field(None, description="extension")
    skip_special_tokens: bool | None = Field(None, description="extension")
    ignore_eos: bool | None = Field(None, description="extension")
    regex: str | None = Field(None, description="extension: the text must match")
    priority: int = Field(0, description="extension: lower is served first", ge=-100, le=100)
    timeout: float | None = Field(None, description="extension: seconds until the request is given up", gt=0)
    cache_salt: str | None = Field(None, description="extension: prefixes are shared only under the same salt")
    method: str | None = Field(None, description="extension: decoding method, or 'auto'")
    options: dict[str, Any] | None = Field(None, description="extension: options of the method")
    include_steps: bool = Field(False, description="extension: streamed chunks carry tokens with their forwards")


class Message(Body):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class Function(Body):
    name: str = Field(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_.-]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    name: str = "answer"
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(SamplingBody):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None


class CompletionBody(SamplingBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = None
    suffix: str | None = None
    return_token_ids: bool = Field(
        False, description="extension, whole answers: choices carry token_ids, prompt_token_ids and stop_reason"
    )
    response_format: ResponseFormat | None = None


class TokenizeBody(Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[int]


class SessionBody(Body):
    """A new session: ``prompt`` (text or token ids) or ``messages``, and its budgets."""

    model: str
    prompt: str | list[int] | None = None
    messages: list[Message] | None = None
    max_threads: int = Field(64, ge=1, le=1024)
    max_evaluated: int | None = Field(None, ge=1)
    max_path: int | None = Field(None, ge=1)
    priority: int = Field(0, ge=-100, le=100)
    cache_salt: str | None = None


class ThreadBody(Body):
    thread: int = Field(0, description="0 is the session's first thread")


class AppendBody(ThreadBody):
    text: str | list[int]


class TruncateBody(ThreadBody):
    length: int


class ForkBody(ThreadBody):
    """``n`` children, or one for each forced prefix; ``positions``: "same", or where they start."""

    n: int | None = Field(None, ge=1, le=1024)
    prefixes: list[str | list[int]] | None = Field(None, max_length=1024)
    positions: Literal["same"] | int = "same"


class JoinBody(ThreadBody):
    children: list[int] = Field(min_length=1)
    mode: str = "reencode"
    order: Literal["index", "finish"] | list[int] = "index"
    separator: str | list[int] | None = None
    select: int = 0


class GenBody(SamplingBody):
    """Threads of a session generate together, one choice each; greedy unless a temperature is given."""

    threads: list[int] = Field([0], min_length=1, max_length=1024)
    temperature: float | None = 0.0
