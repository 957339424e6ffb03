"""LLaVA-STF in JAX: training and running vision-language models with compact vision tokens.

import stf_jax

model = stf_jax.load("path/to/model")
(answer,) = model.generate([stf_jax.Request(prompt="What is this?", images=["cat.jpg"])])
answer.text
"""

import importlib.metadata

from stf_jax.infer.answers import Answer
from stf_jax.infer.sampling import Sampling
from stf_jax.loading import load
from stf_jax.model import Model, Request

__all__ = ["Answer", "Model", "Request", "Sampling", "load"]
__version__ = importlib.metadata.version("stf-jax")
