"""How each published layout spells the canonical names of `stf_jax.convert.mapping`."""

import re
from collections.abc import Iterable
from typing import Literal

from stf_jax.systems import connector_prefixes

# What a directory of PyTorch weights can be; the first three are whole models.
Layout = Literal["llava-stf", "llava", "hf", "hf-code", "llama", "clip", "adapter", "lora"]
PublishedLayout = Literal["llava-stf", "llava", "hf", "hf-code", "adapter"]
ExportLayout = Literal[PublishedLayout, "lora", "gguf", "native"]

# Those that transformers loads.
TRANSFORMERS = ("hf", "hf-code")

# What lies between tower and language model, of every system.
_CONNECTOR = tuple((f"model.{prefix}", prefix) for prefix in connector_prefixes())

_LLAVA = (
    ("model.vision_tower.vision_tower.vision_model.", "vision_model."),
    # As saved by transformers 5, whose CLIP has lost a level.
    ("model.vision_tower.vision_tower.", "vision_model."),
    *_CONNECTOR,
    ("model.", "model."),
    ("lm_head.", "lm_head."),
)

# (published prefix, canonical prefix): the first published prefix that fits a name counts, and the
# first with the canonical prefix is written.
_PREFIXES: dict[Layout, tuple[tuple[str, str], ...]] = {
    "llava-stf": _LLAVA,
    "llava": _LLAVA,
    "hf": (
        # On disk, in every release of transformers.
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("multi_modal_projector.linear_1.", "mm_projector.0."),
        ("multi_modal_projector.linear_2.", "mm_projector.2."),
        ("vision_tower.vision_model.", "vision_model."),
        ("vision_tower.", "vision_model."),
        # In memory from transformers 4.52 on, and on disk where that was saved as it is.
        ("model.language_model.", "model."),
        ("model.multi_modal_projector.linear_1.", "mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "mm_projector.2."),
        ("model.vision_tower.vision_model.", "vision_model."),
        ("model.vision_tower.", "vision_model."),
        ("lm_head.", "lm_head."),
    ),
    # As our own code for transformers holds them; see `stf_jax.convert.hf_code`.
    "hf-code": (
        ("model.language_model.", "model."),
        *((f"model.multi_modal_projector.{prefix}", prefix) for prefix in connector_prefixes()),
        ("model.vision_tower.", "vision_model."),
        ("lm_head.", "lm_head."),
    ),
    "llama": (("model.", "model."), ("lm_head.", "lm_head.")),
    "clip": (
        ("vision_model.", "vision_model."),
        # A vision model as saved by transformers 5.
        ("embeddings.", "vision_model.embeddings."),
        ("pre_layrnorm.", "vision_model.pre_layrnorm."),
        ("encoder.", "vision_model.encoder."),
        ("post_layernorm.", "vision_model.post_layernorm."),
    ),
    "adapter": _CONNECTOR,
    # Its names are those of the model that it adapts; see `stf_jax.convert.lora`.
    "lora": (),
}

# The rest of a whole CLIP: its text tower has no place in a LLaVA.
_CLIP_TEXT = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")

# What wrappers add to names: DistributedDataParallel, torch.compile, FSDP; p-MoD's round a layer.
_WRAPPERS = re.compile(
    r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)+"
    r"|(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|decoder_layer)\."
)

# What PEFT puts in front of the names of the model that it adapts.
PEFT = "base_model.model."


def recognize(names: Iterable[str]) -> Layout | None:
    """The layout that spells names like these, if any does."""
    names = list(names)

    def any_has(part: str) -> bool:
        return any(part in name for name in names)

    if any_has(".lora_") or any(unwrap(name).startswith(PEFT) for name in names):
        return "lora"
    if any_has("multi_modal_projector.mm_"):
        return "hf-code"
    if any_has("multi_modal_projector."):
        return "hf"
    language = any_has("model.layers.") or any_has("model.embed_tokens.")
    connector = {
        layout for prefix, layout in connector_prefixes().items() if any_has(f"model.{prefix}")
    }
    if connector:
        # The first stage may train an embedding, too.
        if not any_has("model.layers."):
            return "adapter"
        # What every system has says least.
        return next(layout for layout in ("llava-stf", "llava") if layout in connector)
    if language:
        return "llama"
    return "clip" if any_has("embeddings.class_embedding") else None


def unwrap(name: str) -> str:
    """A tensor's name without what a wrapper round the model has added to it."""
    return _WRAPPERS.sub("", name)


def canonical(name: str, layout: Layout) -> str | None:
    """The canonical name of a published one; None if the layout does not know it."""
    name = unwrap(name)
    for published, ours in _PREFIXES[layout]:
        if name.startswith(published):
            return ours + name.removeprefix(published)
    return None


def published_name(name: str, layout: Layout) -> str:
    """The published name of a canonical one."""
    for theirs, ours in _PREFIXES[layout]:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    if layout == "adapter" and name.startswith("model."):
        # Beside a LoRA adapter lies what a system adds to the language model, too.
        return name
    raise AssertionError(f"{layout} has no name for {name}")


def is_ignored(name: str, layout: Layout) -> bool:
    """Whether a tensor belongs to the layout but not to a LLaVA."""
    return layout == "clip" and unwrap(name).startswith(_CLIP_TEXT)
