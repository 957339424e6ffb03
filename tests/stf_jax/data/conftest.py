"""A small training set with every kind of example, and the dataset built from it."""

from pathlib import Path

import pytest

from stf_jax.data.building import build
from stf_jax.data.images import ImageProcessor
from stf_jax.data.tokenizer import Tokenizer, load_tokenizer
from tests.corpus import Corpus, write_corpus

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
