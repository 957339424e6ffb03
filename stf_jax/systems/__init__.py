"""The papers, one file each; this file lists them.

`base.py` says what a system is. `llava.py` is what all of them change, `stf.py` is LLaVA-STF,
`average.py` its baseline; `random.py` and `downsample.py` are controls.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from stf_jax.config.parse import parse
from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.systems.average import Average
from stf_jax.systems.base import LlavaConfig, System
from stf_jax.systems.downsample import Downsample
from stf_jax.systems.fastv import FastV
from stf_jax.systems.gsearch import GSearch
from stf_jax.systems.llava import Llava
from stf_jax.systems.m3 import M3
from stf_jax.systems.pmod import PMoD
from stf_jax.systems.proxyv import ProxyV
from stf_jax.systems.prumerge import PruMerge
from stf_jax.systems.pyramiddrop import PyramidDrop
from stf_jax.systems.quecc import QueCC
from stf_jax.systems.random import Random
from stf_jax.systems.stf import STF, MBTFConfig
from stf_jax.systems.videollm_mod import VideoLLMMoD
from stf_jax.systems.vistog import VisToG
from stf_jax.systems.voco import VoCo
from stf_jax.systems.vqtoken import VQToken

# The language models that named sizes ("llava_stf_7b") are over.
_TEXTS = {"7b": TextConfig.vicuna_7b, "13b": TextConfig.vicuna_13b}

# In the order of tables.
SYSTEMS: Mapping[str, type[System]] = {
    system.name: system
    for system in (
        Llava,
        Average,
        Random,
        Downsample,
        STF,
        M3,
        PruMerge,
        QueCC,
        VisToG,
        VQToken,
        VoCo,
        VideoLLMMoD,
        PMoD,
        ProxyV,
        FastV,
        PyramidDrop,
        GSearch,
    )
}


def get_system(name: object) -> type[System]:
    """The system of that name.

    Raises:
        ValueError: there is none; lists them.
    """
    if not isinstance(name, str) or name not in SYSTEMS:
        raise ValueError(f"system {name!r} is not one of {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def system_from_dict(tree: Mapping[str, Any]) -> System:
    """Reads what `System.to_dict` wrote.

    Raises:
        ValueError: no such system, an unknown or mistyped key, or a value that does not fit.
    """
    fields = {key: value for key, value in tree.items() if key != "name"}
    name = tree.get("name")
    if not isinstance(name, str):
        raise ValueError(f"system.name is {name!r}; choose one of {', '.join(SYSTEMS)}")
    system: System = parse(get_system(name), fields)
    return system


def config_from_dict(tree: Mapping[str, Any]) -> LlavaConfig:
    """Reads what `LlavaConfig.to_dict` wrote.

    Raises:
        ValueError: an unknown or mistyped key, or a value that does not fit.
    """
    unknown = tree.keys() - {"vision", "text", "system"}
    if unknown:
        raise ValueError(f"not a model config: there is no key {sorted(unknown)[0]!r}")
    try:
        return LlavaConfig(
            vision=parse(VisionConfig, tree.get("vision", {})),
            text=parse(TextConfig, tree.get("text", {})),
            system=system_from_dict(tree.get("system", {})),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"not a model config: {error}") from error


def published_models() -> Iterator[tuple[str, LlavaConfig]]:
    """Every system over CLIP ViT-L/14-336 and Vicuna, by the name of its size."""
    vision = VisionConfig.clip_l_336()
    for system in SYSTEMS.values():
        for size, make in _TEXTS.items():
            text = make()
            if system.own_token is not None:
                text = dataclasses.replace(text, vocab_size=text.vocab_size + 1)
            yield (
                f"{system.family}_{size}",
                LlavaConfig(
                    vision=vision, text=text, system=system.for_model(vision=vision, text=text)
                ),
            )


def named_config(name: str, *, quantization: str | None = None) -> LlavaConfig:
    """A published size, such as "llava_stf_7b", or "tiny".

    Args:
        name: of the size.
        quantization: the scheme in which its language model is stored.

    Raises:
        ValueError: there is none of that name, and lists them; or a scheme that does not fit.
    """
    models = {**dict(published_models()), "tiny": tiny_config()}
    if name not in models:
        raise ValueError(f"architecture {name!r} is not one of {', '.join(models)}")
    return models[name].with_quantization(quantization)


def tiny_config() -> LlavaConfig:
    """LLaVA-STF small enough for a test: 4 tokens an image."""
    vision = VisionConfig.tiny()
    system = STF(
        taps=(3, 1),
        mbtf=MBTFConfig(mlp_width=4 * vision.width),
        projector_width=16 * vision.width,
    )
    return LlavaConfig(vision=vision, text=TextConfig.tiny(), system=system)


def connector_prefixes() -> dict[str, str]:
    """What a connector's tensors begin with in PyTorch, and the layout that each prefix tells.

    The longest come first, so that the first that fits is the right one.
    """
    prefixes: dict[str, str] = {}
    for system in SYSTEMS.values():
        prefixes |= system.prefixes
    return dict(sorted(prefixes.items(), key=lambda item: -len(item[0])))
