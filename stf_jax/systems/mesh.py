"""Whether a mesh divides a model."""

from jax.sharding import AbstractMesh, Mesh

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
        *(
            (f"system.{name}", size, "tensor", tensor)
            for name, size in config.system.tensor_sizes().items()
        ),
    ]
    wrong = [f"{name} {size} by {axis} {by}" for name, size, axis, by in sizes if size % by]
    if wrong:
        raise ValueError(f"the mesh does not divide the model: {', '.join(wrong)}")
