"""A system's reference: a folder with `case.json` and `tensors.safetensors`, as a model's weights.

No size, seed, budget or name of a folder stands in a test: another folder of the same form is
checked by the same tests (`STF_JAX_REFERENCE=DIR`; DIR, DIR/systems or DIR itself is the folder).
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.convert.layouts import canonical
from stf_jax.convert.mapping import table
from stf_jax.data.batch import Batch
from stf_jax.data.tokenizer import IGNORED_LABEL, IMAGE_TOKEN_ID
from stf_jax.models.llava import Llava
from stf_jax.models.weights import Entry
from stf_jax.store.arrays import flatten, unflatten
from stf_jax.systems.base import LlavaConfig, System
from tests.conftest import REFERENCE


@dataclasses.dataclass(frozen=True)
class Case:
    """One folder."""

    path: Path

    @cached_property
    def json(self) -> dict[str, Any]:
        return json.loads((self.path / "case.json").read_text(encoding="utf-8"))

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        return load_file(self.path / "tensors.safetensors")

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[name]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """The tensors whose names begin so, without that."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    @property
    def hyper(self) -> dict[str, Any]:
        return self.json["hyper"]

    @cached_property
    def vision(self) -> VisionConfig:
        sizes = self.json["sizes"]["clip"]
        return VisionConfig(
            image_size=_first(sizes, "image_size", "image"),
            patch_size=_first(sizes, "patch_size", "patch"),
            width=_first(sizes, "hidden_size", "width"),
            layers=_first(sizes, "num_hidden_layers", "layers"),
            heads=_first(sizes, "num_attention_heads", "heads"),
            mlp_width=_first(sizes, "intermediate_size", "inter"),
            activation=sizes["hidden_act"],
            norm_eps=sizes["layer_norm_eps"],
        )

    @cached_property
    def text(self) -> TextConfig:
        sizes = self.json["sizes"]["llm"]
        return TextConfig(
            vocab_size=sizes["vocab_size"],
            width=sizes["hidden_size"],
            mlp_width=sizes["intermediate_size"],
            layers=sizes["num_hidden_layers"],
            heads=sizes["num_attention_heads"],
            kv_heads=sizes["num_key_value_heads"],
            head_dim=sizes["hidden_size"] // sizes["num_attention_heads"],
            norm_eps=sizes["rms_norm_eps"],
            rope_theta=sizes["rope_theta"],
        )

    @cached_property
    def decoder_text(self) -> TextConfig:
        """The language model of a folder that holds nothing else; its sizes have other names."""
        sizes = self.json["sizes"]
        return TextConfig(
            vocab_size=sizes["vocab"],
            width=sizes["hidden"],
            mlp_width=sizes["intermediate"],
            layers=sizes["layers"],
            heads=sizes["heads"],
            kv_heads=sizes["heads"],
            head_dim=sizes["hidden"] // sizes["heads"],
            norm_eps=self.hyper["rms_norm_eps"],
            rope_theta=self.hyper["rope_theta"],
        )

    @property
    def tap(self) -> int:
        """The hidden state that `select_layer` names; LLaVA's is the last but one."""
        return self.vision.layers + 1 + self.hyper.get("select_layer", -2)

    def config(self, system: System) -> LlavaConfig:
        return LlavaConfig(vision=self.vision, text=self.text, system=system)

    def model(self, system: System, *, weights: str = "weights.") -> Llava:
        """With the reference's weights, through the table that imports them."""
        config = self.config(system)
        given = {canonical(name, "llava"): w for name, w in self.group(weights).items()}
        model = Llava.abstract(config)
        fill(model, table(config), given)
        return model

    def check_gradients(self, model: Llava, gradient: Any, *, prefix: str) -> None:
        """Each within 1e-5 of its norm, where that is no rounding of zero."""
        actual = self.gradients(model, gradient)
        expected = self.group(prefix)
        floor = 1e-3 * max(np.linalg.norm(tensor) for tensor in expected.values())
        for name, tensor in expected.items():
            found = actual[canonical(name, "llava")]
            difference = np.linalg.norm(found - tensor)
            assert difference < 1e-5 * max(np.linalg.norm(tensor), floor), name

    def gradients(self, model: Llava, gradient: Any) -> dict[str, np.ndarray]:
        """Gradients by their canonical names."""
        leaves = flatten(nnx.to_pure_dict(gradient))
        result = {}
        for entry in table(model.config):
            leaf = np.asarray(leaves[entry.native])
            parts = leaf if entry.layers is not None else [leaf]
            for name, part in zip(entry.tensors, parts, strict=True):
                result[name] = entry.transform.torch(part)
        return result


def _first(sizes: Mapping[str, Any], *names: str) -> Any:
    return next(sizes[name] for name in names if name in sizes)


def fill(
    module: nnx.Module, entries: Iterable[Entry], given: Mapping[str, np.ndarray], *, at: str = ""
) -> None:
    """Puts tensors into a module that lies at a path of the whole model."""
    leaves: dict[str, jax.Array] = {}
    for entry in entries:
        parts = [entry.transform.native(given[name]) for name in entry.tensors]
        leaf = np.stack(parts) if entry.layers is not None else parts[0]
        leaves[entry.native.removeprefix(at)] = jnp.asarray(leaf)
    nnx.update(module, unflatten(leaves))


def find_case(name: str) -> Case:
    """The folder of a system; skips where another reference is asked for that has none."""
    for path in (REFERENCE / "systems" / name, REFERENCE / name, REFERENCE):
        file = path / "case.json"
        if file.is_file() and json.loads(file.read_text())["system"] == name:
            return Case(path)
    pytest.skip(f"{REFERENCE} has no folder of {name}")


def insert_images(
    ids: np.ndarray, labels: np.ndarray, mask: np.ndarray, *, tokens: int, images: np.ndarray
) -> Batch:
    """Rows with -200 where an image stands as a batch with `tokens` slots an image.

    A row without an image uses up one image, as LLaVA's collator supplies it.
    """
    rows, taken, at = [], [], 0
    for row_ids, row_labels, row_mask in zip(ids, labels, mask, strict=True):
        real = row_mask > 0
        row_ids, row_labels = row_ids[real], row_labels[real]
        count = int((row_ids == IMAGE_TOKEN_ID).sum())
        repeats = np.where(row_ids == IMAGE_TOKEN_ID, tokens, 1)
        labels_of = np.where(row_ids == IMAGE_TOKEN_ID, IGNORED_LABEL, row_labels)
        rows.append((np.repeat(row_ids, repeats), np.repeat(labels_of, repeats)))
        taken.append(range(at, at + count))
        at += max(count, 1)
    length, most = max(len(row) for row, _ in rows), max(map(len, taken))
    shape = (len(rows), length)
    batch_ids, batch_labels = np.zeros(shape, np.int32), np.full(shape, IGNORED_LABEL, np.int32)
    segments, slots = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    pixels = np.zeros((len(rows), most, *images.shape[2:], 3), np.float32)
    for row, ((row_ids, row_labels), numbers) in enumerate(zip(rows, taken, strict=True)):
        size, at_image = len(row_ids), row_ids == IMAGE_TOKEN_ID
        batch_ids[row, :size], batch_labels[row, :size] = row_ids, row_labels
        segments[row, :size] = 1
        slots[row, :size][at_image] = np.arange(at_image.sum())
        for place, number in enumerate(numbers):
            pixels[row, place] = images[number].transpose(1, 2, 0)
    return Batch(
        ids=jnp.asarray(batch_ids),
        labels=jnp.asarray(batch_labels),
        positions=jnp.asarray(np.broadcast_to(np.arange(length, dtype=np.int32), shape)),
        segments=jnp.asarray(segments),
        image_slots=jnp.asarray(slots),
        pixels=jnp.asarray(pixels),
    )


def assert_near(actual: Any, expected: np.ndarray, *, tolerance: float) -> None:
    """Equal relative to the largest entry."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    scale = max(float(np.abs(expected).max()), 1e-6)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)
