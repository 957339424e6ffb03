"""From ids to an answer: the text that comes, where a stop string ends it, and why it ended."""

from pathlib import Path

import pytest

from stf_jax import Request
from stf_jax.data.tokenizer import Tokenizer, load_tokenizer
from stf_jax.infer.answers import AnswerBuilder
from stf_jax.infer.model import Model


@pytest.fixture(scope="module")
def tokenizer(reference: Path) -> Tokenizer:
    return load_tokenizer(reference / "llava-stf")


def builder(tokenizer: Tokenizer, *stops: str) -> AnswerBuilder:
    return AnswerBuilder(tokenizer, stop_ids=(2,), stops=stops)


@pytest.mark.parametrize("pieces", [1, 100])
def test_ids_behind_a_stop_string_are_ignored(tokenizer: Tokenizer, pieces: int) -> None:
    ids = tokenizer.encode("one two three")
    answer, text = builder(tokenizer, "two"), ""
    for at in range(0, len(ids), pieces):
        text += answer.push(ids[at : at + pieces])
    assert answer.finished
    assert tokenizer.decode(answer.token_ids).endswith("two")
    assert text + answer.finish() == answer.text == "one "


def test_a_stop_string_that_the_last_id_completes(tokenizer: Tokenizer) -> None:
    """A newline is a byte token, whose text is kept back until the next id."""
    newline = tokenizer.backend.token_to_id("<0x0A>")
    answer = builder(tokenizer, "\n")
    answer.push([newline])
    assert answer.finish() == ""
    assert answer.finished


def test_stop_strings_end_an_answer(model: Model, reference: Path) -> None:
    """The text before the stop string, in pieces as it comes, and no token behind it."""
    request = Request(
        prompt="How many cats are in the image?", images=[reference / "images" / "1.png"]
    )
    (whole,) = model.generate([request], max_new_tokens=20)
    # Somewhere in the middle.
    at = next(i for i in range(8, 40) if whole.text[i : i + 4].isascii())
    stop = whole.text[at : at + 4]
    pieces: list[str] = []
    (cut,) = model.generate(
        [request],
        max_new_tokens=20,
        stop=[stop],
        on_text=lambda index, text: pieces.append(text),
    )
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[:at].strip()
    assert "".join(pieces).strip() == cut.text
    assert len(pieces) > 1
    assert len(cut.token_ids) < len(whole.token_ids)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert stop in model.tokenizer.decode(cut.token_ids)
    assert stop not in model.tokenizer.decode(cut.token_ids[:-1])


def test_streamed_text_is_the_answer_of_each_request(model: Model, reference: Path) -> None:
    requests = [
        Request(prompt="How many cats are in the image?", images=[reference / "images" / "1.png"]),
        Request(prompt="Why?"),
    ]
    texts = ["", ""]

    def take(index: int, text: str) -> None:
        texts[index] += text

    answers = model.generate(requests, max_new_tokens=10, on_text=take)
    assert [text.strip() for text in texts] == [answer.text for answer in answers]
    assert texts[0] != texts[1]
    assert [answer.finish_reason for answer in answers] == ["length", "length"]
