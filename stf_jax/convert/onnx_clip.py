"""CLIP's vision tower in an ONNX file, opened as a directory of Hugging Face would be.

PyTorch's exporter keeps the names of transformers: biases and norms have them as tensors, and
linear layers as the nodes that multiply. Their weights are [in, out] there, and may be integers
with a scale and a zero point for each output.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from stf_jax.convert.bundle import Bundle
from stf_jax.convert.dtypes import FLOATS, Array, is_float
from stf_jax.convert.processor import Json, clip_preprocessor, encode_json
from stf_jax.convert.safetensors_file import TensorInfo, check_weights_file
from stf_jax.util.errors import CheckpointError

_FORMAT = "ONNX, a format of graphs"
_PATCHES = "vision_model.embeddings.patch_embedding.weight"
_POSITIONS = "vision_model.embeddings.position_embedding.weight"
_LINEAR = re.compile(r"/((?:vision_model/|visual_projection).*?)/MatMul(?:_quant)?")
_LAYER = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.")
_FIRST = "/vision_model/encoder/layers.0"


def open_onnx_clip(path: epath.Path) -> Bundle:
    """Opens an ONNX file with CLIP's vision tower; integer weights become float32.

    Raises:
        CheckpointError: not whole, another model, or written by another exporter.
    """
    check_weights_file(path)
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise CheckpointError(
            f"{path} is {_FORMAT}; install what reads it: pip install 'stf-jax[onnx]'"
        ) from error
    try:
        graph = _Graph(onnx.load_model_from_string(path.read_bytes()).graph)
    except DecodeError as error:
        raise CheckpointError(
            f"{path} is damaged or truncated; download or copy it again"
        ) from error
    infos, readers = graph.weights()
    try:
        config = _config(graph, infos)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is {_FORMAT}, and {error}; give CLIP's vision tower as PyTorch exports it "
            "from transformers, or the checkpoint that it was made from"
        ) from error
    files = {
        "config.json": encode_json(config),
        "preprocessor_config.json": encode_json(clip_preprocessor(config["image_size"])),
    }
    return Bundle(infos, readers, files)


class _Graph:
    """An ONNX graph by names."""

    def __init__(self, graph: Any):
        self.nodes = list(graph.node)
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {output: node for node in self.nodes for output in node.output}

    def weights(self) -> tuple[dict[str, TensorInfo], dict[str, Callable[[], Array]]]:
        """The tower's tensors under the names of transformers."""
        infos: dict[str, TensorInfo] = {}
        readers: dict[str, Callable[[], Array]] = {}

        def add(name: str, tensor: Any, read: Callable[[], Array], *, turned: bool) -> None:
            shape, dtype = tuple(tensor.dims), _dtype(tensor)
            kept = dtype if is_float(dtype) else FLOATS["float32"]
            infos[name] = TensorInfo(shape[::-1] if turned else shape, kept)
            readers[name] = read

        for name, tensor in self.stored.items():
            if name.startswith("vision_model."):
                add(name, tensor, functools.partial(_read, tensor), turned=False)
        for node in self.nodes:
            match = _LINEAR.fullmatch(node.name)
            if match is None or len(node.input) < 2 or node.input[1] not in self.stored:
                continue
            name, tensor = match[1].replace("/", ".") + ".weight", self.stored[node.input[1]]
            if node.op_type == "MatMul":
                add(name, tensor, functools.partial(_read_turned, tensor), turned=True)
            elif node.op_type == "MatMulInteger" and (scale := self._scale(node)) is not None:
                # Without a zero point there is none.
                zero = self.stored.get(node.input[3]) if len(node.input) > 3 else None
                read = functools.partial(_read_integers, tensor, scale, zero)
                add(name, tensor, read, turned=True)
        return infos, readers

    def _scale(self, node: Any) -> Any:
        """The scales of a product of integers: the product, cast, is multiplied by them."""
        name = node.input[1].removesuffix("_quantized") + "_scale"
        return self.stored.get(name)

    def constant(self, name: str) -> Array | None:
        """A value that the graph holds; None if it is computed."""
        if name in self.stored:
            return _read(self.stored[name])
        maker = self._makers.get(name)
        if maker is None or maker.op_type != "Constant":
            return None
        return next((_read(a.t) for a in maker.attribute if a.name == "value"), None)

    def within(self, module: str, *kinds: str) -> list[Any]:
        """The nodes of a module, of some kinds."""
        return [n for n in self.nodes if n.name.startswith(f"{module}/") and n.op_type in kinds]

    def last_sizes(self, reshape: Any) -> tuple[int, int]:
        """The last two sizes of a reshape's result; (0, 0) where they are computed."""
        shape = self.constant(reshape.input[1])
        if shape is None:
            maker = self._makers.get(reshape.input[1])
            parts = [self.constant(name) for name in maker.input] if maker is not None else []
            shape = np.array([0 if part is None else part.item() for part in parts[-2:]])
        return (int(shape[-2]), int(shape[-1])) if len(shape) > 1 else (0, 0)


def _dtype(tensor: Any) -> np.dtype[Any]:
    from onnx import helper

    return np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))


def _read(tensor: Any) -> Array:
    from onnx import numpy_helper

    result: Array = numpy_helper.to_array(tensor)
    return result


def _read_turned(tensor: Any) -> Array:
    return np.ascontiguousarray(_read(tensor).T)


def _read_integers(tensor: Any, scale: Any, zero: Any) -> Array:
    """(integers - zero point) * scale of each output, as float32 [out, in]."""
    integers = _read(tensor).astype(np.float32)
    if zero is not None:
        integers -= _read(zero).astype(np.float32)
    return np.ascontiguousarray((integers * _read(scale)).T, np.float32)


def _config(graph: _Graph, infos: dict[str, TensorInfo]) -> Json:
    """The config.json of the tower, from its shapes and its graph.

    Raises:
        ValueError: what is missing, in a few words.
    """
    bias = "vision_model.encoder.layers.0.mlp.fc1.bias"
    if missing := [name for name in (_PATCHES, _POSITIONS, bias) if name not in infos]:
        raise ValueError(f"it has no {missing[0]}")
    if len(infos[_PATCHES].shape) != 4:
        raise ValueError(f"its {_PATCHES} has the shape {infos[_PATCHES].shape}")
    width, _, _, patch = infos[_PATCHES].shape
    grid = round((infos[_POSITIONS].shape[0] - 1) ** 0.5)
    reshapes = graph.within(f"{_FIRST}/self_attn", "Reshape")
    heads, head_dim = graph.last_sizes(reshapes[0]) if reshapes else (0, 0)
    if heads == -1 and head_dim > 0:
        heads = width // head_dim
    elif head_dim == -1 and heads > 0:
        head_dim = width // heads
    if heads * head_dim != width:
        raise ValueError("it does not say how many heads its attention has")
    if graph.within(f"{_FIRST}/mlp", "Sigmoid"):
        activation = "quick_gelu"
    elif graph.within(f"{_FIRST}/mlp", "Erf", "Gelu"):
        activation = "gelu"
    else:
        raise ValueError("its activation is neither CLIP's quick GELU nor GELU")
    layers = {int(match[1]) for name in infos if (match := _LAYER.match(name))}
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": infos[bias].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "image_size": grid * patch,
        "patch_size": patch,
        "num_channels": 3,
        "hidden_act": activation,
        "layer_norm_eps": _norm_eps(graph),
        "torch_dtype": infos[_PATCHES].dtype.name,
    }


def _norm_eps(graph: _Graph) -> float:
    """What the norms add to a variance."""
    norm = "/vision_model/pre_layrnorm"
    for node in graph.within(norm, "LayerNormalization"):
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                return float(str(np.float32(attribute.f)))
    for node in graph.within(norm, "Add"):
        for value in map(graph.constant, node.input):
            # The other sum is with the bias.
            if value is not None and value.size == 1:
                return float(str(np.float32(value.item())))
    raise ValueError("it does not say what its norms add to a variance")
