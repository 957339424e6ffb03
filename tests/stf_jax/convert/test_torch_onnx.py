"""CLIP's tower as PyTorch exports it to ONNX becomes the tower that was exported."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from stf_jax.convert import open_source
from stf_jax.util.errors import CheckpointError
from tests.stf_jax.convert.refusal import refused

onnx = pytest.importorskip("onnx", reason="the package onnx is not installed (extra onnx)")
pytestmark = pytest.mark.torch


class Tower(torch.nn.Module):
    """As exporters wrap it: the names begin with vision_model."""

    def __init__(self, tower: transformers.CLIPVisionModel):
        super().__init__()
        # transformers 5 has lost a level.
        self.vision_model = getattr(tower, "vision_model", tower)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vision_model(pixel_values=pixels, return_dict=False)[1]


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Tower]:
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        hidden_act=request.param,
        attn_implementation="eager",
    )
    tower = Tower(transformers.CLIPVisionModel(config)).eval()
    for parameter in tower.parameters():
        # The exporter joins tensors that are equal, such as biases of zeros.
        torch.nn.init.normal_(parameter)
    path = tmp_path_factory.mktemp("onnx") / "clip.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It will be replaced, and traces shapes.
        torch.onnx.export(tower, (torch.zeros(1, 3, 28, 28),), path, dynamo=False)
    return path, tower


def quantize(path: Path, out: Path) -> dict[str, np.ndarray]:
    """Replaces a matrix of every linear layer by integers, as onnxruntime does.

    Returns:
        What the integers stand for, [in, out], by the name of the node.
    """
    model = onnx.load(path)
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    values = {}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in stored:
            continue
        name = node.input[1]
        matrix = onnx.numpy_helper.to_array(stored[name])
        low, high = matrix.min(0), matrix.max(0)
        scale = ((high - low) / 255).astype(np.float32)
        zero = np.round(-low / scale).astype(np.uint8)
        integers = np.clip(np.round(matrix / scale) + zero, 0, 255).astype(np.uint8)
        values[node.name] = (integers.astype(np.float32) - zero) * scale
        for ending, array in (("quantized", integers), ("scale", scale), ("zero_point", zero)):
            graph.initializer.append(onnx.numpy_helper.from_array(array, f"{name}_{ending}"))
        node.op_type = "MatMulInteger"
        del node.input[1]
        node.input.extend([f"{name}_quantized", "zero", f"{name}_zero_point"])
        node.name += "_quant"
        graph.initializer.remove(stored[name])
    onnx.save(model, out)
    return values


def test_the_tower_is_the_exported_one(exported: tuple[Path, Tower], reference: Path) -> None:
    path, tower = exported
    source = open_source(reference / "vicuna", vision_tower=path, system="llava")
    vision, config = source.config.vision, tower.vision_model.config
    assert (vision.width, vision.mlp_width, vision.layers, vision.heads) == (48, 80, 3, 4)
    assert (vision.image_size, vision.patch_size, vision.norm_eps) == (28, 7, 1e-5)
    assert vision.activation == config.hidden_act
    names = [name for name in source.tensors if name.startswith("vision_model.")]
    state = tower.state_dict()
    assert {*names} == {name for name in state if "position_ids" not in name}
    for name in names:
        np.testing.assert_array_equal(source.tensors[name].read(), state[name].numpy(), name)
    settings = json.loads(source.files["preprocessor_config.json"].read_text())
    assert settings["crop_size"] == {"height": 28, "width": 28}


def test_integers_are_their_difference_to_the_zero_point_times_the_scale_of_an_output(
    exported: tuple[Path, Tower], reference: Path, tmp_path: Path
) -> None:
    values = quantize(exported[0], tmp_path / "int8.onnx")
    source = open_source(reference / "vicuna", vision_tower=tmp_path / "int8.onnx", system="llava")
    assert len(values) == 3 * 6
    for node, matrix in values.items():
        name = node.removeprefix("/").removesuffix("/MatMul").replace("/", ".") + ".weight"
        np.testing.assert_array_equal(source.tensors[name].read(), matrix.T, name)


def test_other_graphs_and_damaged_files_are_refused_in_one_line(
    exported: tuple[Path, Tower], reference: Path, tmp_path: Path
) -> None:
    other, broken = tmp_path / "other.onnx", tmp_path / "broken.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "other", [], [])), other)
    content = exported[0].read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    messages = {
        other: "other.onnx is ONNX, .* it has no vision_model",
        broken: "broken.onnx is damaged or truncated; download or copy it again",
    }
    for path, message in messages.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            open_source(reference / "vicuna", vision_tower=path)
        assert "\n" not in str(caught.value)
    refused(exported[0], tmp_path / "out", "is a vision tower alone; import a language model")
