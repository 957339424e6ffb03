"""Which vision tower a checkpoint means: its config, and its weights where they lie elsewhere.

LLaVA's config.json only names the tower; the tower's own config.json is looked for, in this order,
in the directory given, in `vision_tower/` of the checkpoint (our exports put it there), under the
path that `mm_vision_tower` names, and among the published towers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from stf_jax.config.vision import VisionConfig
from stf_jax.convert.foreign import refuse_family
from stf_jax.convert.hf_config import VISION_DEFAULTS, section, vision_from_hf, vision_to_hf
from stf_jax.convert.layouts import TRANSFORMERS
from stf_jax.convert.parts import Part, Tensor, open_part
from stf_jax.convert.readers import read_json
from stf_jax.util.errors import CheckpointError

PUBLISHED: dict[str, Callable[[], VisionConfig]] = {
    "openai/clip-vit-large-patch14-336": VisionConfig.clip_l_336,
    "openai/clip-vit-large-patch14": VisionConfig.clip_l_224,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerChoice:
    """A tower, and where it was found."""

    config: VisionConfig
    tensors: Mapping[str, Tensor]  # by canonical name
    folder: epath.Path | None  # with its config.json
    unknown: tuple[str, ...]  # published names that no tower has
    assumed: Mapping[str, int]  # sizes that no config.json gives


def choose_tower(part: Part, language: Part, vision_tower: epath.PathLike | None) -> TowerChoice:
    """The tower of a checkpoint; weights inside the checkpoint win over those beside it.

    Raises:
        CheckpointError: there is no config or there are no weights; it says what to give.
    """
    inside = part.tower or language.tower
    beside = None
    if vision_tower is not None and epath.Path(vision_tower).is_file():
        beside = open_part(vision_tower)
    if beside is not None and beside.bundled is not None:
        folder: epath.Path | None = beside.bundled
        config, assumed = _read_config(beside.path, beside.hf)
    elif (folder := _folder(part, language, vision_tower)) is not None:
        config, assumed = _read_config(folder / "config.json", read_json(folder / "config.json"))
    else:
        config, assumed = _known_config(part, language)
    if inside:
        return TowerChoice(
            config=config, tensors=inside, folder=folder, unknown=(), assumed=assumed
        )
    if folder is None or (beside is None and not _has_weights(folder)):
        raise CheckpointError(
            f"{part.path} has no vision tower inside"
            + (f", nor has {folder}" if folder else "")
            + "; give a directory with CLIP's config.json and weights: --vision-tower DIR"
        )
    beside = beside or open_part(folder)
    return TowerChoice(
        config=config,
        tensors=beside.tower,
        folder=folder,
        unknown=beside.unknown,
        assumed=assumed,
    )


def _folder(part: Part, language: Part, vision_tower: epath.PathLike | None) -> epath.Path | None:
    if vision_tower is not None:
        folder = epath.Path(vision_tower)
        if not (folder / "config.json").exists():
            raise CheckpointError(f"{folder} holds no config.json of a vision tower")
        return folder
    for owner in (part, language):
        if _has_config(owner):
            continue
        candidates = [owner.folder / "vision_tower"]
        name = owner.hf.get("mm_vision_tower")
        if name and not isinstance(name, str):
            raise CheckpointError(
                f"{owner.path}: mm_vision_tower is {name!r} in config.json; give a path or a name"
            )
        if name:
            # Joining an absolute path gives that path.
            candidates += [owner.folder / name, owner.folder.parent / name]
        for folder in candidates:
            if (folder / "config.json").exists():
                return folder
    return None


def _has_config(owner: Part) -> bool:
    return owner.hf.get("vision_config") is not None


def _known_config(part: Part, language: Part) -> tuple[VisionConfig, Mapping[str, int]]:
    for owner in (part, language):
        if _has_config(owner):
            return _read_config(owner.path, owner.hf)
    if part.layout in TRANSFORMERS:
        # The tower of `transformers.LlavaConfig` where none is given.
        config = VisionConfig.clip_l_336()
        hf = vision_to_hf(config)
        return config, {key: hf[key] for key in VISION_DEFAULTS}
    name = part.hf.get("mm_vision_tower") or language.hf.get("mm_vision_tower")
    if name in PUBLISHED:
        return PUBLISHED[name](), {}
    if name is None:
        raise CheckpointError(f"{part.path} names no vision tower; give one: --vision-tower DIR")
    raise CheckpointError(
        f"{part.path} means the vision tower {name!r}, which is not here and not one of "
        f"{', '.join(PUBLISHED)}; give its directory: --vision-tower DIR"
    )


def _read_config(path: epath.Path, hf: Mapping[str, Any]) -> tuple[VisionConfig, Mapping[str, int]]:
    refuse_family(path, hf)
    try:
        config = vision_from_hf(hf)
        given = section(hf, "vision_config") if "vision_config" in hf else hf
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return config, {key: size for key, size in VISION_DEFAULTS.items() if key not in given}


def _has_weights(folder: epath.Path) -> bool:
    return any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir())
