"""`load`: a native checkpoint or a PyTorch directory, from disk to devices, leaf by leaf."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from convert import open_source
from stf_jax.checkpoint import CheckpointError, flatten, is_native, open_native, unflatten
from stf_jax.config import LlavaConfig
from stf_jax.data.images import ImageProcessor
from stf_jax.data.tokenizer import Tokenizer, load_tokenizer
from stf_jax.model import Model
from stf_jax.models.llava import Llava
from stf_jax.parallel.sharding import ShardingRules, check_divisible

DTypeName = Literal["float32", "float16", "bfloat16"]


def load(
    path: epath.PathLike,
    *,
    dtype: DTypeName | None = None,
    mesh: Mesh | None = None,
    vision_tower: epath.PathLike | None = None,
) -> Model:
    """Loads a model to answer questions with.

    Args:
        path: a native checkpoint, or a PyTorch directory in a layout that `stf-jax convert import`
            reads, told apart by what lies in it; local or on gs://.
        dtype: of weights and arithmetic; by default float32 on CPU and bfloat16 elsewhere.
        mesh: from `stf_jax.parallel.sharding.make_mesh`; one device by default.
        vision_tower: a directory with CLIP, for a PyTorch directory that does not lead to one.

    Raises:
        CheckpointError: what is missing, damaged or does not fit, and what to do.
        ValueError: a mesh that does not divide the model.
    """
    path = epath.Path(path)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if is_native(path):
        if vision_tower is not None:
            raise CheckpointError(f"{path} has its vision tower inside; leave out --vision-tower")
        checkpoint = open_native(path)
        files = {file.name: file for file in (path / "hf").iterdir() if file.is_file()}
        network = _abstract(checkpoint.config, mesh, dtype)
        leaves = checkpoint.restore(nnx.to_pure_dict(nnx.state(network)))
    else:
        source = open_source(path, vision_tower=vision_tower)
        files = dict(source.files)
        network = _abstract(source.config, mesh, dtype)
        wanted = flatten(nnx.to_pure_dict(nnx.state(network)))
        leaves = {leaf.path: _placed(leaf.read(), wanted[leaf.path]) for leaf in source.leaves()}
    nnx.update(network, unflatten(leaves))
    tokenizer = _tokenizer(path, files)
    return Model(
        network, tokenizer=tokenizer, image_processor=_image_processor(path, files), mesh=mesh
    )


def _abstract(config: LlavaConfig, mesh: Mesh | None, dtype: DTypeName) -> Llava:
    if mesh is None:
        return Llava.abstract(config, dtype=jnp.dtype(dtype))
    check_divisible(config, mesh)
    with jax.set_mesh(mesh):
        return Llava.abstract(config, rules=ShardingRules.default(), dtype=jnp.dtype(dtype))


def _placed(array: np.ndarray[Any, Any], like: jax.ShapeDtypeStruct) -> jax.Array:
    """Casts and puts a host array where it belongs; each device gets its own part only."""
    array = array.astype(like.dtype, copy=False)
    if like.sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, like.sharding, lambda part: array[part])


def _tokenizer(path: epath.Path, files: Mapping[str, epath.Path]) -> Tokenizer:
    with _local(files, lambda name: "token" in name) as directory:
        try:
            return load_tokenizer(directory)
        except ValueError as error:
            raise CheckpointError(str(error).replace(str(directory), str(path))) from error


def _image_processor(path: epath.Path, files: Mapping[str, epath.Path]) -> ImageProcessor:
    """As LLaVA's second stage and its evaluation: padded, unless the config says otherwise."""
    if "preprocessor_config.json" not in files:
        raise CheckpointError(
            f"{path} has no preprocessor_config.json; copy it there from the vision tower"
        )
    config = json.loads(files["config.json"].read_text())
    ratio = config.get("image_aspect_ratio", "pad")
    if ratio not in ("pad", "square", None):
        raise CheckpointError(
            f"{path} was trained with image_aspect_ratio {ratio!r}; supported: 'pad', 'square'"
        )
    processor = json.loads(files["preprocessor_config.json"].read_text())
    return ImageProcessor.from_hf(processor, mode="pad" if ratio == "pad" else "crop")


@contextlib.contextmanager
def _local(files: Mapping[str, epath.Path], wanted: Any) -> Iterator[Path]:
    """A local directory with the wanted files: transformers cannot read gs://."""
    with tempfile.TemporaryDirectory() as directory:
        for name, file in files.items():
            if wanted(name):
                file.copy(Path(directory, name), overwrite=True)
        yield Path(directory)
