"""From token ids to an answer: text as it comes, where it ends, and why."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from stf_jax.data.detokenizer import StreamDecoder
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID, Tokenizer
from stf_jax.infer.prompts import Prompt
from stf_jax.infer.stop_strings import StopStrings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer of the model.

    Attributes:
        text: without special tokens and without the stop string that ended it.
        token_ids: every id that was generated, the end of sequence included.
        prompt_tokens: tokens before the answer, vision tokens included.
        vision_tokens: how many of these stand for images.
        finish_reason: "stop" at an end of sequence or a stop string, "length" at a limit.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    vision_tokens: int
    finish_reason: Literal["stop", "length"]


class AnswerBuilder:
    """Takes one row's ids as they come and gives the text that is settled."""

    def __init__(self, tokenizer: Tokenizer, *, stop_ids: Iterable[int], stops: Sequence[str]):
        self._decoder, self._stops = StreamDecoder(tokenizer), StopStrings(stops)
        self._stop_ids = frozenset(stop_ids)
        self._text: list[str] = []
        self.token_ids: list[int] = []
        self.finished = False

    @property
    def text(self) -> str:
        """All text given so far."""
        return "".join(self._text)

    def push(self, ids: Iterable[int]) -> str:
        """Takes ids and returns the new text; ignores ids after the end."""
        return self._emit("".join(self._push_one(int(id_)) for id_ in ids if not self.finished))

    def finish(self) -> str:
        """The rest of the text, when no more ids come."""
        if self._stops.stopped:
            return ""
        text = self._stops.push(self._decoder.finish()) + self._stops.finish()
        # What was kept back may have held the end of a stop string.
        self.finished |= self._stops.stopped
        return self._emit(text)

    def build(self, prompt: Prompt) -> Answer:
        """The answer to `prompt`, when nothing more comes."""
        return Answer(
            text=self.text.strip(),
            token_ids=self.token_ids,
            prompt_tokens=len(prompt.ids),
            vision_tokens=int((prompt.ids == IMAGE_TOKEN_ID).sum()),
            finish_reason="stop" if self.finished else "length",
        )

    def _push_one(self, token_id: int) -> str:
        self.token_ids.append(token_id)
        if token_id in self._stop_ids:
            self.finished = True
            return ""
        text = self._stops.push(self._decoder.push(token_id))
        self.finished = self._stops.stopped
        return text

    def _emit(self, text: str) -> str:
        self._text.append(text)
        return text
