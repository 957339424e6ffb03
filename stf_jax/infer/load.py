"""`load`: a native checkpoint or a PyTorch directory, from disk to devices, leaf by leaf."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from stf_jax.convert.stored_model import open_any
from stf_jax.infer.model import Model
from stf_jax.models.cache import CacheDType
from stf_jax.models.llava import Llava
from stf_jax.models.lora import LoRAConfig
from stf_jax.parallel.sharding import ShardingRules
from stf_jax.systems.base import LlavaConfig, System
from stf_jax.systems.mesh import check_divisible

DTypeName = Literal["float32", "float16", "bfloat16"]


def load(
    path: epath.PathLike,
    *,
    dtype: DTypeName | None = None,
    mesh: Mesh | None = None,
    vision_tower: epath.PathLike | None = None,
    cache_dtype: CacheDType | None = None,
    system: str | System | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Model:
    """Loads a model to answer questions with.

    Args:
        path: a native checkpoint, the directory of a run of `stf-jax train`, or a PyTorch directory
            in a layout that `stf-jax convert import` reads, recognized by what lies in it; local
            or on gs://.
        dtype: of weights and arithmetic; by default float32 on CPU and bfloat16 elsewhere.
        mesh: from `stf_jax.parallel.sharding.make_mesh`; one device by default.
        vision_tower: a directory with CLIP, for a PyTorch directory that does not lead to one.
        cache_dtype: how keys and values are kept while answering; by default as they are computed.
        system: another one over the same weights: a name, such as "prumerge" over LLaVA-1.5's, with
            its published fields; or a whole system.
        fields: of that system, where they are to be otherwise: {"ratio": 0.125}.

    Raises:
        CheckpointError: what is missing, damaged or does not fit, and what to do.
        ValueError: another dtype, float16 on CPU, or a mesh that does not divide the model.
    """
    if dtype is not None and dtype not in get_args(DTypeName):
        raise ValueError(f"dtype is {dtype!r}; choose float32, float16 or bfloat16")
    if cache_dtype is not None and cache_dtype not in get_args(CacheDType):
        raise ValueError(f"cache_dtype is {cache_dtype!r}; choose bfloat16 or int8")
    if dtype == "float16" and jax.default_backend() == "cpu":
        # XLA has no attention of float16 for it.
        raise ValueError("float16 does not run on CPU; choose float32 or bfloat16")
    opened = open_any(path, vision_tower=vision_tower, system=system, fields=fields)
    opened.check_trained()
    processors = opened.processors()
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    config = _stop_at(opened.config, processors.tokenizer.eos_id)
    network = _abstract(config, mesh, dtype, opened.adapters)
    nnx.update(network, opened.restore(nnx.to_pure_dict(nnx.state(network))))
    return Model(
        network,
        tokenizer=processors.tokenizer,
        image_processor=processors.image_processor,
        mesh=mesh,
        cache_dtype=cache_dtype,
    )


def _stop_at(config: LlavaConfig, eos_id: int) -> LlavaConfig:
    """Stops at the tokenizer's own end of text, too, which is what training teaches."""
    eos_ids = config.text.eos_ids
    if eos_id in eos_ids:
        return config
    text = dataclasses.replace(config.text, eos_ids=(*eos_ids, eos_id))
    return dataclasses.replace(config, text=text)


def _abstract(
    config: LlavaConfig, mesh: Mesh | None, dtype: DTypeName, adapters: LoRAConfig | None
) -> Llava:
    make = partial(Llava.abstract, config, dtype=jnp.dtype(dtype), lora=adapters)
    if mesh is None:
        return make()
    check_divisible(config, mesh)
    with jax.set_mesh(mesh):
        return make(rules=ShardingRules.default())
