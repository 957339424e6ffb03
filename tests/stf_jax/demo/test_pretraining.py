"""The command that makes the small CLIP and the small LLaMA, in a few steps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stf_jax
from stf_jax.convert import import_checkpoint
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.demo import pretraining, scenes
from stf_jax.demo.evaluation import LONGEST_ANSWER
from stf_jax.demo.language import TEXT, Phase, write_tokenizer
from stf_jax.demo.scenes import CAPTIONS, MOST, Scene
from stf_jax.demo.tower import VISION
from stf_jax.demo.variants import all_variants
from tests.switch import ALL

pytest.importorskip("sklearn")
pytestmark = pytest.mark.slow


def test_the_stored_tokenizer_is_that_of_the_scenes(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (pretraining.LANGUAGE / file.name).read_bytes()
    tokenizer, rng = load_tokenizer(tmp_path), np.random.default_rng(0)
    longest = max(
        # As an answer begins, behind a space, and with the token that ends it.
        len(tokenizer.encode(f"x {question.answer}")) - len(tokenizer.encode("x")) + 1
        for _ in range(100)
        for question in scenes.questions(Scene.draw(rng), rng, of_each=MOST)
    )
    assert longest == LONGEST_ANSWER


@pytest.mark.skipif(not ALL, reason="CI runs the demo, which imports what was made")
def test_makes_what_the_converter_imports(tmp_path: Path) -> None:
    texts = [*CAPTIONS, "questions"]
    shape: Any = {"rows": len(texts), "length": 256, "texts": texts, "rate": 1e-3}
    pretraining.make(tmp_path, tower_steps=2, scenes=8, phases=[Phase(steps=2, **shape)])
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    folders = (pretraining.LANGUAGE, pretraining.TOWER)
    shipped = {
        path.relative_to(pretraining.DATA) for folder in folders for path in folder.rglob("*.*")
    }
    assert written == shipped

    system = all_variants(VISION, TEXT)["stf_mbtf"].system
    import_checkpoint(
        tmp_path / "language", tmp_path / "model", vision_tower=tmp_path / "tower", system=system
    )
    config = stf_jax.load(tmp_path / "model").config
    assert (config.vision.width, config.text) == (VISION.width, TEXT)

    # What is there is not made again.
    (tmp_path / "tower" / "model.safetensors").unlink()
    pretraining.make(tmp_path)
    assert not (tmp_path / "tower" / "model.safetensors").exists()
