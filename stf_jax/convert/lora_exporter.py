"""The adapter of a LoRA run, in the files that `stf_jax.convert.lora` describes."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from stf_jax.convert.dtypes import Array, DType, cast, check_finite
from stf_jax.convert.layouts import PEFT, published_name
from stf_jax.convert.mapping import text_entries
from stf_jax.convert.readers import BESIDE_LORA, LORA, LORA_CONFIG
from stf_jax.convert.safetensors_file import SafetensorsWriter, TensorInfo, local_file
from stf_jax.convert.torch_file import write_torch
from stf_jax.models.lora import LoRAConfig
from stf_jax.models.weights import Entry, transpose
from stf_jax.store.checkpoint import NativeCheckpoint
from stf_jax.store.run import TrainedCheckpoint, adapter_path
from stf_jax.util.errors import CheckpointError


def check_trained(checkpoint: NativeCheckpoint, layout: str, *, whole: str) -> None:
    """Refuses a layout that would leave out what a run has trained.

    Args:
        checkpoint: what is exported.
        layout: "adapter", which holds the connector alone, or "lora".
        whole: the layout that holds everything.

    Raises:
        CheckpointError: names the layout that fits.
    """
    trained = checkpoint.trained if isinstance(checkpoint, TrainedCheckpoint) else {}
    adapted = bool(_adapted(checkpoint))
    if layout == "lora" and not adapted:
        raise CheckpointError(
            f"{checkpoint.path} is no LoRA run and has no adapter to write; use --layout {whole}"
        )
    if layout == "adapter" and any(not path.startswith("connector/") for path in trained):
        raise CheckpointError(
            f"{checkpoint.path} has trained its language model, too, which mm_projector.bin does "
            f"not hold; use --layout {'lora' if adapted else whole}"
        )


def write_lora(
    checkpoint: NativeCheckpoint,
    connector: Mapping[str, Array],
    directory: epath.Path,
    *,
    dtype: DType | None,
) -> None:
    """Writes the adapter of a LoRA run and the connector that was trained beside it.

    Args:
        checkpoint: the run; see `check_trained`.
        connector: the connector's tensors by published name.
        directory: there already.
        dtype: of A and B; None is float32, in which they were trained.
    """
    assert isinstance(checkpoint, TrainedCheckpoint)
    tensors: dict[str, Array] = {}
    modules: dict[str, None] = {}
    for entry in _adapted(checkpoint):
        a, b = (checkpoint.read_trained(adapter_path(entry.native, which)) for which in "ab")
        for layer, name in enumerate(entry.tensors):
            theirs = checkpoint.config.system.rename(name)
            module = published_name(theirs, "llava").removesuffix(".weight")
            modules[module.rpartition(".")[2]] = None
            # A [*inputs, R] -> [R, C], B [R, *outputs] -> [F, R].
            for half, array in (
                ("lora_A", transpose(a[layer].reshape(-1, a.shape[-1]))),
                ("lora_B", transpose(b[layer].reshape(b.shape[1], -1))),
            ):
                theirs = f"{PEFT}{module}.{half}.weight"
                check_finite(array, name=theirs)
                tensors[theirs] = cast(array, dtype or array.dtype, name=theirs)
    infos = {name: TensorInfo(array.shape, array.dtype) for name, array in tensors.items()}
    with local_file(directory / LORA[0]) as local:
        writer = SafetensorsWriter(local, infos)
        for name, array in tensors.items():
            writer.write(name, array)
    write_torch(
        directory / BESIDE_LORA, {f"{PEFT}{name}": array for name, array in connector.items()}
    )
    settings = _settings(checkpoint.lora, list(modules))
    (directory / LORA_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _adapted(checkpoint: NativeCheckpoint) -> list[Entry]:
    """The weights of the language model that a run has adapted."""
    if not isinstance(checkpoint, TrainedCheckpoint):
        return []
    text = checkpoint.config.text
    return [
        entry
        for entry in text_entries(text, vocabulary=text.vocab_size)
        if adapter_path(entry.native, "a") in checkpoint.trained
    ]


def _settings(lora: LoRAConfig, modules: list[str]) -> dict[str, Any]:
    whole = int(lora.alpha) == lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if whole else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
