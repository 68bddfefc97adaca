"""The body of ``POST /v1/completions`` and what is answered, as OpenAI's API has them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moe_scale.errors import ConfigError
from moe_scale.generate.batch import Finish, Request
from moe_scale.generate.sampling import Sampling
from moe_scale.generate.text_model import TextModel

MAX_PROMPTS = 128
MAX_STOPS = 16
_Probability = Annotated[float, Field(gt=0, le=1)]
_StopText = Annotated[str, Field(min_length=1, max_length=200)]

_NOTHING: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}
"""Fields of OpenAI's API that this server lacks, and the values with which they ask for nothing."""


class RequestError(Exception):
    """A request cannot be answered as it stands.

    Args:
        message: what is wrong, and what would be right.
        status: of the answer.
        param: the field.
        code: for programs.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """What else a stream holds."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class CompletionBody(BaseModel):
    """The fields that are understood; ``top_k`` and ``repetition_penalty`` are not OpenAI's."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: _Probability = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_PROMPTS)] = 1
    seed: int | None = None
    stop: _StopText | Annotated[list[_StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def without_what_asks_for_nothing(cls, fields: Any) -> Any:
        """Null stands for a field's default, and what is not supported may be there as long as it asks for nothing."""
        if not isinstance(fields, Mapping):
            return fields
        kept = {}
        for name, value in fields.items():
            if name in _NOTHING:
                if value not in _NOTHING[name]:
                    raise ValueError(f"{name} is not supported; leave it out")
            elif value is not None or name in ("model", "prompt"):
                kept[name] = value
        return kept

    @model_validator(mode="after")
    def fits_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true alone")
        return self

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def read_body(data: bytes) -> CompletionBody:
    """The fields of a body.

    Raises:
        RequestError: when it is no JSON, or asks for what there is not.
    """
    try:
        return CompletionBody.model_validate_json(data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        of_one = [item for item in found if item["loc"][:1] == found[0]["loc"][:1]]
        # A field that may be of either of two kinds is told of the one that it is, where it is one.
        item = next((item for item in of_one if item["type"] not in ("string_type", "list_type")), of_one[0])
        param = str(item["loc"][0]) if item["loc"] else None
        what = item["msg"].removeprefix("Value error, ")
        raise RequestError(f"{param}: {what}" if param else what, param=param) from None


def requests_of(body: CompletionBody, model: TextModel, max_sequences: int) -> list[Request]:
    """What is to be generated: for each prompt its ``n`` samples, in the order of the answer's choices.

    Raises:
        RequestError: when the model is another, a prompt too long or without what the model fills in, or all together
            too many.
    """
    if body.model != model.name:
        message = f"there is no model {body.model!r}; this server has {model.name!r}"
        raise RequestError(message, status=404, param="model", code="model_not_found")
    count = len(body.prompts) * body.n
    if count > max_sequences:
        raise RequestError(f"{count} texts (prompts times n); ask for at most {max_sequences} at a time", param="n")
    seed = secrets.randbits(63) if body.seed is None else body.seed
    sampling = Sampling(body.temperature, body.top_k, body.top_p, body.repetition_penalty, seed)
    requests = []
    for number, prompt in enumerate(body.prompts, start=1):
        try:
            first = model.request(prompt, body.max_tokens, sampling, body.stops, 0)
        except ConfigError as error:
            raise RequestError(str(error), param="prompt") from None
        if problems := model.check(first.prompt, f"prompt {number}"):
            code = "context_length_exceeded" if len(first.prompt) >= model.context else None
            raise RequestError(str(problems[0]), param="prompt", code=code)
        requests += [replace(first, sample=sample) for sample in range(body.n)]
    return requests


class Answer:
    """What is sent back for one request: the same names and times in all of its pieces."""

    def __init__(self, model: str, requests: Sequence[Request], n: int):
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self.prompt_tokens = sum(len(request.prompt) for request in requests[::n])
        self.completion_tokens = 0

    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }

    def whole(self, texts: Sequence[tuple[str, Finish | Literal["error"] | None]]) -> dict[str, Any]:
        """The answer without a stream: text and finish reason of each choice."""
        choices = [_choice(index, *text) for index, text in enumerate(texts)]
        return {**self._head, "choices": choices, "usage": self.usage()}

    def piece(self, index: int, text: str, finish: Finish | None) -> dict[str, Any]:
        """One piece of a stream."""
        return {**self._head, "choices": [_choice(index, text, finish)]}

    def last(self) -> dict[str, Any]:
        """The piece after all others that ``stream_options.include_usage`` asks for."""
        return {**self._head, "choices": [], "usage": self.usage()}


def _choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
