"""Towers of other depths and grids than CLIP ViT-L/14's, and the options that fit a system."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from stf_jax.cli.main import main
from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.convert import open_source
from stf_jax.convert.infer import new_system
from stf_jax.store.checkpoint import open_native
from stf_jax.systems import SYSTEMS
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.stf import STF_TAPS
from tests.stf_jax.convert.refusal import refused

TEXT = TextConfig.tiny()
B_32 = VisionConfig(image_size=224, patch_size=32, width=768, mlp_width=3072, layers=12, heads=12)
B_16 = VisionConfig(image_size=224, patch_size=16, width=768, mlp_width=3072, layers=12, heads=12)
TOWERS = {
    "B/32": (B_32, 7, (11, 9, 6, 3), None),
    "B/16": (B_16, 14, (11, 9, 6, 3), 49),
    "L/14": (VisionConfig.clip_l_224(), 16, STF_TAPS, 64),
    "L/14-336": (VisionConfig.clip_l_336(), 24, STF_TAPS, 144),
}


@pytest.mark.parametrize("name", TOWERS)
def test_published_towers(name: str) -> None:
    """The taps that are proposed, and the tokens that two by two patches make."""
    vision, grid, taps, tokens = TOWERS[name]
    system = new_system("stf", {}, vision=vision, text=TEXT)
    assert vision.grid == grid
    assert system.taps == taps
    if tokens is None:
        with pytest.raises(ValueError, match=r"7x7 grid; windows that do: 1, 7$"):
            LlavaConfig(vision=vision, text=TEXT, system=system)
    else:
        assert LlavaConfig(vision=vision, text=TEXT, system=system).tokens_per_image == tokens


@pytest.mark.parametrize("layers", [2, 3, 4, 6, 12, 24, 32, 48])
def test_every_system_proposes_taps_for_a_tower_of_any_depth(layers: int) -> None:
    vision = VisionConfig(image_size=56, width=32, mlp_width=64, layers=layers, heads=4)
    for name in SYSTEMS:
        system = new_system(name, None, vision=vision, text=TEXT)
        # The last hidden state that LLaVA reads is the last but one.
        assert max(system.taps) == layers - 1
        assert len(set(system.taps)) == len(system.taps)
        assert LlavaConfig(vision=vision, text=TEXT, system=system).tokens_per_image


@pytest.fixture
def small_tower(reference: Path, tmp_path: Path) -> Callable[..., Path]:
    """The reference's tower, cut to some layers and patches."""

    def make(*, layers: int, grid: int = 4) -> Path:
        folder = Path(shutil.copytree(reference / "clip", tmp_path / f"clip-{layers}-{grid}"))
        tensors = {
            name: array
            for name, array in load_file(folder / "model.safetensors").items()
            if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < layers
        }
        places = "vision_model.embeddings.position_embedding.weight"
        tensors[places] = tensors[places][: grid**2 + 1].copy()
        save_file(tensors, folder / "model.safetensors")
        hf = json.loads((folder / "config.json").read_text())
        sizes = {"num_hidden_layers": layers, "image_size": grid * hf["patch_size"]}
        hf = {**hf, **sizes}
        (folder / "config.json").write_text(json.dumps(hf))
        return folder

    return make


@pytest.mark.parametrize(("layers", "taps"), [(3, (2,)), (6, (5, 3)), (12, (11, 9, 6, 3))])
def test_a_tower_of_few_layers(
    layers: int, taps: tuple[int, ...], small_tower: Callable, reference: Path
) -> None:
    opened = open_source(reference / "vicuna", vision_tower=small_tower(layers=layers))
    assert opened.config.system.taps == taps
    assert {leaf.path for leaf in opened.leaves()} >= {"connector/mbtf/linear_1/kernel"}


def test_options_of_the_command_line(
    small_tower: Callable, reference: Path, tmp_path: Path
) -> None:
    """What they give comes back from an export."""
    out = tmp_path / "native"
    command = f"convert import {reference / 'vicuna'} {out} --vision-tower {small_tower(layers=12)}"
    options = "--taps 10,8,2 --window 4 --mbtf-width 24 --projector-width 40"
    assert main([*command.split(), *options.split()]) == 0
    native = open_native(out)
    assert native.config.system.to_dict() == {
        "name": "stf",
        "taps": (10, 8, 2),
        "window": 4,
        "mbtf": {"mlp_width": 24, "last_activation": False},
        "projector_width": 40,
    }
    assert native.config.tokens_per_image == 1
    assert native.shapes["connector/mbtf/linear_1/kernel"].shape == (3 * 32, 24)
    assert native.shapes["connector/projector/linear_1/kernel"].shape == (16 * 32, 40)
    assert main(f"convert export {out} {tmp_path / 'out'} --layout llava-stf".split()) == 0
    assert open_source(tmp_path / "out").config == native.config


REFUSED = [
    ("--taps 13,3", r"clip-12-4: tap 13 lies beyond the tower's 12 layers; .*such as 11,9,6,3$"),
    ("--window 3", r"clip-12-4: window 3 does not divide .* 4x4 grid; windows that do: 1, 2, 4$"),
    ("--window 0", r"clip-12-4: .*window is 0; it must be at least 1"),
    ("--mbtf-width 0", r"clip-12-4: .*mlp_width is 0; it must be at least 1"),
    ("--system llava --window 2", r"clip-12-4: system llava has no window; it has projector_width"),
    ("--system average --taps 11,3", r"clip-12-4: 2 taps need mbtf to mix them"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[option for option, _ in REFUSED])
def test_options_that_do_not_fit(
    options: str,
    message: str,
    small_tower: Callable,
    reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = f"convert import {reference / 'vicuna'} {tmp_path / 'out'} --vision-tower "
    assert main([*f"{command} {small_tower(layers=12)} {options}".split()]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_an_odd_grid(small_tower: Callable, reference: Path, tmp_path: Path) -> None:
    tower = small_tower(layers=6, grid=3)
    message = r"clip-6-3: window 2 does not divide the tower's 3x3 grid; windows that do: 1, 3$"
    refused(reference / "vicuna", tmp_path / "out", message, vision_tower=tower)
    opened = open_source(reference / "vicuna", vision_tower=tower, fields={"window": 3})
    assert opened.config.tokens_per_image == 1


def test_options_for_a_model_with_a_system_of_its_own(reference: Path, tmp_path: Path) -> None:
    message = "has a system of its own; leave out --taps, --mbtf-width$"
    fields = {"taps": [3], "mbtf": {"mlp_width": 8}}
    refused(reference / "llava-stf", tmp_path / "out", message, fields=fields)
