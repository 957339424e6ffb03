"""The variants of the experiment: the systems that it compares, sized for its small models."""

import dataclasses

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.systems import SYSTEMS
from stf_jax.systems.base import System

# The hidden states that MBTF mixes: all but the first and the last, the highest first.
TAPS = (4, 3, 2, 1)
# The peak learning rate of stage 1 for each variant, chosen by `stf_jax.demo.rates`.
RATES = {"llava": 1e-2, "average": 3e-2, "stf": 1.5e-3, "stf_mbtf": 1.5e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoVariant:
    """A system's variant in the demo: one way to make vision tokens.

    Attributes:
        name: of its folder.
        title: in tables and plots.
        system: how.
        pretrain_rate: the peak learning rate of stage 1.
    """

    name: str
    title: str
    system: System
    pretrain_rate: float


def all_variants(vision: VisionConfig, text: TextConfig) -> dict[str, DemoVariant]:
    """The variants whose rates are known, with the papers' multiples of the tower's width."""
    variants = {
        name: variant
        for system in SYSTEMS.values()
        for name, variant in system.variants(vision=vision, text=text).items()
    }
    return {
        name: DemoVariant(
            name=name,
            title=variants[name].title,
            system=_with_taps(variants[name].system),
            pretrain_rate=rate,
        )
        for name, rate in RATES.items()
    }


def _with_taps(system: System) -> System:
    several = len(system.taps) > 1
    return dataclasses.replace(system, taps=TAPS if several else TAPS[:1])
