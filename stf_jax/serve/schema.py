"""What clients send, in OpenAI's form, and the errors that they get back.

https://platform.openai.com/docs/api-reference/chat. What would change an answer and is not computed
here is refused; what does not change it, such as `user`, is ignored.
"""

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator, model_validator

from stf_jax.infer.sampling import Sampling

# Parts of a message.
_MOST_PARTS = 256
# The longest string at which an answer may end.
_LONGEST_STOP = 256
# Parameters that change nothing of an answer.
_IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
# Parameters of OpenAI's that change an answer, and the values at which they do not.
_UNCHANGED: dict[str, tuple[object, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
}


class ApiError(Exception):
    """A refusal, as the client sees it.

    Args:
        status: of HTTP.
        message: one line that names the fix.
        param: the parameter that is wrong.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.headers = param, code, headers

    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients read."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 401:
            kind = "authentication_error"
        elif self.status == 429:
            kind = "rate_limit_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class TextPart(_Part):
    """Words."""

    type: Literal["text"]
    text: str


class ImageUrl(_Part):
    """Where an image is."""

    url: str


class ImagePart(_Part):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Part):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @field_validator("content", mode="before")
    @classmethod
    def _check_parts(cls, content: object) -> object:
        # Before each of them is looked at.
        if isinstance(content, list) and len(content) > _MOST_PARTS:
            raise ValueError(f"{len(content)} parts; give {_MOST_PARTS} at most")
        return content

    @property
    def text(self) -> str:
        """Its words."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> list[str]:
        """Its images' URLs."""
        if isinstance(self.content, str):
            return []
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class StreamOptions(_Part):
    """What a stream ends with."""

    include_usage: bool = False


class _Request(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    # Not OpenAI's, but vLLM's and others'.
    top_k: int | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse(self) -> "_Request":
        extra = self.model_extra or {}
        for name, value in extra.items():
            harmless = (None, *_UNCHANGED.get(name, ()))
            if name not in _IGNORED and value not in harmless:
                raise ValueError(f"{name} is not supported; leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options means nothing without stream; leave it out")
        return self

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > 4:
            raise ValueError(f"stop has {len(stop)} strings; give 4 at most")
        if any(
            len(one) > _LONGEST_STOP for one in ([stop] if isinstance(stop, str) else stop or ())
        ):
            raise ValueError(f"stop is longer than {_LONGEST_STOP} characters; shorten it")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings at which an answer ends."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn: by default as OpenAI does, at temperature 1."""
        seed = int.from_bytes(os.urandom(4), "little") if self.seed is None else self.seed
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            seed=seed % 2**32,
        )

    @property
    def most(self) -> int | None:
        """The tokens of the answer at most."""
        return self.max_tokens


class ChatRequest(_Request):
    """`/v1/chat/completions`."""

    # One thing that is wrong is enough to know.
    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    max_completion_tokens: int | None = None
    # Ours: the tokens of an image, where the system has several budgets.
    image_tokens: int | None = None

    @property
    def most(self) -> int | None:
        """The tokens of the answer at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(_Request):
    """`/v1/completions`: text as it is, without a template."""

    prompt: str
