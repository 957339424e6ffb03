"""What a directory of weights is, and whether it is whole."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping

from etils import epath

from convert.layouts import Layout, recognise
from convert.readers import open_tensors
from convert.source import open_source
from stf_jax.checkpoint import CheckpointError, is_native, open_native
from stf_jax.config import LlavaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was found; `str` of it is what `stf-jax convert inspect` prints."""

    path: str
    kind: Layout | str  # a layout, "native", or "unknown"
    config: LlavaConfig | None  # None for a part of a model, and where it cannot be told
    tensors: int
    parameters: Mapping[str, int]  # values of each dtype
    problem: str | None  # why it cannot be used as it is; None: it is whole

    @property
    def tokens_per_image(self) -> int | None:
        """Vision tokens that the language model sees for an image."""
        return None if self.config is None else self.config.tokens_per_image

    def __str__(self) -> str:
        total = sum(self.parameters.values())
        dtypes = ", ".join(f"{dtype} {count:,}" for dtype, count in self.parameters.items())
        lines = [f"{self.path}: {_KINDS.get(self.kind, self.kind)}"]
        if self.tensors:
            lines.append(f"  parameters        {total:,} in {self.tensors:,} tensors ({dtypes})")
        if self.config is not None:
            vision, fusion, text = self.config.vision, self.config.fusion, self.config.text
            lines += [
                f"  vision tower      {vision.layers} layers, width {vision.width}, "
                f"{vision.image_size} px, patch {vision.patch_size}",
                f"  fusion            {fusion.reduction}, window {fusion.window}, "
                f"taps {', '.join(map(str, fusion.taps))}",
                f"  tokens per image  {self.config.tokens_per_image}",
                f"  language model    {text.layers} layers, width {text.width}, "
                f"vocabulary {text.vocab_size:,}",
            ]
        lines.append(f"  not importable as it is: {self.problem}" if self.problem else "  whole")
        return "\n".join(lines)


_KINDS = {
    "native": "native checkpoint",
    "llava-stf": "LLaVA-STF (PyTorch)",
    "llava": "LLaVA-1.5 (PyTorch)",
    "hf": "Llava of transformers (PyTorch)",
    "llama": "language model alone (PyTorch)",
    "clip": "vision tower alone (PyTorch)",
    "adapter": "stage-1 adapter (PyTorch)",
}


def inspect_checkpoint(
    source: epath.PathLike,
    *,
    vision_tower: epath.PathLike | None = None,
    base: epath.PathLike | None = None,
) -> Report:
    """Looks at a checkpoint, native or PyTorch's, without reading its weights.

    Args:
        source: A directory, or the file of an adapter.
        vision_tower: As for `open_source`.
        base: As for `open_source`.

    Returns:
        A report, also of a damaged checkpoint.

    Raises:
        CheckpointError: `source` does not exist.
    """
    path = epath.Path(source)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_dir() and is_native(path):
        return _native(path)
    kind: Layout | None = None
    sizes: Counter[str] = Counter()
    tensors, config, problem = 0, None, None
    try:
        infos = open_tensors(path).infos
        kind, tensors = recognise(infos), len(infos)
        for info in infos.values():
            sizes[info.dtype.name] += math.prod(info.shape)
        config = open_source(path, vision_tower=vision_tower, base=base).config
    except CheckpointError as error:
        problem = str(error)
    return Report(
        path=str(path),
        kind=kind or "unknown",
        config=config,
        tensors=tensors,
        parameters=sizes,
        problem=problem,
    )


def _native(path: epath.Path) -> Report:
    sizes: Counter[str] = Counter()
    tensors, config, problem = 0, None, None
    try:
        native = open_native(path)
        config, tensors = native.config, len(native.shapes)
        for leaf in native.shapes.values():
            sizes[leaf.dtype.name] += math.prod(leaf.shape)
    except CheckpointError as error:
        problem = str(error)
    return Report(
        path=str(path),
        kind="native",
        config=config,
        tensors=tensors,
        parameters=sizes,
        problem=problem,
    )
