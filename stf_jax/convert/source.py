"""A PyTorch checkpoint of any layout, opened as the native model that it will be.

Whole models come as they are; a language model takes a vision tower and a new connector beside it;
a stage-1 adapter takes a language model and a tower.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from etils import epath

from stf_jax.config.text import TextConfig
from stf_jax.convert.dtypes import (
    FLOATS,
    Array,
    DType,
    FloatName,
    cast,
    check_finite,
    common,
    is_float,
)
from stf_jax.convert.hf_config import TEXT_DEFAULTS, text_from_hf
from stf_jax.convert.infer import infer_system, name_fields, new_system, replace_system
from stf_jax.convert.layouts import Layout
from stf_jax.convert.lora import merge_lora
from stf_jax.convert.mapping import carried_shapes, is_buffer, own_entries, table
from stf_jax.convert.own_token import add_rows, find_token
from stf_jax.convert.parts import Part, RandomTensors, Tensor, open_part
from stf_jax.convert.quantize import quantized_leaves, quantized_weights
from stf_jax.convert.sidecars import find_sidecars, language_keys
from stf_jax.convert.tower import TowerChoice, choose_tower
from stf_jax.data.processors import read_tokenizer
from stf_jax.models.weights import Entry
from stf_jax.store.checkpoint import Leaf
from stf_jax.systems.base import LlavaConfig, System
from stf_jax.util.errors import CheckpointError
from stf_jax.util.files import list_some

T = TypeVar("T")

_LAYER = re.compile(r"\.layers\.(\d+)\.")


# Layers of one parameter that are read and transposed at a time.
THREADS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A checked PyTorch checkpoint; its weights are read leaf by leaf."""

    config: LlavaConfig
    layout: Layout
    vocabulary: int  # rows of its embedding
    dtype: FloatName | None  # of every leaf; None: as they are
    files: Mapping[str, epath.Path]  # what travels along, by its name in the native `hf/`
    entries: tuple[Entry, ...]
    tensors: Mapping[str, Tensor]  # by canonical name
    new: tuple[str, ...]  # canonical names of those that are drawn, since the checkpoint has none
    carried: tuple[str, ...]  # canonical names of tensors that the model does not compute with

    def leaves(self) -> Iterator[Leaf]:
        """Every parameter of the model, largest parts first in no particular order."""
        quantized = quantized_weights(self.config)
        for entry in self.entries:
            if entry.native in quantized:
                # What becomes integers is rounded once: it is read in the dtype of the file.
                yield from quantized_leaves(
                    entry.native,
                    quantized[entry.native],
                    functools.partial(
                        functools.partial, self._read_layer, entry, self._stored_dtype(entry)
                    ),
                )
                continue
            yield Leaf(
                path=entry.native,
                shape=entry.native_shape,
                dtype=self._dtype(entry),
                read=functools.partial(self._read, entry),
            )

    def read_carried(self, name: str) -> Array:
        """A tensor that the model does not compute with, for the way back."""
        tensor = self.tensors[name]
        if self.dtype is None or is_buffer(name):
            return _read_finite(tensor, tensor.info.dtype)
        return _read_finite(tensor, FLOATS[self.dtype])

    def origin(self) -> dict[str, Any]:
        """What the way back needs to know, as JSON: layout, vocabulary, odd dtypes."""
        odd = {}
        if self.dtype is None:
            odd = {
                name: self.tensors[name].info.dtype.name
                for entry in self.entries
                for name in entry.tensors
                if self.tensors[name].info.dtype != self._dtype(entry)
            }
        return {
            "layout": self.layout,
            "vocabulary": self.vocabulary,
            "cast": self.dtype,
            "dtypes": odd,
        }

    def _dtype(self, entry: Entry) -> DType:
        if self.dtype is not None:
            return FLOATS[self.dtype]
        return self._stored_dtype(entry)

    def _stored_dtype(self, entry: Entry) -> DType:
        return common({self.tensors[name].info.dtype for name in entry.tensors})

    def _read(self, entry: Entry) -> Array:
        dtype = self._dtype(entry)
        if entry.layers is None:
            return np.ascontiguousarray(self._read_layer(entry, dtype, 0))
        result = np.empty(entry.native_shape, dtype)

        def fill(layer: int) -> None:
            result[layer] = self._read_layer(entry, dtype, layer)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fill, range(entry.layers)))
        return result

    def _read_layer(self, entry: Entry, dtype: DType, layer: int) -> Array:
        tensor = self.tensors[entry.tensors[layer]]
        return entry.transform.native(_read_finite(tensor, dtype))


def _read_finite(tensor: Tensor, dtype: DType) -> Array:
    """A tensor's values, cast once they are known to be finite."""
    array = tensor.read()
    check_finite(array, name=tensor.name)
    return cast(array, dtype, name=tensor.name)


def open_source(
    path: epath.PathLike,
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
    """Opens a PyTorch checkpoint and checks all of it but the values.

    Args:
        path: A directory in one of the layouts LLaVA-STF, LLaVA-1.5, Hugging Face's Llava, LLaMA;
            a GGUF file of a LLaMA; a stage-1 adapter, its file or its directory; or a LoRA
            adapter's directory.
        vision_tower: A directory with CLIP's config.json, and its weights where `path` has none;
            or an ONNX file with both. Needed where config.json does not lead to one.
        base: The language model under an adapter; of a LoRA adapter, the model that it was trained
            on, into which it is merged.
        system: What makes the tokens of a language model alone: a name, with the published
            proportions, or a system. Its weights are new, random ones; "stf" by default. For a
            model that has a connector, another system that its weights fit, such as "prumerge". A
            system with a token of its own gets a row for it, new and random too.
        fields: Of that system, those that differ from its published proportions: {"taps": [11, 6]}.
        seed: Of these random weights.
        dtype: The dtype of every parameter; None keeps those of the file.
        vocabulary_multiple: Pads the vocabulary to a multiple, so that it can be sharded.
        quantize: The scheme in which the language model's weights are stored; see
            `stf_jax.config.quantization`.

    Raises:
        CheckpointError: what is missing, damaged, unknown or does not fit, and what to do.
    """
    if dtype is not None and dtype not in FLOATS:
        raise CheckpointError(f"dtype is {dtype!r}; supported: {', '.join(FLOATS)}")
    if vocabulary_multiple < 1:
        raise CheckpointError(f"vocabulary_multiple is {vocabulary_multiple}; give 1 or more")
    part = open_part(path)
    if part.layout == "clip":
        raise CheckpointError(
            f"{path} is a vision tower alone; import a language model or a LLaVA, "
            f"with --vision-tower {path}"
        )
    if part.layout == "lora":
        part, under = merge_lora(part, base)
        if part.layout == "llama" and system is None:
            raise CheckpointError(
                f"neither {path} nor {base} has a projector; give the LLaVA that the adapter was "
                "trained on as --base, or choose a new, random connector with --system NAME"
            )
        language, folders = part, [part.folder, under.folder]
    else:
        language = under = _language_part(part, base)
        folders = [language.folder]
    text = _text_config(language)
    tower = choose_tower(part, under, vision_tower)
    tensors = language.language | dict(tower.tensors)
    files = find_sidecars(*folders, tower=tower.folder)
    token = find_token(system, part.hf, lambda: _tokens(language.path, files), rows=text.vocab_size)
    if token is not None:
        fields = {"token_id": token, **(fields or {})}
        text = dataclasses.replace(text, vocab_size=max(text.vocab_size, token + 1))
        tensors = add_rows(tensors, rows=text.vocab_size, seed=seed)
    place = epath.Path(vision_tower or tower.folder or part.path)
    if part.layout == "llama":
        chosen = _name_errors(
            place, lambda: new_system(system, fields, vision=tower.config, text=text)
        )
    elif system is None and fields:
        options = ", ".join(name_fields(fields))
        raise CheckpointError(f"{path} has a system of its own; leave out {options}")
    else:
        tensors |= part.connector
        hf = replace_system(part.hf or language.hf, system, fields)
        shapes = {name: tensor.info.shape for name, tensor in tensors.items()}
        chosen = _name_errors(
            part.path,
            infer_system,
            shapes,
            hf,
            tower.config,
            text,
            assumed=_describe_defaults(None, tower),
        )
    config = _name_errors(place, lambda: LlavaConfig(vision=tower.config, text=text, system=chosen))
    new = own_entries(config) if part.layout == "llama" else ()
    if part.layout != "llama" and system is not None:
        # Of a system that the weights fit, what it adds to the language model may be new.
        new = tuple(
            entry
            for entry in chosen.decoder_weights(tower.config, text)
            if not any(name in tensors for name in entry.tensors)
        )
    tensors |= _random(new, tensors, seed)
    text = dataclasses.replace(text, vocab_padding=-text.vocab_size % vocabulary_multiple)
    config = dataclasses.replace(config, text=text)
    config = _name_errors(part.path, config.with_quantization, quantize)
    entries = table(config)
    unknown = (*part.unknown, *(language.unknown if language is not part else ()), *tower.unknown)
    return Source(
        config=config,
        layout=part.layout,
        vocabulary=text.vocab_size,
        dtype=dtype,
        files=files,
        entries=entries,
        tensors=tensors,
        new=tuple(name for entry in new for name in entry.tensors),
        carried=_check(
            part.path,
            config,
            entries,
            tensors,
            unknown,
            assumed=_describe_defaults(language, tower),
        ),
    )


def _language_part(part: Part, base: epath.PathLike | None) -> Part:
    """The part that holds the language model."""
    if part.layout != "adapter":
        if base is not None:
            raise CheckpointError(
                f"{part.path} has a language model of its own; leave out --base {base}"
            )
        return part
    if base is None:
        raise CheckpointError(
            f"{part.path} is an adapter alone; import it first: stf-jax convert import {part.path} "
            "OUT --base LANGUAGE_MODEL --vision-tower CLIP"
        )
    if part.hf.get("mm_use_im_start_end") or any("embed_tokens" in name for name in part.unknown):
        raise CheckpointError(
            f"{part.path} was trained with tokens of its own round images (mm_use_im_start_end), "
            "which its base does not have; finish both stages in LLaVA, and import the whole model"
        )
    language = open_part(base)
    if not language.language:
        raise CheckpointError(f"{base} is no language model, but {language.layout}")
    return language


def _tokens(path: epath.Path, files: Mapping[str, epath.Path]) -> Mapping[str, int]:
    """Ids of the tokenizer's tokens; none where there is none to read."""
    try:
        tokenizer = read_tokenizer(path, files)
    except CheckpointError:
        # Weights alone are converted, too.
        return {}
    tokens: dict[str, int] = tokenizer.backend.get_vocab(with_added_tokens=True)
    return tokens


def _text_config(part: Part) -> TextConfig:
    if not part.hf:
        raise CheckpointError(f"{part.path} has no config.json; download or copy it, too")
    return _name_errors(part.path, lambda: text_from_hf(language_keys(part.hf)))


def _name_errors(path: epath.Path, function: Callable[..., T], *args: Any, assumed: str = "") -> T:
    """`function(*args)`, whose errors then say which checkpoint or tower they mean."""
    try:
        return function(*args)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}{assumed}") from error


def _describe_defaults(language: Part | None, tower: TowerChoice) -> str:
    """For an error about sizes: those that config.json does not give."""
    given = TEXT_DEFAULTS if language is None else language_keys(language.hf)
    silent = [
        f"the language model's {key} ({size})"
        for key, size in TEXT_DEFAULTS.items()
        if key not in given
    ]
    silent += [f"the vision tower's {key} ({size})" for key, size in tower.assumed.items()]
    if not silent:
        return ""
    return f" (config.json lacks {', '.join(silent)}; transformers' defaults were assumed)"


def _random(
    entries: tuple[Entry, ...], tensors: Mapping[str, Tensor], seed: int
) -> dict[str, Tensor]:
    like = tensors.get("model.embed_tokens.weight")
    dtype = like.info.dtype if like else FLOATS["float32"]
    drawn = RandomTensors.for_entries(entries, dtype=dtype, seed=seed)
    return {name: Tensor(drawn, name) for name in drawn.infos}


def _check(
    path: epath.Path,
    config: LlavaConfig,
    entries: tuple[Entry, ...],
    tensors: Mapping[str, Tensor],
    unknown: tuple[str, ...],
    *,
    assumed: str,
) -> tuple[str, ...]:
    """The carried tensors, once every tensor is known to be there and to fit."""
    needed = {name: entry.shape for entry in entries for name in entry.tensors}
    may_be = carried_shapes(config)
    if config.text.tie_embeddings:
        may_be["lm_head.weight"] = needed["model.embed_tokens.weight"]
    problems = [f"missing: {name} {shape}" for name, shape in needed.items() if name not in tensors]
    extra: list[str] = list(unknown)
    for name, tensor in tensors.items():
        shape = needed.get(name, may_be.get(name))
        if shape is None:
            if not is_buffer(name):
                extra.append(tensor.name)
        elif tensor.info.shape != shape:
            problems.append(f"shape of {tensor.name}: {tensor.info.shape}, expected {shape}")
        elif not is_float(tensor.info.dtype):
            problems.append(
                f"dtype of {tensor.name}: {tensor.info.dtype}, expected {', '.join(FLOATS)}"
            )
    problems += [f"extra: {name}" for name in extra]
    if problems:
        count = "1 tensor" if len(problems) == 1 else f"{len(problems)} tensors"
        raise CheckpointError(
            f"{path} does not fit its config.json ({count}){assumed}:\n"
            + list_some(_by_layer(problems))
        )
    return tuple(name for name in tensors if name not in needed)


def _by_layer(problems: list[str]) -> list[str]:
    """The lines; those that differ by nothing but the number of a layer become one."""
    layers: dict[str, list[int]] = {}
    for line in problems:
        number = _LAYER.search(line)
        kind = _LAYER.sub(".layers.{}.", line, count=1)
        layers.setdefault(kind, []).extend([int(number[1])] if number else [])
    return [
        kind.replace(".layers.{}.", f".layers.{_ranges(numbers)}.") if numbers else kind
        for kind, numbers in layers.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> "1-3,7"."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ranges)
