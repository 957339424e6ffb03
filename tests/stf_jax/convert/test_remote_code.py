"""What transformers computes from an exported directory alone: our answers, token by token."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import stf_jax
from stf_jax.convert import export_checkpoint, import_checkpoint, open_source
from stf_jax.store.checkpoint import open_native
from stf_jax.util.errors import CheckpointError

pytestmark = pytest.mark.torch

PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: <image>\n{} ASSISTANT:"
)
QUESTIONS = ("What is this?", "Which color has it, and how many are there?")
NEW = 8

# Nothing of this project can be imported there.
SCRIPT = """
import json, sys
sys.modules["stf_jax"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

prompt, questions, images, new = json.loads(sys.argv[1])
answers = {}
for folder in sys.argv[2:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    processor.tokenizer.padding_side = "left"
    inputs = processor(
        text=[prompt.format(question) for question in questions],
        images=[Image.open(image) for image in images],
        padding=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        out = model.eval().generate(**inputs, max_new_tokens=new, do_sample=False)
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
    counts = processor._get_num_multimodal_tokens(image_sizes=[[30, 40]])
    answers[folder] = {
        "ids": out[:, inputs["input_ids"].shape[1]:].tolist(),
        "tokens": len(features[0]),
        "counted": list(counts.num_image_tokens),
        "backend": bool(model._supports_attention_backend),
    }
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def folders(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The published model, and new ones of every system that the code computes."""
    root, made = tmp_path_factory.mktemp("code"), {}
    for name in ("trained", "average", "random", "m3"):
        native, out = root / f"{name}-native", root / name
        if name == "trained":
            import_checkpoint(reference / "llava-stf", native)
        else:
            tower = reference / "clip"
            import_checkpoint(reference / "vicuna", native, vision_tower=tower, system=name)
        export_checkpoint(native, out, layout="hf-code")
        made[name] = out
    return made


def test_the_same_answers_without_this_project(
    folders: dict[str, Path], reference: Path, tmp_path: Path
) -> None:
    images = [str(reference / "images" / f"{number}.png") for number in range(len(QUESTIONS))]
    arguments = json.dumps([PROMPT, QUESTIONS, images, NEW])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, arguments, *map(str, folders.values())],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    for name, folder in folders.items():
        model = stf_jax.load(folder.with_name(f"{name}-native"))
        requests = [
            stf_jax.Request(prompt=question, images=[image])
            for question, image in zip(QUESTIONS, images, strict=True)
        ]
        expected = [a.token_ids for a in model.generate(requests, max_new_tokens=NEW)]
        found = answers[str(folder)]
        ids = [row[: len(wanted)] for row, wanted in zip(found["ids"], expected, strict=True)]
        assert ids == expected, name
        assert found["tokens"] == model.config.tokens_per_image
        assert found["counted"] == [model.config.tokens_per_image]
        assert found["backend"]


def test_it_comes_back_as_it_went_out(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        opened, native = open_source(folder), open_native(folder.with_name(f"{name}-native"))
        assert opened.config.system == native.config.system, name
        for leaf in opened.leaves():
            stored = native.read(leaf.path)
            # The embedding has rows for <image> and <pad> now.
            rows = tuple(slice(size) for size in stored.shape)
            assert (leaf.read()[rows] == stored).all(), leaf.path


def test_a_system_without_code_is_refused(reference: Path, tmp_path: Path) -> None:
    tower = reference / "clip"
    native = tmp_path / "native"
    import_checkpoint(reference / "vicuna", native, vision_tower=tower, system="prumerge")
    with pytest.raises(CheckpointError, match=r"no code for this system \(prumerge; .*--layout"):
        export_checkpoint(native, tmp_path / "out", layout="hf-code")
    assert not (tmp_path / "out").exists()
