"""LLaVA-STF in JAX: training and running vision-language models with compact vision tokens.

import stf_jax

model = stf_jax.load("path/to/model")
(answer,) = model.generate([stf_jax.Request(prompt="What is this?", images=["cat.jpg"])])
answer.text
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stf_jax.data.clips import FrameSampling
    from stf_jax.data.images import ImageError
    from stf_jax.eval.evaluate import evaluate
    from stf_jax.infer.answers import Answer
    from stf_jax.infer.chat import Chat
    from stf_jax.infer.image_cache import ImageCache
    from stf_jax.infer.load import load
    from stf_jax.infer.model import Model, Request
    from stf_jax.infer.sampling import Sampling
    from stf_jax.parallel.sharding import make_mesh
    from stf_jax.train.config import TrainConfig
    from stf_jax.util.errors import CheckpointError, DeviceMemoryError

__all__ = [
    "Answer",
    "Chat",
    "CheckpointError",
    "DeviceMemoryError",
    "FrameSampling",
    "ImageCache",
    "ImageError",
    "Model",
    "Request",
    "Sampling",
    "TrainConfig",
    "evaluate",
    "load",
    "make_mesh",
    "train",
]
__version__ = importlib.metadata.version("stf-jax")

# Imported when first used, so that `stf-jax --help` need not wait for jax.
_HOMES = {
    "Answer": "stf_jax.infer.answers",
    "Chat": "stf_jax.infer.chat",
    "CheckpointError": "stf_jax.util.errors",
    "DeviceMemoryError": "stf_jax.util.errors",
    "FrameSampling": "stf_jax.data.clips",
    "ImageCache": "stf_jax.infer.image_cache",
    "ImageError": "stf_jax.data.images",
    "Model": "stf_jax.infer.model",
    "Request": "stf_jax.infer.model",
    "Sampling": "stf_jax.infer.sampling",
    "TrainConfig": "stf_jax.train.config",
    "evaluate": "stf_jax.eval.evaluate",
    "load": "stf_jax.infer.load",
    "make_mesh": "stf_jax.parallel.sharding",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "train":
        # A package that can be called.
        return importlib.import_module("stf_jax.train")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
