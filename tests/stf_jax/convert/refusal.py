"""Checkpoints that an import refuses."""

import json
from pathlib import Path

import pytest

from stf_jax.convert import import_checkpoint
from stf_jax.util.errors import CheckpointError


def refused(source: Path, out: Path, message: str, **options: object) -> str:
    """The message of the error that an import raises, which leaves nothing behind."""
    before = set(out.parent.iterdir())
    with pytest.raises(CheckpointError, match=message) as caught:
        import_checkpoint(source, out, **options)
    assert set(out.parent.iterdir()) == before
    return str(caught.value)


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    content |= changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
