"""Requests about clips: frames are images, or one thing where the system joins them."""

import dataclasses

import jax
import numpy as np
import pytest

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.data.clips import FrameSampling
from stf_jax.infer.model import Model, Request
from stf_jax.infer.prompts import Prompt, pad_prompts
from stf_jax.models.llava import Llava
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.vqtoken import VQToken
from tests.stf_jax.systems.conftest import build

FOUR = FrameSampling(frames=4)


def clip_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 30, 40, 3), dtype=np.uint8)


def test_frames_are_images(model: Model) -> None:
    """A clip is answered as its frames would be, one image after the other."""
    clip = clip_of(3)
    images = "<image>" * 3
    timed = (
        "\nThe video lasts for 1.50 seconds, and 3 frames are uniformly sampled from it. These "
        "frames are located at 0.00s,0.50s,1.00s.Please answer the following questions related "
        "to this video."
    )
    answers = model.generate(
        [
            Request(prompt="What happens?", clips=clip),
            Request(prompt=f"{images}\nWhat happens?", images=list(clip)),
            Request(prompt="What happens?", clips=[clip], clip_fps=2, timestamps=True),
            Request(prompt=f"{images}{timed}\nWhat happens?", images=list(clip)),
        ],
        max_new_tokens=4,
    )
    assert answers[0] == answers[1]
    assert answers[2] == answers[3]


def test_what_is_wrong_with_a_clip_is_said(model: Model) -> None:
    with pytest.raises(ValueError, match="the prompt has 2 <video> and there is 1 clip"):
        model.generate([Request(prompt="<video><video> What?", clips=clip_of(2))])
    with pytest.raises(ValueError, match=r"uint8 \[30, 40, 3\] of numpy is no clip"):
        model.generate([Request(prompt="What?", clips=clip_of(2)[0])])


def vqtoken(model: Model, **fields: object) -> Model:
    """VQToken with the reference's tokenizer."""
    text = dataclasses.replace(TextConfig.tiny(), vocab_size=model.tokenizer.vocab_size)
    vision = VisionConfig.tiny()
    system = dataclasses.replace(VQToken.for_model(vision=vision, text=text), **fields)
    network = build(LlavaConfig(vision=vision, text=text, system=system), seed=5)
    processor = model.image_processor.for_size(vision.image_size)
    return Model(network, tokenizer=model.tokenizer, image_processor=processor)


@pytest.mark.parametrize(("images", "output"), [("clip", "attention"), ("whole", "codebook")])
def test_joined_clips_answer_in_any_company(
    model: Model, images: str, output: str, compilations: list[str]
) -> None:
    """Clips of other lengths, two clips, an image beside a clip: as one at a time.

    Another clip, of another number of frames, compiles nothing.
    """
    joined = vqtoken(model, images=images, output=output)
    requests = [
        Request(prompt="What?", clips=clip_of(4), sampling=FOUR),
        Request(prompt="What?", clips=0 * clip_of(3), sampling=FOUR),
        Request(prompt="<video> or <video>?", clips=[clip_of(2), clip_of(4)], sampling=FOUR),
        Request(
            prompt="<video> and <image>?",
            clips=clip_of(2),
            images=clip_of(1)[0],
            sampling=FOUR,
        ),
        Request(prompt="What?", images=clip_of(1)[0]),
        Request(prompt="What?"),
    ]
    together = joined.generate(requests, max_new_tokens=3, slots=4)
    for request, answer in zip(requests, together, strict=True):
        assert joined.generate([request], max_new_tokens=3, slots=4) == [answer]
    # The clip matters, where a random VQ-Attn does not blur it.
    assert output == "attention" or together[0].text != together[1].text
    compilations.clear()
    joined.generate(
        [Request(prompt="What?", clips=clip_of(1, seed=7), sampling=FOUR)],
        max_new_tokens=3,
        slots=4,
    )
    assert not compilations


def test_slots_of_joined_clips(model: Model) -> None:
    """By hand: every placeholder takes the token that is meant, and every clip its own frames."""
    joined = vqtoken(model, images="whole")
    config = joined.config
    layout = config.system.clip_layout(3)
    assert layout is not None
    image, clip = config.tokens_per_image, layout.tokens
    side = config.image_size
    pixels = np.random.default_rng(0).standard_normal((6, side, side, 3)).astype(np.float32)
    # A clip of two frames, an image, a clip of three.
    ids = np.array([5, *[-200] * clip, 6, *[-200] * image, *[-200] * clip, 7], np.int32)
    prompt = Prompt(ids=ids, pixels=pixels, budget=image, visuals=(2, 0, 3), layout=layout)
    batch = pad_prompts([prompt], rows=1, image_size=side)
    assert batch.clips.tolist() == [[[0, 1, -1], [3, 4, 5]]]
    slots = batch.image_slots[0][: len(ids)]
    tokens = jax.jit(Llava.encode)(joined.network, batch).values[0]
    inserted = np.asarray(tokens)[slots[slots >= 0]]
    alone = jax.jit(Llava.encode)(
        joined.network,
        dataclasses.replace(
            batch, pixels=batch.pixels[:, 2:3], clips=np.full((1, 1, 1), 0, np.int32)
        ),
    ).values[0, :image]
    np.testing.assert_allclose(inserted[clip : clip + image], alone, rtol=0, atol=1e-5)
    ends = inserted[[clip - 1, clip + image - 1, -1]]
    np.testing.assert_array_equal(ends, np.broadcast_to(ends[0], ends.shape))
