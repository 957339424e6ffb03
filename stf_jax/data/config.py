"""What training reads, and in what order: the data section of a training config."""

import dataclasses
from typing import Literal

from stf_jax.data.images import Mode
from stf_jax.data.templates import get_template
from stf_jax.util.files import expand

Packing = Literal["packed", "grouped", "single"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """One dataset of a mixture.

    Attributes:
      path: folder made by `stf-jax data build`.
      weight: passes through it in an epoch. With 1 each example comes once; with 0.5 every second
        epoch, with 2 twice in each.
    """

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1000:
            raise ValueError(f"weight {self.weight} of {self.path} must be above 0, at most 1000")
        object.__setattr__(self, "path", expand(self.path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Everything that decides which examples stand in which row of which batch.

    Attributes:
      datasets: what is trained on.
      template: of the conversations; LLaVA-1.5 uses "plain" in its first stage, "v1" in its second.
      image_mode: "pad" to a square (second stage), or "crop" the middle (first stage).
      features: of the frozen tower: "computed" from pixels in every step, or once and "cached" on
        disk; see docs/training.md.
      features_directory: where those are kept; null is beside each dataset, in `PATH.features`.
      fast_images: pixels in about two thirds of the time, off from the recipe's by 0.5 to 1.5 of
        255 on average; see `ImageProcessor.fast`.
      sequence_length: T, tokens in a row; a longer example is cut.
      batch_size: rows in a global batch. A packed row holds several examples, so LLaVA's 128
        examples are fewer rows; `TrainingData.plan` tells how many examples a row holds.
      packing: "packed" rows of several examples; "grouped" one example a row, each batch of one
        modality and sorted by length, as LLaVA-1.5's second stage has it; "single" one example a
        row at random.
      images_per_row: I, images that a row has room for. An example with more is left out.
      clip_frames: the most frames of a clip, where the system joins them; a row then has room for
        images_per_row / clip_frames clips. 0 where the datasets have no clips, or frames are
        images.
      seed: of the order.
      workers: processes that decode and tokenize; with 0 it is done between the steps.
      strict_labels: the PyTorch reference's labels, which mask some conversations whole; these are
        left out.
      max_lost: images or examples that may turn out to be damaged before a run is stopped.
    """

    datasets: tuple[DatasetSource, ...] = ()
    template: str = "v1"
    image_mode: Mode = "pad"
    features: Literal["computed", "cached"] = "computed"
    features_directory: str | None = None
    fast_images: bool = False
    sequence_length: int = 2048
    batch_size: int = 128
    packing: Packing = "packed"
    images_per_row: int = 8
    clip_frames: int = 0
    seed: int = 42
    workers: int = 8
    strict_labels: bool = False
    max_lost: int = 100

    def __post_init__(self) -> None:
        # A plan's memory grows with each; nobody has more.
        bounds = {
            "sequence_length": (2, 2**20), "batch_size": (1, 2**20), "images_per_row": (0, 2**12),
            "clip_frames": (0, 2**12), "workers": (0, 2**10), "max_lost": (0, 2**31),
        }  # fmt: skip
        problems = [
            f"{name} is {value}; it must be at {f'least {low}' if value < low else f'most {high}'}"
            for name, (low, high) in bounds.items()
            for value in [getattr(self, name)]
            if not low <= value <= high
        ]
        if self.packing not in ("packed", "grouped", "single"):
            problems.append(f"packing is {self.packing!r}; it must be packed, grouped or single")
        if self.image_mode not in ("pad", "crop"):
            problems.append(f"image_mode is {self.image_mode!r}; it must be pad or crop")
        if self.features not in ("computed", "cached"):
            problems.append(f"features is {self.features!r}; it must be computed or cached")
        if self.features_directory is not None:
            object.__setattr__(self, "features_directory", expand(self.features_directory))
        if self.clip_frames > self.images_per_row:
            problems.append(
                f"clip_frames is {self.clip_frames}, and images_per_row {self.images_per_row} has "
                "no room for a clip"
            )
        if problems:
            raise ValueError("; ".join(problems))
        if get_template(self.template).label_rule is None and self.strict_labels:
            raise ValueError(
                f"strict_labels are the reference's, which has no template {self.template!r}; "
                "leave them out"
            )
