"""The system of a PyTorch checkpoint, read from shapes and config keys, and written back.

No published key says which system it is: the weights tell, or the user. What they do not tell
stands in config.json under our own key, any of whose keys may be left out:

    "mm_system": {"name": "average", "taps": [3], "window": 2}

It is written only where it is needed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.convert.hf_config import section
from stf_jax.convert.mapping import own_entries
from stf_jax.systems import SYSTEMS, get_system, system_from_dict
from stf_jax.systems.base import LlavaConfig, System
from stf_jax.systems.older import upgrade_fusion
from stf_jax.systems.shapes import Shapes
from stf_jax.util.errors import CheckpointError

KEY = "mm_system"
# The key before systems had names.
OLDER_KEY = "mm_fusion"

# All keys that say which system a model is of.
SYSTEM_KEYS = {KEY, OLDER_KEY}.union(*(kind.published_keys for kind in SYSTEMS.values()))

# Settings that change the computation, and the only values that the models here compute.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch",),
    "mm_patch_merge_type": ("flat",),
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "vision_feature_select_strategy": ("default",),
}


def infer_system(
    shapes: Shapes,
    hf: Mapping[str, Any],
    vision: VisionConfig,
    text: TextConfig = TextConfig(),
) -> System:
    """The system of a PyTorch checkpoint.

    Args:
        shapes: its tensors by canonical name.
        hf: its config.json.
        vision: its tower.
        text: its language model.

    Raises:
        CheckpointError: a setting that is not supported, or weights that fit no system.
    """
    for key, allowed in _REQUIRED.items():
        if hf.get(key, allowed[0]) not in allowed:
            raise CheckpointError(
                f"{key} is {hf[key]!r} in config.json; stf_jax computes only {allowed[0]!r}"
            )
    given = section(hf, KEY) or upgrade_fusion(section(hf, OLDER_KEY))
    published = _published(hf)
    if given.get("name", published.get("name")) == published.get("name"):
        # Our own key may leave out what the system's own keys say.
        given = published | given
    try:
        system = _system_of(given, shapes, vision)
        fields = system.fields_of(
            shapes, vision, selected=lambda: _selected_layer(hf, vision), given=given
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    try:
        # What neither weights nor config tell is as published, for a model of this size.
        proposed = system.for_model(vision=vision, text=text).to_dict()
        return system_from_dict({"name": system.name, **_merge(_merge(proposed, fields), given)})
    except ValueError as error:
        if not given:
            raise CheckpointError(str(error)) from error
        (key, *_) = (key for key in (KEY, OLDER_KEY, *SYSTEM_KEYS) if key in hf)
        example = f'; an example: "{KEY}": {{"name": "average", "taps": [3], "window": 2}}'
        raise CheckpointError(
            f"{key} in config.json does not fit: {error}"
            f"{example if key in (KEY, OLDER_KEY) else ''}"
        ) from error


def new_system(
    system: str | System | None,
    fields: Mapping[str, Any] | None,
    *,
    vision: VisionConfig,
    text: TextConfig,
) -> System:
    """The system that a language model gets.

    Args:
        system: a name, with the published proportions for this tower and language model; a system;
            None is "stf".
        fields: those that are to be otherwise.
        vision: the tower.
        text: the language model.

    Raises:
        ValueError: no such system or field, or a value that does not fit.
    """
    if not isinstance(system, System):
        system = get_system(system or "stf").for_model(vision=vision, text=text)
    if not fields:
        return system
    proposed = system.to_dict()
    if unknown := fields.keys() - proposed.keys():
        raise ValueError(
            f"system {system.name} has no {', '.join(sorted(unknown))}; it has "
            + ", ".join(sorted(proposed.keys() - {"name"}))
        )
    return system_from_dict({"name": system.name, **_merge(proposed, fields)})


def replace_system(
    hf: Mapping[str, Any], system: str | System | None, fields: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """A config.json whose model is to be of another system, over the same weights."""
    if system is None:
        return hf
    given = system.to_dict() if isinstance(system, System) else {"name": system}
    return {key: value for key, value in hf.items() if key not in SYSTEM_KEYS} | {
        KEY: {**given, **(fields or {})}
    }


def name_fields(fields: Mapping[str, Any]) -> list[str]:
    """The options of `stf-jax convert import` that give these fields."""
    options = {"taps": "taps", "window": "window", "mbtf": "mbtf-width"}
    options["projector_width"] = "projector-width"
    return [f"--{options[n]}" if n in options else f"--field {n}" for n in fields]


def system_keys(config: LlavaConfig) -> dict[str, Any]:
    """The config.json keys of LLaVA from which `infer_system` reads this model's system."""
    system, vision = config.system, config.vision
    # The published STF keeps LLaVA's value, though its taps are others.
    selected = -2 if len(system.taps) > 1 else system.taps[0] - vision.layers - 1
    keys: dict[str, Any] = {
        "mm_vision_select_layer": selected,
        **system.hf_keys(vision, config.text),
    }
    shapes = {name: e.shape for e in own_entries(config) for name in e.tensors}
    try:
        inferred = infer_system(shapes, keys, vision, config.text)
    except CheckpointError:
        inferred = None
    if inferred != system:
        keys[KEY] = system.to_dict()
    return keys


def _system_of(given: Mapping[str, Any], shapes: Shapes, vision: VisionConfig) -> type[System]:
    if "name" in given:
        return get_system(given["name"])
    # LLaVA-1.5 comes last: its tensors are in all of them.
    for system in reversed(tuple(SYSTEMS.values())):
        if system.recognizes(shapes, vision):
            return system
    raise CheckpointError(
        "there is no mm_projector.0.weight: a projector of type mlp2x_gelu is expected"
    )


def _published(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json in the form of a system's own code says of it, its name first."""
    for system in SYSTEMS.values():
        fields = system.read_hf(hf)
        if fields is not None:
            return {"name": system.name, **fields}
    return {}


def _merge(fields: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over `fields`, section by section; without the name."""
    merged = dict(fields)
    for key, value in given.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merge(old, value)
        merged[key] = value
    merged.pop("name", None)
    return merged


def _selected_layer(hf: Mapping[str, Any], vision: VisionConfig) -> int:
    """The one hidden state that LLaVA-1.5 takes; negative ones count from the end."""
    layer = hf.get("mm_vision_select_layer", hf.get("vision_feature_layer", -2))
    if isinstance(layer, list) and len(layer) == 1:
        (layer,) = layer
    if type(layer) is not int:
        raise CheckpointError(
            f"vision_feature_layer is {layer} in config.json: several layers without MBTF weights; "
            "stf_jax reads one layer, or LLaVA-STF"
        )
    return layer if layer >= 0 else vision.layers + 1 + layer


def replace_vocabulary(config: LlavaConfig, rows: int) -> LlavaConfig:
    """The same model with so many rows in its embedding, none of them padding."""
    text = dataclasses.replace(config.text, vocab_size=rows, vocab_padding=0)
    return dataclasses.replace(config, text=text)
