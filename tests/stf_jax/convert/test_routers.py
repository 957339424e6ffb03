"""Models with routed layers: p-MoD's published layout, and new routers over a plain LLaVA."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from stf_jax.convert import export_checkpoint, import_checkpoint, open_source
from stf_jax.systems.pmod import PMoD
from stf_jax.systems.videollm_mod import VideoLLMMoD
from stf_jax.util.errors import CheckpointError

# What the released code writes, for a language model of two layers.
KEYS = {
    "architectures": ["PmodLlavaLlamaForCausalLM"],
    "model_type": "pmod_llava_llama",
    "mod_target_layers": "shiftedcos_decay_0.85_0.15",
    "mod_target_token_type": "vision_all",
    "mod_router_factor": 0.5,
    "mod_weight_norm": "tanh_0.2_1",
    "mod_bias_enabled": True,
    "mod_special_init": "zero",
    "mod_target_layer_indices": [1],
}
BF16 = np.dtype(ml_dtypes.bfloat16)


def load_json(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture
def plain(reference: Path, tmp_path: Path) -> Path:
    """A LLaVA-1.5 in PyTorch's layout."""
    tower = reference / "clip"
    import_checkpoint(reference / "vicuna", tmp_path / "a", vision_tower=tower, system="llava")
    export_checkpoint(tmp_path / "a", tmp_path / "plain", layout="llava")
    return tmp_path / "plain"


def routed_by_hand(layers: int) -> list[int]:
    """Layers whose share, by the paper's cosine, is at most 0.85."""
    shares = [math.cos(math.pi * layer / (layers - 1)) / 2 + 0.5 for layer in range(layers)]
    return [layer for layer, share in enumerate(shares) if share <= 0.85]


@pytest.fixture
def published(plain: Path, tmp_path: Path, read: Callable) -> Path:
    """A p-MoD as its authors publish it, made of that LLaVA and random routers, in bfloat16."""
    rng = np.random.default_rng(0)
    hf = load_json(plain / "config.json")
    routed = routed_by_hand(hf["num_hidden_layers"])
    tensors = {}
    for name, array in read(plain).items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) in routed:
            name = f"{layer[0]}decoder_layer.{name[layer.end() :]}"
        tensors[name] = array.astype(BF16)
    for layer in routed:
        for kind, shape in (("weight", (1, hf["hidden_size"])), ("bias", (1,))):
            values = rng.standard_normal(shape).astype(BF16)
            tensors[f"model.layers.{layer}.router.router.{kind}"] = values
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf | KEYS))
    for path in (plain / "vision_tower", *plain.glob("*token*"), *plain.glob("pre*")):
        (folder / path.name).symlink_to(path)
    return folder


def test_a_published_pmod_comes_back(
    published: Path, tmp_path: Path, read: Callable, assert_same: Callable
) -> None:
    """To the bit, under its names, with its config.json."""
    opened = import_checkpoint(published, tmp_path / "native")
    assert opened.config.system == PMoD(
        taps=opened.config.system.taps,
        projector_width=opened.config.system.projector_width,
        depth=opened.config.text.layers,
    )
    export_checkpoint(tmp_path / "native", tmp_path / "out", layout="llava")
    assert_same(read(tmp_path / "out"), read(published))
    assert load_json(tmp_path / "out" / "config.json") == load_json(published / "config.json")


def test_its_weights_alone_tell(published: Path) -> None:
    """Without its keys; the model type then is LLaVA's."""
    expected = open_source(published).config
    hf = {key: value for key, value in load_json(published / "config.json").items()}
    kept = {key: value for key, value in hf.items() if key not in KEYS}
    (published / "config.json").write_text(json.dumps(kept | {"model_type": "llava_llama"}))
    assert open_source(published).config == expected


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mod_target_layers", "deep_all", "schedule is 'deep_all'; give one such as"),
        (
            "mod_target_token_type",
            "all",
            "mod_target_token_type is 'all' in config.json; p-MoD has",
        ),
        ("mod_weight_norm", "softmax", "gate is 'softmax'; give one such as tanh_0.2_1"),
    ],
)
def test_other_routers_are_refused(published: Path, key: str, value: str, message: str) -> None:
    hf = load_json(published / "config.json") | {key: value}
    (published / "config.json").write_text(json.dumps(hf))
    with pytest.raises(CheckpointError, match=message):
        open_source(published)


def test_new_routers_over_a_llava(plain: Path, tmp_path: Path, read: Callable) -> None:
    """p-MoD begins with zeros, VideoLLM-MoD with what a seed draws; the rest stays."""

    def routers(system: str, seed: int = 0) -> dict[str, np.ndarray]:
        opened = open_source(plain, system=system, seed=seed)
        leaves = {leaf.path: leaf.read() for leaf in opened.leaves()}
        return {path: leaf for path, leaf in leaves.items() if path.startswith("text/router/")}

    pmod = routers("pmod")
    assert pmod.keys() == {"text/router/kernel", "text/router/bias"}
    assert not any(leaf.any() for leaf in pmod.values())
    (first,), (again,), (other,) = (routers("videollm_mod", seed).values() for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.std() > 0
    assert not np.array_equal(first, other)
    # Exported, it is p-MoD's own layout.
    import_checkpoint(plain, tmp_path / "native", system="pmod")
    export_checkpoint(tmp_path / "native", tmp_path / "out", layout="llava")
    hf = load_json(tmp_path / "out" / "config.json")
    assert {key: hf[key] for key in KEYS if key != "mod_special_init"} == {
        key: value for key, value in KEYS.items() if key != "mod_special_init"
    }
    assert any(".1.decoder_layer.self_attn." in name for name in read(tmp_path / "out"))
    assert not any(".0.decoder_layer." in name for name in read(tmp_path / "out"))


def test_a_router_that_is_missing_is_named(published: Path, read: Callable) -> None:
    tensors = read(published)
    del tensors["model.layers.1.router.router.bias"]
    save_file(tensors, published / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.router\.router\.bias"):
        open_source(published)


def test_videollm_mod_comes_back(plain: Path, tmp_path: Path) -> None:
    """It has no published layout: our own key says what its weights do not."""
    fields = {"ratio": 0.5, "stream_loss_weight": 2.0}
    native = tmp_path / "native"
    begun = import_checkpoint(plain, native, system="videollm_mod", fields=fields).config
    assert isinstance(begun.system, VideoLLMMoD)
    assert (begun.system.layers, begun.system.ratio) == ((1,), 0.5)
    export_checkpoint(native, tmp_path / "out", layout="llava")
    assert open_source(tmp_path / "out").config == begun
