"""The question that an image is asked, for systems that read it before they make tokens.

As QueCC's released code finds it (arXiv 2411.03312): in the text behind the last image, what stands
between the first line break and the next "ASSISTANT". Several images of one conversation share it.
"""

import numpy as np

from stf_jax.data.conversation import PromptText
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID, Tokenizer, encode_prompt

_END = "ASSISTANT"


def find_question(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """The question in a conversation's ids, int32 [T], as text; "image" without an image.

    As released, a text without "ASSISTANT" loses its last character; template v1 always has it.
    """
    images = np.flatnonzero(ids == IMAGE_TOKEN_ID)
    if not len(images):
        return "image"
    text = tokenizer.decode(ids[images[-1] + 1 :])
    text = text[text.find("\n") + 1 :]
    return text[: text.find(_END)].strip()


def check_prompt(text: str) -> None:
    """Refuses a prompt in which no question can be found.

    Raises:
        ValueError: it has no "ASSISTANT".
    """
    if _END not in text:
        raise ValueError(
            "this model reads the question, and the template does not mark where one ends; "
            "take template v1"
        )


def encode_question(tokenizer: Tokenizer, ids: np.ndarray, *, length: int) -> np.ndarray:
    """The question's own ids, int32, no more than `length`: BOS and the text alone.

    At least one: where a tokenizer has no BOS, an empty question is the end of a text.
    """
    text = find_question(tokenizer, ids)
    typed = PromptText(text=text, typed=((0, len(text)),))
    question = encode_prompt(tokenizer, typed)[:length]
    return question if len(question) else np.array([tokenizer.eos_id], np.int32)
