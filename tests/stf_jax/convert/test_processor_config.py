"""The image processor inside processor_config.json, where transformers 5 saves it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stf_jax.convert import export_checkpoint, import_checkpoint, inspect_checkpoint, open_source
from stf_jax.convert.stored_model import load_processors
from tests.stf_jax.convert.refusal import edit_json


def nest(folder: Path, **changes: object) -> None:
    """Moves the image processor's settings to where transformers 5 has them."""
    alone = folder / "preprocessor_config.json"
    settings = json.loads(alone.read_text()) | changes
    alone.unlink()
    content = {"processor_class": "LlavaProcessor", "image_processor": settings, "patch_size": 14}
    (folder / "processor_config.json").write_text(json.dumps(content))


@pytest.fixture
def model(checkpoint: Callable) -> Path:
    """A model with an image processor of its own, beside its tower with another."""
    source: Path = checkpoint()
    tower = source.parent / "clip"
    shutil.copy(tower / "preprocessor_config.json", source)
    edit_json(source / "preprocessor_config.json", image_mean=[0.25, 0.5, 0.75])
    return source


def mean(path: Path) -> tuple[float, ...]:
    return load_processors(path).image_processor.mean


@pytest.mark.parametrize("place", ["model", "tower", "both files"])
def test_it_is_found(place: str, model: Path, tmp_path: Path) -> None:
    """Also in a native checkpoint, and in what is exported from one."""
    if place == "tower":
        (model / "preprocessor_config.json").unlink()
        edit_json(model.parent / "clip" / "preprocessor_config.json", image_mean=[0.25, 0.5, 0.75])
        nest(model.parent / "clip")
    else:
        nest(model)
    if place == "both files":
        # As in transformers, the nested one counts.
        shutil.copy(model.parent / "clip" / "preprocessor_config.json", model)
    assert inspect_checkpoint(model).problem is None
    assert mean(model) == (0.25, 0.5, 0.75)
    import_checkpoint(model, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "out", layout="llava-stf")
    for path in (tmp_path / "native", tmp_path / "out"):
        assert inspect_checkpoint(path).problem is None
        assert mean(path) == (0.25, 0.5, 0.75)


def test_a_processor_config_without_an_image_processor(model: Path) -> None:
    """As transformers 4 wrote it, beside the other file or beside none."""
    (model / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
    assert mean(model) == (0.25, 0.5, 0.75)
    (model / "preprocessor_config.json").unlink()
    assert mean(model) == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)
    nest(model.parent / "clip", image_mean=[0.5, 0.5, 0.5])
    assert mean(model) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"image_processor": [3]}',
            r"processor_config.json: image_processor is \[3\]; give an obj",
        ),
        ('{"image_processor": {"image_processor_type": "SiglipImageProcessor"}}', "is not CLIP's"),
        ("{", "processor_config.json: not valid JSON"),
    ],
)
def test_a_damaged_one(content: str, message: str, model: Path) -> None:
    (model / "processor_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_processors(model)
    # The weights are of use all the same.
    assert open_source(model).config


def test_it_goes_into_what_transformers_reads(reference: Path, tmp_path: Path) -> None:
    tower = Path(shutil.copytree(reference / "clip", tmp_path / "clip"))
    nest(tower, image_mean=[0.25, 0.5, 0.75])
    import_checkpoint(reference / "vicuna", tmp_path / "native", vision_tower=tower, system="llava")
    export_checkpoint(tmp_path / "native", tmp_path / "hf", layout="hf")
    written = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert written["image_mean"] == [0.25, 0.5, 0.75]
    assert mean(tmp_path / "hf") == (0.25, 0.5, 0.75)


@pytest.mark.torch
def test_what_this_transformers_saves(reference: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    import_checkpoint(
        reference / "vicuna", tmp_path / "native", vision_tower=reference / "clip", system="llava"
    )
    export_checkpoint(tmp_path / "native", tmp_path / "hf", layout="hf")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "hf" / name).unlink()
    processor.save_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf" / "preprocessor_config.json").exists()
    report = inspect_checkpoint(tmp_path / "hf")
    assert report.problem is None
    assert report.processors["image processor"] == "56 px, mode pad"
