"""How answers are made: what `eval` runs, and what `plan` asks the TPU compiler about."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Self

from etils import epath

from stf_jax.config.quantization import check_named
from stf_jax.config.yaml import load_config, read_yaml
from stf_jax.models.cache import CacheDType
from stf_jax.parallel.mesh import MeshConfig
from stf_jax.systems import named_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """The questions that a plan assumes; those of `eval` are as they are.

    Attributes:
        images: of a prompt.
        prompt_tokens: text up to the last image; template v1 has 36.
        question_tokens: text behind it, a program for each length.
        max_new_tokens: of an answer.
    """

    images: int = 1
    prompt_tokens: int = 36
    question_tokens: tuple[int, ...] = (64,)
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        sizes = (self.prompt_tokens, *self.question_tokens, self.max_new_tokens)
        if self.images < 0 or min(sizes) < 1 or not self.question_tokens:
            raise ValueError(
                "workload: prompt_tokens, question_tokens and max_new_tokens are at least 1, "
                "images at least 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """The settings of the engine.

    Attributes:
        stage: tells this config from one of a training run.
        architecture: a named size, such as "llava_stf_7b", for `plan`, which has no weights.
        quantization: of `architecture`, such as "int4"; null is plain numbers.
        tokens: an image, where the system has several budgets; null is its most.
        slots: answers in the making at a time.
        dtype: of weights and arithmetic; null is float32 on CPU, else bfloat16.
        cache_dtype: how keys and values are kept; null is as they are computed.
        mesh: null for one device without a mesh.
        workload: read by `plan` only.
    """

    stage: Literal["inference"] = "inference"
    architecture: str | None = None
    quantization: str | None = None
    tokens: int | None = None
    slots: int = 16
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    cache_dtype: CacheDType | None = None
    mesh: MeshConfig | None = None
    workload: Workload = dataclasses.field(default_factory=Workload)

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"slots is {self.slots}; give 1 or more")
        check_named(self.quantization, self.architecture)
        if self.architecture is not None:
            model = named_config(self.architecture, quantization=self.quantization)
            model.choose_budget(self.tokens)

    @classmethod
    def load(cls, path: epath.PathLike, overrides: Sequence[str] = ()) -> Self:
        """Reads YAML, with `--section.key=value` on top.

        Raises:
            ValueError: no such file, one for training, an unknown key, or a value that does not
                fit.
        """
        stage = read_yaml(path).get("stage", "inference")
        if stage != "inference":
            raise ValueError(
                f"{path}: stage {stage} is for training; for answers see "
                "configs/stf-7b-inference.yaml"
            )
        return load_config(cls, path, overrides)


def is_inference(path: epath.PathLike) -> bool:
    """Whether a file is an `InferenceConfig` rather than one of a training run.

    Raises:
        ValueError: it cannot be read.
    """
    return read_yaml(path).get("stage") == "inference"
