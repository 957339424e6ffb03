"""Text from ids as they come, for streaming."""

import re

from stf_jax.data.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class StreamDecoder:
    """Turns one sequence's ids into text piece by piece.

    What `push` and `finish` return, joined, is `Tokenizer.decode` of all the ids. Text is held
    back until the next token can no longer change it: a character spelled in several byte tokens
    comes whole, and a run of byte tokens comes when it ends, since one bad byte spoils the run.

        decoder = StreamDecoder(tokenizer)
        for token_id in generate(...):
            write(decoder.push(token_id))
        write(decoder.finish())
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The last ids whose text is out. Decoding continues from them, to get spaces right.
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """Takes the next id; returns the text that it settles, often "" or a word."""
        if token_id < 0 or token_id in self._tokenizer.special_ids:
            return ""
        self._held.append(int(token_id))
        token = self._tokenizer.backend.id_to_token(int(token_id))
        if token is not None and _BYTE_TOKEN.fullmatch(token):
            return ""
        text = self._new_text()
        if text.endswith(_REPLACEMENT):
            return ""
        return self._settle(text)

    def finish(self) -> str:
        """The text still held back; call it once, after the last id."""
        return self._settle(self._new_text())

    def _new_text(self) -> str:
        known = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._held)[len(known) :]

    def _settle(self, text: str) -> str:
        if self._held:
            self._context, self._held = self._held, []
        return text
