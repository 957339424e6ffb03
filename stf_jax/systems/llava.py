"""LLaVA-1.5 (arXiv 2310.03744): every patch of one hidden state is a token."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from stf_jax.config.vision import VisionConfig
from stf_jax.systems.base import LlamaCppProjector, System
from stf_jax.systems.shapes import Shapes, matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llava(System):
    """Nothing is changed: 576 tokens an image."""

    name: ClassVar[str] = "llava"
    title: ClassVar[str] = "LLaVA-1.5"
    family: ClassVar[str] = "llava_1_5"
    published: ClassVar = {
        "vqav2": 78.5,
        "gqa": 62.0,
        "vizwiz": 50.0,
        "scienceqa": 66.8,
        "textvqa": 58.2,
        "pope": 85.9,
        "mme": 1510.7,
        "mmbench": 64.3,
        "mmbench-cn": 58.3,
    }

    @classmethod
    def recognizes(cls, shapes: Shapes, vision: VisionConfig) -> bool:
        """The projector takes a patch's channels; no other system has recognized its own."""
        name = "mm_projector.0.weight"
        return name in shapes and matrix(shapes, name)[1] == vision.width

    def hf_code(self, vision: VisionConfig) -> dict[str, Any]:
        """Every patch."""
        del vision
        return {"kind": self.name}

    @property
    def fits_transformers(self) -> bool:
        """It is what `transformers` calls Llava."""
        return True

    def llama_cpp(self, vision: VisionConfig) -> Mapping[int, LlamaCppProjector]:
        """Its first projector."""
        return {vision.patches: "mlp"}
