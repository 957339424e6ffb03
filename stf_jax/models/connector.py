"""What lies between the vision tower and the language model: what it takes, and what it gives."""

import dataclasses
import itertools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.data.batch import ClipLayout
from stf_jax.data.templates import ImagesFirst
from stf_jax.models.cache import Split
from stf_jax.models.layers import MLP, Init, gelu
from stf_jax.models.llama import Llama
from stf_jax.models.lora import LoRAConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassAttention:
    """What the class token asks of the patches in the block after the last tap.

    Both are raw projections, with bias and without the scale, not split into heads.

    Attributes:
        query: of the class token.
        keys: of the class token, which is first, and of the patches.
    """

    query: Float[Array, "B C"]
    keys: Float[Array, "B _ C"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionFeatures:
    """What the tower found in each image.

    Attributes:
        taps: M hidden states, in the order of the system's taps; no class token, raster order.
        class_attention: where the system captures it.
        extra: the last hidden state of the extra tokens, where the system has some.
    """

    taps: tuple[Float[Array, "B P C"], ...]
    class_attention: ClassAttention | None = None
    extra: Float[Array, "B E C"] | None = None

    def pack(self) -> Float[Array, "B N C"]:
        """One array of all but `extra`: the taps, then the class token's query, then the keys."""
        parts = [*self.taps]
        if self.class_attention is not None:
            parts += [self.class_attention.query[:, None], self.class_attention.keys]
        return jnp.concatenate(parts, axis=1)

    @classmethod
    def unpack(
        cls, packed: Float[Array, "B N C"], *, taps: int, captures: bool
    ) -> "VisionFeatures":
        """What `pack` made one array of.

        Args:
            packed: the array.
            taps: M.
            captures: whether `class_attention` is in it.
        """
        # The class token has a query and a key beside those of the patches.
        patches = (packed.shape[1] - 2) // (taps + 1) if captures else packed.shape[1] // taps
        ends = [patches * number for number in range(taps + 1)]
        end = ends[-1]
        attention = None
        if captures:
            attention = ClassAttention(query=packed[:, end], keys=packed[:, end + 1 :])
        return cls(
            taps=tuple(packed[:, first:last] for first, last in itertools.pairwise(ends)),
            class_attention=attention,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """K tokens an image, in the width of the language model.

    Attributes:
        values: of the tokens.
        valid: False where an image has fewer than K and a slot holds nothing; None is all valid.
            The last slot of an image is always valid, so that what follows the image is predicted
            from it.
    """

    values: Float[Array, "B K H"]
    valid: Bool[Array, "B K"] | None = None


class Connector(nnx.Module):
    """Fewer tokens, then LLaVA-1.5's projector: Linear, GELU, Linear.

    LLaVA-1.5 (arXiv 2310.03744) keeps every token of its one tap; a system that makes fewer writes
    `reduce`.

    Args:
        inputs: channels of a token before the projector.
        width: between the two linear layers.
        outputs: H, the width of the language model.
        init: of the weights.
    """

    def __init__(self, *, inputs: int, width: int, outputs: int, init: Init):
        self.rules = init.rules
        self.projector = MLP(inputs, width, outputs, init=init)

    def __call__(
        self, features: VisionFeatures, question: Float[Array, "B H"] | None = None
    ) -> Tokens:
        """Tokens of each image, in raster order.

        Args:
            features: of the images.
            question: what each is asked, as the language model reads it alone; given where the
                system reads questions.
        """
        del question
        return Tokens(values=self.project(self.reduce(features)))

    def project(self, x: Float[Array, "B K _"]) -> Float[Array, "B K H"]:
        """LLaVA-1.5's projector."""
        with jax.named_scope("projector"):
            return self.projector(x, activation=gelu)

    def extra_tokens(self) -> Float[Array, "E C"] | None:
        """What goes through the tower behind the patches, which do not see it."""
        return None

    def shrink(self, tokens: Tokens, budget: int) -> Tokens:
        """The same images in `budget` tokens; a system with several budgets writes it."""
        raise NotImplementedError(f"{type(self).__name__} has one budget")

    def views(self, tokens: Tokens) -> tuple[Tokens, ...]:
        """What a training step takes the mean loss over, each with K slots an image."""
        return (tokens,)

    def join(
        self, tokens: Tokens, *, rows: int, clips: Int[Array, "B C F"] | None = None
    ) -> Tokens:
        """Tokens of a row's images one after the other: [B*I, K, ...] -> [B, I*K, ...].

        Args:
            tokens: of each image.
            rows: B.
            clips: of the batch; a system that makes one thing of a clip's frames writes this.
        """
        del clips

        def join(array: Array) -> Array:
            images = array.shape[0] // rows
            row = (rows, images * array.shape[1], *array.shape[2:])
            return jax.lax.reshape(array, row, out_sharding=self.rules.tokens)

        joined: Tokens = jax.tree.map(join, tokens)
        return joined

    def reduce(self, features: VisionFeatures) -> Float[Array, "B K _"]:
        """Every patch of the one tap."""
        (tap,) = features.taps
        return tap


@runtime_checkable
class ConnectedSystem(Protocol):
    """What the networks ask of a system; `stf_jax.systems.base.System` is one."""

    @property
    def taps(self) -> tuple[int, ...]:
        """The hidden states of the tower that are read."""

    def connector(self, vision: VisionConfig, text: TextConfig, *, init: Init) -> Connector:
        """The module between the tower and the language model."""

    def decoder(
        self, vision: VisionConfig, text: TextConfig, *, init: Init, lora: LoRAConfig | None
    ) -> Llama:
        """The language model, with new weights."""

    def flops(self, vision: VisionConfig, text: TextConfig) -> float:
        """Arithmetic of the connector for one image."""

    def layer_lengths(
        self, vision: VisionConfig, text: TextConfig, *, length: int, images: int
    ) -> tuple[int, ...]:
        """Positions that each layer of the decoder computes of a prompt of `length`."""

    def decoder_flops(
        self, vision: VisionConfig, text: TextConfig, *, length: int, images: int
    ) -> float:
        """Arithmetic of a prompt of `length` in the decoder beside `layer_lengths`."""

    def training_flops(
        self, vision: VisionConfig, text: TextConfig, *, length: int, images: int
    ) -> float:
        """What a training step adds in the decoder to layers over a row, with its gradients."""

    def describe(self) -> str:
        """One line: the name, and the fields."""

    @property
    def captures(self) -> bool:
        """Whether the connector reads `ClassAttention`."""

    @property
    def extra_count(self) -> int:
        """E, the tokens that go through the tower behind the patches."""

    def clip_layout(self, frames: int) -> ClipLayout | None:
        """The slots of a clip of at most so many frames; None where frames are images like any."""

    def budgets(self, vision: VisionConfig) -> tuple[int, ...]:
        """Every number of tokens that an image can have; the most first."""

    def training_budgets(self, vision: VisionConfig) -> tuple[int, ...]:
        """Tokens an image of each view that a training step takes the mean loss over."""

    def split(self, ids: Int[np.ndarray, "T"]) -> Split:
        """What of a prompt is prefilled, and what is computed against that cache."""

    def held(self, ids: Int[np.ndarray, "T"], vision: VisionConfig) -> tuple[int, ...]:
        """Slots that a prompt takes in the cache, by group of layers."""

    @property
    def compacts(self) -> bool:
        """Whether some layers compute or hold fewer positions than a row has."""


@runtime_checkable
class Architecture(Protocol):
    """The sizes of a whole model; `stf_jax.systems.base.LlavaConfig` is one."""

    @property
    def vision(self) -> VisionConfig:
        """The tower."""

    @property
    def text(self) -> TextConfig:
        """The language model."""

    @property
    def system(self) -> ConnectedSystem:
        """What makes an image's tokens."""

    @property
    def image_size(self) -> int:
        """The side in pixels at which the tower sees an image."""

    @property
    def tokens_per_image(self) -> int:
        """K, the tokens of an image that the language model sees."""

    @property
    def images_first(self) -> ImagesFirst | None:
        """How images come in front of a conversation; None leaves them where they are."""

    @property
    def question_length(self) -> int:
        """Tokens of an image's question that the connector reads; 0 where it reads none."""

    def choose_budget(self, tokens: int | None) -> int:
        """The tokens of an image, as asked for; None is the most."""
