"""VoCo-LLaMA: "VoCo-LLaMA: Towards Vision Compression with LLMs" (arXiv 2406.12275).

The language model itself compresses an image: behind the image stand n tokens `<voco>`, and no text
sees what stands before them. Training is one pass with this mask; at generation the cache keeps the
n tokens alone, so an image takes n slots in every layer and serves any number of questions.

    BOS  image  newline  voco voco  newline  A chat ...  USER: ...  ASSISTANT: ...
    <------ BEFORE ------>  VOCO    <----------------- text ----------------->
     seen by BEFORE, VOCO   seen by all      seen by text

As in the released code, the system text and the question come behind the vocos, BOS is hidden with
the image, and rotary positions count what is hidden. Own decisions, where nothing public says: all
images of a conversation come first and then n vocos for each, so that no text sees any image; the
keys `voco_num` and `voco_token_id` of config.json. Later turns of a chat see the vocos and all text
behind them; a new image comes in front, so everything is computed again.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from stf_jax.config.checks import check_positive
from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.data.templates import ImagesFirst
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.models.cache import CacheDType, KVCache, SlotGroup, Split
from stf_jax.models.layers import Init
from stf_jax.models.llama import Llama, take
from stf_jax.models.loop import run_layers
from stf_jax.models.lora import LoRAConfig
from stf_jax.models.marks import Marks, Rule, causal
from stf_jax.models.selection import gather_order, hide, take_rows
from stf_jax.systems.base import System
from stf_jax.systems.shapes import Shapes

# What stands before a sequence's first voco; and from its first voco to its last.
BEFORE, VOCO = 3, 4

_TOKEN = "<voco>"
_COUNT_KEY, _TOKEN_KEY = "voco_num", "voco_token_id"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VoCo(System):
    """LLaVA-1.5 whose images the text sees through a few tokens. Defaults: the paper's, over 7B.

    Attributes:
        count: vocos an image.
        token_id: of the token `<voco>`, whose row of the vocabulary is new.
    """

    count: int = 1
    token_id: int = 32000

    name: ClassVar[str] = "voco"
    title: ClassVar[str] = "VoCo-LLaMA"
    family: ClassVar[str] = "llava_voco"
    own_token: ClassVar[str | None] = _TOKEN
    published_keys: ClassVar = (_COUNT_KEY, _TOKEN_KEY)
    # With one token (paper, table 1).
    published: ClassVar = {
        "gqa": 57.0,
        "mmbench": 58.8,
        "mme": 1323.3,
        "pope": 81.4,
        "scienceqa": 65.4,
        "vqav2": 72.3,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "count")

    @classmethod
    def proportions(cls, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """The token is the last of the vocabulary."""
        return {"token_id": text.vocab_size - 1}

    def check(self, vision: VisionConfig, text: TextConfig) -> None:
        """The vocabulary has a row for the token."""
        super().check(vision, text)
        if not 0 <= self.token_id < text.vocab_size:
            raise ValueError(
                f"token_id {self.token_id} is no row of a vocabulary of {text.vocab_size}; "
                "stf-jax convert import --system voco adds one"
            )

    @property
    def images_first(self) -> ImagesFirst:
        """Images, vocos, then the conversation, whose system text speaks of the image."""
        return ImagesFirst(
            token=_TOKEN,
            token_id=self.token_id,
            count=self.count,
            behind="artificial intelligence assistant",
            inserted=" of the image",
        )

    def decoder(
        self, vision: VisionConfig, text: TextConfig, *, init: Init, lora: LoRAConfig | None
    ) -> Llama:
        """LLaMA with the rule of the vocos."""
        return VoCoLlama(
            text,
            token_id=self.token_id,
            tokens_per_image=self.tokens(vision),
            init=init,
            lora=lora,
        )

    def split(self, ids: Int[np.ndarray, "T"]) -> Split:
        """All up to the last voco is shared; without images, all but the last position."""
        vocos = np.flatnonzero(ids == self.token_id)
        if not len(vocos):
            return super().split(ids)
        end = int(vocos[-1]) + 1
        return Split(prefilled=end, start=end)

    def held(self, ids: Int[np.ndarray, "T"], vision: VisionConfig) -> tuple[int, ...]:
        """All from the first voco on.

        Raises:
            ValueError: images without their vocos, of which text would see nothing.
        """
        vocos = np.flatnonzero(ids == self.token_id)
        images = int((ids == IMAGE_TOKEN_ID).sum()) // self.tokens(vision)
        if len(vocos) != images * self.count:
            raise ValueError(
                f"the prompt has {images} images and {len(vocos)} {_TOKEN}, and "
                f"{self.title} needs {self.count} an image; let render_prompt write it, with the "
                "template that fit_template makes for this model's tokenizer"
            )
        return (len(ids) - int(vocos[0]) if len(vocos) else len(ids),)

    @property
    def compacts(self) -> bool:
        """What stands before the vocos is dropped."""
        return True

    @classmethod
    def own_fields(cls, shapes: Shapes) -> dict[str, Any]:
        """The token is the last of the vocabulary, where nothing names it."""
        table = shapes.get("model.embed_tokens.weight")
        return {} if table is None else {"token_id": table[0] - 1}

    @classmethod
    def read_hf(cls, hf: Mapping[str, Any]) -> dict[str, Any] | None:
        """Our own keys: the released code has the number as a literal, and published no weights."""
        if _COUNT_KEY not in hf:
            return None
        token = {"token_id": hf[_TOKEN_KEY]} if _TOKEN_KEY in hf else {}
        return {"count": hf[_COUNT_KEY], **token}

    def hf_keys(self, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """The same keys."""
        return {_COUNT_KEY: self.count, _TOKEN_KEY: self.token_id}


def rule(query: Marks, key: Marks) -> Bool[Array, "B T S"]:
    """Text sees the vocos and the text behind them; these see everything before themselves."""
    is_text = (query.kind != BEFORE) & (query.kind != VOCO)
    return causal(query, key) & ~(is_text & (key.kind == BEFORE))


class VoCoLlama(Llama):
    """LLaMA whose text sees nothing that stands before the vocos of its sequence.

    Args:
        config: of the language model.
        token_id: of `<voco>`.
        tokens_per_image: K.
        init: of the weights.
        lora: of the adapters.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        token_id: int,
        tokens_per_image: int,
        init: Init,
        lora: LoRAConfig | None = None,
    ):
        super().__init__(config, init=init, lora=lora)
        self.token_id, self.tokens_per_image = token_id, tokens_per_image

    @property
    def rule(self) -> Rule:
        """Nothing before the vocos is seen by text."""
        return rule

    def mark(self, ids: Int[Array, "B T"], marks: Marks) -> Marks:
        """Kinds from the vocos of each segment; one without any stays as it is."""
        index = jnp.arange(ids.shape[1])
        same = marks.segment[:, :, None] == marks.segment[:, None, :]
        vocos = same & (ids == self.token_id)[:, None, :]
        begun = (vocos & (index <= index[:, None])).any(axis=2)
        follows = (vocos & (index >= index[:, None])).any(axis=2)
        kind = jnp.where(follows, jnp.where(begun, VOCO, BEFORE), marks.kind)
        return dataclasses.replace(marks, kind=kind)

    def prefill(
        self,
        x: Float[Array, "B T H"],
        *,
        marks: Marks,
        last: Int[Array, "B"],
        images: int | None = None,
        cache_dtype: CacheDType | None = None,
    ) -> tuple[Float[Array, "B H"], KVCache]:
        """The masked pass, of whose cache everything before the vocos is dropped.

        With `images` in every row the cache has that many images' tokens fewer slots than T, which
        is all that a static shape can save; `dropped` counts the rest.
        """
        with jax.named_scope("decoder"):
            inputs = [self.inputs(marks)]
            x, _, pairs = run_layers(x, self.layers, inputs=inputs, rule=self.rule, keep=True)
            stays = marks.kind != BEFORE
            slots = x.shape[1] - (images or 0) * self.tokens_per_image
            order = gather_order(stays, slots)
            group = SlotGroup(
                marks=hide(marks, stays).take(order), dropped=(~stays).sum(axis=1, dtype=jnp.int32)
            )
            keys, values = (
                [take_rows(array, order) for array in arrays]
                for arrays in zip(*(pair for pair in pairs if pair is not None), strict=True)
            )
            return self.norm(take(x, last)), KVCache.of(keys, values, [group], dtype=cache_dtype)
