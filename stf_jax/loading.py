"""`load`: a native checkpoint or a PyTorch directory, from disk to devices, leaf by leaf."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from convert import open_source
from stf_jax.checkpoint import CheckpointError, flatten, is_native, place, unflatten
from stf_jax.config import LlavaConfig
from stf_jax.model import Model
from stf_jax.models.llava import Llava
from stf_jax.parallel.sharding import ShardingRules, check_divisible
from stf_jax.processors import extra_files, read_processors
from stf_jax.train.run import is_run, open_model

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
        path: a native checkpoint, the directory of a run of `stf-jax train`, or a PyTorch directory
            in a layout that `stf-jax convert import` reads, told apart by what lies in it; local
            or on gs://.
        dtype: of weights and arithmetic; by default float32 on CPU and bfloat16 elsewhere.
        mesh: from `stf_jax.parallel.sharding.make_mesh`; one device by default.
        vision_tower: a directory with CLIP, for a PyTorch directory that does not lead to one.

    Raises:
        CheckpointError: what is missing, damaged or does not fit, and what to do.
        ValueError: another dtype, or a mesh that does not divide the model.
    """
    if dtype is not None and dtype not in get_args(DTypeName):
        raise ValueError(f"dtype is {dtype!r}; choose float32, float16 or bfloat16")
    path = epath.Path(path)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if is_native(path) or is_run(path):
        if vision_tower is not None:
            raise CheckpointError(f"{path} has its vision tower inside; leave out --vision-tower")
        checkpoint = open_model(path)
        config, files = checkpoint.config, extra_files(checkpoint.extras)
        path = checkpoint.extras / "hf"
        network = _abstract(config, mesh, dtype)
        leaves = checkpoint.restore(nnx.to_pure_dict(nnx.state(network)))
    else:
        source = open_source(path, vision_tower=vision_tower)
        if source.layout == "llama":
            # Its fusion would be new, of random weights.
            raise CheckpointError(
                f"{path} is a language model alone and has not learned to see; import it with "
                f"stf-jax convert import {path} OUT --vision-tower CLIP, and train that"
            )
        config, files = source.config, dict(source.files)
        network = _abstract(config, mesh, dtype)
        wanted = flatten(nnx.to_pure_dict(nnx.state(network)))
        leaves = {leaf.path: place(leaf.read(), wanted[leaf.path]) for leaf in source.leaves()}
    nnx.update(network, unflatten(leaves))
    processors = read_processors(path, files, tokens_per_image=config.tokens_per_image)
    return Model(
        network,
        tokenizer=processors.tokenizer,
        image_processor=processors.image_processor,
        mesh=mesh,
    )


def _abstract(config: LlavaConfig, mesh: Mesh | None, dtype: DTypeName) -> Llava:
    if mesh is None:
        return Llava.abstract(config, dtype=jnp.dtype(dtype))
    check_divisible(config, mesh)
    with jax.set_mesh(mesh):
        return Llava.abstract(config, rules=ShardingRules.default(), dtype=jnp.dtype(dtype))
