"""Native -> PyTorch."""

import contextlib
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

from etils import epath

from stf_jax.convert.dtypes import FLOATS, Array, DType, FloatName, cast, check_finite
from stf_jax.convert.gguf_exporter import check_llama_cpp, write_gguf
from stf_jax.convert.layouts import (
    TRANSFORMERS,
    ExportLayout,
    PublishedLayout,
    published_name,
)
from stf_jax.convert.lora_exporter import check_trained, write_lora
from stf_jax.convert.mapping import carried_shapes, connector_entries, is_buffer, own_entries, table
from stf_jax.convert.native_exporter import write_native
from stf_jax.convert.processor import IMAGE_TOKEN, PAD_TOKEN, ImageTokens
from stf_jax.convert.quantize import check_plain, open_dequantized
from stf_jax.convert.readers import BESIDE_LORA, read_json
from stf_jax.convert.remote_code import code_sidecars, compact
from stf_jax.convert.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorInfo
from stf_jax.convert.sidecars import generation_file, hf_sidecars, language_keys, llava_sidecars
from stf_jax.convert.source import THREADS
from stf_jax.convert.torch_file import import_torch, write_torch
from stf_jax.data.fit import fit_template, stop_ids
from stf_jax.data.processors import read_tokenizer
from stf_jax.models.weights import Entry
from stf_jax.store.checkpoint import NativeCheckpoint, extra_files
from stf_jax.store.run import TrainedCheckpoint, open_model
from stf_jax.systems.base import LlavaConfig
from stf_jax.util.errors import CheckpointError
from stf_jax.util.files import list_some, new_directory
from stf_jax.util.progress import byte_progress

# What transformers calls 5GB.
SHARD_BYTES = 5 * 10**9
# More than any tensor's entry takes in the header of its file.
_HEADER_BYTES = 512
# Keys of a config.json under which ids of tokens stand.
_TOKEN_KEYS = (
    "image_token_index",
    "image_token_id",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Native:
    """A native checkpoint with what the import noted for the way back.

    Attributes:
        checkpoint: as it lies on disk.
        weights: the same as plain numbers.
        origin: what the import noted.
        carried: tensors that the model does not compute with.
    """

    checkpoint: NativeCheckpoint
    weights: NativeCheckpoint
    origin: Mapping[str, Any]
    carried: SafetensorsFile | None

    @property
    def config(self) -> LlavaConfig:
        """The model."""
        return self.checkpoint.config

    @property
    def hf(self) -> epath.Path:
        """The files that travel along."""
        return self.checkpoint.extras / "hf"

    def publish(self, name: str, layout: PublishedLayout) -> str:
        """The published name of a canonical one, in the words of the system's own code."""
        return published_name(self.config.system.rename(name), layout)

    def dtype(self, name: str, entry: Entry) -> DType:
        """The dtype in which a tensor came, or in which its parameter is stored."""
        odd = self.origin["dtypes"].get(name)
        return FLOATS[odd] if odd else self.weights.shapes[entry.native].dtype


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The tensors of an export, by published name, and what each parameter turns into."""

    infos: Mapping[str, TensorInfo]
    entries: tuple[Entry, ...]
    carried: tuple[str, ...]  # canonical names


def export_checkpoint(
    source: epath.PathLike,
    out: epath.PathLike,
    *,
    layout: ExportLayout,
    dtype: FloatName | None = None,
    vocabulary: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    quantize: str | None = None,
    dequantize: bool = False,
) -> None:
    """Writes a native checkpoint, or the model of a run, in a published PyTorch layout.

    What came in through `import_checkpoint` goes out bit for bit, under the published names.

    Args:
        source: A native checkpoint, or the directory of a run of `stf-jax train`.
        out: The new directory; it appears under this name only when it is complete.
        layout: "llava-stf" or "llava" (the vision tower inside), "hf" (for
            `transformers.LlavaForConditionalGeneration`), "hf-code" (for transformers too, with
            code of ours for other systems beside the weights), "adapter" (`mm_projector.bin`, what
            lies between tower and language model; needs PyTorch), "lora" (the adapter of a LoRA run
            and its connector, as LLaVA and PEFT read them; needs PyTorch), "gguf" (the two files
            from which llama.cpp runs a model; needs the package gguf), or "native" (one checkpoint
            of a run and the model that it began with).
        dtype: The dtype of every weight; None gives back the one it came in.
        vocabulary: Rows of the embedding, at least as many as there are tokens; None gives back as
            many as came, and for "hf" as many more as the image and padding tokens need.
        shard_bytes: The most that one file holds, unless one tensor is larger.
        quantize: For layout "native", the scheme in which the language model's weights are stored.
        dequantize: Writes the plain numbers that a quantized model computes with. Only layouts
            "native", "lora" and "adapter" do without.

    Raises:
        CheckpointError: `source` is no whole native checkpoint or run, `layout` cannot hold the
            model, or `out` exists.
    """
    if layout not in get_args(ExportLayout):
        raise CheckpointError(
            f"layout is {layout!r}; supported: {', '.join(get_args(ExportLayout))}"
        )
    native = _open(source)
    if dtype is not None and dtype not in FLOATS:
        raise CheckpointError(f"dtype is {dtype!r}; supported: {', '.join(FLOATS)}")
    if quantize is not None and layout != "native":
        raise CheckpointError("PyTorch's layouts have plain numbers; leave out --quantize")
    if layout == "native":
        if vocabulary is not None:
            raise CheckpointError("layout native keeps the vocabulary; leave out --vocabulary")
        checkpoint = native.weights if dequantize else native.checkpoint
        write_native(checkpoint, out, None if dtype is None else FLOATS[dtype], quantize)
        return
    if layout not in ("lora", "adapter") and not dequantize:
        check_plain(native.checkpoint, to=f"be written in layout {layout}", fix="add --dequantize")
    _check_layout(native, layout)
    check_trained(native.checkpoint, layout, whole=native.config.system.layout)
    known = _known_tokens(native)
    tokens = _image_tokens(native, layout, known)
    rows = _rows(native, tokens) if vocabulary is None else vocabulary
    if rows < (least := _least_rows(native, layout, known, tokens)):
        raise CheckpointError(
            f"vocabulary is {rows}, which would cut tokens off; give {least} or more"
        )
    cast_to = None if dtype is None else FLOATS[dtype]
    if layout == "gguf":
        with new_directory(out) as unfinished, _local(unfinished) as local:
            write_gguf(native.weights, native.hf, local, rows=rows, dtype=cast_to)
        return
    spelling: PublishedLayout = "adapter" if layout == "lora" else layout
    plan = _plan(native, spelling, rows, cast_to, lora=layout == "lora")
    sidecars = _sidecars(native, spelling, rows, tokens, dtype)
    if spelling == "adapter":
        import_torch(f"to write {'mm_projector.bin' if layout == 'adapter' else BESIDE_LORA}")
    with new_directory(out) as unfinished:
        if layout == "lora":
            connector = _read_connector(native, plan)
            write_lora(native.checkpoint, connector, unfinished, dtype=cast_to)
        elif layout == "adapter":
            write_torch(unfinished / "mm_projector.bin", _read_connector(native, plan))
        else:
            # Shards are filled in the order of the parameters, which takes a local file.
            with _local(unfinished) as local:
                _write_shards(native, plan, layout, local, shard_bytes)
        # config.json comes last: without it, a directory is not taken for a checkpoint.
        for name in sorted(sidecars, key=lambda name: name == "config.json"):
            target = unfinished / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(sidecars[name])


@contextlib.contextmanager
def _local(directory: epath.Path) -> Iterator[epath.Path]:
    """A local directory, whose files are copied into this one if it is not local itself."""
    if "://" not in os.fspath(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory() as folder:
        yield epath.Path(folder)
        for file in epath.Path(folder).iterdir():
            file.copy(directory / file.name)


def _open(source: epath.PathLike) -> Native:
    opened = open_model(source)
    pytorch = opened.extras / "pytorch"
    carried = SafetensorsFile(pytorch / "carried.safetensors")
    return Native(
        checkpoint=opened,
        weights=open_dequantized(opened),
        origin=read_json(pytorch / "origin.json"),
        carried=carried if carried.path.exists() else None,
    )


def _check_layout(native: Native, layout: str) -> None:
    system = native.config.system
    right = system.layout
    config = native.hf / "config.json"
    elsewhere = {**dict.fromkeys(TRANSFORMERS, "transformers' Llava"), "gguf": "llama.cpp"}
    if layout in elsewhere and config.exists() and read_json(config).get("mm_use_im_start_end"):
        raise CheckpointError(
            f"{elsewhere[layout]} puts no tokens round an image, as this model has them "
            f"(mm_use_im_start_end); use --layout {right}"
        )
    if layout == "hf" and not system.fits_transformers:
        raise CheckpointError(
            "transformers' Llava has one projector over every vision token of a layer, and no "
            f"place for this system ({system.describe()}); use --layout {right}"
        )
    if layout == "hf-code":
        compact(native.config)
    if layout == "gguf":
        check_llama_cpp(native.config)
    if layout not in (*elsewhere, "adapter", "lora", right):
        raise CheckpointError(f"this model is of layout {right}; use --layout {right}")


def _known_tokens(native: Native) -> dict[str, int]:
    """Every token of its tokenizer and its system; none where there is no tokenizer to read."""
    try:
        tokenizer = read_tokenizer(native.hf, extra_files(native.checkpoint.extras))
    except CheckpointError:
        return {}
    tokens: dict[str, int] = tokenizer.backend.get_vocab(with_added_tokens=True)
    first = native.config.images_first
    return tokens if first is None else {first.token: first.token_id, **tokens}


def _image_tokens(native: Native, layout: str, known: Mapping[str, int]) -> ImageTokens | None:
    """Where a Llava of transformers gets its two tokens; None for all other exports."""
    if layout not in TRANSFORMERS or native.origin["layout"] == layout == "hf":
        return None
    # A tokenizer numbers what is added on from its last token, however many rows there are.
    after = max(known.values()) + 1 if known else native.origin["vocabulary"]
    return ImageTokens.among(known, after=after)


def _rows(native: Native, tokens: ImageTokens | None) -> int:
    rows: int = native.origin["vocabulary"]
    if tokens is None:
        return rows
    # 64 is Hugging Face's multiple.
    return -(-max(rows, tokens.image + 1, tokens.pad + 1) // 64) * 64


def _least_rows(
    native: Native, layout: str, known: Mapping[str, int], tokens: ImageTokens | None
) -> int:
    """Below this number of rows, some token would have none."""
    came: int = native.origin["vocabulary"]
    if tokens is not None:
        return max(*known.values(), tokens.image, tokens.pad) + 1
    if not known:
        # Nothing says which rows are padding.
        return came
    ids = dict(known)
    hf = read_json(native.hf / "config.json")
    if layout in TRANSFORMERS:
        for part in (hf, language_keys(hf)):
            ids |= {key: part[key] for key in _TOKEN_KEYS if isinstance(part.get(key), int)}
    else:
        # LLaVA looks neither of them up: it cuts one out of the text, and masks the other.
        ids = {token: n for token, n in ids.items() if token not in (IMAGE_TOKEN, PAD_TOKEN)}
    return min(came, max(ids.values()) + 1)


def _plan(
    native: Native, layout: PublishedLayout, rows: int, dtype: DType | None, *, lora: bool
) -> _Plan:
    entries = table(native.config, vocabulary=rows)
    if layout == "adapter":
        entries = own_entries(native.config) if lora else connector_entries(native.config)
    missing = [e.native for e in entries if e.native not in native.weights.shapes]
    infos = {
        native.publish(name, layout): TensorInfo(entry.shape, dtype or native.dtype(name, entry))
        for entry in entries
        for name in (() if entry.native in missing else entry.tensors)
    }
    extra: dict[str, TensorInfo] = {}
    if native.carried is not None and layout != "adapter":
        # transformers has no place for the buffers of the other layouts, nor they for its.
        same = (native.origin["layout"] in TRANSFORMERS) == (layout in TRANSFORMERS)
        extra = {
            name: TensorInfo(info.shape, dtype)
            if dtype is not None and not is_buffer(name)
            else info
            for name, info in native.carried.infos.items()
            if same or not is_buffer(name)
        }
    if layout in TRANSFORMERS:
        # It builds the whole tower, of which the model here may hold a part.
        missing += [name for name in carried_shapes(native.config) if name not in extra]
    if missing:
        raise CheckpointError(
            f"{native.checkpoint.path} lacks what layout {layout} needs:\n{list_some(missing)}"
        )
    infos |= {published_name(name, layout): info for name, info in extra.items()}
    return _Plan(dict(sorted(infos.items(), key=_natural)), entries, tuple(extra))


def _natural(item: tuple[str, TensorInfo]) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [
        (int(part or -1), "") if part.isdigit() else (0, part)
        for part in re.split(r"(\d+)", item[0])
    ]


def _sidecars(
    native: Native, layout: str, rows: int, tokens: ImageTokens | None, dtype: FloatName | None
) -> dict[str, bytes]:
    dtype = dtype or native.origin["cast"]
    if layout in TRANSFORMERS:
        files = hf_sidecars(native.hf, native.config, rows=rows, tokens=tokens, dtype=dtype)
        if layout == "hf-code":
            ratio = read_json(native.hf / "config.json").get("image_aspect_ratio", "pad")
            files = code_sidecars(files, native.config, aspect_ratio=ratio)
        return files | _generation(native, files)
    files = llava_sidecars(native.hf, native.config, rows=rows, dtype=dtype)
    if layout == "adapter":
        return {"config.json": files["config.json"]}
    return files | _generation(native, files)


def _generation(native: Native, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """generation_config.json, if a run has taught the model to end a reply in another token."""
    trained = native.checkpoint
    if not isinstance(trained, TrainedCheckpoint) or trained.template is None:
        return {}
    try:
        tokenizer = read_tokenizer(native.hf, extra_files(trained.extras))
        template = fit_template(trained.template, tokenizer)
    except (CheckpointError, ValueError):
        # Without a tokenizer that is as it was in training, nothing is known of it.
        return {}
    return generation_file(files, native.config, stop_ids(template, tokenizer))


def _read_connector(native: Native, plan: _Plan) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    _each_tensor(native, plan, "adapter", tensors.__setitem__)
    return {name: tensors[name] for name in plan.infos}


def _write_shards(
    native: Native, plan: _Plan, layout: PublishedLayout, directory: epath.Path, limit: int
) -> None:
    shards = split(plan.infos, limit)
    names = ["model.safetensors"]
    if len(shards) > 1:
        total = len(shards)
        names = [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    writers: dict[str, SafetensorsWriter] = {}
    weight_map: dict[str, str] = {}
    for file, shard in zip(names, shards, strict=True):
        writer = SafetensorsWriter(directory / file, {name: plan.infos[name] for name in shard})
        writers |= dict.fromkeys(shard, writer)
        weight_map |= dict.fromkeys(shard, file)
    _each_tensor(native, plan, layout, lambda name, array: writers[name].write(name, array))
    if len(shards) > 1:
        size = sum(info.nbytes for info in plan.infos.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def split(infos: Mapping[str, TensorInfo], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most `limit` bytes; a larger tensor is a group of its own."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        nbytes = info.nbytes + _HEADER_BYTES
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    return groups


def _each_tensor(
    native: Native, plan: _Plan, layout: PublishedLayout, put: Callable[[str, Array], None]
) -> None:
    """Calls `put` with every tensor under its published name; few parameters are in memory."""

    def convert(entry: Entry, name: str, array: Array) -> None:
        theirs = native.publish(name, layout)
        tensor = entry.transform.torch(array)
        check_finite(tensor, name=theirs)
        put(theirs, cast(tensor, plan.infos[theirs].dtype, name=theirs))

    total = sum(info.nbytes for info in plan.infos.values())
    with byte_progress("Exporting", total=total) as advance, ThreadPoolExecutor(THREADS) as pool:
        arrays = native.weights.read_each(entry.native for entry in plan.entries)
        for entry, array in zip(plan.entries, arrays, strict=True):
            layers = [array] if entry.layers is None else list(array)
            names = entry.tensors
            list(pool.map(convert, [entry] * len(names), names, layers))
            advance(sum(plan.infos[native.publish(name, layout)].nbytes for name in names))
        for name in plan.carried:
            assert native.carried is not None
            theirs = published_name(name, layout)
            put(theirs, cast(native.carried.read(name), plan.infos[theirs].dtype, name=theirs))
            advance(plan.infos[theirs].nbytes)
