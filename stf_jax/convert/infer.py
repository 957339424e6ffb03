"""What lies between tower and language model, read from shapes and config keys, and written back.

No published key says "STF": taps, window and widths follow from the weights. What the weights
cannot tell and the published default does not either, stands in config.json under our own key:

    "mm_fusion": {"taps": [3, 1], "reduction": "average", "window": 2, "last_activation": false}

It is written only where it is needed; any of its keys may be left out.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

from stf_jax.config.vision import VisionConfig
from stf_jax.convert.hf_config import section
from stf_jax.convert.mapping import CROSSLAYER, PROJECTOR, fusion_entries
from stf_jax.systems.base import STF_TAPS, FusionConfig, LlavaConfig, MBTFConfig, Reduction
from stf_jax.util.errors import CheckpointError

KEY = "mm_fusion"

# By their number, where config.json does not name them: the released taps, and those of the
# unpublished 13B run.
_TAPS = {8: STF_TAPS, 4: (23, 18, 12, 6)}

# Settings that change the computation, and the only values that the models here compute.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch",),
    "mm_patch_merge_type": ("flat",),
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "vision_feature_select_strategy": ("default",),
}

Shapes = Mapping[str, tuple[int, ...]]


def infer_fusion(shapes: Shapes, hf: Mapping[str, Any], vision: VisionConfig) -> FusionConfig:
    """The fusion of a PyTorch checkpoint.

    Args:
        shapes: Its tensors by canonical name.
        hf: Its config.json.
        vision: Its tower.

    Raises:
        CheckpointError: a setting that is not supported, or weights that fit no fusion.
    """
    for key, allowed in _REQUIRED.items():
        if hf.get(key, allowed[0]) not in allowed:
            raise CheckpointError(
                f"{key} is {hf[key]!r} in config.json; stf_jax computes only {allowed[0]!r}"
            )
    ours = section(hf, KEY)
    unknown = ours.keys() - {"taps", "reduction", "window", "last_activation"}
    if unknown:
        raise CheckpointError(f"{KEY} in config.json has an unknown key {sorted(unknown)[0]!r}")
    _check_ours(ours)
    width = vision.width
    mixer = _matrix(shapes, f"{CROSSLAYER}0.weight")
    projector = _matrix(shapes, f"{PROJECTOR}0.weight")
    if projector is None:
        raise CheckpointError(
            f"there is no {PROJECTOR}0.weight: a projector of type mlp2x_gelu is expected"
        )
    if "taps" in ours:
        taps = tuple(ours["taps"])
    elif mixer is None:
        taps = (_selected_layer(hf, vision),)
    else:
        taps = _default_taps(mixer[1], hf, vision)
    mbtf = None
    if mixer is not None:
        mbtf = MBTFConfig(mlp_width=mixer[0], last_activation=ours.get("last_activation", False))
    area = projector[1] / width
    side = math.isqrt(int(area))
    if side**2 != area or side == 0:
        raise CheckpointError(
            f"the projector takes {projector[1]} channels, which is no square window of tokens "
            f"of the tower's width {width}; is this the right vision tower?"
        )
    return FusionConfig(
        taps=taps,
        mbtf=mbtf,
        reduction=ours.get("reduction", "stf" if side > 1 else "identity"),
        window=ours.get("window", side),
        projector_width=projector[0],
    )


def fusion_keys(config: LlavaConfig) -> dict[str, Any]:
    """The config.json keys of LLaVA from which `infer_fusion` reads this model's fusion."""
    fusion, vision = config.fusion, config.vision
    # The published STF keeps LLaVA's value, though its taps are others.
    selected = -2 if fusion.mbtf else fusion.taps[0] - vision.layers - 1
    keys: dict[str, Any] = {"mm_vision_select_layer": selected}
    shapes = {name: e.shape for e in fusion_entries(config) for name in e.tensors}
    if _try_infer(shapes, keys, vision) != fusion:
        keys[KEY] = {
            "taps": list(fusion.taps),
            "reduction": fusion.reduction,
            "window": fusion.window,
            "last_activation": fusion.mbtf is not None and fusion.mbtf.last_activation,
        }
    return keys


def _try_infer(
    shapes: Shapes, keys: Mapping[str, Any], vision: VisionConfig
) -> FusionConfig | None:
    try:
        return infer_fusion(shapes, keys, vision)
    except CheckpointError:
        return None


def new_fusion(kind: str, *, vision: VisionConfig, text_width: int) -> FusionConfig:
    """The fusion that training starts with: "stf", "llava" or "average"."""
    tap = vision.layers - 1
    if kind == "llava":
        return FusionConfig.llava(text_width=text_width, tap=tap)
    if kind == "average":
        return FusionConfig.average(text_width=text_width, tap=tap)
    return FusionConfig.stf(vision_width=vision.width)


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


def _default_taps(inputs: int, hf: Mapping[str, Any], vision: VisionConfig) -> tuple[int, ...]:
    count, rest = divmod(inputs, vision.width)
    if rest:
        raise CheckpointError(
            f"{CROSSLAYER}0.weight takes {inputs} channels, no multiple of the tower's width "
            f"{vision.width}; is this the right vision tower?"
        )
    if count == 1:
        return (_selected_layer(hf, vision),)
    if count not in _TAPS:
        raise CheckpointError(
            f"{CROSSLAYER}0.weight mixes {count} hidden states of the tower, and nothing says "
            f'which; add "{KEY}": {{"taps": [...]}} to config.json, in order of concatenation'
        )
    return _TAPS[count]


def _check_ours(ours: Mapping[str, Any]) -> None:
    right: dict[str, Callable[[Any], bool]] = {
        "taps": lambda taps: isinstance(taps, list) and all(type(tap) is int for tap in taps),
        "reduction": lambda kind: kind in get_args(Reduction),
        "window": lambda window: type(window) is int,
        "last_activation": lambda on: isinstance(on, bool),
    }
    for key, value in ours.items():
        if not right[key](value):
            raise CheckpointError(
                f"{key} in {KEY} of config.json is {value!r}; an example of all its keys: "
                '{"taps": [3, 1], "reduction": "average", "window": 2, "last_activation": false}'
            )


def _matrix(shapes: Shapes, name: str) -> tuple[int, int] | None:
    if name not in shapes:
        return None
    if len(shapes[name]) != 2:
        raise CheckpointError(f"{name} has shape {shapes[name]}; a matrix is expected")
    rows, columns = shapes[name]
    return rows, columns


def replace_vocabulary(config: LlavaConfig, rows: int) -> LlavaConfig:
    """The same model with so many rows in its embedding, none of them padding."""
    text = dataclasses.replace(config.text, vocab_size=rows, vocab_padding=0)
    return dataclasses.replace(config, text=text)
