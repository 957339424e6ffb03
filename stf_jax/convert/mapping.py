"""Which PyTorch tensor is which native parameter: one table for each part of a model.

Tensors have canonical names here: those of `transformers` for the tower (`vision_model.*`) and the
language model (`model.*`, `lm_head.weight`), and LLaVA's for the connector, which its system lists.
How each published layout spells them is in `stf_jax.convert.layouts`.
"""

import re

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.weights import (
    LINEAR,
    SAME,
    Entry,
    Transform,
    embedding,
    head,
    join_heads,
    make_entry,
    patches,
    split_head_bias,
    split_heads,
)
from stf_jax.systems.base import LlavaConfig

TOWER = "vision_model."

# Buffers that some releases of transformers saved; they are computed anew and hold no weight.
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|position_ids)")


def table(config: LlavaConfig, *, vocabulary: int | None = None) -> tuple[Entry, ...]:
    """Every parameter of the model.

    Args:
        config: The native model.
        vocabulary: Rows of the PyTorch embedding, where they are not `config.text.vocab_size`.
    """
    return (
        *_computed_tower(config),
        *connector_entries(config),
        *text_entries(config.text, vocabulary=vocabulary or config.text.vocab_size),
        *config.system.decoder_weights(config.vision, config.text),
    )


def carried_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that the model does not compute with but that belong to the checkpoint: their shapes.

    They are the tower's layers after the last tap and its last norm.
    """
    computed = {name for entry in _computed_tower(config) for name in entry.tensors}
    whole = {
        name: entry.shape
        for entry in tower_entries(config.vision, layers=config.vision.layers)
        for name in entry.tensors
    }
    norm = {f"{TOWER}post_layernorm.{kind}": (config.vision.width,) for kind in ("weight", "bias")}
    return {name: shape for name, shape in (whole | norm).items() if name not in computed}


def _computed_tower(config: LlavaConfig) -> tuple[Entry, ...]:
    """Of the tower, what the model computes with."""
    last = max(config.system.taps)
    layers = tower_entries(config.vision, layers=last)
    if not config.system.captures:
        return layers
    return (*layers, *next_layer_entries(config.vision, layer=last))


def is_buffer(name: str) -> bool:
    """Whether this is a buffer, of any shape and dtype, rather than a weight."""
    return _BUFFERS.fullmatch(name) is not None


def tower_entries(vision: VisionConfig, *, layers: int) -> tuple[Entry, ...]:
    """The CLIP tower up to and with encoder layer `layers`."""
    width, hidden = vision.width, vision.mlp_width
    heads, head_dim = vision.heads, vision.head_dim
    patch = vision.patch_size

    def one(native: str, torch: str, *shape: int) -> Entry:
        return make_entry(f"vision/{native}", TOWER + torch, shape, shape, SAME)

    def stack_entry(
        native: str, torch: str, shape: tuple[int, ...], to: tuple[int, ...], transform: Transform
    ) -> Entry:
        name = f"{TOWER}encoder.layers.{{}}.{torch}"
        return make_entry(f"vision/layers/{native}", name, shape, to, transform, layers=layers)

    entries = [
        make_entry(
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
            stack_entry(f"{native}/scale", f"{torch}.weight", (width,), (width,), SAME),
            stack_entry(f"{native}/bias", f"{torch}.bias", (width,), (width,), SAME),
        ]
    for native, torch in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        entries += [
            stack_entry(
                f"attention/{native}/kernel",
                f"self_attn.{torch}.weight",
                (width, width),
                (width, heads, head_dim),
                split_heads(heads),
            ),
            stack_entry(
                f"attention/{native}/bias",
                f"self_attn.{torch}.bias",
                (width,),
                (heads, head_dim),
                split_head_bias(heads),
            ),
        ]
    entries += [
        stack_entry(
            "attention/output/kernel",
            "self_attn.out_proj.weight",
            (width, width),
            (heads, head_dim, width),
            join_heads(heads),
        ),
        stack_entry("attention/output/bias", "self_attn.out_proj.bias", (width,), (width,), SAME),
    ]
    for native, torch, inputs, outputs in (
        ("linear_1", "fc1", width, hidden),
        ("linear_2", "fc2", hidden, width),
    ):
        entries += [
            stack_entry(
                f"mlp/{native}/kernel",
                f"mlp.{torch}.weight",
                (outputs, inputs),
                (inputs, outputs),
                LINEAR,
            ),
            stack_entry(f"mlp/{native}/bias", f"mlp.{torch}.bias", (outputs,), (outputs,), SAME),
        ]
    return tuple(entries)


def next_layer_entries(vision: VisionConfig, *, layer: int) -> tuple[Entry, ...]:
    """Of the encoder layer after the last tap, what tells how the class token attends."""
    width = vision.width
    entries: list[Entry] = []
    for native, torch, shape, transform in (
        ("attention_norm/scale", "layer_norm1.weight", (width,), SAME),
        ("attention_norm/bias", "layer_norm1.bias", (width,), SAME),
        ("query/kernel", "self_attn.q_proj.weight", (width, width), LINEAR),
        ("query/bias", "self_attn.q_proj.bias", (width,), SAME),
        ("key/kernel", "self_attn.k_proj.weight", (width, width), LINEAR),
        ("key/bias", "self_attn.k_proj.bias", (width,), SAME),
    ):
        name = f"{TOWER}encoder.layers.{layer}.{torch}"
        entries.append(make_entry(f"vision/next_layer/{native}", name, shape, shape, transform))
    return tuple(entries)


def connector_entries(config: LlavaConfig) -> tuple[Entry, ...]:
    """What lies between tower and language model: what a stage-1 adapter holds."""
    return config.system.weights(config.vision, config.text)


def own_entries(config: LlavaConfig) -> tuple[Entry, ...]:
    """What a system adds to a tower and a language model: its connector, and in the decoder."""
    return (*connector_entries(config), *config.system.decoder_weights(config.vision, config.text))


def text_entries(text: TextConfig, *, vocabulary: int) -> tuple[Entry, ...]:
    """The LLaMA decoder, its embedding and its head."""
    width, hidden = text.width, text.mlp_width
    heads, head_dim = text.heads, text.head_dim
    padded = text.padded_vocab_size

    def stack_entry(
        native: str, torch: str, shape: tuple[int, ...], to: tuple[int, ...], transform: Transform
    ) -> Entry:
        name = f"model.layers.{{}}.{torch}.weight"
        return make_entry(f"text/layers/{native}", name, shape, to, transform, layers=text.layers)

    entries = [
        make_entry(
            "text/embedding",
            "model.embed_tokens.weight",
            (vocabulary, width),
            (padded, width),
            embedding(vocabulary, padded),
        ),
        stack_entry("attention_norm/scale", "input_layernorm", (width,), (width,), SAME),
        stack_entry("mlp_norm/scale", "post_attention_layernorm", (width,), (width,), SAME),
    ]
    for native, torch, count in (
        ("query", "q_proj", heads),
        ("key", "k_proj", text.kv_heads),
        ("value", "v_proj", text.kv_heads),
    ):
        entries.append(
            stack_entry(
                f"attention/{native}/kernel",
                f"self_attn.{torch}",
                (count * head_dim, width),
                (width, count, head_dim),
                split_heads(count),
            )
        )
    entries.append(
        stack_entry(
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
            stack_entry(
                f"mlp/{native}/kernel",
                f"mlp.{torch}",
                (outputs, inputs),
                (inputs, outputs),
                LINEAR,
            )
        )
    entries.append(make_entry("text/norm/scale", "model.norm.weight", (width,), (width,), SAME))
    if not text.tie_embeddings:
        entries.append(
            make_entry(
                "text/head/kernel",
                "lm_head.weight",
                (vocabulary, width),
                (width, padded),
                head(vocabulary, padded),
            )
        )
    return tuple(entries)
