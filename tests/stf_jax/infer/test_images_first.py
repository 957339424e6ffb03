"""A conversation of several turns with a model that has images in front of it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from stf_jax.data.conversation import render_prompt
from stf_jax.data.fit import fit_template
from stf_jax.data.images import load_image
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID, encode_prompt, expand_images, load_tokenizer
from stf_jax.infer.chat import Chat
from stf_jax.infer.model import Model
from stf_jax.infer.prompts import Prompt
from stf_jax.infer.sampling import GREEDY
from tests.stf_jax.infer.test_image_cache import COUNT, model_of, network_of

NEW = 4


@pytest.fixture(scope="module")
def voco(reference: Path) -> Model:
    tokenizer = load_tokenizer(reference / "llava-stf")
    return model_of(network_of(tokenizer), tokenizer)


def whole_prompt(model: Model, chat: Chat, question: str, images: list[Path]) -> Prompt:
    """The conversation so far and a question, to be computed at once."""
    template = fit_template("v1", model.tokenizer)
    text = render_prompt(question, template=template, history=chat.history)
    ids = encode_prompt(model.tokenizer, text)
    pixels = [model.image_processor.pixels(load_image(one)) for one in images]
    return Prompt(
        ids=expand_images(ids, tokens_per_image=model.config.tokens_per_image),
        pixels=np.stack(pixels),
    )


def answer(model: Model, prompt: Prompt) -> list[int]:
    said: list[int] = []

    def take(number: int, new: np.ndarray) -> bool:
        said.extend(new.tolist())
        return True

    options = {"slots": 1, "max_new_tokens": NEW, "sampling": GREEDY, "every": NEW}
    list(model.engine.run([prompt], **options, take=take))
    return said


def test_a_chat_over_several_turns(voco: Model, reference: Path) -> None:
    """A later turn costs its text, and sees the vocos; a new image changes what comes first."""
    images = [reference / "images" / name for name in ("1.png", "0.png")]
    chat = Chat(voco, max_new_tokens=NEW)
    chat.show(images[0])
    for turn, question in enumerate(("How many\ncats?", "And dogs?")):
        asked = f"<image>\n{question}" if turn == 0 else question
        prompt = whole_prompt(voco, chat, asked, images[:1])
        expected = voco.tokenizer.decode(answer(voco, prompt)).strip()
        assert "".join(chat.ask(question)).strip() == expected
    assert chat._session.computed < len(prompt.ids) - voco.config.tokens_per_image - COUNT
    chat.show(images[1])
    prompt = whole_prompt(voco, chat, "<image>\nAnd here?", images)
    vocos = np.flatnonzero(prompt.ids == voco.config.images_first.token_id)
    assert len(vocos) == 2 * COUNT
    assert np.flatnonzero(prompt.ids == IMAGE_TOKEN_ID)[-1] < vocos[0]
    expected = voco.tokenizer.decode(answer(voco, prompt)).strip()
    assert "".join(chat.ask("And here?")).strip() == expected
    assert chat._session.computed == len(prompt.ids)


def test_a_prompt_that_nobody_laid_out_is_refused(voco: Model, reference: Path) -> None:
    """Ids with an image and without its vocos, of which text would see nothing."""
    chat = Chat(voco)
    prompt = whole_prompt(voco, chat, "<image>\nWhat?", [reference / "images" / "0.png"])
    ids = prompt.ids[prompt.ids != voco.config.images_first.token_id]
    with pytest.raises(ValueError, match="1 images and 0 <voco>, and VoCo-LLaMA needs 2 an image"):
        answer(voco, dataclasses.replace(prompt, ids=ids))
