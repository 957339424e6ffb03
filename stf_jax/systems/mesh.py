"""Whether a mesh divides a model."""

from jax.sharding import AbstractMesh, Mesh

from stf_jax.config.text import TextConfig
from stf_jax.systems.base import LlavaConfig


def check_divisible(config: LlavaConfig, mesh: Mesh | AbstractMesh) -> None:
    """Refuses a mesh that does not divide the model.

    Raises:
        ValueError: lists every size that does not divide, and by which axis.
    """
    text, vision = config.text, config.vision
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    sizes = [
        ("text.width", text.width, "fsdp", fsdp),
        ("vision.width", vision.width, "fsdp", fsdp),
        ("vocabulary (pad it on import)", text.padded_vocab_size, "tensor", tensor),
        ("text.heads", text.heads, "tensor", tensor),
        ("text.kv_heads", text.kv_heads, "tensor", tensor),
        ("text.mlp_width", text.mlp_width, "tensor", tensor),
        ("vision.heads", vision.heads, "tensor", tensor),
        ("vision.mlp_width", vision.mlp_width, "tensor", tensor),
        *_quantized_sizes(text, fsdp=fsdp, tensor=tensor),
        *(
            (f"system.{name}", size, "tensor", tensor)
            for name, size in config.system.tensor_sizes().items()
        ),
    ]
    wrong = [f"{name} {size} by {axis} {by}" for name, size, axis, by in sizes if size % by]
    if wrong:
        raise ValueError(f"the mesh does not divide the model: {', '.join(wrong)}")


def _quantized_sizes(
    text: TextConfig, *, fsdp: int, tensor: int
) -> list[tuple[str, int, str, int]]:
    """What a mesh has to divide of quantized weights: pairs of int4, and groups."""
    scheme = text.scheme
    if scheme is None or scheme.group is None:
        return []
    groups = f"in groups of {scheme.group}"
    width, hidden = (size // scheme.inputs_per_scale(size) for size in (text.width, text.mlp_width))
    return [
        ("text.width in pairs", text.width // 2, "fsdp", fsdp),
        ("text.mlp_width in pairs", text.mlp_width // 2, "tensor", tensor),
        (f"text.width {groups}", width, "fsdp", fsdp),
        (f"text.mlp_width {groups}", hidden, "tensor", tensor),
    ]
