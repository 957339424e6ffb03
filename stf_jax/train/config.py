"""What a run is: the training config, read from YAML with keys overridden on the command line."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Self

from etils import epath

from stf_jax.config.quantization import check_named
from stf_jax.config.yaml import load_config, read_yaml
from stf_jax.data.config import DataConfig
from stf_jax.models.layers import Remat
from stf_jax.models.lora import LoRAConfig
from stf_jax.parallel.mesh import MeshConfig
from stf_jax.systems import named_config
from stf_jax.train.optimizer import OptimizerConfig, Stage
from stf_jax.train.step import LossNormalization
from stf_jax.util.files import expand

# The learning rates of all steps are computed at the start, and the rows of all epochs counted.
_MOST_STEPS, _MOST_EPOCHS = 10**7, 10**4


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Steps between checkpoints, and how many of the latest are kept."""

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError("checkpoint.every and checkpoint.keep must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Held-out examples, whose loss is computed before the first step, between steps, at the end.

    Attributes:
        dataset: folder made by `stf-jax data build`, with the template of `data`.
        every: steps between.
        batches: of the dataset's, the first so many; null for all.
    """

    dataset: str
    every: int = 500
    batches: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dataset", expand(self.dataset))
        if self.every < 1:
            raise ValueError(f"validation.every is {self.every}; it must be at least 1")
        if self.batches is not None and self.batches < 1:
            raise ValueError(
                f"validation.batches is {self.batches}; give 1 or more, or null for all"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of one stage. Defaults: stage 2 of LLaVA-STF-7B.

    Attributes:
        model: what is trained on: a native checkpoint, or the directory of an earlier run.
        out: directory of this run; a run that is there already continues.
        stage: "pretrain" trains the connector, "finetune" also the language model, "lora"
            adapters of the language model in place of its weights.
        architecture: a named size, such as "llava_stf_7b", that the model must have; what
            `stf-jax plan` reads where there are no weights yet.
        quantization: of `architecture`, such as "int4"; null is plain numbers.
        epochs: passes over the data.
        steps: of the whole run, in place of epochs.
        micro_batches: parts of a batch whose gradients are added up one after the other.
        normalization: the loss is the mean over all supervised "tokens" of a batch, or the mean of
            its "micro_batches"' means, as in the PyTorch reference.
        remat: what the backward pass computes again of each layer of the language model, from least
            to most: nothing ("none"), norms, the activation and one matmul ("dots"), all but
            attention and its projections ("attention"), everything ("full").
        dtype: of the forward and backward pass; trained parameters are float32 all the same.
        nonfinite: what a step does whose loss or gradient is not finite: "stop" the run, or "skip"
            the update and continue.
        log_every: steps between lines where the output is no terminal.
        profile: first step to trace for TensorBoard's profiler, and one after the last.
        seed: of adapters and dropout; `data.seed` decides the order of the examples.
        lora: read in stage "lora" only.
        mesh: null for one device without a mesh.
        validation: null for none.
    """

    model: str
    out: str
    stage: Stage = "finetune"
    architecture: str | None = None
    quantization: str | None = None
    epochs: int = 1
    steps: int | None = None
    micro_batches: int = 1
    normalization: LossNormalization = "tokens"
    remat: Remat = "full"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    nonfinite: Literal["stop", "skip"] = "stop"
    log_every: int = 10
    profile: tuple[int, int] | None = None
    seed: int = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    mesh: MeshConfig | None = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    validation: ValidationConfig | None = None

    def __post_init__(self) -> None:
        for name in ("model", "out"):
            object.__setattr__(self, name, expand(getattr(self, name)))
        least = ("epochs", "micro_batches", "log_every")
        problems = [
            f"{name} is {getattr(self, name)}; it must be at least 1"
            for name in least
            if getattr(self, name) < 1
        ]
        if self.epochs > _MOST_EPOCHS:
            problems.append(f"epochs is {self.epochs}; it must be at most {_MOST_EPOCHS}")
        if self.steps is not None and not 1 <= self.steps <= _MOST_STEPS:
            problems.append(
                f"steps is {self.steps}; give 1 to {_MOST_STEPS}, or null for whole epochs"
            )
        if self.profile is not None and not 0 <= self.profile[0] < self.profile[1]:
            problems.append(
                f"profile is {self.profile}; give the first step, and one after the last"
            )
        if self.data.batch_size % self.micro_batches:
            problems.append(
                f"data.batch_size {self.data.batch_size} does not divide into "
                f"{self.micro_batches} micro-batches"
            )
        peaks = self.optimizer.peaks
        # The first stage trains the connector alone.
        if not (peaks["projector"] or (peaks["text"] and self.stage != "pretrain")):
            problems.append(
                "every learning rate is 0, with which nothing is trained; give one above 0"
            )
        if problems:
            raise ValueError("; ".join(problems))
        check_named(self.quantization, self.architecture)
        if self.architecture is not None:
            named_config(self.architecture, quantization=self.quantization)

    @classmethod
    def load(cls, path: epath.PathLike, overrides: Sequence[str] = ()) -> Self:
        """Reads YAML, with `--section.key=value` on top.

        Raises:
            ValueError: no such file, one for inference, an unknown key, or a value that does not
                fit.
        """
        if read_yaml(path).get("stage") == "inference":
            raise ValueError(
                f"{path}: stage inference is for 'plan' and 'eval --config', not a run"
            )
        return load_config(cls, path, overrides)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, ready for YAML."""
        return dataclasses.asdict(self)
