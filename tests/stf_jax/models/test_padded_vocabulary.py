"""A vocabulary padded for a mesh changes neither logits, nor loss, nor what is generated."""

from pathlib import Path

import jax
import numpy as np

import stf_jax
from stf_jax.convert import import_checkpoint
from stf_jax.infer.prompts import Prompt, pad_prompts
from stf_jax.models.llava import Llava


def test_padding_is_never_predicted(reference: Path, model: stf_jax.Model, tmp_path: Path):
    import_checkpoint(reference / "llava-stf", tmp_path / "padded", vocabulary_multiple=256)
    padded = stf_jax.load(tmp_path / "padded")
    assert padded.config.text.padded_vocab_size == 768

    prompt = Prompt(ids=np.arange(1, 41, dtype=np.int32), pixels=np.zeros((0, 56, 56, 3)))
    batch = pad_prompts([prompt], rows=1, image_size=56)
    forward = jax.jit(Llava.__call__)
    expected, logits = (np.asarray(forward(one.network, batch)) for one in (model, padded))
    np.testing.assert_allclose(logits[..., :600], expected, rtol=0, atol=1e-5)
    assert (jax.nn.softmax(logits)[..., 600:] == 0).all()

    request = stf_jax.Request(prompt="Which?", images=[reference / "images" / "0.png"])
    # So hot that every id is about as likely as another.
    sampling = stf_jax.Sampling(temperature=100.0)
    (answer,) = padded.generate([request], sampling=sampling, max_new_tokens=200)
    assert max(answer.token_ids) < 600
