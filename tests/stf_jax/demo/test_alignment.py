"""A projector that begins where the words are."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import stf_jax
from stf_jax.convert import import_checkpoint
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.demo.alignment import align, word_targets, write_adapter
from stf_jax.demo.pretraining import LANGUAGE, TOWER


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_an_image_points_to_its_words(rng: np.random.Generator) -> None:
    """And to no others: what features hold of them is found."""
    tokenizer = load_tokenizer(LANGUAGE)
    embedding = rng.standard_normal((tokenizer.vocab_size, 32)).astype(np.float32)
    words = ("red", "green", "blue", "yellow")
    described = [(words[number % 4], words[(number + 1) % 4]) for number in range(8)]
    targets, center = word_targets(described, embedding, tokenizer)
    for target, own in zip(targets, described, strict=True):
        scores = []
        for word in words:
            ids = tokenizer.encode(f" {word}")
            direction = embedding[ids].mean(axis=0) - center
            scores.append(target @ direction / np.linalg.norm(direction))
        assert {words[at] for at in np.argsort(scores)[-2:]} == set(own)


def test_the_imported_projector_computes_the_regression(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """Through the project's own GELU, from the files that were written."""
    import_checkpoint(LANGUAGE, tmp_path / "start", vision_tower=TOWER, system="average")
    start = stf_jax.load(tmp_path / "start")
    system, width = start.config.system, start.config.text.width
    features = rng.standard_normal((40, 4, start.config.vision.width)).astype(np.float32)
    # What is to be found: a linear map of few dimensions.
    true = rng.standard_normal((features.shape[2], 3)) @ rng.standard_normal((3, width))
    targets = (features @ true).mean(axis=1)
    center = rng.standard_normal(width)
    tensors = align(
        np.repeat(features.mean(axis=1, keepdims=True), 4, axis=1), targets,
        center=center, width=system.projector_width, scale=0.3,
    )  # fmt: skip
    write_adapter(tmp_path / "adapter", tensors, system=system.to_dict())
    import_checkpoint(tmp_path / "adapter", tmp_path / "aligned", base=LANGUAGE, vision_tower=TOWER)
    model = stf_jax.load(tmp_path / "aligned")
    assert model.config == start.config
    found = np.asarray(model.network.connector.project(jnp.asarray(features))) - center
    assert np.sqrt(np.mean(found.mean(axis=1) ** 2)) == pytest.approx(0.3, rel=0.1)
    wanted = targets - targets.mean(axis=0)
    ours = found.mean(axis=1) - found.mean(axis=(0, 1))
    cosines = (ours * wanted).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosines.min() > 0.9
