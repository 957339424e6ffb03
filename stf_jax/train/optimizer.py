"""AdamW with LLaVA's schedule: which parameters train in which stage, and how fast.

Recipe of LLaVA-1.5 (arXiv 2310.03744, table 9) as LLaVA-STF uses it.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array

from stf_jax.models.lora import is_adapter

Stage = Literal["pretrain", "finetune", "lora"]

# What the language model has in every system.
LLAMA = ("text/embedding", "text/layers/", "text/norm/", "text/head/")

# Every parameter by its path in the model: "text/layers/mlp/up/kernel".
Parameters = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, a linear warm-up, then a cosine to zero. Defaults: stage 2.

    Attributes:
        learning_rate: the peak for all that lies in the language model.
        projector_learning_rate: the peak for the connector, where it is another one.
        warmup_ratio: of all steps, rounded up.
        clip_norm: of the gradient over all parameters; None does not clip.
        weight_decay: of all but biases and the scales of norms, which are never decayed.
        moments_dtype: of the first moment; bfloat16 halves its memory.
    """

    learning_rate: float = 2e-5
    projector_learning_rate: float | None = None
    warmup_ratio: float = 0.03
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    moments_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        least = ("learning_rate", "projector_learning_rate", "weight_decay", "epsilon")
        for name in least:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it must be 0 or more, and finite")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 or more, below 1")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}; give 0 or more, below 1")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; give more than 0, or null for none")

    @property
    def peaks(self) -> dict[str, float]:
        """The peak for the language model, and that for the connector."""
        rate, projector = self.learning_rate, self.projector_learning_rate
        return {"text": rate, "projector": rate if projector is None else projector}


def split_trained(parameters: Parameters, stage: Stage) -> tuple[Parameters, Parameters]:
    """The parameters that a stage trains, and those that it leaves alone.

    Every stage trains the connector and what else a system adds, and none the vision tower; of the
    language model "finetune" trains all, "lora" the adapters only.
    """

    def is_trained(path: str) -> bool:
        return (
            path.startswith("connector/")
            or (path.startswith("text/") and not path.startswith(LLAMA))
            or (stage == "finetune" and path.startswith("text/"))
            or (stage == "lora" and is_adapter(path))
        )

    trained = {path: leaf for path, leaf in parameters.items() if is_trained(path)}
    return trained, {path: leaf for path, leaf in parameters.items() if path not in trained}


def schedule(peak: float, *, steps: int, warmup_ratio: float) -> optax.Schedule:
    """Learning rate of each step from 0: linear from zero to the peak, then a cosine to zero.

    A run of a single step has no warm-up, which would have it train at a rate of zero.
    """
    warmup = math.ceil(warmup_ratio * steps) if steps > 1 else 0
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0, peak_value=peak, warmup_steps=warmup, decay_steps=max(steps, warmup + 1)
    )


def make_optimizer(config: OptimizerConfig, *, steps: int) -> optax.GradientTransformation:
    """For the trained parameters by path; `steps` is the length of the whole run."""
    rates = {
        group: optax.scale_by_learning_rate(
            schedule(peak, steps=steps, warmup_ratio=config.warmup_ratio)
        )
        for group, peak in config.peaks.items()
    }
    clip = optax.identity()
    if config.clip_norm is not None:
        clip = optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip,
        optax.scale_by_adam(
            config.beta1, config.beta2, config.epsilon, mu_dtype=jnp.dtype(config.moments_dtype)
        ),
        optax.add_decayed_weights(config.weight_decay, mask=_is_decayed),
        optax.partition(rates, _group),
    )


def _group(parameters: Parameters) -> dict[str, str]:
    """The learning rate's group of each parameter."""
    return {path: "text" if path.startswith("text/") else "projector" for path in parameters}


def _is_decayed(parameters: Parameters) -> dict[str, bool]:
    return {path: path.rpartition("/")[2] not in ("bias", "scale") for path in parameters}
