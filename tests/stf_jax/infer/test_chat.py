"""A conversation gives what `generate` gives for the same prompt, and computes only what is new."""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pytest

import stf_jax
from stf_jax.cli.chat import add_chat
from stf_jax.data.conversation import render_prompt
from stf_jax.data.images import ImageError, load_image
from stf_jax.data.templates import get_template
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID, encode_prompt, expand_images
from stf_jax.infer.chat import Chat
from stf_jax.infer.prompts import Prompt
from stf_jax.infer.sampling import GREEDY

NEW = 12


def expected(
    model: stf_jax.Model, chat: Chat, question: str, images: list[Path]
) -> tuple[str, int]:
    """The answer to the whole conversation, computed at once, and how long its prompt is."""
    text = render_prompt(question, template=get_template("v1"), history=chat.history)
    ids = encode_prompt(model.tokenizer, text)
    ids = expand_images(ids, tokens_per_image=model.config.tokens_per_image)
    assert (ids == IMAGE_TOKEN_ID).sum() == len(images) * model.config.tokens_per_image
    pixels = np.stack([model.image_processor.pixels(load_image(one)) for one in images])
    said: list[int] = []

    def take(number: int, new: np.ndarray) -> bool:
        said.extend(new.tolist())
        return True

    run = model.engine.run(
        [Prompt(ids=ids, pixels=pixels)],
        slots=1,
        max_new_tokens=NEW,
        sampling=GREEDY,
        every=NEW,
        take=take,
    )
    list(run)
    return model.tokenizer.decode(said).strip(), len(ids)


def test_a_conversation(model: stf_jax.Model, reference: Path) -> None:
    images = [reference / "images" / name for name in ("1.png", "0.png")]
    chat = Chat(model, max_new_tokens=NEW)
    chat.show(images[0])
    before = 0
    for turn, question in enumerate(("How many cats?", "And dogs?", "Why is that?")):
        asked = f"<image>\n{question}" if turn == 0 else question
        wanted, length = expected(model, chat, asked, images[:1])
        assert "".join(chat.ask(question)).strip() == wanted
        assert chat.history[turn] == (asked, wanted)
        # All of the last prompt is there; of its answer, what is tokenized again as it was.
        assert chat._session.computed <= length - before
        before = length
    chat.show(images[1])
    wanted, _ = expected(model, chat, "<image>\nAnd here?", images)
    assert "".join(chat.ask("And here?")).strip() == wanted
    record = chat.to_json()
    assert record["image"] == [str(image) for image in images]
    assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * 4
    chat.restart()
    chat.show(images[1])
    wanted, _ = expected(model, chat, "<image>\nWhat?", images[1:])
    assert "".join(chat.ask("What?")).strip() == wanted


def test_an_answer_cut_short_is_history(model: stf_jax.Model, reference: Path) -> None:
    image = reference / "images" / "1.png"
    chat = Chat(model, max_new_tokens=NEW)
    chat.show(image)
    answer = chat.ask("How many cats?")
    next(answer)
    answer.close()
    assert len(chat.history) == 1
    wanted, _ = expected(model, chat, "And dogs?", [image])
    assert "".join(chat.ask("And dogs?")).strip() == wanted


def test_mistakes_change_nothing(model: stf_jax.Model) -> None:
    chat = Chat(model, max_new_tokens=NEW)
    with pytest.raises(ValueError, match="the question is empty"):
        next(chat.ask(" "))
    with pytest.raises(ImageError, match="no image"):
        chat.show(b"no image")
    with pytest.raises(ValueError, match=r"the conversation is \d+ tokens long"):
        next(chat.ask("word " * 5000))
    assert chat.history == []


@pytest.mark.parametrize("new", [0, -100_000])
def test_no_tokens_wanted(model: stf_jax.Model, new: int) -> None:
    with pytest.raises(ValueError, match=f"max_new_tokens is {new}; give 1 or more"):
        Chat(model, max_new_tokens=new)


def test_more_tokens_than_the_context_has(model: stf_jax.Model) -> None:
    """Neither memory nor a number of 32 bits is asked to hold so many."""
    assert next(Chat(model, max_new_tokens=3_000_000_000).ask("Hello")) is not None
    request = stf_jax.Request(prompt="word " * 4000)
    (answer,) = model.generate([request], template="plain", max_new_tokens=3_000_000_000)
    assert answer.prompt_tokens + len(answer.token_ids) <= model.config.text.max_positions + 1


def test_on_the_command_line(
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved = tmp_path / "chat.json"
    lines = [
        f"/image {reference / 'images' / '1.png'}",
        "How many cats?",
        "/image nowhere.png",
        "/what",
        "/image",
        "/image a cat.png",
        "/image it's.png",
        "/restart now",
        "caf\udce9",
        f"/save '{saved}'",
        "/restart",
        "/quit",
        "Never asked.",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    parser = argparse.ArgumentParser()
    add_chat(parser.add_subparsers())
    arguments = ["chat", str(reference / "llava-stf"), "--max-new-tokens", str(NEW)]
    options = parser.parse_args(arguments)
    assert options.run(options) is None
    said = capsys.readouterr()
    record = json.loads(saved.read_text())
    assert record["conversations"][0] == {"from": "human", "value": "<image>\nHow many cats?"}
    assert said.out.strip() == record["conversations"][1]["value"]
    errors = [line for line in said.err.splitlines() if line.startswith("error")]
    assert "nowhere.png" in errors[0]
    assert errors[1:] == [
        "error: '/what' is no command; /help lists them",
        "error: /image takes one FILE, in quotes if there is a space in its name",
        "error: /image takes one FILE, in quotes if there is a space in its name",
        """error: "/image it's.png" has a quote that does not end; write "it's.png\"""",
        "error: /restart takes nothing behind it",
        "error: this line is not UTF-8; write it again, or convert what is piped",
    ]
