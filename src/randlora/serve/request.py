"""The fields of OpenAI's requests that the server supports. Other fields are refused rather than ignored."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from randlora.errors import ConfigError

_NO_EFFECT = {"user", "metadata", "store", "service_tier", "stream_options", "parallel_tool_calls", "safety_identifier"}
"""Fields that do not change the text and are ignored: clients' own, and those of OpenAI's accounts.

Usage is always reported, so that ``stream_options`` changes nothing.
"""
_NEUTRAL: dict[str, list[Any]] = {
    "n": [1],
    "best_of": [1],
    "echo": [False],
    "logprobs": [False],
    "presence_penalty": [0],
    "response_format": [{"type": "text"}],
    "tool_choice": ["auto"],
}
"""Values that ask for the default behaviour, by field."""


class Asked(BaseModel):
    """The fields of both kinds of request."""

    model_config = ConfigDict(extra="forbid")

    model: str
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    frequency_penalty: float | None = Field(None, gt=-1, le=2)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None


class TextPart(BaseModel):
    """A text within a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation. Further fields are passed to the chat template."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[TextPart] | None = None


class AskedChat(Asked):
    """A request for the next message of a conversation."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logit_bias: dict[int, float] | None = None
    tools: list[dict[str, Any]] | None = None


class AskedText(Asked):
    """A request for the continuation of a prompt."""

    prompt: str
    suffix: str | None = None


def understood(kind: type[Asked], body: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a request that have an effect, with values of the declared types.

    Raises:
        ConfigError: if a field is missing, unsupported or invalid; one line names all such fields.
    """
    said = {
        name: value
        for name, value in body.items()
        if value is not None and name not in _NO_EFFECT and value not in _NEUTRAL.get(name, [])
    }
    try:
        return kind.model_validate(said).model_dump(exclude_none=True)
    except ValidationError as error:
        raise ConfigError("; ".join(map(_explained, error.errors()))) from None


def _explained(fault: Any) -> str:
    name = ".".join(map(str, fault["loc"]))
    if fault["type"] == "missing":
        return f"{name}: missing"
    if fault["type"] == "extra_forbidden":
        return f"{name}={fault['input']!r:.80}: not supported here"
    return f"{name}={fault['input']!r:.80}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
