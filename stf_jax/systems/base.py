"""What a system is, and the config of a whole model.

A system is one way to show an image to the language model in few tokens. It is a frozen dataclass:
its fields are its keys in YAML and in checkpoints, its methods are what it changes. What a subclass
does not write is LLaVA-1.5's (arXiv 2310.03744).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from jaxtyping import Int

from stf_jax.config.checks import check_positive
from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.data.batch import ClipLayout
from stf_jax.data.templates import ImagesFirst
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.models.cache import Split
from stf_jax.models.connector import Connector
from stf_jax.models.layers import Init
from stf_jax.models.llama import Llama
from stf_jax.models.lora import LoRAConfig
from stf_jax.models.weights import LINEAR, Entry, Transform, mlp_entries
from stf_jax.systems.shapes import Shapes, matrix

# What llama.cpp calls its projectors that compute one of the systems.
LlamaCppProjector = Literal["mlp", "ldpv2"]

_System = TypeVar("_System", bound="System")


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """LLaVA-1.5's parts, which a system changes one by one.

    Attributes:
        taps: indices into the tower's hidden states: 0 is the embedding, k the output of layer k.
        projector_width: between the two linear layers of the projector.
    """

    taps: tuple[int, ...] = (23,)
    projector_width: int = 4096

    # Tokens of an image's question that the connector reads.
    question_length = 0

    # A token that the language model's vocabulary gets a row for; the field `token_id` is its id.
    own_token: ClassVar[str | None] = None

    # Its name in YAML, in checkpoints and on the command line.
    name: ClassVar[str]
    # Its name in tables and plots.
    title: ClassVar[str]
    # What named sizes begin with: "llava_stf" for "llava_stf_7b".
    family: ClassVar[str]
    # Scores of the 7B model by benchmark, as its paper states them.
    published: ClassVar[Mapping[str, float]] = {}
    # The keys of config.json by which its published code knows such a model.
    published_keys: ClassVar[tuple[str, ...]] = ()
    # `model_type` and `architectures` of its published code's config.json.
    model_type: ClassVar[str] = "llava_llama"
    architecture: ClassVar[str] = "LlavaLlamaForCausalLM"
    # What the tensors of its connector begin with, and the layout that each prefix tells.
    prefixes: ClassVar[Mapping[str, str]] = {"mm_projector.": "llava"}

    def __post_init__(self) -> None:
        check_positive(self, "projector_width")
        if not self.taps or min(self.taps) < 0 or max(self.taps) == 0:
            raise ValueError(
                f"taps {self.taps} must be one or more hidden states, from 0 on, not all 0"
            )

    @classmethod
    def for_model(cls: type[_System], *, vision: VisionConfig, text: TextConfig) -> _System:
        """The system with its published proportions, for a tower and a language model."""
        fields: dict[str, Any] = {"taps": (vision.layers - 1,), "projector_width": text.width}
        return cls(**fields | cls.proportions(vision, text))

    @classmethod
    def proportions(cls, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """The fields that follow from the sizes of a tower and a language model."""
        del vision, text
        return {}

    @classmethod
    def variants(cls, *, vision: VisionConfig, text: TextConfig) -> Mapping[str, "Variant"]:
        """The forms of this system that a comparison shows, by name."""
        return {cls.name: Variant(title=cls.title, system=cls.for_model(vision=vision, text=text))}

    def check(self, vision: VisionConfig, text: TextConfig) -> None:
        """Refuses a tower or a language model that this system does not fit.

        Raises:
            ValueError: what does not fit.
        """
        if len(self.taps) > 1:
            raise ValueError(f"{self.title} reads one hidden state; taps is {self.taps}")

    # --- What it computes.

    def image_size(self, vision: VisionConfig) -> int:
        """The side in pixels at which the tower sees an image."""
        return vision.image_size

    def tokens(self, vision: VisionConfig) -> int:
        """K, the tokens of an image that the language model sees."""
        return (self.image_size(vision) // vision.patch_size) ** 2

    def clip_layout(self, frames: int) -> ClipLayout | None:
        """The slots of a clip of at most so many frames; None where frames are images like any."""
        del frames
        return None

    def budgets(self, vision: VisionConfig) -> tuple[int, ...]:
        """Every number of tokens that an image can have, chosen at generation; the most first."""
        return (self.tokens(vision),)

    def training_budgets(self, vision: VisionConfig) -> tuple[int, ...]:
        """Tokens an image of each view that a training step takes the mean loss over."""
        return (self.tokens(vision),)

    @property
    def captures(self) -> bool:
        """Whether the connector reads how the class token attends after the last tap."""
        return False

    @property
    def extra_count(self) -> int:
        """Tokens that go through the tower behind the patches."""
        return 0

    def token_width(self, vision: VisionConfig) -> int:
        """Channels of a token before the projector."""
        return vision.width

    def connector(self, vision: VisionConfig, text: TextConfig, *, init: Init) -> Connector:
        """The module between the tower and the language model, with new weights."""
        return Connector(**self.widths(vision, text), init=init)

    def decoder(
        self, vision: VisionConfig, text: TextConfig, *, init: Init, lora: LoRAConfig | None
    ) -> Llama:
        """The language model, with new weights; a system that changes it has its own subclass."""
        del vision
        return Llama(text, init=init, lora=lora)

    def widths(self, vision: VisionConfig, text: TextConfig) -> dict[str, int]:
        """The sizes of the projector: inputs, width, outputs."""
        return {
            "inputs": self.token_width(vision),
            "width": self.projector_width,
            "outputs": text.width,
        }

    # --- How a prompt is laid out and goes through the decoder, on the host.

    @property
    def images_first(self) -> ImagesFirst | None:
        """How images come in front of a conversation; None where they stand inside it."""
        return None

    def split(self, ids: Int[np.ndarray, "T"]) -> Split:
        """What of a prompt is prefilled, and what is computed against that cache.

        Questions about the same images share the first positions: all up to the last image; without
        images, all but the last one.
        """
        images = np.flatnonzero(ids == IMAGE_TOKEN_ID)
        end = int(images[-1]) + 1 if len(images) else len(ids) - 1
        return Split(prefilled=end, start=end)

    def held(self, ids: Int[np.ndarray, "T"], vision: VisionConfig) -> tuple[int, ...]:
        """Slots that a prompt takes in the cache, by group of layers."""
        del vision
        return (len(ids),)

    @property
    def compacts(self) -> bool:
        """Whether some layers compute or hold fewer positions than a row has."""
        return False

    # --- What it costs, and where it lies.

    def flops(self, vision: VisionConfig, text: TextConfig) -> float:
        """Arithmetic of the connector for one image, two FLOPs a product."""
        products = self.projector_width * (self.token_width(vision) + text.width)
        return 2.0 * self.tokens(vision) * products

    def layer_lengths(
        self, vision: VisionConfig, text: TextConfig, *, length: int, images: int
    ) -> tuple[int, ...]:
        """Positions that each layer of the decoder computes of a prompt of `length`."""
        del vision, images
        return (length,) * text.layers

    def decoder_flops(
        self, vision: VisionConfig, text: TextConfig, *, length: int, images: int
    ) -> float:
        """Arithmetic of a prompt of `length` in the decoder beside `layer_lengths`."""
        del vision, text, length, images
        return 0.0

    def training_flops(
        self, vision: VisionConfig, text: TextConfig, *, length: int, images: int
    ) -> float:
        """What a training step adds in the decoder to layers over a row, with its gradients."""
        return 3 * self.decoder_flops(vision, text, length=length, images=images)

    def tensor_sizes(self) -> dict[str, int]:
        """The sizes that the mesh axis `tensor` splits, by name."""
        return {"projector_width": self.projector_width}

    # --- PyTorch's checkpoints.

    def weights(self, vision: VisionConfig, text: TextConfig) -> tuple[Entry, ...]:
        """Every parameter of the connector, and the tensor that it is in PyTorch."""
        return self.projector_weights(vision, text, first=LINEAR)

    def decoder_weights(self, vision: VisionConfig, text: TextConfig) -> tuple[Entry, ...]:
        """What the language model has beside LLaMA's parameters; every stage trains it."""
        del vision, text
        return ()

    def projector_weights(
        self, vision: VisionConfig, text: TextConfig, *, first: Transform
    ) -> tuple[Entry, ...]:
        """The projector, the first of whose weights is changed by `first`."""
        return mlp_entries(
            "connector/projector",
            "mm_projector.",
            inputs=self.token_width(vision),
            hidden=self.projector_width,
            outputs=text.width,
            first=first,
        )

    @classmethod
    def recognizes(cls, shapes: Shapes, vision: VisionConfig) -> bool:
        """Whether the weights alone tell that a checkpoint is of this system."""
        del shapes, vision
        return False

    @classmethod
    def fields_of(
        cls,
        shapes: Shapes,
        vision: VisionConfig,
        *,
        selected: Callable[[], int],
        given: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The fields that the weights of a checkpoint tell.

        Args:
            shapes: its tensors.
            vision: its tower.
            selected: gives the one hidden state that config.json selects; refuses a list.
            given: the fields that config.json names.

        Raises:
            ValueError: weights that fit no model of this system.
        """
        del vision
        rows, _ = matrix(shapes, "mm_projector.0.weight")
        taps = [] if "taps" in given else [selected()]
        return {"taps": taps, "projector_width": rows, **cls.own_fields(shapes)}

    @classmethod
    def own_fields(cls, shapes: Shapes) -> dict[str, Any]:
        """Of those, what is no field of LLaVA-1.5.

        Raises:
            ValueError: weights that fit no model of this system.
        """
        del shapes
        return {}

    @classmethod
    def read_hf(cls, hf: Mapping[str, Any]) -> dict[str, Any] | None:
        """The fields that a config.json of its published checkpoints names; None if it is none."""
        del hf
        return None

    def hf_keys(self, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """The keys of config.json by which its published code knows such a model."""
        del vision, text
        return {}

    def rename(self, name: str) -> str:
        """What its published code calls a tensor of this canonical name."""
        return name

    @property
    def layout(self) -> str:
        """The PyTorch layout that holds such a model."""
        return "llava"

    def hf_code(self, vision: VisionConfig) -> dict[str, Any]:
        """What `convert/hf_code` is told to compute this system in PyTorch.

        Raises:
            ValueError: it cannot; what can.
        """
        del vision
        raise ValueError(
            f"{self.title} acts inside the language model, which is transformers' own there; use "
            f"--layout {self.layout}"
        )

    @property
    def fits_transformers(self) -> bool:
        """Whether `transformers.LlavaForConditionalGeneration` computes this system."""
        return False

    def llama_cpp(self, vision: VisionConfig) -> Mapping[int, LlamaCppProjector]:
        """The projector of llama.cpp that computes this system, by tokens an image; none: empty."""
        del vision
        return {}

    # --- In words and in files.

    def describe(self) -> str:
        """One line for `inspect`: the name, and the fields that are not the projector's."""
        fields = {**dataclasses.asdict(self), "taps": ", ".join(map(str, self.taps))}
        del fields["projector_width"]
        for key, value in fields.items():
            if isinstance(value, Mapping):
                fields[key] = ", ".join(f"{name} {part}" for name, part in value.items())
        return "; ".join([self.name, *(f"{key} {value}" for key, value in fields.items())])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, `name` among them."""
        return {"name": self.name, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A system as a comparison shows it."""

    title: str
    system: System


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """A whole vision-language model; `stf_jax.systems` makes one by name or from a dictionary."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    system: System

    def __post_init__(self) -> None:
        last, layers = max(self.system.taps), self.vision.layers
        if last > layers:
            proposed = self.system.for_model(vision=self.vision, text=self.text).taps
            raise ValueError(
                f"tap {last} lies beyond the tower's {layers} layers; give taps up to {layers}, "
                f"such as {','.join(map(str, proposed))}"
            )
        if self.system.captures and last == layers:
            raise ValueError(
                f"tap {last} is the tower's last; {self.system.title} reads the attention of the "
                "layer after it"
            )
        self.system.check(self.vision, self.text)

    @property
    def tokens_per_image(self) -> int:
        """K, the tokens that the language model sees for one image."""
        return self.system.tokens(self.vision)

    def choose_budget(self, tokens: int | None) -> int:
        """The tokens of an image, as asked for; None is the most.

        Raises:
            ValueError: not a budget of the system; lists them.
        """
        budgets = self.system.budgets(self.vision)
        if tokens is None:
            return budgets[0]
        if tokens not in budgets:
            raise ValueError(
                f"{self.system.title} cannot show an image in {tokens} tokens; choose "
                f"{'among ' if len(budgets) > 1 else ''}{', '.join(map(str, budgets))}"
            )
        return tokens

    def clip_layout(self, frames: int) -> ClipLayout | None:
        """The slots of a clip of at most so many frames; None where frames are images like any."""
        return self.system.clip_layout(frames)

    @property
    def question_length(self) -> int:
        """Tokens of an image's question that the connector reads; 0 where it reads none."""
        return self.system.question_length

    @property
    def images_first(self) -> ImagesFirst | None:
        """How images come in front of a conversation; None where they stand inside it."""
        return self.system.images_first

    @property
    def image_size(self) -> int:
        """The side in pixels at which the tower sees an image."""
        return self.system.image_size(self.vision)

    def with_quantization(self, scheme: str | None) -> "LlavaConfig":
        """The same model with its language model stored in a scheme; None is as plain numbers.

        Raises:
            ValueError: the scheme is unknown, or does not divide the model.
        """
        return dataclasses.replace(self, text=dataclasses.replace(self.text, quantization=scheme))

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionaries, ready for JSON or YAML."""
        return {
            "vision": dataclasses.asdict(self.vision),
            "text": self._text(),
            "system": self.system.to_dict(),
        }

    def _text(self) -> dict[str, Any]:
        """Releases before quantization read what has none."""
        text = dataclasses.asdict(self.text)
        if text["quantization"] is None:
            del text["quantization"]
        return text
