"""QueCC: "Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters" (arXiv 2411.03312).

The question decides what an image's few tokens say (section 4). In front of LLaVA-1.5's projector:

1. The language model reads the question alone; its last hidden state is added to every patch.
2. A depthwise convolution makes one query of each window of patches.
3. The query attends to the patches of its own window, whose keys and values come from several
   blocks of the tower.

One model has one number of tokens, since the convolution is as large as a window. The prefix of a
prompt depends on the question, so only prompts with the same question share it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from stf_jax.config.checks import check_positive
from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.connector import Connector, Tokens, VisionFeatures
from stf_jax.models.layers import MLP, Init, LayerNorm, Linear, PackedAttention, gelu
from stf_jax.models.weights import (
    SAME,
    Entry,
    Transform,
    attention_entries,
    linear_entries,
    make_entry,
    mlp_entries,
    norm_entries,
    transpose,
)
from stf_jax.systems.base import System
from stf_jax.systems.shapes import Shapes, matrix
from stf_jax.systems.stf import check_window, spatial_token_fusion

_PREFIX = "mm_projector.0."
_NORM_EPS = 1e-6
# Keys of config.json, as the released code writes them.
_TYPE, _STRIDE = "mm_vision_token_compression_type", "mm_vision_token_compression_stride"
_KERNEL = "mm_vision_token_compression_kernel_size"


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueCC(System):
    """Defaults: 36 tokens an image of LLaVA-1.5-7B.

    Attributes:
        taps: hidden states whose patches are keys and values; the last one is the image itself.
        stride: side of the window of patches that becomes one token.
        heads: of the attention inside a window.
        question_length: tokens of a question that are read; what is longer is cut.
    """

    taps: tuple[int, ...] = (12, 16, 22, 23)
    stride: int = 4
    heads: int = 8
    question_length: int = 128

    name: ClassVar[str] = "quecc"
    title: ClassVar[str] = "QueCC"
    family: ClassVar[str] = "llava_quecc"
    published_keys: ClassVar = (_TYPE, _KERNEL, _STRIDE)
    # With 36 tokens (paper, table 1).
    published: ClassVar = {
        "gqa": 60.5,
        "mmbench": 62.5,
        "mme": 1442.0,
        "pope": 84.5,
        "scienceqa": 70.6,
        "textvqa": 53.3,
        "vizwiz": 50.1,
        "vqav2": 75.8,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "stride", "heads", "question_length")

    @classmethod
    def proportions(cls, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """The published taps by their depth, and the published window where it divides."""
        last = vision.layers - 1
        taps = (vision.layers // 2, vision.layers * 2 // 3, last - 1, last)
        stride = next(side for side in (4, 2, 1) if vision.grid % side == 0)
        return {"taps": tuple(dict.fromkeys(sorted(max(tap, 1) for tap in taps))), "stride": stride}

    def check(self, vision: VisionConfig, text: TextConfig) -> None:
        """The window divides the grid, and the heads the width."""
        check_window(self.stride, vision)
        if vision.width % self.heads:
            raise ValueError(
                f"heads is {self.heads}, which does not divide the tower's width {vision.width}"
            )

    def tokens(self, vision: VisionConfig) -> int:
        """One a window."""
        return (vision.grid // self.stride) ** 2

    def connector(self, vision: VisionConfig, text: TextConfig, *, init: Init) -> Connector:
        """Compression by the question, then LLaVA-1.5's projector."""
        return QueCCConnector(self, vision, text, init=init)

    def hf_code(self, vision: VisionConfig) -> dict[str, Any]:
        """The window and the heads; the processor knows how much of a question is read."""
        del vision
        return {"kind": self.name, "stride": self.stride, "heads": self.heads}

    def flops(self, vision: VisionConfig, text: TextConfig) -> float:
        """Queries, keys and values over every patch; the question's own pass is the text's."""
        width, patches, blocks = vision.width, vision.patches, len(self.taps)
        tokens = self.tokens(vision)
        mlps = 2 * width**2 + 2 * (blocks + 1) * width**2
        convolution = width
        attention = 2 * width**2 + 2 * width
        ends = 2 * tokens * width**2 + width * text.width
        products = patches * (mlps + convolution + attention) + ends
        return 2.0 * products + super().flops(vision, text)

    def weights(self, vision: VisionConfig, text: TextConfig) -> tuple[Entry, ...]:
        """The released names: the compressor is module 0, the projector modules 1 and 3."""
        width, inputs = vision.width, len(self.taps) * vision.width
        entries: list[Entry] = []

        def norm(native: str, torch: str) -> None:
            entries.extend(norm_entries(f"connector/{native}", _PREFIX + torch, width=width))

        name = f"{_PREFIX}text_projection.0"
        entries += linear_entries("connector/text/linear", name, inputs=text.width, outputs=width)
        norm("text/norm", "text_projection.1")
        for native, torch, columns in (
            ("query", "q_proj", width),
            ("key", "k_proj", inputs),
            ("value", "v_proj", inputs),
        ):
            entries += mlp_entries(
                f"connector/{native}/mlp",
                f"{_PREFIX}{torch}.",
                inputs=columns,
                hidden=width,
                outputs=width,
            )
            norm(f"{native}/norm", f"{torch}.3")
        shape, to = (width, 1, self.stride, self.stride), (self.stride**2, width)
        name = f"{_PREFIX}q_downsample"
        entries.append(
            make_entry("connector/window/kernel", f"{name}.weight", shape, to, _depthwise())
        )
        entries.append(
            make_entry("connector/window/bias", f"{name}.bias", (width,), (width,), SAME)
        )
        name = f"{_PREFIX}clip_attn"
        entries += attention_entries("connector/attention", name, width=width, heads=self.heads)
        projector = mlp_entries(
            "connector/projector",
            "mm_projector.",
            inputs=width,
            hidden=self.projector_width,
            outputs=text.width,
            modules=(1, 3),
        )
        return (*entries, *projector)

    @classmethod
    def recognizes(cls, shapes: Shapes, vision: VisionConfig) -> bool:
        """The depthwise convolution is its own."""
        return f"{_PREFIX}q_downsample.weight" in shapes

    @classmethod
    def fields_of(
        cls,
        shapes: Shapes,
        vision: VisionConfig,
        *,
        selected: Callable[[], int],
        given: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The window follows from the convolution, the taps from their number."""
        name = f"{_PREFIX}q_downsample.weight"
        if name not in shapes:
            raise ValueError(f"there is no {name}: these are no weights of QueCC")
        rows, _ = matrix(shapes, "mm_projector.1.weight")
        fields = {"stride": shapes[name][-1], "projector_width": rows}
        if "taps" in given:
            return fields
        _, columns = matrix(shapes, f"{_PREFIX}k_proj.0.weight")
        if columns != len(cls.taps) * vision.width:
            raise ValueError(
                f"{_PREFIX}k_proj.0.weight takes {columns} channels, and nothing says of which "
                'hidden states; add "mm_system": {"taps": [...]} to config.json'
            )
        return {**fields, "taps": list(cls.taps)}

    @classmethod
    def read_hf(cls, hf: Mapping[str, Any]) -> dict[str, Any] | None:
        """The released keys name the window; so do the weights."""
        return {} if hf.get(_TYPE) == cls.name else None

    def hf_keys(self, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """The released keys."""
        return {_TYPE: self.name, _KERNEL: self.stride, _STRIDE: self.stride}


def _depthwise() -> Transform:
    """A depthwise convolution as wide as its window: [C, 1, S, S] <-> [S*S, C]."""

    def torch(array: np.ndarray) -> np.ndarray:
        side = math.isqrt(len(array))
        return transpose(array).reshape(-1, 1, side, side)

    return Transform(lambda tensor: transpose(tensor.reshape(len(tensor), -1)), torch)


class QueCCConnector(Connector):
    """One query a window, made with the question, over the patches of the window."""

    def __init__(self, system: QueCC, vision: VisionConfig, text: TextConfig, *, init: Init):
        width, blocks = vision.width, len(system.taps)
        self.stride = system.stride
        self.text = NormedLinear(text.width, width, init=init)
        self.query = NormedMLP(width, width, init=init)
        self.key = NormedMLP(blocks * width, width, init=init)
        self.value = NormedMLP(blocks * width, width, init=init)
        self.window = WindowQuery(system.stride, width, init=init)
        self.attention = WindowAttention(width, system.heads, init=init)
        super().__init__(**system.widths(vision, text), init=init)

    def __call__(
        self, features: VisionFeatures, question: Float[Array, "B H"] | None = None
    ) -> Tokens:
        """K tokens of each image, in raster order."""
        assert question is not None
        with jax.named_scope("quecc"):
            compressed = self.compress(features.taps, self.text(question))
        return Tokens(values=self.project(compressed))

    def compress(
        self, taps: tuple[Float[Array, "B P C"], ...], text: Float[Array, "B C"]
    ) -> Float[Array, "B K C"]:
        """One token a window; `text` is the question in the width of the tower."""
        queries = self.window(self.windows(self.query(taps[-1] + text[:, None])))
        blocks = jnp.concatenate(taps, axis=-1)
        keys, values = (self.windows(part(blocks)) for part in (self.key, self.value))
        return self.attention(queries, keys, values)

    def windows(self, x: Float[Array, "B P C"]) -> Float[Array, "B K W C"]:
        """The patches of each window, row by row."""
        fused = spatial_token_fusion(x, window=self.stride, out=self.rules.tokens)
        shape = (*fused.shape[:2], self.stride**2, x.shape[-1])
        return jax.lax.reshape(fused, shape, out_sharding=self.rules.tokens)


class NormedLinear(nnx.Module):
    """Linear, then LayerNorm."""

    def __init__(self, inputs: int, width: int, *, init: Init):
        self.rules = rules = init.rules
        self.linear = Linear((inputs,), (width,), init=init, kernel=rules.vector, bias=rules.vector)
        self.norm = LayerNorm(width, epsilon=_NORM_EPS, init=init)

    def __call__(self, x: Float[Array, "B _"]) -> Float[Array, "B C"]:
        """In the width of the tower."""
        return self.norm(self.linear(x, out=self.rules.tokens))


class NormedMLP(nnx.Module):
    """Linear, GELU, Linear, then LayerNorm."""

    def __init__(self, inputs: int, width: int, *, init: Init):
        self.mlp = MLP(inputs, width, width, init=init)
        self.norm = LayerNorm(width, epsilon=_NORM_EPS, init=init)

    def __call__(self, x: Float[Array, "B P _"]) -> Float[Array, "B P C"]:
        """In the width of the tower."""
        return self.norm(self.mlp(x, activation=gelu))


class WindowQuery(nnx.Module):
    """A depthwise convolution whose stride is its window: one row of weights a channel."""

    def __init__(self, stride: int, width: int, *, init: Init):
        self.kernel = init.normal(stride**2, width, spec=init.rules.vector)
        self.bias = init.zeros(width, spec=init.rules.vector)

    def __call__(self, x: Float[Array, "B K W C"]) -> Float[Array, "B K C"]:
        """The weighted sum over each window."""
        return (x * self.kernel[...]).sum(axis=2) + self.bias[...]


class WindowAttention(PackedAttention):
    """Each query attends to its own window."""

    def __call__(
        self,
        queries: Float[Array, "B K C"],
        keys: Float[Array, "B K W C"],
        values: Float[Array, "B K W C"],
    ) -> Float[Array, "B K C"]:
        """No residual and no norm follow."""
        query, key, value = self.split(queries, keys, values)
        weights = self.weigh(query, key)
        return self.join(jnp.einsum("bknw,bkwnd->bknd", weights.astype(value.dtype), value))

    def weigh(
        self, query: Float[Array, "B K N D"], key: Float[Array, "B K W N D"]
    ) -> Float[Array, "B K N W"]:
        """Attention over a window, in float32."""
        scores = jnp.einsum(
            "bknd,bkwnd->bknw", query, key, preferred_element_type=jnp.float32
        ) / math.sqrt(query.shape[-1])
        return jax.nn.softmax(scores, axis=-1)
