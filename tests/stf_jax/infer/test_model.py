"""The Python interface: what a notebook gives by mistake, or for short."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stf_jax
from stf_jax.data.fit import fit_template
from stf_jax.data.images import ImageError
from stf_jax.infer import prompts
from stf_jax.infer.model import Model, Request
from stf_jax.util.errors import CheckpointError


def answer(model: Model, request: Request, **settings: object) -> str:
    (given,) = model.generate([request], max_new_tokens=8, **settings)
    return given.text


def test_one_image_needs_no_list(model: Model, reference: Path) -> None:
    path = reference / "images" / "0.png"
    image = Image.open(path).convert("RGB")
    expected = answer(model, Request(prompt="What?", images=[path]))
    for one in (path, str(path), path.read_bytes(), image, np.asarray(image)):
        assert answer(model, Request(prompt="What?", images=one)) == expected
        assert answer(model, Request(prompt="What?", images=[one])) == expected
    with pytest.raises(ImageError, match=r"photo.jpg: no such file"):
        answer(model, Request(prompt="What?", images="photo.jpg"))


def test_one_stop_string_needs_no_list(model: Model) -> None:
    whole = answer(model, Request(prompt="What?"))
    assert answer(model, Request(prompt="What?"), stop=whole[:2]) == ""
    # Not letter by letter.
    assert answer(model, Request(prompt="What?"), stop=f"{whole[0]}\u2603") == whole


def test_requests_are_a_list(model: Model) -> None:
    for one in (Request(prompt="What?"), "What?"):
        with pytest.raises(TypeError, match=r"takes a list: write \[Request"):
            model.generate(one)


def test_a_language_model_alone_gives_no_answers(reference: Path) -> None:
    """With a new fusion they would be of chance."""
    with pytest.raises(CheckpointError, match=r"vicuna OUT --vision-tower CLIP, and train that$"):
        stf_jax.load(reference / "vicuna", vision_tower=reference / "clip")


@pytest.mark.parametrize("dtype", ["bf16", "int8", "", "FLOAT32"])
def test_dtypes(reference: Path, dtype: str) -> None:
    message = rf"^dtype is '{dtype}'; choose float32, float16 or bfloat16$"
    with pytest.raises(ValueError, match=message):
        stf_jax.load(reference / "llava-stf", dtype=dtype)


def test_no_images_is_none(model: Model) -> None:
    """As a row of a table without an image gives it."""
    expected = answer(model, Request(prompt="What?"))
    assert answer(model, Request(prompt="What?", images=None)) == expected
    assert answer(model, Request(prompt="What?", images=[])) == expected


@pytest.mark.parametrize("one", [{"prompt": "What?"}, "What?", None, ("What?", [])])
def test_a_list_of_something_else(one: object, model: Model) -> None:
    with pytest.raises(TypeError, match=rf"list of Request, not of {type(one).__name__}: write"):
        model.generate([Request(prompt="What?"), one])


def test_the_request_that_is_wrong_is_named(model: Model) -> None:
    right = Request(prompt="What?")
    with pytest.raises(ValueError, match=r"^request 2 of 3: the prompt is empty; ask something$"):
        model.generate([right, Request(prompt=" "), right])
    with pytest.raises(ImageError, match=r"^request 3 of 3: photo.jpg: no such file"):
        model.generate([right, right, Request(prompt="What?", images="photo.jpg")])


def test_a_url_is_fetched_only_where_that_is_allowed(
    model: Model, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, url = reference / "images" / "0.png", "https://example.org/0.png"
    monkeypatch.setattr(prompts, "fetch", {url: path.read_bytes()}.__getitem__)
    asked = Request(prompt="What?", images=url)
    with pytest.raises(ImageError, match=r"0.png: .*allow URLs where it may be fetched"):
        answer(model, asked)
    expected = answer(model, Request(prompt="What?", images=path))
    assert answer(model, asked, allow_urls=True) == expected
    chat = stf_jax.Chat(model, max_new_tokens=8)
    with pytest.raises(ImageError, match="allow URLs"):
        chat.show(url)
    allowed = stf_jax.Chat(model, max_new_tokens=8, allow_urls=True)
    allowed.show(url)
    assert "".join(allowed.ask("What?")).strip() == expected


def test_a_template_that_does_not_fit_the_tokenizer_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match=r"template 'llama_3' needs .*; choose one of"):
        answer(model, Request(prompt="What?"), template="llama_3")
    with pytest.raises(ValueError, match=r"template 'llama_3' needs .*; choose one of"):
        stf_jax.Chat(model, template="llama_3")


def test_a_special_token_that_somebody_types_is_text(model: Model) -> None:
    """The end of text in a question would end it for the model."""
    template, tokens = fit_template("v1", model.tokenizer), model.config.tokens_per_image
    asked = model._prompt(Request(prompt="Is </s> a tag?"), template, tokens, allow_urls=False)
    assert model.tokenizer.eos_id not in asked.ids.tolist()
    assert "Is </s> a tag?" in model.tokenizer.decode(asked.ids)
