"""The loss because a TPU works on whole tiles."""

from jax.sharding import Mesh

from stf_jax.systems.base import LlavaConfig

# Lanes of a vector register, and the side of the smallest matrix unit.
_LANES = 128


def padding(model: LlavaConfig, mesh: Mesh) -> dict[str, float]:
    """The part of each size that is padding on a chip, where there is any."""
    tensor = mesh.shape["tensor"]
    text, vision = model.text, model.vision
    sizes = {
        "text.width": text.width,
        "text.mlp_width": text.mlp_width // tensor,
        "text.head_dim": text.head_dim,
        "vocabulary": text.padded_vocab_size // tensor,
        "vision.width": vision.width,
        "vision.mlp_width": vision.mlp_width // tensor,
        "vision.head_dim": vision.head_dim,
        "vision tokens in attention": (model.image_size // vision.patch_size) ** 2 + 1,
        **{f"system.{name}": size // tensor for name, size in model.system.tensor_sizes().items()},
    }
    whole = {name: -(-size // _LANES) * _LANES for name, size in sizes.items()}
    return {name: 1 - size / whole[name] for name, size in sizes.items() if size != whole[name]}
