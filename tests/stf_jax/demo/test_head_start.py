"""The command that makes the small CLIP and the small LLaMA, in a few steps."""

from pathlib import Path
from typing import Any

import pytest

import stf_jax
from convert import import_checkpoint
from stf_jax.demo import head_start
from stf_jax.demo.arms import all_arms
from stf_jax.demo.language import TEXT, Phase
from stf_jax.demo.scenes import CAPTIONS
from stf_jax.demo.tower import VISION

pytest.importorskip("sklearn")
pytestmark = pytest.mark.slow


def test_makes_what_the_converter_imports(tmp_path: Path) -> None:
    texts = [*CAPTIONS, "questions"]
    shape: Any = {"rows": len(texts), "length": 256, "texts": texts, "rate": 1e-3}
    head_start.make(tmp_path, tower_steps=2, scenes=8, phases=[Phase(steps=2, **shape)])
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    kept = {path.relative_to(head_start.DATA) for path in head_start.DATA.rglob("*.*")}
    assert written == kept

    fusion = all_arms(VISION, TEXT)["stf_mbtf"].fusion
    import_checkpoint(
        tmp_path / "language", tmp_path / "model", vision_tower=tmp_path / "tower", fusion=fusion
    )
    config = stf_jax.load(tmp_path / "model").config
    assert (config.vision.width, config.text) == (VISION.width, TEXT)

    # What is there is not made again.
    (tmp_path / "tower" / "model.safetensors").unlink()
    head_start.make(tmp_path)
    assert not (tmp_path / "tower" / "model.safetensors").exists()
