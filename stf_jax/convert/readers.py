"""The tensors of a checkpoint, wherever they lie: one file or shards, safetensors or `.bin`."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Protocol

from etils import epath

from stf_jax.convert.bundle import Bundle
from stf_jax.convert.dtypes import Array
from stf_jax.convert.foreign import refuse_directory, refuse_file
from stf_jax.convert.gguf_file import open_gguf
from stf_jax.convert.gguf_header import MAGIC as GGUF
from stf_jax.convert.onnx_clip import open_onnx_clip
from stf_jax.convert.safetensors_file import SafetensorsFile, TensorInfo
from stf_jax.convert.torch_file import TorchFile
from stf_jax.util import files
from stf_jax.util.errors import CheckpointError, missing
from stf_jax.util.files import list_some

read_json = functools.partial(
    files.read_json, error=CheckpointError, fix="download or copy it again"
)


class Tensors(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What there is."""
        ...

    def read(self, name: str) -> Array:
        """One tensor."""
        ...


@dataclasses.dataclass(frozen=True)
class Shards:
    """Tensors spread over several files."""

    files: Mapping[str, Tensors]  # by tensor

    @functools.cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What all files hold together."""
        return {name: file.infos[name] for name, file in self.files.items()}

    def read(self, name: str) -> Array:
        """One tensor."""
        return self.files[name].read(name)


# In the order in which transformers looks for them.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
ADAPTERS = ("mm_projector.safetensors", "mm_projector.bin")
# A LoRA adapter: PEFT's two files, and what LLaVA trained beside it.
LORA_CONFIG = "adapter_config.json"
LORA = ("adapter_model.safetensors", "adapter_model.bin")
BESIDE_LORA = "non_lora_trainables.bin"

_SHARD = re.compile(r".*-\d+-of-\d+\.(safetensors|bin)")


def open_tensors(path: epath.Path) -> Tensors:
    """Opens a directory of weights, or a single file of them.

    Of a directory that holds a LoRA adapter, the adapter alone.

    Raises:
        CheckpointError: no weights, or weights that are not whole: all problems in one message.
    """
    if not path.exists():
        raise missing(path)
    if path.is_file():
        return open_file(path)
    lora = [name for name in LORA if (path / name).exists()]
    for name in _WHOLE:
        index = path / f"{name}.index.json"
        if lora and (index.exists() or (path / name).exists()):
            raise CheckpointError(
                f"{path} holds a whole model ({name}) and a LoRA adapter ({lora[0]}); move one of "
                "them to another directory"
            )
        if index.exists():
            return _open_shards(index)
        if (path / name).exists():
            return open_file(path / name)
    weights = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin"))
    if shards := [name for name in weights if _SHARD.fullmatch(name)]:
        raise _no_index(path, shards[0])
    if lora:
        return open_file(path / lora[0])
    for name in (LORA_CONFIG, BESIDE_LORA):
        if (path / name).exists():
            raise CheckpointError(
                f"{path} holds {name} of a LoRA adapter but no {LORA[0]} or .bin; download or copy "
                "it, too"
            )
    for name in ADAPTERS:
        if (path / name).exists():
            inside = sorted(p.name for p in path.iterdir() if (p / "config.json").is_file())
            if inside and not (path / "config.json").exists():
                # No adapter's directory, but one of several checkpoints.
                raise CheckpointError(
                    f"{path} holds several checkpoints; name one of them: "
                    + ", ".join([name, *inside])
                )
            return open_file(path / name)
    refuse_directory(path)
    if weights:
        raise _no_index(path, weights[0])
    raise CheckpointError(f"{path} holds no weights: no model.safetensors, no pytorch_model.bin")


def _no_index(path: epath.Path, name: str) -> CheckpointError:
    index = _WHOLE[0] if name.endswith(".safetensors") else _WHOLE[1]
    return CheckpointError(
        f"{path} holds {name} but no index ({index}.index.json); download or copy it, too"
    )


def open_file(path: epath.Path) -> Tensors:
    """Opens one file of weights.

    Raises:
        CheckpointError: it is damaged, or of another format.
    """
    if bundle := _open_bundle(path):
        return bundle
    if path.exists():
        refuse_file(path)
    file = SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
    _ = file.infos  # Complains now, rather than half-way.
    return file


def _open_bundle(path: epath.Path) -> Bundle | None:
    """A file that holds config and tokenizer or image processor, too; None of any other."""
    with files.explain_file(path, CheckpointError, "download or copy it again"):
        files.check_file(path)
        if not path.is_file():
            return None
        with path.open("rb") as file:
            if file.read(len(GGUF)) == GGUF:
                return open_gguf(path)
    return open_onnx_clip(path) if path.suffix == ".onnx" else None


def _open_shards(index: epath.Path) -> Shards:
    weight_map = read_json(index).get("weight_map")
    shards = weight_map.values() if isinstance(weight_map, dict) else ()
    if not shards or not all(isinstance(shard, str) for shard in shards):
        raise CheckpointError(f"{index} has no weight_map; download or copy it again")
    files: dict[str, Tensors] = {}
    problems: list[str] = []
    for shard in sorted(set(weight_map.values())):
        try:
            files[shard] = open_file(index.parent / shard)
        except CheckpointError as error:
            problems.append(str(error))
    for name, shard in weight_map.items():
        if shard in files and name not in files[shard].infos:
            problems.append(f"the index puts {name} into {shard}, which does not hold it")
    for shard, file in files.items():
        for name in file.infos:
            if weight_map.get(name) != shard:
                where = weight_map.get(name, "no shard")
                problems.append(f"{shard} holds {name}, which the index puts into {where}")
    if problems:
        raise CheckpointError(
            problems[0]
            if len(problems) == 1
            else f"{index.parent} is not whole:\n{list_some(problems)}"
        )
    return Shards({name: files[shard] for name, shard in weight_map.items()})
