"""What transformers computes from an exported checkpoint is what the native model computes."""

from pathlib import Path

import jax
import numpy as np
import pytest
import transformers

import stf_jax
from stf_jax.convert import export_checkpoint, import_checkpoint
from stf_jax.data.images import load_image
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID, encode_prompt, expand_images
from stf_jax.infer.prompts import Prompt, pad_prompts

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def test_exported_hf_of_the_reference_gives_the_same_logits(
    reference: Path, tmp_path: Path
) -> None:
    import_checkpoint(
        reference / "vicuna", tmp_path / "native", vision_tower=reference / "clip", system="llava"
    )
    export_checkpoint(tmp_path / "native", tmp_path / "hf", layout="hf")
    exported = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", dtype=torch.float32
    ).eval()
    ours = stf_jax.load(tmp_path / "native")

    text = "USER: <image>\nHow many cats are in the image? " * 2 + "ASSISTANT:"
    ids = expand_images(
        encode_prompt(ours.tokenizer, text), tokens_per_image=ours.config.tokens_per_image
    )
    files = sorted((reference / "images").iterdir())
    images = [load_image(file) for file in (files[0], files[-1])]
    pixels = np.stack([ours.image_processor.pixels(image) for image in images])

    batch = pad_prompts(
        [Prompt(ids=ids, pixels=pixels)], rows=1, image_size=ours.config.vision.image_size
    )
    forward = jax.jit(lambda network, batch: network(batch))
    found = np.asarray(forward(ours.network, batch))[0, : len(ids)]
    with torch.no_grad():
        expected = exported(
            input_ids=torch.tensor(
                np.where(ids == IMAGE_TOKEN_ID, exported.config.image_token_id, ids)[None]
            ).long(),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)),
        ).logits[0]
    # The exported vocabulary has two tokens more, and padding.
    np.testing.assert_allclose(
        found, expected[:, : ours.config.text.vocab_size].numpy(), rtol=0, atol=1e-4
    )
