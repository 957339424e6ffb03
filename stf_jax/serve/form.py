"""How answers are written in OpenAI's form: whole, or as the events of a stream."""

import time
import uuid
from typing import Any

from stf_jax.serve.worker import Usage


class Form:
    """How answers are written, as chat or as text."""

    def __init__(self, model: str, *, chat: bool):
        self._chat = chat
        kind = "chat.completion" if chat else "text_completion"
        name = "chatcmpl" if chat else "cmpl"
        self._head = {
            "id": f"{name}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._kind = kind

    def whole(self, text: str, reason: str, usage: Usage) -> dict[str, Any]:
        """An answer in one piece."""
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **said, "finish_reason": reason, "logprobs": None}
        return {
            **self._head,
            "object": self._kind,
            "choices": [choice],
            "usage": self.usage(usage),
        }

    def piece(self, text: str | None, reason: str | None, *, first: bool = False) -> dict[str, Any]:
        """A part of a stream."""
        if self._chat:
            said: dict[str, Any] = {"role": "assistant", "content": ""} if first else {}
            if text:
                said["content"] = text
            choice: dict[str, Any] = {"index": 0, "delta": said, "finish_reason": reason}
        else:
            choice = {"index": 0, "text": text or "", "finish_reason": reason}
        kind = f"{self._kind}.chunk" if self._chat else self._kind
        return {**self._head, "object": kind, "choices": [choice]}

    def last(self, usage: Usage) -> dict[str, Any]:
        """What a stream ends with, where usage is asked for."""
        kind = f"{self._kind}.chunk" if self._chat else self._kind
        return {**self._head, "object": kind, "choices": [], "usage": self.usage(usage)}

    def usage(self, usage: Usage) -> dict[str, Any]:
        """Tokens, those of images counted."""
        return {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.new,
            "total_tokens": usage.prompt + usage.new,
            "prompt_tokens_details": {
                "cached_tokens": usage.cached,
                "image_tokens": usage.image,
            },
        }
