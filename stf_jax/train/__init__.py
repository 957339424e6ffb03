"""Training: a step, the run around it, and its checkpoints.

`stf_jax.train(config)` is `stf_jax.train.loop.train`: the package is what it is named after.
"""

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stf_jax.train.config import TrainConfig


class _Train(types.ModuleType):
    """A package that can be called: a function of its name would be hidden by an import of it."""

    def __call__(self, config: "TrainConfig") -> Any:
        """See `stf_jax.train.loop.train`."""
        from stf_jax.train.loop import train

        return train(config)


sys.modules[__name__].__class__ = _Train
