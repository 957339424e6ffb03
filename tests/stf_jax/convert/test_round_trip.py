"""PyTorch -> native -> PyTorch gives every tensor back bit for bit: files without PyTorch."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from stf_jax.convert import export_checkpoint, import_checkpoint, open_source
from stf_jax.store.checkpoint import open_native
from stf_jax.systems.stf import STF, STF_TAPS
from stf_jax.util.errors import CheckpointError
from tests.stf_jax.convert.refusal import edit_json

BF16 = np.dtype(ml_dtypes.bfloat16)
TOWER = "model.vision_tower.vision_tower.vision_model."


def load_json(path: Path) -> dict:
    return json.loads(path.read_text())


def mixed(name: str, array: np.ndarray) -> np.ndarray:
    """A dtype that depends on the name: within one stack, too."""
    dtypes = [np.dtype(np.float32), np.dtype(np.float16), BF16]
    return array.astype(dtypes[sum(map(ord, name)) % 3])


CASTS = {
    "float32": lambda name, array: array,
    "float16": lambda name, array: array.astype(np.float16),
    "bfloat16": lambda name, array: array.astype(BF16),
    "mixed": mixed,
}
BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.arange(8, dtype=np.float32),
    f"{TOWER}embeddings.position_ids": np.arange(17, dtype=np.int64)[None],
}


@pytest.mark.portable
def test_round_trip_of_the_reference(
    reference: Path, tmp_path: Path, read: Callable, assert_same: Callable
) -> None:
    source, out = reference / "llava-stf", tmp_path / "out"
    import_checkpoint(source, tmp_path / "native")
    export_checkpoint(tmp_path / "native", out, layout="llava-stf", shard_bytes=350_000)
    assert_same(read(out), read(source))
    assert load_json(out / "config.json") == load_json(source / "config.json")
    assert load_json(out / "generation_config.json") == load_json(source / "generation_config.json")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    preprocessor = reference / "clip" / "preprocessor_config.json"
    assert load_json(out / "preprocessor_config.json") == load_json(preprocessor)


def test_shards_and_index(reference: Path, tmp_path: Path, read: Callable) -> None:
    import_checkpoint(reference / "llava-stf", tmp_path / "native")
    export_checkpoint(
        tmp_path / "native", tmp_path / "out", layout="llava-stf", shard_bytes=350_000
    )
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert [file.name for file in files] == names
    assert len(files) > 4
    assert all(file.stat().st_size <= 350_000 for file in files)
    index = load_json(tmp_path / "out" / "model.safetensors.index.json")
    original = load_json(reference / "llava-stf" / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == original["metadata"]["total_size"]
    assert index["weight_map"].keys() == original["weight_map"].keys()
    for file in files:
        held = {name for name, shard in index["weight_map"].items() if shard == file.name}
        assert read(tmp_path / "out").keys() >= held
        assert file.read_bytes()[8:64].startswith(b'{"__metadata__":{"format":"pt"}')


@pytest.mark.parametrize("kind", CASTS)
def test_every_dtype_and_buffers(
    kind: str, checkpoint: Callable, tmp_path: Path, read: Callable, assert_same: Callable
) -> None:
    source = checkpoint(CASTS[kind], add=BUFFERS)
    import_checkpoint(source, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "out", layout="llava-stf")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert_same(read(tmp_path / "out"), read(source))
    assert load_json(tmp_path / "out" / "config.json") == load_json(source / "config.json")


@pytest.mark.portable
def test_leaves_of_the_reference_are_what_is_written(reference: Path, tmp_path: Path) -> None:
    source = open_source(reference / "llava-stf")
    import_checkpoint(reference / "llava-stf", tmp_path / "native")
    native = open_native(tmp_path / "native")
    assert native.config == source.config
    assert native.config.system.taps == STF_TAPS
    # STF makes one token of each two by two patches.
    vision = native.config.vision
    assert native.config.tokens_per_image == (vision.image_size // vision.patch_size // 2) ** 2
    leaves = list(source.leaves())
    assert {leaf.path for leaf in leaves} == native.shapes.keys()
    for leaf in leaves:
        array = leaf.read()
        assert (array.shape, array.dtype) == (leaf.shape, leaf.dtype)
        stored = native.read(leaf.path)
        assert (stored.shape, stored.dtype) == (leaf.shape, leaf.dtype)
        assert stored.tobytes() == array.tobytes()


def test_stf_weight_of_the_reference_is_permuted(reference: Path, read: Callable) -> None:
    weight = read(reference / "llava-stf")["model.mm_projector.0.weight"]
    source = open_source(reference / "llava-stf")
    leaves = {leaf.path: leaf for leaf in source.leaves()}
    native = leaves["connector/projector/linear_1/kernel"].read()
    channels = source.config.vision.width
    for row, column, channel in ((0, 0, 0), (0, 1, 5), (1, 0, channels - 1), (1, 1, 17)):
        expected = weight[:, 4 * channel + 2 * row + column]
        np.testing.assert_array_equal(native[(2 * row + column) * channels + channel], expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_option(
    dtype: str, checkpoint: Callable, tmp_path: Path, read: Callable, assert_same: Callable
) -> None:
    source = checkpoint(add=BUFFERS)
    import_checkpoint(source, tmp_path / "native", dtype=dtype)
    assert {str(leaf.dtype) for leaf in open_native(tmp_path / "native").shapes.values()} == {dtype}
    export_checkpoint(tmp_path / "native", tmp_path / "out", layout="llava-stf")
    expected = {
        name: array if name in BUFFERS else CASTS[dtype](name, array)
        for name, array in read(source).items()
    }
    assert_same(read(tmp_path / "out"), expected)
    assert load_json(tmp_path / "out" / "config.json")["torch_dtype"] == dtype
    import_checkpoint(source, tmp_path / "native32")
    export_checkpoint(tmp_path / "native32", tmp_path / "out2", layout="llava-stf", dtype=dtype)
    assert_same(read(tmp_path / "out2"), expected)
    assert load_json(tmp_path / "out2" / "config.json")["torch_dtype"] == dtype


def test_vocabulary_is_padded_and_trimmed(
    reference: Path, tmp_path: Path, read: Callable, assert_same: Callable
) -> None:
    source = reference / "llava-stf"
    imported = import_checkpoint(source, tmp_path / "native", vocabulary_multiple=128)
    assert imported.config.text.vocab_size == 600
    assert imported.config.text.padded_vocab_size == 640
    native = open_native(tmp_path / "native")
    assert native.shapes["text/embedding"].shape == (640, 64)
    assert native.shapes["text/head/kernel"].shape == (64, 640)
    export_checkpoint(tmp_path / "native", tmp_path / "out", layout="llava-stf")
    assert_same(read(tmp_path / "out"), read(source))
    assert load_json(tmp_path / "out" / "config.json") == load_json(source / "config.json")
    export_checkpoint(tmp_path / "native", tmp_path / "more", layout="llava-stf", vocabulary=640)
    assert read(tmp_path / "more")["lm_head.weight"].shape == (640, 64)
    assert load_json(tmp_path / "more" / "config.json")["vocab_size"] == 640


def test_tower_beside_the_checkpoint(
    checkpoint: Callable, tmp_path: Path, read: Callable, assert_same: Callable, reference: Path
) -> None:
    source = checkpoint(lambda name, array: None if name.startswith(TOWER) else array)
    import_checkpoint(source, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "out", layout="llava-stf")
    tower = {
        TOWER + name.removeprefix("vision_model."): array
        for name, array in read(reference / "clip").items()
    }
    assert_same(read(tmp_path / "out"), {**read(source), **tower})
    # The export is complete in itself.
    shutil.copytree(tmp_path / "out", tmp_path / "elsewhere" / "model")
    assert open_source(tmp_path / "elsewhere" / "model").config == open_source(source).config


def test_tower_inside_wins(checkpoint: Callable, read: Callable) -> None:
    source = checkpoint(lambda name, array: array * 2 if "class_embedding" in name else array)
    leaves = {leaf.path: leaf for leaf in open_source(source).leaves()}
    inside = read(source)[f"{TOWER}embeddings.class_embedding"]
    np.testing.assert_array_equal(leaves["vision/class_embedding"].read(), inside)


def test_native_checkpoint_is_self_contained(
    checkpoint: Callable, tmp_path: Path, read: Callable, assert_same: Callable
) -> None:
    source = checkpoint()
    expected = read(source)
    import_checkpoint(source, tmp_path / "native")
    shutil.rmtree(source.parent)
    (tmp_path / "native").rename(tmp_path / "moved")
    export_checkpoint(tmp_path / "moved", tmp_path / "out", layout="llava-stf")
    assert_same(read(tmp_path / "out"), expected)
    assert (tmp_path / "moved" / "hf" / "tokenizer.model").exists()
    assert (tmp_path / "moved" / "hf" / "preprocessor_config.json").exists()


@pytest.mark.portable
@pytest.mark.parametrize("kind", ["stf", "llava", "average"])
def test_language_model_with_a_new_system(
    kind: str, reference: Path, tmp_path: Path, read: Callable, assert_same: Callable
) -> None:
    vicuna, clip = reference / "vicuna", reference / "clip"
    imported = import_checkpoint(
        vicuna, tmp_path / "native", vision_tower=clip, system=kind, seed=7
    )
    again = open_source(vicuna, vision_tower=clip, system=kind, seed=7)
    other = open_source(vicuna, vision_tower=clip, system=kind, seed=8)
    native = open_native(tmp_path / "native")
    for ours, theirs in zip(again.leaves(), other.leaves(), strict=True):
        stored = native.read(ours.path)
        assert stored.tobytes() == ours.read().tobytes()
        new = ours.path.startswith("connector/")
        assert (stored.tobytes() == theirs.read().tobytes()) != new
    weight = native.read("connector/projector/linear_1/kernel")
    bound = weight.shape[0] ** -0.5
    assert np.abs(weight).max() <= bound
    assert np.std(weight) == pytest.approx(bound / 3**0.5, rel=0.05)
    layout = "llava-stf" if kind == "stf" else "llava"
    export_checkpoint(tmp_path / "native", tmp_path / "out", layout=layout)
    out = read(tmp_path / "out")
    assert_same({name: out[name] for name in read(vicuna)}, read(vicuna))
    assert open_source(tmp_path / "out").config == imported.config
    assert ("mm_system" in load_json(tmp_path / "out" / "config.json")) == (kind == "average")
    wrong = "llava" if kind == "stf" else "llava-stf"
    with pytest.raises(CheckpointError, match=r"use --layout llava(-stf)?$"):
        export_checkpoint(tmp_path / "native", tmp_path / "wrong", layout=wrong)


@pytest.mark.parametrize(
    ("older", "today"),
    [
        ({"taps": [12, 3], "last_activation": True}, {"mbtf": {"last_activation": True}}),
        ({"taps": [12, 3], "last_activation": False, "reduction": "stf", "window": 2}, {}),
        ({"taps": [12, 3], "reduction": "average"}, {"name": "average"}),
    ],
)
def test_the_key_before_systems_had_names(
    checkpoint: Callable, older: dict[str, object], today: dict[str, object]
) -> None:
    def two_taps(name: str, array: np.ndarray) -> np.ndarray:
        if "mm_projector.0.weight" in name and older.get("reduction") == "average":
            return array[:, : array.shape[1] // 4].copy()
        return array[:, :64].copy() if "crosslayer.0.weight" in name else array

    source = checkpoint(two_taps, config={"mm_fusion": older})
    opened = open_source(source)
    edit_json(source / "config.json", mm_fusion=None, mm_system={"taps": [12, 3], **today})
    assert open_source(source).config == opened.config
    assert opened.config.system.taps == (12, 3)


def test_own_taps_survive(
    checkpoint: Callable, tmp_path: Path, read: Callable, assert_same: Callable
) -> None:
    def two_taps(name: str, array: np.ndarray) -> np.ndarray:
        return array[:, :64].copy() if "crosslayer.0.weight" in name else array

    ours = {"taps": [12, 3], "mbtf": {"last_activation": True}}
    source = checkpoint(two_taps, config={"mm_system": ours})
    imported = import_checkpoint(source, tmp_path / "native")
    assert imported.config.system.taps == (12, 3)
    assert isinstance(imported.config.system, STF)
    assert imported.config.system.mbtf is not None
    assert imported.config.system.mbtf.last_activation
    export_checkpoint(tmp_path / "native", tmp_path / "out", layout="llava-stf")
    assert_same(read(tmp_path / "out"), read(source))
    assert load_json(tmp_path / "out" / "config.json") == load_json(source / "config.json")
    assert (
        open_source(tmp_path / "out", vision_tower=source.parent / "clip").config == imported.config
    )


def test_four_taps_are_those_of_the_13b_run(checkpoint: Callable) -> None:
    source = checkpoint(
        lambda name, array: array[:, :128].copy() if "crosslayer.0.weight" in name else array
    )
    assert open_source(source).config.system.taps == (23, 18, 12, 6)


def test_generation_settings_that_newer_loaders_refuse(
    checkpoint: Callable, tmp_path: Path
) -> None:
    source = checkpoint()
    vicuna = {"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1}
    (source / "generation_config.json").write_text(json.dumps(vicuna))
    import_checkpoint(source, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "out", layout="llava-stf")
    written = load_json(tmp_path / "out" / "generation_config.json")
    assert written == {**vicuna, "do_sample": True}


def test_generation_settings_that_say_nothing(checkpoint: Callable, tmp_path: Path) -> None:
    source = checkpoint()
    greedy = {"temperature": None, "top_p": None, "do_sample": False}
    (source / "generation_config.json").write_text(json.dumps(greedy))
    import_checkpoint(source, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "out", layout="llava-stf")
    assert load_json(tmp_path / "out" / "generation_config.json") == greedy


def test_without_a_tokenizer(checkpoint: Callable, tmp_path: Path) -> None:
    source = checkpoint()
    for file in source.glob("*token*"):
        file.unlink()
    import_checkpoint(source, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "out", layout="llava-stf")
    assert not list((tmp_path / "out").glob("*token*"))
