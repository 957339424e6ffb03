"""The pretraining of the demo: makes `data/` again, the small CLIP and the small LLaMA.

    python -m stf_jax.demo.pretraining OUT

They take the place of CLIP and Vicuna. The tower has learned to see. The language model has learned
to talk about scenes, but has never seen an image. Both are written in the layouts of
`transformers`, as PyTorch users have them.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from stf_jax.convert.hf_config import text_to_hf, vision_to_hf
from stf_jax.convert.mapping import TOWER as TOWER_PREFIX
from stf_jax.convert.mapping import text_entries, tower_entries
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.demo import language, tower
from stf_jax.demo.language import TEXT, Phase, train_language, write_tokenizer
from stf_jax.demo.tower import VISION, train_tower
from stf_jax.models.weights import Entry
from stf_jax.util.files import new_directory, write_json

DATA = Path(__file__).parent / "data"
LANGUAGE, TOWER = DATA / "language", DATA / "tower"

_PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": VISION.image_size, "width": VISION.image_size},
    "size": {"shortest_edge": VISION.image_size},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def make(
    out: Path,
    *,
    seed: int = 0,
    tower_steps: int = tower.STEPS,
    scenes: int = tower.SCENES,
    phases: Sequence[Phase] = language.PHASES,
) -> None:
    """Trains and writes `out`/tower and `out`/language, unless they are there already."""
    if not (out / "tower").is_dir():
        with new_directory(out / "tower") as unfinished:
            _make_tower(Path(unfinished), steps=tower_steps, scenes=scenes, seed=seed)
    if not (out / "language").is_dir():
        with new_directory(out / "language") as unfinished:
            _make_language(Path(unfinished), phases=phases, seed=seed)


def _make_tower(folder: Path, *, steps: int, scenes: int, seed: int) -> None:
    trained = train_tower(seed=seed, steps=steps, scene_count=scenes, say=_say)
    norm = {"weight": np.ones(VISION.width, np.float32), "bias": np.zeros(VISION.width, np.float32)}
    _write(
        folder,
        {"architectures": ["CLIPVisionModel"], **vision_to_hf(VISION)},
        native_tensors(tower_entries(VISION, layers=VISION.layers), trained)
        # CLIP has this norm; LLaVA never runs it.
        | {f"{TOWER_PREFIX}post_layernorm.{kind}": array for kind, array in norm.items()},
    )
    write_json(folder / "preprocessor_config.json", _PREPROCESSOR, indent=2)


def _make_language(folder: Path, *, phases: Sequence[Phase], seed: int) -> None:
    write_tokenizer(folder)
    trained = train_language(load_tokenizer(folder), phases=phases, seed=seed, say=_say)
    _write(
        folder,
        {"architectures": ["LlamaForCausalLM"], **text_to_hf(TEXT)},
        native_tensors(text_entries(TEXT, vocabulary=TEXT.vocab_size), trained),
    )


def native_tensors(entries: Sequence[Entry], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """PyTorch's tensors of the native parameters."""
    tensors = {}
    for entry in entries:
        array = np.asarray(leaves[entry.native])
        layers = [array] if entry.layers is None else list(array)
        for name, layer in zip(entry.tensors, layers, strict=True):
            tensors[name] = np.ascontiguousarray(entry.transform.torch(layer))
    return tensors


def _write(folder: Path, config: Mapping[str, Any], tensors: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {**config, "torch_dtype": "float32"}, indent=2)
    file = folder / "model.safetensors"
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    # It is written for its owner alone.
    file.chmod(0o644)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
