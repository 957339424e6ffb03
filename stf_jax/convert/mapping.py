"""Which PyTorch tensor is which native parameter: one table for each part of a model.

Tensors have canonical names here: those of `transformers` for the tower (`vision_model.*`) and the
language model (`model.*`, `lm_head.weight`), and LLaVA's for what lies between (`mm_projector.*`,
`mm_projector_crosslayer.*`). How each published layout spells them is in `stf_jax.convert.layouts`.
"""

import dataclasses
import re

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.convert.transforms import (
    LINEAR,
    SAME,
    Transform,
    embedding,
    head,
    join_heads,
    patches,
    split_head_bias,
    split_heads,
    windows,
)
from stf_jax.systems.base import FusionConfig, LlavaConfig

PROJECTOR = "mm_projector."
CROSSLAYER = "mm_projector_crosslayer."
TOWER = "vision_model."

# Buffers that some releases of transformers saved; they are computed anew and hold no weight.
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|position_ids)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One native parameter, and the tensor or the tensors, one a layer, that it is made of."""

    native: str  # "text/layers/mlp/up/kernel"
    torch: str  # "model.layers.{}.mlp.up_proj.weight"
    shape: tuple[int, ...]  # of each tensor
    native_shape: tuple[int, ...]  # of the parameter
    transform: Transform
    layers: int | None = None  # None: not stacked

    @property
    def tensors(self) -> tuple[str, ...]:
        """The canonical names of its tensors, in the order of the stack."""
        if self.layers is None:
            return (self.torch,)
        return tuple(self.torch.format(layer) for layer in range(self.layers))


def table(config: LlavaConfig, *, vocabulary: int | None = None) -> tuple[Entry, ...]:
    """Every parameter of the model.

    Args:
        config: The native model.
        vocabulary: Rows of the PyTorch embedding, where they are not `config.text.vocab_size`.
    """
    return (
        *tower_entries(config.vision, layers=max(config.fusion.taps)),
        *fusion_entries(config),
        *text_entries(config.text, vocabulary=vocabulary or config.text.vocab_size),
    )


def carried(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that the model does not compute with but that belong to the checkpoint: their shapes.

    They are the tower's layers after the last tap and its last norm.
    """
    computed = {
        name
        for entry in tower_entries(config.vision, layers=max(config.fusion.taps))
        for name in entry.tensors
    }
    whole = {
        name: entry.shape
        for entry in tower_entries(config.vision, layers=config.vision.layers)
        for name in entry.tensors
    }
    norm = {f"{TOWER}post_layernorm.{kind}": (config.vision.width,) for kind in ("weight", "bias")}
    return {name: shape for name, shape in (whole | norm).items() if name not in computed}


def is_buffer(name: str) -> bool:
    """Whether this is a buffer, of any shape and dtype, rather than a weight."""
    return _BUFFERS.fullmatch(name) is not None


def tower_entries(vision: VisionConfig, *, layers: int) -> tuple[Entry, ...]:
    """The CLIP tower up to and with encoder layer `layers`."""
    width, hidden = vision.width, vision.mlp_width
    heads, head_dim = vision.heads, vision.head_dim
    patch = vision.patch_size

    def one(native: str, torch: str, *shape: int) -> Entry:
        return _entry(f"vision/{native}", TOWER + torch, shape, shape, SAME)

    def stacked(
        native: str, torch: str, shape: tuple[int, ...], to: tuple[int, ...], transform: Transform
    ) -> Entry:
        name = f"{TOWER}encoder.layers.{{}}.{torch}"
        return _entry(f"vision/layers/{native}", name, shape, to, transform, layers=layers)

    entries = [
        _entry(
            "vision/patch_embedding/kernel",
            f"{TOWER}embeddings.patch_embedding.weight",
            (width, 3, patch, patch),
            (patch * patch * 3, width),
            patches(patch),
        ),
        one("class_embedding", "embeddings.class_embedding", width),
        one(
            "position_embedding", "embeddings.position_embedding.weight", vision.patches + 1, width
        ),
        one("pre_norm/scale", "pre_layrnorm.weight", width),
        one("pre_norm/bias", "pre_layrnorm.bias", width),
    ]
    for native, torch in (("attention_norm", "layer_norm1"), ("mlp_norm", "layer_norm2")):
        entries += [
            stacked(f"{native}/scale", f"{torch}.weight", (width,), (width,), SAME),
            stacked(f"{native}/bias", f"{torch}.bias", (width,), (width,), SAME),
        ]
    for native, torch in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        entries += [
            stacked(
                f"attention/{native}/kernel",
                f"self_attn.{torch}.weight",
                (width, width),
                (width, heads, head_dim),
                split_heads(heads),
            ),
            stacked(
                f"attention/{native}/bias",
                f"self_attn.{torch}.bias",
                (width,),
                (heads, head_dim),
                split_head_bias(heads),
            ),
        ]
    entries += [
        stacked(
            "attention/output/kernel",
            "self_attn.out_proj.weight",
            (width, width),
            (heads, head_dim, width),
            join_heads(heads),
        ),
        stacked("attention/output/bias", "self_attn.out_proj.bias", (width,), (width,), SAME),
    ]
    for native, torch, inputs, outputs in (
        ("linear_1", "fc1", width, hidden),
        ("linear_2", "fc2", hidden, width),
    ):
        entries += [
            stacked(
                f"mlp/{native}/kernel",
                f"mlp.{torch}.weight",
                (outputs, inputs),
                (inputs, outputs),
                LINEAR,
            ),
            stacked(f"mlp/{native}/bias", f"mlp.{torch}.bias", (outputs,), (outputs,), SAME),
        ]
    return tuple(entries)


def fusion_entries(config: LlavaConfig) -> tuple[Entry, ...]:
    """MBTF, where the model has it, and the projector: what a stage-1 adapter holds."""
    fusion, width = config.fusion, config.vision.width
    mbtf: tuple[Entry, ...] = ()
    if fusion.mbtf is not None:
        inputs = len(fusion.taps) * width
        mbtf = _mlp("fusion/mbtf", CROSSLAYER, inputs, fusion.mbtf.mlp_width, width, LINEAR)
    first: Transform = windows(fusion.window) if fusion.reduction == "stf" else LINEAR
    return (
        *mbtf,
        *_mlp(
            "projector",
            PROJECTOR,
            projector_inputs(fusion, width),
            fusion.projector_width,
            config.text.width,
            first,
        ),
    )


def projector_inputs(fusion: FusionConfig, width: int) -> int:
    """Width of one fused token, for a tower of this width."""
    return width * fusion.window**2 if fusion.reduction == "stf" else width


def text_entries(text: TextConfig, *, vocabulary: int) -> tuple[Entry, ...]:
    """The LLaMA decoder, its embedding and its head."""
    width, hidden = text.width, text.mlp_width
    heads, head_dim = text.heads, text.head_dim
    padded = text.padded_vocab_size

    def stacked(
        native: str, torch: str, shape: tuple[int, ...], to: tuple[int, ...], transform: Transform
    ) -> Entry:
        name = f"model.layers.{{}}.{torch}.weight"
        return _entry(f"text/layers/{native}", name, shape, to, transform, layers=text.layers)

    entries = [
        _entry(
            "text/embedding",
            "model.embed_tokens.weight",
            (vocabulary, width),
            (padded, width),
            embedding(vocabulary, padded),
        ),
        stacked("attention_norm/scale", "input_layernorm", (width,), (width,), SAME),
        stacked("mlp_norm/scale", "post_attention_layernorm", (width,), (width,), SAME),
    ]
    for native, torch, count in (
        ("query", "q_proj", heads),
        ("key", "k_proj", text.kv_heads),
        ("value", "v_proj", text.kv_heads),
    ):
        entries.append(
            stacked(
                f"attention/{native}/kernel",
                f"self_attn.{torch}",
                (count * head_dim, width),
                (width, count, head_dim),
                split_heads(count),
            )
        )
    entries.append(
        stacked(
            "attention/output/kernel",
            "self_attn.o_proj",
            (width, heads * head_dim),
            (heads, head_dim, width),
            join_heads(heads),
        )
    )
    for native, torch, inputs, outputs in (
        ("gate", "gate_proj", width, hidden),
        ("up", "up_proj", width, hidden),
        ("down", "down_proj", hidden, width),
    ):
        entries.append(
            stacked(
                f"mlp/{native}/kernel",
                f"mlp.{torch}",
                (outputs, inputs),
                (inputs, outputs),
                LINEAR,
            )
        )
    entries.append(_entry("text/norm/scale", "model.norm.weight", (width,), (width,), SAME))
    if not text.tie_embeddings:
        entries.append(
            _entry(
                "text/head/kernel",
                "lm_head.weight",
                (vocabulary, width),
                (width, padded),
                head(vocabulary, padded),
            )
        )
    return tuple(entries)


def _entry(
    native: str,
    torch: str,
    shape: tuple[int, ...],
    to: tuple[int, ...],
    transform: Transform,
    *,
    layers: int | None = None,
) -> Entry:
    return Entry(
        native=native,
        torch=torch,
        shape=shape,
        native_shape=to if layers is None else (layers, *to),
        transform=transform,
        layers=layers,
    )


def _mlp(
    native: str, torch: str, inputs: int, hidden: int, outputs: int, first: Transform
) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    for number, module, rows, columns, transform in (
        (1, 0, hidden, inputs, first),
        (2, 2, outputs, hidden, LINEAR),
    ):
        to, name = f"{native}/linear_{number}", f"{torch}{module}"
        entries += [
            _entry(f"{to}/kernel", f"{name}.weight", (rows, columns), (columns, rows), transform),
            _entry(f"{to}/bias", f"{name}.bias", (rows,), (rows,), SAME),
        ]
    return tuple(entries)
