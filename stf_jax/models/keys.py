"""Random keys of a training step: what a model's noise and dropout are drawn with."""

from flax import nnx
from jaxtyping import Array


class StepKey(nnx.Variable[Array]):
    """A random key, given anew at each step; no parameter."""
