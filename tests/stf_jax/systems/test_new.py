"""A connector for a language model alone: how each system's weights begin, and its fields."""

from pathlib import Path

import numpy as np
import pytest

from stf_jax.convert import open_source
from stf_jax.systems import SYSTEMS
from stf_jax.util.errors import CheckpointError


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_can_begin(reference: Path, name: str) -> None:
    """Norms scale by 1 and add 0; nothing else is constant, and a seed decides."""

    def read(seed: int) -> dict[str, np.ndarray]:
        source = open_source(
            reference / "vicuna", vision_tower=reference / "clip", system=name, seed=seed
        )
        assert source.config.system.name == name
        leaves = [leaf for leaf in source.leaves() if leaf.path.startswith("connector/")]
        assert leaves
        return {leaf.path: leaf.read() for leaf in leaves}

    first, again, other = read(0), read(0), read(1)
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, again[path])
        if path.endswith("scale"):
            assert (leaf == 1).all()
        elif "norm" in path.split("/")[-2]:
            assert (leaf == 0).all()
        else:
            assert leaf.size == 1 or leaf.std() > 0, path
            assert not np.array_equal(leaf, other[path]), path


def test_fields_by_name(reference: Path) -> None:
    opened = open_source(
        reference / "vicuna",
        vision_tower=reference / "clip",
        system="quecc",
        fields={"stride": 2, "question_length": 16},
    )
    assert opened.config.tokens_per_image == opened.config.vision.patches // 4
    assert opened.config.question_length == 16
    with pytest.raises(CheckpointError, match="system quecc has no strides; it has heads"):
        open_source(
            reference / "vicuna",
            vision_tower=reference / "clip",
            system="quecc",
            fields={"strides": 2},
        )
