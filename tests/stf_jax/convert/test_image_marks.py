"""Models with tokens of their own round an image (`mm_use_im_start_end`), and with `<im_patch>`.

What is expected is written as LLaVA does it: the marker is put into the text, the text is cut at
`<image>`, and sentencepiece tokenizes each piece.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from etils import epath

from stf_jax.convert import export_checkpoint, import_checkpoint, inspect_checkpoint, open_source
from stf_jax.convert.stored_model import load_processors
from stf_jax.data.conversation import render_conversation, render_prompt
from stf_jax.data.encoding import encode_conversation
from stf_jax.data.fit import fit_template
from stf_jax.data.index import index_name
from stf_jax.data.processors import read_tokenizer
from stf_jax.data.tokenizer import IGNORED_LABEL, Tokenizer, encode_prompt
from stf_jax.util.errors import CheckpointError
from tests.stf_jax.convert.refusal import edit_json, refused

PATCH, START, END = 600, 601, 602
TOKENS = {"<im_patch>": PATCH, "<im_start>": START, "<im_end>": END}
IMAGE = -200
TEMPLATES = ["v1", "v1_mmtag", "llava_v1", "v0", "llava_llama_2"]


def marked_source(
    checkpoint: Callable, rows: int, *, files: dict[str, int], **config: object
) -> Path:
    """The reference's LLaVA-STF with more rows, and those tokens in the tokenizer's files."""

    def grow(name: str, array: np.ndarray) -> np.ndarray:
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return np.concatenate([array, array[:1].repeat(rows - len(array), axis=0)])
        return array

    source: Path = checkpoint(grow, config={"vocab_size": rows, **config})
    if files:
        (source / "added_tokens.json").write_text(json.dumps(files))
    return source


@pytest.fixture(params=["in the files", "by the config alone"])
def marked(request: pytest.FixtureRequest, checkpoint: Callable) -> Path:
    files = TOKENS if request.param == "in the files" else {}
    return marked_source(
        checkpoint, 603, files=files, mm_use_im_start_end=True, mm_use_im_patch_token=True
    )


def plain(reference: Path) -> Tokenizer:
    """That of the model without such tokens."""
    folder = reference / "llava-stf"
    files = {path.name: epath.Path(path) for path in folder.iterdir()}
    return read_tokenizer(epath.Path(folder), files)


def expected_ids(reference: Path, text: str) -> list[int]:
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(reference / "llava-stf" / "tokenizer.model")
    )
    special = {**TOKENS, "<s>": 1, "</s>": 2}
    ids = [1]
    for number, chunk in enumerate(text.split("<image>")):
        ids += [IMAGE] if number else []
        parts = [part for part in re.split(f"({'|'.join(special)})", chunk) if part]
        for place, part in enumerate(parts):
            if part in special:
                ids.append(special[part])
            else:
                # A text begins with the mark of a word; what follows a special token does not.
                mark = "" if place else "▁"
                ids += model.encode(mark + part.replace("▁", " "))
    return ids


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "question", ["<image>\nWhat is this?", "<image>\n<image>\nWhich?", "Hello there"]
)
def test_prompts(name: str, question: str, marked: Path, reference: Path) -> None:
    tokenizer = load_processors(marked).tokenizer
    found = encode_prompt(
        tokenizer, render_prompt(question, template=fit_template(name, tokenizer))
    )
    without = plain(reference)
    text = render_prompt(question, template=fit_template(name, without)).text
    text = text.replace("<image>", "<im_start><image><im_end>")
    assert found.tolist() == expected_ids(reference, text)
    for place in np.flatnonzero(found == IMAGE):
        assert found[place - 1 : place + 2].tolist() == [START, IMAGE, END]


@pytest.mark.parametrize("name", TEMPLATES)
def test_training(name: str, marked: Path, reference: Path) -> None:
    conversation = [
        {"from": "human", "value": "What is this?\n<image>"},
        {"from": "gpt", "value": "A bus."},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "Here."},
    ]
    tokenizer, without = load_processors(marked).tokenizer, plain(reference)
    found, before = (
        encode_conversation(
            conversation=conversation,
            tokenizer=one,
            template=fit_template(name, one),
            num_images=1,
        )
        for one in (tokenizer, without)
    )
    pieces = render_conversation(conversation, template=fit_template(name, without), num_images=1)
    text = "".join(piece.text for piece in pieces)
    text = text.replace("<image>", "<im_start><image><im_end>")
    assert found.ids.tolist() == expected_ids(reference, text)
    # What is learnt is the same.
    assert (
        found.labels[found.labels != IGNORED_LABEL].tolist()
        == before.labels[before.labels != IGNORED_LABEL].tolist()
    )


def test_captions_of_the_first_stage_have_none(marked: Path, reference: Path) -> None:
    """LLaVA's plain form overwrites the text in which they stood."""
    caption = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A bus."}]
    ids = [
        encode_conversation(
            tokenizer, caption, template=fit_template("plain", tokenizer), num_images=1
        ).ids.tolist()
        for tokenizer in (load_processors(marked).tokenizer, plain(reference))
    ]
    assert ids[0] == ids[1]


def test_typed_by_a_user_they_are_text(marked: Path) -> None:
    tokenizer = load_processors(marked).tokenizer
    question = "<image>\nWhat does <im_start> or <im_end> mean?"
    prompt = render_prompt(question, template=fit_template("v1", tokenizer))
    ids = encode_prompt(tokenizer, prompt).tolist()
    assert (ids.count(START), ids.count(END)) == (1, 1)
    assert "<im_start> or <im_end> mean" in tokenizer.decode(ids)


def test_an_index_knows_of_them(marked: Path, reference: Path) -> None:
    tokenizer = load_processors(marked).tokenizer
    edit_json(marked / "config.json", mm_use_im_start_end=False)
    others = [load_processors(marked).tokenizer, plain(reference)]
    names = {index_name(one, fit_template("v1", one)) for one in (tokenizer, *others)}
    assert len(names) >= 2
    assert index_name(tokenizer, fit_template("v1", tokenizer)) not in {
        index_name(one, fit_template("v1", one)) for one in others
    }


def test_they_come_back_from_a_native_checkpoint(marked: Path, tmp_path: Path) -> None:
    assert inspect_checkpoint(marked).problem is None
    import_checkpoint(marked, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "out", layout="llava-stf")
    expected = load_processors(marked).tokenizer
    for path in (tmp_path / "native", tmp_path / "out"):
        tokenizer = load_processors(path).tokenizer
        assert tokenizer.image_marker == "<im_start><image><im_end>"
        assert tokenizer.backend.to_str() == expected.backend.to_str()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mm_use_im_start_end"] is config["mm_use_im_patch_token"] is True


def test_without_rows_in_the_embedding(checkpoint: Callable, tmp_path: Path) -> None:
    source = marked_source(checkpoint, 601, files={}, mm_use_im_start_end=True)
    refused(source, tmp_path / "out", r"601 rows and a tokenizer with 1 .*'<im_end>' with id 601")


@pytest.mark.torch
@pytest.mark.parametrize("told", ["by its config", "by its embedding"])
def test_an_adapter_that_needs_them(told: str, reference: Path, tmp_path: Path) -> None:
    """Its base has no such tokens."""
    torch = pytest.importorskip("torch")
    tensors = torch.load(reference / "mm_projector.bin", weights_only=True)
    if told == "by its config":
        shutil.copy(reference / "llava-stf" / "config.json", tmp_path)
        edit_json(tmp_path / "config.json", mm_use_im_start_end=True)
    else:
        tensors["model.embed_tokens.weight"] = torch.zeros(602, 64)
    torch.save(tensors, tmp_path / "mm_projector.bin")
    options = {"base": reference / "vicuna", "vision_tower": reference / "clip"}
    message = r"trained with tokens of its own round images .*; finish both stages in LLaVA"
    refused(tmp_path, tmp_path / "out", message, **options)


def test_transformers_has_no_place_for_them(
    checkpoint: Callable, reference: Path, tmp_path: Path
) -> None:
    source = tmp_path / "llava"
    import_checkpoint(
        reference / "vicuna", tmp_path / "one", vision_tower=reference / "clip", system="llava"
    )
    export_checkpoint(tmp_path / "one", source, layout="llava", vocabulary=603)
    edit_json(source / "config.json", mm_use_im_start_end=True, mm_use_im_patch_token=True)
    import_checkpoint(source, tmp_path / "two")
    with pytest.raises(CheckpointError, match=r"puts no tokens round an image, .*--layout llava$"):
        export_checkpoint(tmp_path / "two", tmp_path / "hf", layout="hf")


@pytest.mark.parametrize(
    ("rows", "files"),
    [(601, {"<im_patch>": PATCH}), (601, {}), (600, {})],
    ids=["in the files", "a row alone", "neither"],
)
def test_a_patch_token_changes_nothing(
    rows: int, files: dict[str, int], checkpoint: Callable, reference: Path
) -> None:
    """LLaVA's default, which no text has."""
    source = marked_source(checkpoint, rows, files=files, mm_use_im_patch_token=True)
    assert inspect_checkpoint(source).problem is None
    assert open_source(source).config.text.vocab_size == rows
    tokenizer = load_processors(source).tokenizer
    prompt = render_prompt("<image>\nWhy?", template=fit_template("v1", tokenizer))
    assert encode_prompt(tokenizer, prompt).tolist() == expected_ids(reference, prompt.text)
