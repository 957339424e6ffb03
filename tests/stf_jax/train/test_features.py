"""Features of the frozen tower, computed once and kept on disk in place of pixels."""

import contextlib
import dataclasses
import fcntl
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental import multihost_utils

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.convert.stored_model import load_processors
from stf_jax.data import features as stores
from stf_jax.data.dataset import Dataset
from stf_jax.data.features import FeatureIdentity, FeaturesError, ImageFeatures, ImageTable
from stf_jax.data.images import ImageError, ImageProcessor
from stf_jax.models import flops
from stf_jax.models.connector import VisionFeatures
from stf_jax.models.llava import Llava
from stf_jax.store.checkpoint import open_native
from stf_jax.systems import SYSTEMS
from stf_jax.systems.base import LlavaConfig
from stf_jax.train import features as cached
from stf_jax.train.config import TrainConfig
from stf_jax.train.features import CachedFeatures, packed_shape
from stf_jax.train.program import make_program

Config = Callable[..., TrainConfig]
VISION, TEXT = VisionConfig.tiny(), TextConfig.tiny()


class Data:
    """What `CachedFeatures.open` asks of training data."""

    def __init__(self, dataset: Path, processor: ImageProcessor):
        self.datasets, self.image_processor = [Dataset(dataset)], processor


@pytest.fixture
def opened(
    native: Path, dataset: Path, tmp_path: Path
) -> Iterator[Callable[..., tuple[CachedFeatures, ImageFeatures]]]:
    """The features of the dataset under other circumstances, in one directory."""
    first, processor = open_native(native), load_processors(native).image_processor

    def make(
        dataset: Path = dataset, dtype: str = "float32", **changes: Any
    ) -> tuple[CachedFeatures, ImageFeatures]:
        data: Any = Data(dataset, dataclasses.replace(processor, **changes))
        features = CachedFeatures.open(first, [data], dtype=dtype, directory=str(tmp_path / "f"))
        (store,) = features.stores.values()
        return features, store

    return make


def fake_tower(
    self: CachedFeatures, identity: FeatureIdentity, squares: Iterator[Any]
) -> Iterator[Any]:
    """Features that tell an image."""
    for data, reason, square in squares:
        features = np.full(identity.shape, square.astype(np.float64).mean(), np.float32)
        yield data, reason or features


def test_hosts_share_the_images_and_equal_files_are_one(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_MULTIPLE", 4)
    monkeypatch.setattr(stores, "_PART_BYTES", 1)
    monkeypatch.setattr(CachedFeatures, "_run_tower", fake_tower)
    features, store = opened()
    assert [len(part) for part in store.parts] == [4, 4, 1]
    monkeypatch.setattr(multihost_utils, "sync_global_devices", lambda name: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for host, left in ((1, [0, 2]), (0, [])):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        assert features.compute(workers=0)
        assert store.missing == left
    shown = 0
    for example in range(len(store.dataset)):
        for place, data in enumerate(store.dataset[example].images):
            processor = store.identity.image_processor
            mean = processor.square(processor.load(data)).astype(np.float64).mean()
            bits = store.read(example, place, data)
            np.testing.assert_array_equal(bits.view(np.float32), np.float32(mean))
            shown += 1
    assert shown > len(store.table.firsts) == 8
    np.testing.assert_array_equal(store.blank, 0)


def test_runs_that_begin_together_describe_a_dataset_one_after_the_other(
    opened: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that write the same file at once would damage it."""
    describe, held = ImageTable.of, []

    def note(*arguments: Any) -> ImageTable:
        with (tmp_path / "f" / ".lock-0").open("a") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(True)
        return describe(*arguments)

    monkeypatch.setattr(ImageTable, "of", note)
    opened()
    # What is complete is only read, as from a place that cannot be written to.
    monkeypatch.setattr(cached, "_alone", None)
    opened()
    assert held == [True]


def test_features_are_known_by_all_that_decides_them(opened: Callable[..., Any]) -> None:
    others = ({}, {"dtype": "bfloat16"}, {"mode": "crop"}, {"fast": True})
    stores = [opened(**changes)[1] for changes in others]
    identity = stores[0].identity
    assert len({store.folder for store in stores}) == 4
    for change in ({"tower": "x"}, {"taps": (1,)}, {"captures": True}):
        other = dataclasses.replace(identity, **change)
        store = ImageFeatures.open(
            stores[0].dataset,
            other,
            stores[0].folder.parent,
            progress=lambda done, total: None,
            lock=lambda folder: contextlib.nullcontext(),
        )
        assert store.folder not in {store.folder for store in stores}


def test_a_tower_with_other_weights_or_another_activation_is_another(
    opened: Callable[..., Any],
) -> None:
    features, store = opened()
    vision = features.config.vision
    weights = {name: np.array(leaf) for name, leaf in features.weights.items()}
    assert cached._digest(vision, weights) == store.identity.tower
    other = dataclasses.replace(vision, activation="gelu")
    assert cached._digest(other, weights) != store.identity.tower
    weights["class_embedding"][0] += 1e-3
    assert cached._digest(vision, weights) != store.identity.tower


def test_what_is_stale_or_damaged_is_refused_and_not_trained_on(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CachedFeatures, "_run_tower", fake_tower)
    features, store = opened()
    features.compute(workers=0)
    data = store.dataset[0].images[0]
    assert store.read(0, 0, data).shape == store.shape
    with pytest.raises(FeaturesError, match=r"has features of other images than .*; delete .*/f, "):
        store.read(0, 0, data + b"!")
    (part,) = store.folder.glob("part-*")
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(FeaturesError, match=r"damaged \(.*\); delete it, and the features are"):
        opened()[1].read(0, 0, data)
    (store.folder / "identity.json").write_text("{}")
    with pytest.raises(FeaturesError, match=r"identity.json: damaged; delete the folder"):
        opened()


def test_an_image_that_cannot_be_read_has_the_reason_that_pixels_have(
    native: Path, opened: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CachedFeatures, "_run_tower", fake_tower)

    class Broken(Dataset):
        def __getitem__(self, number: int) -> Any:
            stored = super().__getitem__(number)
            stored.images = [data[:200] for data in stored.images]
            return stored

    _, store = opened()
    processor = store.identity.image_processor
    broken = dataclasses.replace(store, dataset=Broken(store.dataset.path))
    features = CachedFeatures(config=None, stores={tmp_path: broken}, weights={})  # type: ignore[arg-type]
    features.compute(workers=0)
    data = broken.dataset[0].images[0]
    with pytest.raises(ImageError) as expected:
        processor.load(data)
    with pytest.raises(ImageError, match=f"^{re.escape(str(expected.value))}$"):
        broken.read(0, 0, data)


def test_too_little_room_is_told_before_anything_is_computed(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached, "free_bytes", lambda path: 1000)
    message = r"take 9 images x 16,400 bytes = 0.00 GB, and 0.00 GB are free in .*; name another"
    with pytest.raises(FeaturesError, match=message):
        opened()


def config_of(name: str) -> LlavaConfig:
    system = SYSTEMS[name].for_model(vision=VISION, text=TEXT)
    return LlavaConfig(vision=VISION, text=TEXT, system=system)


@pytest.mark.parametrize("name", ["stf", "prumerge", "downsample"])
def test_what_a_system_takes_of_the_tower_goes_through_one_array(name: str) -> None:
    config = config_of(name)
    side, rng = config.image_size, np.random.default_rng(0)

    graph, state = nnx.split(Llava.abstract(config).vision)

    def both(state: Any, pixels: jax.Array) -> Any:
        features = nnx.merge(graph, state)(pixels)
        packed = features.pack()
        assert packed.shape == (2, *packed_shape(config))
        taps, captures = len(config.system.taps), config.system.captures
        again = VisionFeatures.unpack(packed, taps=taps, captures=captures)
        # Leaves: the dataclasses refuse what is no array of JAX.
        return jax.tree.leaves(features), jax.tree.leaves(again)

    def draw(leaf: Any) -> np.ndarray:
        return rng.standard_normal(leaf.shape).astype(np.float32)

    pixels = jax.ShapeDtypeStruct((2, side, side, 3), np.float32)
    features, again = jax.jit(both)(*jax.tree.map(draw, (state, pixels)))
    jax.tree.map(np.testing.assert_array_equal, again, features)
    assert np.std(features[0]) > 0


def test_a_step_over_features_has_no_tower(config: Config) -> None:
    run = config(data={"features": "cached"}, dtype="bfloat16")
    model = config_of("prumerge")
    program = make_program(run, model, steps=1, mesh=None)
    names = [*program.frozen, *program.state.parameters]
    assert names
    assert not [name for name in names if name.startswith("vision/")]
    assert program.batch.features.shape == (1, 8, 4, *packed_shape(model))
    assert program.batch.features.dtype == "bfloat16"
    assert program.batch.pixels.size == 0
    sizes: Any = {"stage": "finetune", "rows": 8, "length": 256, "images": 4}
    whole, rest = (flops.training(model, **sizes, tower=tower) for tower in (True, False))
    assert rest == dataclasses.replace(whole, vision=0)


def test_tokens_that_train_through_the_tower_are_refused(config: Config) -> None:
    run = config(data={"features": "cached"})
    with pytest.raises(ValueError, match="VisToG trains tokens that go through the tower"):
        make_program(run, config_of("vistog"), steps=1, mesh=None)
    with pytest.raises(ValueError, match="computed"):
        config(data={"features": "stored"})
