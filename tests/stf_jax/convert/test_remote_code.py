"""What transformers computes from an exported directory alone: our answers, token by token."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import stf_jax
from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.convert import export_checkpoint, import_checkpoint, open_source
from stf_jax.convert.remote_code import compact
from stf_jax.data.conversation import PromptText
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.prompts import make_prompt, pad_prompts, read_pixels
from stf_jax.models.marks import Marks
from stf_jax.systems import SYSTEMS
from stf_jax.systems.base import LlavaConfig, System
from stf_jax.util.errors import CheckpointError
from tests.stf_jax.convert.conftest import read_all, write_file

pytestmark = pytest.mark.torch

PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: <image>\n{} ASSISTANT:"
)
QUESTIONS = ("What is this?", "Which color has it, and how many are there?")
NEW = 6
TRAINED = "trained"
# Every system that acts before the language model, in every form that has arithmetic of its own.
FORMS: Mapping[str, Mapping[str, Any]] = {
    "llava": {},
    "average": {},
    "random": {},
    "downsample": {},
    "m3": {},
    "prumerge": {"ratio": 0.25, "neighbors": 3, "order": "raster"},
    # Of these patches some are kept for their scores and for their places.
    "prumerge-plus": {"ratio": 1 / 3, "plus": True},
    "vistog": {},
    "vistog-full": {"grouping": "full"},
    "vqtoken": {},
    "vqtoken-codebook": {"output": "codebook"},
    "vqtoken-whole": {"images": "whole"},
    "quecc": {"stride": 2},
}
LAYERS = 3

# Nothing of this project can be imported there, and nothing that only this project needs.
SCRIPT = """
import json, sys
sys.modules |= dict.fromkeys(["stf_jax", "jax", "flax", "orbax", "etils", "grain", "ml_dtypes"])
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AttentionInterface, AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

torch.set_num_threads(1)
prompts, images, new, chat, cases, served, *folders = json.loads(sys.argv[1])
images = [Image.open(image) for image in images]


def answer(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    processor.tokenizer.padding_side = "left"
    inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
    asked = {name: array for name, array in inputs.items() if name.startswith("question_")}
    out = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    features = model.get_image_features(inputs["pixel_values"], **asked).pooler_output
    # Whoever calls the model by itself has the logits of `generate`.
    logits = model(**inputs).logits
    start = inputs["input_ids"].shape[1]
    return {
        "prompts": [row[mask > 0].tolist() for row, mask in
                    zip(inputs["input_ids"], inputs["attention_mask"])],
        "answers": out[:, start:].tolist(),
        "first": logits[:, -1].argmax(dim=-1).tolist(),
        "image_token": model.config.image_token_id,
        "features": torch.stack(features).tolist(),
        "counted": list(processor._get_num_multimodal_tokens(image_sizes=[[30, 40]])
                        .num_image_tokens),
    }


def talk(folder):
    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    content = [{"type": "image", "image": images[0]}, {"type": "text", "text": chat}]
    said = pipe(text=[{"role": "user", "content": content}], max_new_tokens=new, do_sample=False,
                return_full_text=False)
    module = sys.modules[type(pipe.processor).__module__]
    asked = [module.find_question(prompt, pipe.processor.image_token) for prompt in cases]
    return {"answer": said[0]["generated_text"], "questions": asked}


def serve(folder):
    '''What vLLM does with a model that it runs through transformers, step by step.'''
    reached = []

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        reached.append([type(module).__name__, kwargs.get("attention_instances")])
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling,
                                      is_causal=True)

    AttentionInterface.register("vllm", attend)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.get_text_config()._attn_implementation = "vllm"
    with torch.device("meta"):
        empty = AutoModel.from_config(config, trust_remote_code=True)
    base = AutoModel.from_config(config, trust_remote_code=True).eval()
    weights = {name.removeprefix("model."): array
               for name, array in load_file(folder + "/model.safetensors").items()}
    head = weights.pop("lm_head.weight")
    base.load_state_dict(weights)

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    dummy = processor(text=processor.image_token, images=images[:1],
                      return_text_replacement_offsets=True, return_tensors="pt")
    counts = processor._get_num_multimodal_tokens(image_sizes=[(10_000, 10_000)])
    inputs = processor(text=prompts[:1], images=images[:1], return_mm_token_type_ids=True,
                       return_tensors="pt")
    ids, marks = inputs["input_ids"], inputs["mm_token_type_ids"] == 1
    features = base.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    embeds = base.get_input_embeddings()(ids.masked_fill(marks, 0))
    embeds = embeds.masked_scatter(marks[..., None], torch.cat(features))
    hidden = base(input_ids=None, inputs_embeds=embeds, use_cache=False, return_dict=False,
                  position_ids=torch.arange(ids.shape[1])[None], attention_instances="given")[0]
    return {
        "auto_map": sorted(config.auto_map),
        "compatible": type(base).is_backend_compatible(),
        "on_meta": {parameter.device.type for parameter in empty.parameters()} == {"meta"},
        "encoder": base.get_encoder(modality="image") is base.vision_tower,
        "decoder": base.get_decoder() is base.language_model,
        "attention": reached,
        "layers": config.get_text_config().num_hidden_layers,
        "ids": [processor.image_token_id, config.image_token_id],
        "marked": int(marks.sum()),
        "counted": [counts["num_image_tokens"], counts["num_image_patches"]],
        "replaced": [entry["replacement"].count(processor.image_token)
                     for entry in dummy["text_replacement_offsets"][0]],
        "first": int((hidden[0, -1] @ head.T).argmax()),
    }


with torch.inference_mode():
    print(json.dumps({
        "answers": {folder: answer(folder) for folder in folders},
        "chat": talk(served[0]),
        "vllm": serve(served[1]),
    }))
"""


@pytest.fixture(scope="module")
def tower(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's CLIP with fewer layers."""
    out = tmp_path_factory.mktemp("clip")
    for file in (reference / "clip").glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    hf = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**hf, "num_hidden_layers": LAYERS}))
    kept = {
        name: array
        for name, array in read_all(reference / "clip").items()
        if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < LAYERS
    }
    write_file(out / "model.safetensors", kept)
    return out


def original(name: str, reference: Path, tower: Path) -> tuple[Path, dict[str, Any]]:
    """What a model is imported from, and the options."""
    if name == TRAINED:
        return reference / "llava-stf", {}
    system = name.partition("-")[0]
    options = {"vision_tower": tower, "system": system, "fields": FORMS[name]}
    return reference / "vicuna", options


def question_cases(reference: Path) -> list[dict[str, Any]]:
    """Prompts with images, and the question of each image, as QueCC's own code finds it."""
    content = json.loads((reference / "systems" / "quecc" / "case.json").read_text())
    return [case for case in content["query_cases"] if "<image>" in case["prompt"]]


@pytest.fixture(scope="module")
def folders(
    reference: Path, tower: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The published model, and new ones of every form, each with `-native` beside it."""
    root = tmp_path_factory.mktemp("code")
    for name in (TRAINED, *FORMS):
        source, options = original(name, reference, tower)
        import_checkpoint(source, root / f"{name}-native", **options)
        export_checkpoint(root / f"{name}-native", root / name, layout="hf-code")
    return {name: root / name for name in (TRAINED, *FORMS)}


@pytest.fixture(scope="module")
def found(
    folders: dict[str, Path], reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Any]:
    """What transformers makes of all of them, in one process."""
    home = tmp_path_factory.mktemp("home")
    images = [str(reference / "images" / f"{number}.png") for number in range(len(QUESTIONS))]
    prompts = [PROMPT.format(question) for question in QUESTIONS]
    served = [str(folders["quecc"]), str(folders[TRAINED])]
    cases = [case["prompt"] for case in question_cases(reference)]
    arguments = [prompts, images, NEW, QUESTIONS[0], cases, served, *map(str, folders.values())]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        cwd=home,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# One function each, so that systems share what is compiled: most have one tower, all one decoder.
see = jax.jit(lambda vision, pixels, extra: vision(pixels, extra))
ask = jax.jit(lambda network, batch: network._read_questions(batch))
connect = jax.jit(
    lambda connector, features, question: (
        connector.join(connector(features, question), rows=len(QUESTIONS)).values
    )
)
embed = jax.jit(lambda text, ids: text.embed(ids))
decode = jax.jit(lambda text, x, marks: text.logits(text(x, marks=marks)))


def test_the_same_answers_without_this_project(
    folders: dict[str, Path], found: Mapping[str, Any], reference: Path
) -> None:
    for name, folder in folders.items():
        model = stf_jax.load(folder.with_name(f"{name}-native"))
        network, theirs = model.network, found["answers"][str(folder)]
        prompts, answers = [], []
        for number, question in enumerate(QUESTIONS):
            image = reference / "images" / f"{number}.png"
            prompt = make_prompt(
                PromptText(text=PROMPT.format(question)),
                read_pixels([image], model.image_processor, upright=False),
                tokenizer=model.tokenizer,
                tokens_per_image=model.config.tokens_per_image,
                question_length=model.config.question_length,
            )
            ids = np.where(prompt.ids == IMAGE_TOKEN_ID, theirs["image_token"], prompt.ids)
            assert theirs["prompts"][number] == ids.tolist(), name
            row, ends = theirs["answers"][number], model.config.text.eos_ids
            stop = next((place for place, token in enumerate(row) if token in ends), NEW)
            answers.append(row[: stop + 1])
            ids = np.append(prompt.ids, answers[-1]).astype(np.int32)
            prompts.append(dataclasses.replace(prompt, ids=ids))
        batch = pad_prompts(prompts, rows=len(prompts), image_size=model.config.image_size)
        features = see(network.vision, batch.pixels[:, 0], network.connector.extra_tokens())
        question = ask(network, batch) if model.config.question_length else None
        tokens = np.asarray(connect(network.connector, features, question))
        np.testing.assert_allclose(tokens, theirs["features"], atol=2e-5, err_msg=name)
        x = np.array(embed(network.text, batch.ids))
        x[batch.image_slots >= 0] = tokens.reshape(-1, tokens.shape[-1])
        marks = Marks.text(batch.positions, batch.segments)
        logits = np.asarray(decode(network.text, x, marks))
        for number, answer in enumerate(answers):
            # What our decoder says after each of its tokens is the next one.
            start = len(prompts[number].ids) - len(answer) - 1
            ours = logits[number, start : start + len(answer)].argmax(axis=-1)
            assert ours.tolist() == answer, name
        assert theirs["first"] == [answer[0] for answer in answers], name
        assert theirs["counted"] == [model.config.tokens_per_image], name


def test_a_pipeline_says_the_same(folders: dict[str, Path], found: Mapping[str, Any]) -> None:
    folder = folders["quecc"]
    tokenizer = stf_jax.load(folder.with_name("quecc-native")).tokenizer
    (answer, _) = found["answers"][str(folder)]["answers"]
    assert found["chat"]["answer"].strip() == tokenizer.decode(answer).strip() != ""


def test_questions_are_what_quecc_itself_finds(found: Mapping[str, Any], reference: Path) -> None:
    expected = [case["texts"] for case in question_cases(reference)]
    for question, texts in zip(found["chat"]["questions"], expected, strict=True):
        assert [question] * len(texts) == texts


def test_everything_that_vllm_asks_of_a_custom_model(
    folders: dict[str, Path], found: Mapping[str, Any]
) -> None:
    """The points of docs/converting.md, in their order."""
    asked, theirs = found["vllm"], found["answers"][str(folders[TRAINED])]
    tokens = open_source(folders[TRAINED]).config.tokens_per_image
    assert {"AutoConfig", "AutoModel"} <= set(asked["auto_map"])
    assert asked["compatible"]
    assert asked["on_meta"]
    assert asked["encoder"]
    assert asked["decoder"]
    # Every layer of the language model, and no other attention.
    assert asked["attention"] == [["LlamaAttention", "given"]] * asked["layers"]
    assert asked["ids"] == [theirs["image_token"]] * 2
    assert asked["counted"] == [[tokens], [1]]
    assert asked["marked"] == tokens
    assert asked["replaced"] == [tokens]
    assert asked["first"] == theirs["first"][0]


def test_it_comes_back_as_it_went_out(
    folders: dict[str, Path], reference: Path, tower: Path
) -> None:
    for name, folder in folders.items():
        source, options = original(name, reference, tower)
        before, after = open_source(source, **options), open_source(folder)
        assert after.config.system == before.config.system, name
        leaves = {leaf.path: leaf for leaf in after.leaves()}
        for leaf in before.leaves():
            array = leaf.read()
            # The embedding has rows for <image> and <pad> now.
            rows = tuple(slice(size) for size in array.shape)
            assert leaves.pop(leaf.path).read()[rows].tobytes() == array.tobytes(), leaf.path
        assert not leaves, name


def test_a_directory_holds_the_code_that_it_needs(folders: dict[str, Path]) -> None:
    shared = {"configuration", "base", "connector", "modeling", "processing"}
    for name, folder in folders.items():
        files = {file.name.removesuffix("_compact_llava.py") for file in folder.glob("*.py")}
        assert files == (shared | {"processing_question"} if name == "quecc" else shared), name


def test_a_system_without_code_is_refused(reference: Path, tower: Path, tmp_path: Path) -> None:
    native, out = tmp_path / "native", tmp_path / "out"
    import_checkpoint(reference / "vicuna", native, vision_tower=tower, system="prumerge")
    with pytest.raises(CheckpointError, match=r"no code .* --field ratio=0\.125$"):
        export_checkpoint(native, out, layout="hf-code")
    assert not out.exists()


def test_every_refusal_names_what_to_do() -> None:
    vision, text = VisionConfig.tiny(), TextConfig.tiny()

    def refusal(system: System) -> str:
        with pytest.raises(CheckpointError) as caught:
            compact(LlavaConfig(vision=vision, text=text, system=system))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    before = {"llava", "stf", *(name.partition("-")[0] for name in FORMS)}
    for name in SYSTEMS.keys() - before:
        system = SYSTEMS[name].for_model(vision=vision, text=text)
        message = refusal(system)
        assert "inside the language model" in message, name
        assert message.endswith(f"--layout {system.layout}"), name

    def make(name: str, **fields: Any) -> System:
        return dataclasses.replace(SYSTEMS[name].for_model(vision=vision, text=text), **fields)

    ratio = refusal(make("prumerge", plus=True)).rpartition("=")[2]
    fixed = make("prumerge", plus=True, ratio=float(ratio))
    assert compact(LlavaConfig(vision=vision, text=text, system=fixed))["places"]
    once = dataclasses.replace(fixed, repeats=False)
    assert refusal(once).endswith("--field repeats=true")
    clips = make("vqtoken", adaptive=True, clusters=4, least=2)
    assert refusal(clips).endswith("--field adaptive=false")
    # Images that pass through whole do not ask for clusters.
    whole = dataclasses.replace(clips, images="whole")
    compact(LlavaConfig(vision=vision, text=text, system=whole))
