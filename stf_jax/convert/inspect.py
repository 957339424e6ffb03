"""What a directory of weights is, and whether it is whole."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping

from etils import epath

from stf_jax.convert.layouts import Layout, recognize
from stf_jax.convert.readers import open_tensors
from stf_jax.convert.safetensors_file import SafetensorsFile
from stf_jax.convert.source import open_source
from stf_jax.data.processors import check_tokenizer, read_image_processor, read_tokenizer
from stf_jax.models.quantization import bytes_per_value
from stf_jax.store.checkpoint import extra_files, is_native
from stf_jax.store.run import is_run, open_model
from stf_jax.systems.base import LlavaConfig
from stf_jax.util.errors import CheckpointError, missing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was found; `str` of it is what `stf-jax convert inspect` prints."""

    path: str
    kind: Layout | str  # a layout, "native", or "unknown"
    config: LlavaConfig | None  # None for a part of a model, and where it cannot be told
    tensors: int
    parameters: Mapping[str, int]  # values of each dtype
    problem: str | None  # why it cannot be used as it is; None: it is whole
    carried: int = 0  # values that a native checkpoint keeps for the way back alone
    processors: Mapping[str, str] = dataclasses.field(default_factory=dict)  # what was found
    verified: bool = False  # every array has the checksum that was written with it

    @property
    def tokens_per_image(self) -> int | None:
        """Vision tokens that the language model sees for an image."""
        return None if self.config is None else self.config.tokens_per_image

    @property
    def size(self) -> int:
        """Bytes of all parameters."""
        return int(sum(count * bytes_per_value(dtype) for dtype, count in self.parameters.items()))

    def __str__(self) -> str:
        total = sum(self.parameters.values())
        dtypes = ", ".join(f"{dtype} {count:,}" for dtype, count in self.parameters.items())
        lines = [f"{self.path}: {_KINDS.get(self.kind, self.kind)}"]
        if self.tensors:
            extra = f" + {self.carried:,} kept for export" if self.carried else ""
            lines.append(
                f"  parameters        {total:,} in {self.tensors:,} tensors ({dtypes}){extra}"
            )
        if self.config is not None:
            vision, text = self.config.vision, self.config.text
            padded = f", padded to {text.padded_vocab_size:,}" if text.vocab_padding else ""
            stored = ""
            if text.quantization is not None:
                stored = f"; {text.quantization} weights, the whole model {self.size:,} bytes"
            lines += [
                f"  vision tower      {vision.layers} layers, width {vision.width}, "
                f"{vision.image_size} px, patch {vision.patch_size}",
                f"  system            {self.config.system.describe()}",
                f"  tokens per image  {self.config.tokens_per_image}",
                f"  language model    {text.layers} layers, width {text.width}, "
                f"vocabulary {text.vocab_size:,}{padded}{stored}",
            ]
        lines += [f"  {kind:<16}  {what}" for kind, what in self.processors.items()]
        whole = "  whole, every array verified" if self.verified else "  whole"
        lines.append(f"  not usable as it is: {self.problem}" if self.problem else whole)
        return "\n".join(lines)


_KINDS = {
    "native": "native checkpoint",
    "run": "run of stf-jax train",
    "llava-stf": "LLaVA-STF (PyTorch)",
    "llava": "LLaVA-1.5 (PyTorch)",
    "hf": "Llava of transformers (PyTorch)",
    "hf-code": "stf_jax's code for transformers (PyTorch)",
    "llama": "language model alone",
    "clip": "vision tower alone",
    "adapter": "stage-1 adapter (PyTorch)",
    "lora": "LoRA adapter (PyTorch)",
}


def inspect_checkpoint(
    source: epath.PathLike,
    *,
    vision_tower: epath.PathLike | None = None,
    base: epath.PathLike | None = None,
    verify: bool = False,
) -> Report:
    """Looks at a checkpoint, native, PyTorch's or a run's; reads weights only to verify them.

    Args:
        source: A directory or a file of weights.
        vision_tower: As for `open_source`.
        base: As for `open_source`.
        verify: Reads every array of a native checkpoint or a run and holds it against the checksum
            that was written with it.

    Returns:
        A report, also of a damaged checkpoint.

    Raises:
        CheckpointError: `source` does not exist, is PyTorch's and was to be verified, or is native
            and was given a part of a model.
    """
    path = epath.Path(source)
    if not path.exists():
        raise missing(path)
    if path.is_dir() and (is_native(path) or is_run(path)):
        for option, given in (("--vision-tower", vision_tower), ("--base", base)):
            if given is not None:
                raise CheckpointError(f"{path} is a whole model; leave out {option} {given}")
        return _native(path, verify=verify)
    if verify:
        raise CheckpointError(
            f"{path}: PyTorch's files have no checksums; compare their SHA-256 with those of where "
            "they come from, or leave out --verify"
        )
    kind: Layout | None = None
    sizes: Counter[str] = Counter()
    tensors, config, problem, processors = 0, None, None, _Found()
    try:
        infos = open_tensors(path).infos
        kind, tensors = recognize(infos), len(infos)
        for info in infos.values():
            sizes[info.dtype.name] += math.prod(info.shape)
        opened = open_source(path, vision_tower=vision_tower, base=base)
        config = opened.config
        processors = _processors(epath.Path(base or path), opened.files, config)
    except CheckpointError as error:
        problem = str(error)
    return Report(
        path=str(path),
        kind=kind or "unknown",
        config=config,
        tensors=tensors,
        parameters=sizes,
        problem=problem or processors.problem,
        processors=processors.what,
    )


def _native(path: epath.Path, *, verify: bool) -> Report:
    sizes: Counter[str] = Counter()
    tensors, extra, config, problem, processors, verified = 0, 0, None, None, _Found(), False
    try:
        native = open_model(path)
        config, tensors = native.config, len(native.shapes)
        for leaf in native.shapes.values():
            sizes[leaf.dtype.name] += math.prod(leaf.shape)
        carried = SafetensorsFile(native.extras / "pytorch" / "carried.safetensors")
        if carried.path.exists():
            extra = sum(math.prod(info.shape) for info in carried.infos.values())
        processors = _processors(native.extras / "hf", extra_files(native.extras), config)
        if verify:
            native.verify()
            verified = True
    # The config of a run may be damaged, too.
    except ValueError as error:
        problem = str(error)
    return Report(
        path=str(path),
        kind="run" if is_run(path) else "native",
        config=config,
        tensors=tensors,
        parameters=sizes,
        problem=problem or processors.problem,
        carried=extra,
        verified=verified,
        processors=processors.what,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Found:
    what: Mapping[str, str] = dataclasses.field(default_factory=dict)
    problem: str | None = None


def _processors(path: epath.Path, files: Mapping[str, epath.Path], config: LlavaConfig) -> _Found:
    """What is said of the tokenizer and the image processor that belong into a directory."""
    what, problems = {"tokenizer": "none", "image processor": "none"}, []
    try:
        tokenizer = read_tokenizer(path, files)
        what["tokenizer"] = f"{tokenizer.vocab_size:,} tokens"
        check_tokenizer(path, tokenizer, text=config.text)
    except CheckpointError as error:
        problems.append(str(error))
    try:
        images = read_image_processor(path, files)
        what["image processor"] = f"{images.image_size} px, mode {images.mode}"
    except CheckpointError as error:
        problems.append(str(error))
    return _Found(what=what, problem="; ".join(problems) or None)
