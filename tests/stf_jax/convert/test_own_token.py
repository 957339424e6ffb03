"""A system with a token of its own: a row of the vocabulary, and a token of the tokenizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stf_jax.convert import export_checkpoint, import_checkpoint, open_source
from stf_jax.convert.stored_model import load_processors
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.store.checkpoint import open_native
from stf_jax.systems.voco import VoCo
from stf_jax.util.errors import CheckpointError
from tests.stf_jax.convert.conftest import read_all

ROWS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def imported(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vicuna and CLIP as VoCo-LLaMA with two tokens an image."""
    out = tmp_path_factory.mktemp("voco") / "native"
    import_checkpoint(
        reference / "vicuna",
        out,
        vision_tower=reference / "clip",
        system="voco",
        fields={"count": 2},
        vocabulary_multiple=8,
    )
    return out


@pytest.fixture(scope="module")
def exported(imported: Path) -> Path:
    out = imported.parent / "exported"
    export_checkpoint(imported, out, layout="llava")
    return out


def vocabulary(reference: Path) -> int:
    hf = json.loads((reference / "vicuna" / "config.json").read_text())
    return int(hf["vocab_size"])


def test_an_import_adds_a_row(reference: Path, imported: Path) -> None:
    native, rows = open_native(imported), vocabulary(reference)
    config = native.config
    assert config.system == VoCo(
        taps=config.system.taps, projector_width=config.text.width, count=2, token_id=rows
    )
    assert (config.text.vocab_size, config.text.padded_vocab_size) == (rows + 1, rows + 8)
    processors = load_processors(imported)
    tokenizer = processors.tokenizer
    assert tokenizer.images_first == config.images_first
    assert tokenizer.encode("<voco>") == [rows]
    assert tokenizer.vocab_size == rows + 1


def test_the_old_rows_are_as_they_were(
    reference: Path, exported: Path, read: Callable[[Path], dict[str, np.ndarray]]
) -> None:
    """And the new ones are small, random and told apart."""
    before, after = read(reference / "vicuna"), read(exported)
    new = []
    for name in ROWS:
        np.testing.assert_array_equal(after[name][:-1], before[name])
        assert len(after[name]) == len(before[name]) + 1
        new.append(after[name][-1])
        assert 0.01 < new[-1].std() < 0.04
    assert not np.array_equal(*new)
    for name, tensor in before.items():
        if name not in ROWS:
            assert tensor.tobytes() == after[name].tobytes(), name


def test_an_export_comes_back(
    reference: Path,
    exported: Path,
    tmp_path: Path,
    read: Callable[[Path], dict[str, np.ndarray]],
    assert_same: Callable[..., None],
) -> None:
    """Weights and files, to the bit; the tokenizer knows the token without being told."""
    rows = vocabulary(reference)
    assert load_tokenizer(exported).encode("a<voco>")[-1] == rows
    assert json.loads((exported / "added_tokens.json").read_text()) == {"<voco>": rows}
    hf = json.loads((exported / "config.json").read_text())
    assert (hf["vocab_size"], hf["voco_num"], hf["voco_token_id"]) == (rows + 1, 2, rows)
    import_checkpoint(exported, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "again", layout="llava")
    assert_same(read(tmp_path / "again"), read(exported))
    files = {path.relative_to(exported) for path in exported.rglob("*") if path.is_file()}
    assert files == {
        path.relative_to(tmp_path / "again")
        for path in (tmp_path / "again").rglob("*")
        if path.is_file()
    }
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes(), name
    with pytest.raises(CheckpointError, match=f"cut tokens off; give {rows + 1} or more"):
        export_checkpoint(tmp_path / "native", tmp_path / "cut", layout="llava", vocabulary=rows)


def test_a_model_that_has_the_row_gets_no_second(exported: Path, tmp_path: Path) -> None:
    """Of the same system with other fields; and of a checkpoint that only its tokenizer tells."""
    config = open_source(exported, system="voco", fields={"count": 5}).config
    assert config.system.to_dict() == open_source(exported).config.system.to_dict() | {"count": 5}
    folder = Path(shutil.copytree(exported, tmp_path / "released"))
    hf = json.loads((folder / "config.json").read_text())
    del hf["voco_num"], hf["voco_token_id"]
    (folder / "config.json").write_text(json.dumps(hf))
    assert open_source(folder, system="voco", fields={"count": 5}).config == config


def test_a_tokenizer_file_gets_the_token_once(exported: Path, tmp_path: Path) -> None:
    """tokenizer.json, too, as transformers writes it beside or in place of tokenizer.model."""
    from transformers import LlamaTokenizer

    folder = Path(shutil.copytree(exported, tmp_path / "fast"))
    for name in ("tokenizer.model", "added_tokens.json"):
        (folder / name).unlink()
    rows = json.loads((folder / "config.json").read_text())["vocab_size"] - 1
    LlamaTokenizer.from_pretrained(exported).save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    listed = content["added_tokens"]
    content["added_tokens"] = [token for token in listed if token["content"] != "<voco>"]
    assert len(content["added_tokens"]) == len(listed) - 1
    (folder / "tokenizer.json").write_text(json.dumps(content))
    import_checkpoint(folder, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "again", layout="llava")
    added = json.loads((tmp_path / "again" / "tokenizer.json").read_text())["added_tokens"]
    assert [(token["id"], token["special"]) for token in added if token["content"] == "<voco>"] == [
        (rows, True)
    ]


def test_seeds_decide_the_row(reference: Path) -> None:
    def new_row(seed: int) -> np.ndarray:
        source = open_source(
            reference / "vicuna", vision_tower=reference / "clip", system="voco", seed=seed
        )
        (leaf,) = (leaf for leaf in source.leaves() if leaf.path == "text/embedding")
        return leaf.read()[-1]

    np.testing.assert_array_equal(new_row(0), new_row(0))
    assert not np.array_equal(new_row(0), new_row(1))


def test_a_projector_beside_a_language_model(
    reference: Path, exported: Path, tmp_path: Path, write: Callable[..., None]
) -> None:
    """As the paper begins: LLaVA's pretrained projector, Vicuna, and a new row."""
    projector = {
        name: tensor for name, tensor in read_all(exported).items() if "mm_projector" in name
    }
    (tmp_path / "projector").mkdir()
    write(tmp_path / "projector" / "mm_projector.safetensors", projector)
    source = open_source(
        tmp_path / "projector" / "mm_projector.safetensors",
        base=reference / "vicuna",
        vision_tower=reference / "clip",
        system="voco",
        fields={"count": 2},
    )
    rows = vocabulary(reference)
    assert source.config.system == open_source(exported).config.system
    assert source.config.text.vocab_size == rows + 1
    shapes = {leaf.path: leaf.shape for leaf in source.leaves()}
    assert shapes["text/embedding"][0] == shapes["text/head/kernel"][1] == rows + 1
