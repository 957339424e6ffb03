"""The nine benchmarks in miniature."""

from pathlib import Path

import pytest

from tests.stf_jax.eval.miniature import make_all


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The folder that `--data` names."""
    root = tmp_path / "eval"
    make_all(root)
    return root
