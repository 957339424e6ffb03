"""The Python interface: what a notebook gives by mistake, or for short."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stf_jax
from stf_jax.data.images import ImageError
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
        with pytest.raises(TypeError, match=r"takes a list: write generate\(\[Request"):
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
