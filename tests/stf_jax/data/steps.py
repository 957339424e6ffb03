"""The steps of a training set."""

from collections.abc import Callable, Iterable

from stf_jax.data.pipeline import TrainingData, TrainingStep

Make = Callable[..., TrainingData]
K = 4  # tokens of an image


def ids_of(steps: Iterable[TrainingStep]) -> list[str]:
    return [name for step in steps for row in step.example_ids for name in row]
