"""Bodies of requests: OpenAI's fields, checked, and what they mean for us.

What cannot be fulfilled is refused in one sentence; a field that only some servers know is not an error.
Knows JSON and the fields; not tokens, nor the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fox_edge.errors import FoxEdgeError
from runtimes.sampling import Sampling
from runtimes.server.errors import ApiError, bad_request

MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20
MAX_MESSAGES = 10_000
# Fields that ask for something that this server does not do, unless they hold one of these values.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "audio": (None,),
}
# Python would rather fail than print a number of thousands of digits.
_LARGEST = 2**63
_Whole = Annotated[int, Field(ge=-_LARGEST, lt=_LARGEST)]
_KINDS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


class StreamOptions(BaseModel):
    """What a stream shall contain beside the text."""

    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class _Common(BaseModel):
    """What chat and plain completions share. Our own additions: top_k, min_p, repeat_penalty, grammar."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: _Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: _Whole | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: _Whole | None = None
    stop: Any = None
    response_format: dict[str, Any] | None = None
    grammar: str | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens asked for, whichever name it has."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def stops(self) -> list[str]:
        """The stop strings."""
        stops = [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise bad_request("stop must be text or a list of texts", "stop")
        if len(stops) > MAX_STOPS:
            raise bad_request(f"stop has {len(stops)} texts, but at most {MAX_STOPS} are taken", "stop")
        if any(not 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
            raise bad_request(f"each stop text must have 1 to {MAX_STOP_CHARS} characters", "stop")
        return stops

    def sampling(self, default: Sampling) -> Sampling:
        """How tokens are chosen: what was asked for, else the model's own way."""
        asked: dict[str, Any] = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "repeat_penalty")
            if (value := getattr(self, name)) is not None
        }
        seed = None if self.seed is None else self.seed % 2**64
        try:
            return replace(default, **asked, seed=seed)
        except FoxEdgeError as error:
            raise bad_request(str(error), str(error).split()[0]) from None

    def check(self) -> None:
        """Refuse what this server does not do."""
        fields = self.model_extra or {}
        for name, harmless in _REFUSED.items():
            if fields.get(name) not in harmless:
                raise bad_request(f"{name} is not supported; this server gives one plain answer", name)
        if self.limit is not None and self.limit < 1:
            raise bad_request(f"max_tokens is {self.limit}, but must be from 1", "max_tokens")


class Message(BaseModel):
    """One turn; content may be a list of text parts, which are joined."""

    model_config = ConfigDict(strict=True)
    role: str
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _join(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                what = f"of type '{kind}'" if isinstance(kind, str) else "without a type"
                raise bad_request(f"a message has a part {what[:60]}, but only text is read", "messages")
            texts.append(part["text"])
        return "".join(texts)


class ChatRequest(_Common):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: _Whole | None = None
    logprobs: bool | None = None
    top_logprobs: _Whole | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens asked for, by the newer name or the older."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        """Roles in an order that has an answer, and what `_Common` checks."""
        super().check()
        check_roles([message.role for message in self.messages])
        if self.top_logprobs is not None:
            if not self.logprobs:
                raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
            _check_top(self.top_logprobs, "top_logprobs")

    def turns(self) -> list[dict[str, str]]:
        """The messages as a chat template takes them."""
        return [
            {"role": "system" if message.role == "developer" else message.role, "content": message.content}
            for message in self.messages
        ]

    def wanted_logprobs(self) -> int | None:
        """How many alternatives beside each token; None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Common):
    """The body of /v1/completions: a prompt as text or as token ids."""

    prompt: Any
    logprobs: _Whole | None = None

    def check(self) -> None:
        """One prompt, and what `_Common` checks."""
        super().check()
        self.text_or_tokens()
        if self.logprobs is not None:
            _check_top(self.logprobs, "logprobs")

    def text_or_tokens(self) -> str | list[int]:
        """The prompt; a list with one text or one list of ids is that one."""
        prompt = self.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        if isinstance(prompt, str):
            return prompt
        if isinstance(prompt, list) and prompt and all(_is_whole(id) for id in prompt):
            return prompt
        if isinstance(prompt, list) and len(prompt) > 1:
            raise bad_request(f"prompt has {len(prompt)} entries, but one text is taken at a time", "prompt")
        raise bad_request("prompt must be a text or a list of token ids", "prompt")

    def wanted_logprobs(self) -> int | None:
        """How many alternatives beside each token; None for no log-probabilities at all."""
        return self.logprobs


def check_roles(roles: Sequence[str]) -> None:
    """Raises ApiError for roles that do not make a conversation that waits for an answer."""
    for n, role in enumerate(roles):
        if role not in ("system", "developer", "user", "assistant"):
            raise bad_request(
                f"messages[{n}].role is '{role[:40]}'; known: system, developer, user, assistant", "messages"
            )
        if role in ("system", "developer") and n:
            raise bad_request(f"messages[{n}] has the role {role}, which only the first can have", "messages")
    talk = [role for role in roles if role not in ("system", "developer")]
    if not talk or talk[0] != "user" or talk[-1] != "user":
        raise bad_request("a conversation must begin and end with a message of the user", "messages")


def _is_whole(value: Any) -> bool:
    return type(value) is int and -_LARGEST <= value < _LARGEST


def _check_top(count: int, name: str) -> None:
    if not 0 <= count <= MAX_TOP_LOGPROBS:
        raise bad_request(f"{name} is {count}, but must be from 0 to {MAX_TOP_LOGPROBS}", name)


Request = TypeVar("Request", ChatRequest, CompletionRequest)


def parse(kind: type[Request], body: bytes) -> Request:
    """A checked request; raises ApiError (400) with one sentence."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from None
    request.check()
    return request


def _explain(error: ValidationError) -> ApiError:
    """The first complaint as one sentence."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        reason = str(first.get("ctx", {}).get("error", "")) or "it cannot be read"
        return bad_request(f"the body is not JSON: {reason}", code="invalid_json")
    if not first["loc"]:
        return bad_request("the body must be a JSON object")
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])[1:]
    param = str(first["loc"][0])
    if first["type"] == "missing":
        return bad_request(f"{place} is missing", param, "missing_required_parameter")
    given = _KINDS.get(type(first["input"]), "something else")
    return bad_request(f"{place} is {given}, but: {first['msg'].lower()}", param, "invalid_type")
