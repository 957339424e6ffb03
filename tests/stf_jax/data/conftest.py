"""A small training set with every kind of example, and the dataset built from it."""

import os
from pathlib import Path
from typing import Any

import pytest

from stf_jax.data.builder import build
from stf_jax.data.config import DataConfig, DatasetSource
from stf_jax.data.images import ImageProcessor
from stf_jax.data.pipeline import TrainingData
from stf_jax.data.tokenizer import Tokenizer, load_tokenizer
from tests.corpus import Corpus, write_corpus
from tests.stf_jax.data.steps import K, Make

EXAMPLES = 60


@pytest.fixture(scope="session")
def tokenizer(reference: Path) -> Tokenizer:
    return load_tokenizer(reference / "llava-stf")


@pytest.fixture(scope="session")
def image_processor() -> ImageProcessor:
    return ImageProcessor(image_size=28, shortest_edge=28)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"), EXAMPLES)


@pytest.fixture(scope="session")
def dataset(corpus: Corpus, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dataset") / "small"
    build(
        [corpus.json],
        path,
        images=corpus.images,
        tokenizer=tokenizer,
        examples_per_shard=25,
        workers=1,
    )
    return path


@pytest.fixture
def make(dataset: Path, tokenizer: Tokenizer, image_processor: ImageProcessor) -> Make:
    def make(**options: Any) -> TrainingData:
        arguments: dict[str, Any] = {
            "datasets": (DatasetSource(path=os.fspath(dataset)),),
            "sequence_length": 320,
            "batch_size": 4,
            "images_per_row": 4,
            "workers": 0,
        } | options
        return TrainingData(
            DataConfig(**arguments),
            tokenizer=tokenizer,
            image_processor=image_processor,
            tokens_per_image=K,
        )

    return make
