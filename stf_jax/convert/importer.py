"""PyTorch -> native."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from stf_jax.convert.dtypes import FloatName
from stf_jax.convert.safetensors_file import SafetensorsWriter, TensorInfo, local_file
from stf_jax.convert.source import Source, open_source
from stf_jax.data.processors import check_tokenizer, read_tokenizer
from stf_jax.store import checkpoint
from stf_jax.systems.base import System
from stf_jax.util.errors import CheckpointError
from stf_jax.util.progress import byte_progress


def import_checkpoint(
    source: epath.PathLike,
    out: epath.PathLike,
    *,
    vision_tower: epath.PathLike | None = None,
    base: epath.PathLike | None = None,
    system: str | System | None = None,
    fields: Mapping[str, Any] | None = None,
    seed: int = 0,
    dtype: FloatName | None = None,
    vocabulary_multiple: int = 1,
    quantize: str | None = None,
) -> Source:
    """Writes a PyTorch checkpoint as a native one; `open_source` describes the arguments.

    Memory holds one stacked parameter and a few tensors at a time. `out` appears under its name
    only when it is complete.

    Returns:
        The opened source: its config says what was imported.

    Raises:
        CheckpointError: the source is not whole or not understood, or `out` exists.
    """
    opened = open_source(
        source,
        vision_tower=vision_tower,
        base=base,
        system=system,
        fields=fields,
        seed=seed,
        dtype=dtype,
        vocabulary_multiple=vocabulary_multiple,
        quantize=quantize,
    )
    _check_tokenizer(opened, epath.Path(base or source))
    checkpoint.write(
        out,
        config=opened.config,
        leaves=_with_progress(opened),
        extras=lambda directory: _write_extras(opened, directory),
    )
    return opened


def _check_tokenizer(source: Source, path: epath.Path) -> None:
    try:
        tokenizer = read_tokenizer(path, source.files)
    except CheckpointError:
        # Weights alone are converted, too.
        return
    check_tokenizer(path, tokenizer, text=source.config.text)


def _with_progress(source: Source) -> Iterator[checkpoint.Leaf]:
    leaves = list(source.leaves())
    sizes = [TensorInfo(leaf.shape, leaf.dtype).nbytes for leaf in leaves]
    with byte_progress("Importing", total=sum(sizes)) as advance:
        for leaf, size in zip(leaves, sizes, strict=True):
            yield leaf
            advance(size)


def _write_extras(source: Source, directory: epath.Path) -> None:
    for name, path in source.files.items():
        target = directory / "hf" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.copy(target)
    pytorch = directory / "pytorch"
    pytorch.mkdir(parents=True, exist_ok=True)
    (pytorch / "origin.json").write_text(json.dumps(source.origin(), indent=2) + "\n")
    if source.carried:
        arrays = {name: source.read_carried(name) for name in source.carried}
        infos = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
        with local_file(pytorch / "carried.safetensors") as local:
            writer = SafetensorsWriter(local, infos)
            for name, array in arrays.items():
                writer.write(name, array)
