"""Images in the slots that a model keeps of them: in memory, in a file, and back into a batch.

What a language model has computed of images does not depend on the question, if its system says so.
VoCo-LLaMA keeps n slots of an image; LLaVA-1.5 all of them, with the text in front.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Int

from stf_jax.convert.dtypes import Array
from stf_jax.convert.safetensors_file import (
    SafetensorsFile,
    SafetensorsWriter,
    TensorInfo,
    local_file,
)
from stf_jax.infer.program import Program
from stf_jax.infer.prompts import Prompt, pad_prompts
from stf_jax.models.cache import KVCache
from stf_jax.util.errors import CheckpointError
from stf_jax.util.files import decode_json, expand, write_whole

# Of the header of a file; the number changes with the form.
_KEY, _FORM = "stf_jax_images", 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageCache:
    """What one model keeps of some images; make one with `Model.encode_images`.

    Attributes:
        ids: int32 [T], the prompt up to where questions begin, each image as K placeholders.
        images: how many.
        model: what tells the model: its weights, its system, and how it keeps keys and values.
        cache: keys and values of one row, in host memory.
    """

    ids: Int[np.ndarray, "T"]
    images: int
    model: Mapping[str, str]
    cache: KVCache

    @property
    def slots(self) -> tuple[int, ...]:
        """How many the images and the text with them take, by group of layers."""
        return self.cache.sizes

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        return sum(array.nbytes for array in jax.tree.leaves((self.cache.keys, self.cache.values)))

    def save(self, path: epath.PathLike) -> None:
        """Writes a safetensors file, whole or not at all; local or on gs://."""
        tensors = {"ids": self.ids, **_by_name(self.cache)}
        header = {
            "form": _FORM,
            "images": self.images,
            "model": dict(self.model),
            "sha256": _digest(tensors),
        }
        infos = {name: TensorInfo(array.shape, array.dtype) for name, array in tensors.items()}
        with write_whole(expand(path)) as unfinished, local_file(unfinished) as local:
            # What a process that was killed left.
            local.unlink(missing_ok=True)
            writer = SafetensorsWriter(local, infos, metadata={_KEY: json.dumps(header)})
            for name, array in tensors.items():
                writer.write(name, array)


def encode(program: Program, prompt: Prompt) -> ImageCache:
    """The cache of a prompt that is all images and what belongs to them.

    Args:
        program: of the model.
        prompt: up to where `System.split` ends what is shared.
    """
    config, rows = program.config, program.row_multiple
    batch = pad_prompts(
        [prompt], rows=rows, image_size=config.image_size, uniform=config.system.compacts
    )
    cache = program.prefill(batch)
    first: KVCache = jax.tree.map(lambda array: array[:1], jax.device_get(cache))
    sizes = [len(prompt.ids) - int(group.dropped[0]) for group in first.groups]
    return ImageCache(
        ids=prompt.ids,
        images=len(batch.pixels[0]),
        model=identity(program),
        cache=jax.device_get(first.resize(sizes)),
    )


def identity(program: Program) -> dict[str, str]:
    """What has to be equal for a cache to serve."""
    return {
        "weights": program.checksum,
        "system": program.config.system.describe(),
        "cache_dtype": program.cache_dtype or "as computed",
    }


def read(path: epath.PathLike, program: Program) -> ImageCache:
    """What `ImageCache.save` wrote.

    Raises:
        CheckpointError: no such file, one that is damaged or holds something else, or the images as
            another model sees them.
    """
    path = epath.Path(expand(path))
    file = SafetensorsFile(path)
    like = program.abstract_cache()
    names, metadata = {"ids", *_by_name(like)}, file.metadata
    try:
        header = decode_json(metadata.get(_KEY, "null").encode())
        known = header["form"] == _FORM
        images, model, digest = int(header["images"]), dict(header["model"]), header["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no images; save an ImageCache there") from error
    if not known:
        raise CheckpointError(f"{path} is of another release; encode the images again")
    if model != (own := identity(program)):
        differ = [
            f"{key} {model.get(key)!r}, here {value!r}"
            for key, value in own.items()
            if model.get(key) != value
        ]
        raise CheckpointError(
            f"{path} holds images as another model sees them ({'; '.join(differ)}); encode them "
            "with this one"
        )
    tensors = {name: file.read(name) for name in sorted(names & file.infos.keys())}
    if file.infos.keys() != names or _digest(tensors) != digest:
        raise CheckpointError(f"{path} is damaged; copy it again, or encode the images again")
    leaves = [tensors[name] for name in _by_name(like)]
    return ImageCache(
        ids=tensors["ids"],
        images=images,
        model=model,
        cache=jax.tree.unflatten(jax.tree.structure(like), leaves),
    )


def _by_name(cache: KVCache) -> dict[str, Any]:
    """Its arrays: "keys/0", "groups/0/marks/position"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(cache)
    }


def _digest(tensors: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
