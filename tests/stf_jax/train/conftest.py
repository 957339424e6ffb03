"""A dataset, and configs of runs over it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stf_jax.convert.stored_model import load_processors
from stf_jax.data.builder import build
from stf_jax.train.config import TrainConfig
from tests.corpus import write_corpus
from tests.programs import share_programs

# Two or three examples fill a row.
SEQUENCE_LENGTH = 256


def build_dataset(model: Path, folder: Path, *, examples: int, workers: int) -> Path:
    """A dataset of drawn images and conversations, in `folder`."""
    corpus = write_corpus(folder, examples, longest=4)
    processors = load_processors(model)
    build(
        [corpus.json],
        folder / "dataset",
        images=corpus.images,
        tokenizer=processors.tokenizer,
        image_processor=processors.image_processor,
        tokens_per_image=processors.tokens_per_image,
        template="v1",
        sequence_length=SEQUENCE_LENGTH,
        workers=workers,
    )
    return folder / "dataset"


@pytest.fixture(autouse=True, scope="package")
def programs() -> Iterator[None]:
    """Runs that continue, or differ in their files only, do not trace and compile again."""
    with pytest.MonkeyPatch.context() as patched:
        share_programs(patched)
        yield


@pytest.fixture(scope="session")
def dataset(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four examples with none, one or two images."""
    return build_dataset(native, tmp_path_factory.mktemp("corpus"), examples=24, workers=1)


@pytest.fixture
def config(native: Path, dataset: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A config from keys that differ from a small run of stage 2; through YAML, as a user's."""
    number = iter(range(100))

    def make(**keys: Any) -> TrainConfig:
        tree: dict[str, Any] = {
            "model": str(native),
            "out": str(tmp_path / f"run{next(number)}"),
            "steps": 5,
            "dtype": "float32",
            "remat": "none",
            "mesh": None,
            "data": {
                "datasets": [{"path": str(dataset)}],
                "sequence_length": SEQUENCE_LENGTH,
                "batch_size": 8,
                "images_per_row": 4,
                "workers": 0,
            },
            "optimizer": {"learning_rate": 1e-3},
        }
        for key, value in keys.items():
            if isinstance(value, dict) and isinstance(tree.get(key), dict):
                tree[key] = tree[key] | value
            else:
                tree[key] = value
        path = tmp_path / f"{next(number)}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return TrainConfig.load(path)

    return make
