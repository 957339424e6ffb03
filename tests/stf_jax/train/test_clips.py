"""A system that joins frames trains on clips: what the data makes is what the step takes."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from PIL import Image

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.data.builder import build
from stf_jax.data.clips import FrameSampling
from stf_jax.data.config import DataConfig, DatasetSource
from stf_jax.data.images import ImageProcessor
from stf_jax.data.pipeline import TrainingData
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.store.arrays import flatten
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.vqtoken import VQToken
from stf_jax.train.config import TrainConfig
from stf_jax.train.optimizer import split_trained
from stf_jax.train.program import make_program
from stf_jax.train.step import init_state
from tests.stf_jax.systems.conftest import build as build_model


def write_examples(folder: Path) -> Path:
    """Clips of two and three frames, as folders, and an image."""
    entries = []
    for name, count in (("a", 2), ("b", 3)):
        (folder / name).mkdir()
        for number in range(count):
            shade = np.full((30, 40, 3), 60 * number + count, np.uint8)
            Image.fromarray(shade).save(folder / name / f"{number}.png")
        entries.append({"id": name, "video": name})
    entries.append({"id": "image", "image": "a/0.png"})
    for entry in entries:
        marker = "<video>" if "video" in entry else "<image>"
        entry["conversations"] = [
            {"from": "human", "value": f"{marker}\nWhat?"},
            {"from": "gpt", "value": f"This is {entry['id']}."},
        ]
    path = folder / "train.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def test_a_step_takes_what_the_data_makes(reference: Path, tmp_path: Path) -> None:
    """Shapes are those that the step was compiled for; the loss falls on the clips."""
    tokenizer = load_tokenizer(reference / "vicuna")
    text = dataclasses.replace(TextConfig.tiny(), vocab_size=tokenizer.vocab_size)
    vision = VisionConfig.tiny()
    system = dataclasses.replace(VQToken.for_model(vision=vision, text=text), images="whole")
    model = LlavaConfig(vision=vision, text=text, system=system)
    size = model.image_size
    processor = ImageProcessor(image_size=size, shortest_edge=size)
    build(
        [write_examples(tmp_path)],
        tmp_path / "dataset",
        images=tmp_path,
        tokenizer=tokenizer,
        sampling=FrameSampling(frames=3),
        workers=0,
    )
    config = TrainConfig(
        model="none",
        out="nowhere",
        stage="finetune",
        dtype="float32",
        data=DataConfig(
            datasets=(DatasetSource(path=os.fspath(tmp_path / "dataset")),),
            sequence_length=512,
            batch_size=1,
            images_per_row=7,
            clip_frames=3,
            workers=0,
        ),
    )
    data = TrainingData(
        config.data,
        tokenizer=tokenizer,
        image_processor=processor,
        tokens_per_image=model.tokens_per_image,
        layout=model.clip_layout(config.data.clip_frames),
    )
    program = make_program(config, model, steps=8, mesh=None, image_processor=processor)
    (step,) = data.batches(stop_step=1)
    # Both clips and the image in one row.
    assert sorted(step.example_ids[0]) == ["a", "b", "image"]
    batch = program.layout.place(step.batch)
    jax.tree.map(
        lambda like, array: np.testing.assert_equal(array.shape, like.shape), program.batch, batch
    )
    parameters = flatten(nnx.to_pure_dict(nnx.state(build_model(model, seed=3), nnx.Param)))
    trained, frozen = split_trained(parameters, config.stage)
    state = init_state(trained, program.optimizer)
    losses = []
    for _ in range(8):
        state, metrics = program.step(state, frozen, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0]
