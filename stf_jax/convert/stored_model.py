"""Opens a model wherever it lies: a native checkpoint, a run, or a PyTorch directory."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from stf_jax.convert.infer import new_system
from stf_jax.convert.mapping import table
from stf_jax.convert.readers import read_json
from stf_jax.convert.source import Source, open_source
from stf_jax.data.processors import Processors, read_processors
from stf_jax.models.lora import LoRAConfig
from stf_jax.store.arrays import flatten, place, unflatten
from stf_jax.store.checkpoint import extra_files, is_native
from stf_jax.store.run import is_run, open_model
from stf_jax.systems.base import LlavaConfig, System
from stf_jax.systems.llava import Llava
from stf_jax.util.errors import CheckpointError
from stf_jax.util.files import expand


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model on disk, of which only the shapes have been read.

    Attributes:
        path: where its tokenizer and image processor lie.
        config: of the model; what ends an answer is as generation_config.json says.
        files: tokenizer, image processor and configs, by name.
        restore: nested dictionaries of `jax.ShapeDtypeStruct` -> the parameters, placed so.
        adapters: that lie beside its weights, which `restore` gives where they are asked for.
        layout: of a PyTorch directory; None for a native checkpoint or a run.
        new: tensors that the system has and the directory has not.
    """

    path: epath.Path
    config: LlavaConfig
    files: Mapping[str, epath.Path]
    restore: Callable[[Mapping[str, Any]], dict[str, Any]]
    layout: str | None
    adapters: LoRAConfig | None = None
    new: tuple[str, ...] = ()

    def check_trained(self) -> None:
        """Refuses a model that has not learned all of its weights.

        Raises:
            CheckpointError: what it lacks, and what to do.
        """
        if self.layout == "llama":
            # Its system would be new, of random weights.
            raise CheckpointError(
                f"{self.path} is a language model alone and has not learned to see; import it with "
                f"stf-jax convert import {self.path} OUT --vision-tower CLIP, and train that"
            )
        if self.new:
            name = self.config.system.name
            raise CheckpointError(
                f"{self.path} has no {self.new[0]}, which {name} has to learn; import it with "
                f"stf-jax convert import {self.path} OUT --system {name}, and train that"
            )

    def processors(self) -> Processors:
        """What text and images go through.

        Raises:
            CheckpointError: a file that is missing, damaged or of another model.
        """
        return read_processors(self.path, self.files, config=self.config)


def open_any(
    path: epath.PathLike,
    *,
    vision_tower: epath.PathLike | None = None,
    system: str | System | None = None,
    fields: Mapping[str, Any] | None = None,
) -> StoredModel:
    """Opens a model without reading its weights.

    Args:
        path: a native checkpoint, the directory of a run of `stf-jax train`, or a PyTorch directory
            in a layout that `stf-jax convert import` reads, recognized by what lies in it; local
            or on gs://.
        vision_tower: a directory with CLIP, for a PyTorch directory that does not lead to one.
        system: another one over the same weights, such as "prumerge" over LLaVA-1.5's. Over a
            native checkpoint it is one without weights or tokens of its own.
        fields: of that system, where they are not to be as published.

    Raises:
        CheckpointError: what is missing, damaged or does not fit, and what to do.
    """
    path = epath.Path(expand(path))
    vision_tower = None if vision_tower is None else expand(vision_tower)
    if is_native(path) or is_run(path):
        if vision_tower is not None:
            raise CheckpointError(f"{path} has its vision tower inside; leave out --vision-tower")
        checkpoint = open_model(path)
        config, files = checkpoint.config, extra_files(checkpoint.extras)
        if system is not None or fields:
            config = _replace_system(path, config, system, fields)
        return StoredModel(
            path=checkpoint.extras / "hf",
            config=_with_generation(config, files),
            files=files,
            restore=checkpoint.restore,
            layout=None,
            adapters=checkpoint.adapters,
        )
    source = open_source(path, vision_tower=vision_tower, system=system, fields=fields)
    return StoredModel(
        path=path,
        config=_with_generation(source.config, source.files),
        files=dict(source.files),
        restore=lambda tree: _read(source, tree),
        layout=source.layout,
        new=source.new,
    )


def load_processors(
    path: epath.PathLike, *, vision_tower: epath.PathLike | None = None
) -> Processors:
    """Reads the processors of a model, of its weights at most the shapes; see `open_any`.

    Raises:
        CheckpointError: what is missing, damaged or does not fit, and what to do.
    """
    return open_any(path, vision_tower=vision_tower).processors()


def _replace_system(
    path: epath.Path,
    config: LlavaConfig,
    system: str | System | None,
    fields: Mapping[str, Any] | None,
) -> LlavaConfig:
    """A native LLaVA-1.5 under a system that its weights are all of.

    Raises:
        CheckpointError: another model, a system that needs more, or fields that do not fit.
    """
    if system is None or not isinstance(config.system, Llava):
        raise CheckpointError(
            f"{path} is a native checkpoint of {config.system.title}; another system, and its "
            "fields, are for one of LLaVA-1.5: leave out --field, and --system"
        )
    if isinstance(system, str):
        own = {"taps": config.system.taps, "projector_width": config.system.projector_width}
        fields = {**own, **(fields or {})}
    try:
        chosen = new_system(system, fields, vision=config.vision, text=config.text)
        other = dataclasses.replace(config, system=chosen)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    shapes, wanted = (
        {entry.native: entry.native_shape for entry in table(each)} for each in (config, other)
    )
    if chosen.own_token is not None or shapes != wanted:
        raise CheckpointError(
            f"{path} has not all weights of {chosen.title}; import it for that: stf-jax convert "
            f"export {path} OUT --layout llava, then stf-jax convert import OUT MODEL --system "
            f"{chosen.name}"
        )
    return other


def _read(source: Source, tree: Mapping[str, Any]) -> dict[str, Any]:
    """One leaf at a time, so that host memory holds no second copy of the model."""
    wanted = flatten(tree)
    return unflatten({leaf.path: place(leaf.read(), wanted[leaf.path]) for leaf in source.leaves()})


def _with_generation(config: LlavaConfig, files: Mapping[str, epath.Path]) -> LlavaConfig:
    file = files.get("generation_config.json")
    ids = None if file is None else read_json(file).get("eos_token_id")
    if ids is None:
        return config
    eos_ids = tuple(ids) if isinstance(ids, list) else (ids,)
    if not eos_ids or not all(type(item) is int for item in eos_ids):
        raise CheckpointError(f"{file}: eos_token_id is {ids!r}; give an id, or a list of ids")
    return dataclasses.replace(config, text=dataclasses.replace(config.text, eos_ids=eos_ids))
