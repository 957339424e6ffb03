"""A projector that begins where the words are: ridge regression, before any step of training.

A new projector gives the language model vectors unlike any word, and the first hours of training
find out where words are. Here a linear map from vision tokens to the embeddings of the words that
describe an image is solved for in closed form (Hoerl and Kennard 1970), and written as a projector
of the usual form. Training continues from it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from jaxtyping import Float, Int

from stf_jax.data.tokenizer import Tokenizer, encode_prompt
from stf_jax.util.files import new_directory, write_json

# Of the mean variance of a feature: what the ridge adds.
_RIDGE = 0.1


def word_targets(
    described: Sequence[Sequence[str]], embedding: Float[np.ndarray, "V H"], tokenizer: Tokenizer
) -> tuple[Float[np.ndarray, "images H"], Float[np.ndarray, "H"]]:
    """The sum of the directions of each image's words, and the mean of all words.

    Args:
        described: of each image, one or more words or names.
        embedding: of the language model.
        tokenizer: of the language model.
    """

    def embed(words: str) -> Float[np.ndarray, "H"]:
        ids: Int[np.ndarray, T] = encode_prompt(tokenizer, f" {words}")
        mean: Float[np.ndarray, H] = embedding[ids].astype(np.float64).mean(axis=0)
        return mean

    known = {words: embed(words) for image in described for words in image}
    center = np.mean([*known.values()], axis=0)
    directions = {
        words: (vector - center) / np.linalg.norm(vector - center)
        for words, vector in known.items()
    }
    targets = [sum(directions[words] for words in image) for image in described]
    return np.array(targets), center


def align(
    features: Float[np.ndarray, "images K C"],
    targets: Float[np.ndarray, "images H"],
    *,
    center: Float[np.ndarray, "H"],
    width: int,
    scale: float,
) -> dict[str, Float[np.ndarray, "..."]]:
    """LLaVA-1.5's projector, Linear, GELU, Linear, which computes the regression.

    Its inner channels come in pairs of opposite sign, since GELU(x) - GELU(-x) = x; so it is linear
    until training changes it, of rank `width` / 2 at most.

    Args:
        features: what the projector takes, of each image.
        targets: what every token of an image should point to.
        center: what is added to all of them.
        width: of the projector inside, an even number.
        scale: root mean square of a token's entries, without the center.

    Returns:
        Tensors by LLaVA's names.
    """
    tokens = features.shape[1]
    flat = features.astype(np.float64).reshape(-1, features.shape[2])
    mean = flat.mean(axis=0)
    flat -= mean
    wanted = np.repeat(targets - targets.mean(axis=0), tokens, axis=0)
    covariance = flat.T @ flat / len(flat)
    ridge = _RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    weights = np.linalg.solve(covariance + ridge, flat.T @ wanted / len(flat))
    weights *= scale / np.sqrt(np.mean((flat @ weights) ** 2))
    left, sizes, right = np.linalg.svd(weights, full_matrices=False)
    rank = min(width // 2, len(sizes))
    first, second = (
        left[:, :rank] * np.sqrt(sizes[:rank]),
        np.sqrt(sizes[:rank, None]) * right[:rank],
    )
    # Channels beyond the rank give nothing; training can use them.
    spare = width - 2 * rank
    inner = np.concatenate([first, -first, np.zeros((len(first), spare))], axis=1)
    outer = np.concatenate([second, -second, np.zeros((spare, second.shape[1]))])
    tensors = {
        "mm_projector.0.weight": inner.T,
        "mm_projector.0.bias": -mean @ inner,
        "mm_projector.2.weight": outer.T,
        "mm_projector.2.bias": center,
    }
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def write_adapter(
    out: Path, tensors: dict[str, Float[np.ndarray, "..."]], *, system: dict[str, object]
) -> None:
    """The projector in the files of LLaVA's stage 1, which `stf-jax convert import --base` reads.

    Args:
        out: a new folder.
        tensors: by LLaVA's names.
        system: the keys of config.json that tell the system.
    """
    with new_directory(out) as unfinished:
        folder = Path(unfinished)
        write_json(folder / "config.json", {"mm_system": system}, indent=2)
        file = folder / "mm_projector.safetensors"
        named = {f"model.{name}": np.ascontiguousarray(array) for name, array in tensors.items()}
        safetensors.numpy.save_file(named, file, {"format": "pt"})
        file.chmod(0o644)
