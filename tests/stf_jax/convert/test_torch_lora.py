"""LoRA directories as PEFT and LLaVA write them, merged onto their bases, and written by ours."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from stf_jax.convert import (
    export_checkpoint,
    exporter,
    import_checkpoint,
    inspect_checkpoint,
    open_source,
)
from stf_jax.convert.mapping import own_entries, text_entries
from stf_jax.store.arrays import host_like
from stf_jax.store.checkpoint import open_native
from stf_jax.store.run import adapter_path, open_model
from stf_jax.train.checkpoint import Checkpoints
from stf_jax.train.optimizer import OptimizerConfig, make_optimizer
from stf_jax.train.step import init_state
from stf_jax.util.errors import CheckpointError
from tests.stf_jax.convert.refusal import edit_json, refused

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),
]

Tensors = dict[str, torch.Tensor]
PEFT = "base_model.model."
RANK, ALPHA = 4, 6
MODULES = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
ADAPTED = [f"model.layers.{layer}.{module}" for layer in range(2) for module in MODULES]


def load(directory: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(file)
    return tensors


def low_rank(base: Mapping[str, torch.Tensor], rank: Callable[[str], int]) -> Tensors:
    """A and B for every weight of the decoder's layers, by PEFT's names."""
    generator = torch.Generator().manual_seed(5)
    tensors: Tensors = {}
    for module in ADAPTED:
        rows, columns = base[f"{module}.weight"].shape
        for half, shape in (
            ("lora_A", (rank(module), columns)),
            ("lora_B", (rows, rank(module))),
        ):
            values = torch.randn(shape, generator=generator)
            tensors[f"{PEFT}{module}.{half}.weight"] = values
    return tensors


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], **settings: object) -> Path:
    folder.mkdir(parents=True)
    safetensors.torch.save_file(dict(tensors), folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def peft(reference: Path, tmp_path: Path) -> Path:
    """An adapter of the reference's LLaVA-STF, as PEFT alone leaves it."""
    base = load(reference / "llava-stf")
    return write_adapter(tmp_path / "peft", low_rank(base, lambda module: RANK))


@pytest.fixture
def llava(reference: Path, tmp_path: Path) -> Path:
    """An adapter of Vicuna and what LLaVA's training leaves beside it."""
    folder = write_adapter(
        tmp_path / "llava", low_rank(load(reference / "vicuna"), lambda module: RANK)
    )
    shutil.copy(reference / "llava-stf" / "config.json", folder)
    projector = torch.load(reference / "mm_projector.bin", weights_only=True)
    beside = {f"{PEFT}{name}": tensor for name, tensor in projector.items()}
    torch.save(beside, folder / "non_lora_trainables.bin")
    return folder


def read(source: Path, **options: object) -> dict[str, np.ndarray]:
    """Every tensor of the model that is opened, by its canonical name, in PyTorch's layout."""
    opened = open_source(source, **options)
    leaves = {leaf.path: leaf.read() for leaf in opened.leaves()}
    tensors = {}
    for entry in opened.entries:
        array = leaves[entry.native]
        layers = [array] if entry.layers is None else list(array)
        for name, layer in zip(entry.tensors, layers, strict=True):
            tensors[name] = entry.transform.torch(layer)
    return tensors


def check_merged(
    found: Mapping[str, np.ndarray],
    base: Mapping[str, torch.Tensor],
    adapter: Mapping[str, torch.Tensor],
    scale: Callable[[str], float],
) -> None:
    """Adapted weights against float64, all others to the bit."""
    for name, tensor in base.items():
        if name not in found:
            continue
        module = name.removesuffix(".weight")
        if module not in ADAPTED:
            np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)
            continue
        a, b = (adapter[f"{PEFT}{module}.lora_{half}.weight"].double() for half in "AB")
        expected = tensor.double() + scale(module) * b @ a
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6, err_msg=name)


def test_an_adapter_of_peft_over_a_llava(peft: Path, reference: Path) -> None:
    base = reference / "llava-stf"
    found = read(peft, base=base)
    check_merged(found, load(base), load(peft), lambda module: ALPHA / RANK)
    assert open_source(peft, base=base).config == open_source(base).config


def test_an_adapter_of_llava_over_vicuna(llava: Path, reference: Path) -> None:
    options = {"base": reference / "vicuna", "vision_tower": reference / "clip"}
    found = read(llava, **options)
    check_merged(found, load(reference / "vicuna"), load(llava), lambda module: ALPHA / RANK)
    projector = torch.load(reference / "mm_projector.bin", weights_only=True)
    for name, tensor in projector.items():
        np.testing.assert_array_equal(found[name.removeprefix("model.")], tensor.numpy())
    opened = open_source(llava, **options)
    assert opened.layout == "llava-stf"
    assert opened.files["config.json"].parent == llava
    assert opened.files["tokenizer.model"].parent == reference / "vicuna"
    report = inspect_checkpoint(llava, **options)
    assert (report.kind, report.problem) == ("lora", None)
    assert "LoRA adapter" in str(report)


def test_a_scale_by_the_square_root_of_the_rank(peft: Path, reference: Path) -> None:
    edit_json(peft / "adapter_config.json", use_rslora=True)
    found = read(peft, base=reference / "llava-stf")
    check_merged(found, load(reference / "llava-stf"), load(peft), lambda _: ALPHA / RANK**0.5)


def test_ranks_and_alphas_of_single_modules(reference: Path, tmp_path: Path) -> None:
    """A key names a module or the end of its name; the first that fits counts."""
    base = load(reference / "llava-stf")
    ranks = {"model.layers.1.mlp.up_proj": 2, "mlp.up_proj": 3}
    alphas = {"v_proj": 1.5, "^model.layers.0.self_attn.v_proj": 9, "^mlp.down_proj": 7}

    def rank(module: str) -> int:
        return next((n for end, n in ranks.items() if module.endswith(end)), RANK)

    def scale(module: str) -> float:
        return (1.5 if module.endswith("v_proj") else ALPHA) / rank(module)

    adapter = write_adapter(
        tmp_path / "a", low_rank(base, rank), rank_pattern=ranks, alpha_pattern=alphas
    )
    found = read(adapter, base=reference / "llava-stf")
    check_merged(found, base, load(adapter), scale)


def test_bin_files_and_the_name_of_the_adapter_in_every_name(peft: Path, reference: Path) -> None:
    """As `torch.save(model.state_dict())` of a model inside torch.compile leaves them."""
    named = {
        f"_orig_mod.{name.replace('.weight', '.default.weight')}": tensor
        for name, tensor in load(peft).items()
    }
    expected = read(peft, base=reference / "llava-stf")
    (peft / "adapter_model.safetensors").unlink()
    torch.save(named, peft / "adapter_model.bin")
    found = read(peft, base=reference / "llava-stf")
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_embedding_and_what_is_saved_as_a_whole(reference: Path, tmp_path: Path) -> None:
    base = load(reference / "llava-stf")
    rows, width = base["model.embed_tokens.weight"].shape
    a, b, head = torch.randn(RANK, rows), torch.randn(width, RANK), torch.randn(rows, width)
    tensors = {
        f"{PEFT}model.embed_tokens.lora_embedding_A": a,
        f"{PEFT}model.embed_tokens.lora_embedding_B": b,
        f"{PEFT}lm_head.modules_to_save.weight": head,
    }
    found = read(write_adapter(tmp_path / "a", tensors), base=reference / "llava-stf")
    expected = base["model.embed_tokens.weight"].double() + ALPHA / RANK * (b @ a).T.double()
    np.testing.assert_allclose(found["model.embed_tokens.weight"], expected, atol=1e-5)
    np.testing.assert_array_equal(found["lm_head.weight"], head.numpy())


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_weights_in_half_precision_are_rounded_once(
    dtype: str | None, peft: Path, checkpoint: Callable
) -> None:
    base = checkpoint(lambda name, array: array.astype(np.float16))
    found = read(peft, base=base, dtype=dtype)
    weights, adapter = load(base), load(peft)
    for module in ADAPTED:
        a, b = (adapter[f"{PEFT}{module}.lora_{half}.weight"].double() for half in "AB")
        exact = (weights[f"{module}.weight"].double() + ALPHA / RANK * b @ a).numpy()
        array = found[f"{module}.weight"]
        assert array.dtype == (dtype or "float16")
        # Half a unit in the last place, and the rounding of the sum in float32.
        unit = np.spacing(np.abs(array)).astype(np.float64)
        assert (np.abs(array - exact) <= 0.5 * unit + 2e-6).all(), module


SETTINGS = [
    ({"use_dora": True}, "with DoRA, which .*; merge it with merge_and_unload of PEFT"),
    ({"peft_type": "ADALORA"}, "with ADALORA, which stf_jax does not merge"),
    ({"init_lora_weights": "pissa"}, "with init_lora_weights 'pissa', which"),
    ({"fan_in_fan_out": True}, "with transposed weights, which"),
    ({"r": 8}, r"A \(4, 64\) float32 and B \(64, 4\) .* of model.*: adapter_config.json says rank"),
    ({"r": "4"}, "adapter_config.json: r is '4'; give a whole number, 1 or more"),
    ({"lora_alpha": None}, "lora_alpha is None; give a number"),
    ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    ({"rank_pattern": [1]}, r"rank_pattern is \[1\]; give an object"),
    ({"alpha_pattern": {"(a+)+$": 1}}, r"alpha_pattern has '\(a\+\)\+\$', a regular expression"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=[str(s)[:40] for s, _ in SETTINGS])
def test_settings_that_are_refused(
    settings: dict[str, object], message: str, peft: Path, reference: Path, tmp_path: Path
) -> None:
    content = json.loads((peft / "adapter_config.json").read_text()) | settings
    (peft / "adapter_config.json").write_text(json.dumps(content))
    refused(peft, tmp_path / "out", message, base=reference / "llava-stf")


def test_directories_that_are_not_whole(llava: Path, reference: Path, tmp_path: Path) -> None:
    out, base = tmp_path / "out", reference / "vicuna"
    options = {"base": base, "vision_tower": reference / "clip"}
    advice = rf"is a LoRA adapter alone; .*: stf-jax convert import {llava} OUT --base DIR"
    refused(llava, out, advice)
    assert "LoRA adapter alone" in str(inspect_checkpoint(llava))
    for name in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        refused(llava / name, out, rf"is a part of a LoRA adapter; name .*: {llava}$", **options)
    refused(llava, out, "is no language model, but clip", base=reference / "clip")
    (llava / "non_lora_trainables.bin").rename(tmp_path / "aside")
    refused(llava, out, "there is no non_lora_trainables.bin with its projector", **options)
    (llava / "adapter_model.safetensors").rename(tmp_path / "weights")
    refused(llava, out, "holds adapter_config.json of a LoRA adapter but no adapter_mod", **options)
    (tmp_path / "weights").rename(llava / "adapter_model.safetensors")
    (llava / "adapter_config.json").unlink()
    refused(llava, out, "has no adapter_config.json, which holds the adapter's alpha", **options)
    shutil.copy(base / "model.safetensors", llava)
    refused(llava, out, "holds a whole model .* and a LoRA adapter", **options)


def test_weights_that_do_not_fit_are_named(peft: Path, reference: Path, tmp_path: Path) -> None:
    tensors = load(peft)
    spoiled = dict(tensors)
    del spoiled[f"{PEFT}model.layers.0.mlp.up_proj.lora_B.weight"]
    spoiled[f"{PEFT}model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(RANK, 64)
    spoiled[f"{PEFT}model.layers.9.mlp.up_proj.lora_B.weight"] = torch.zeros(112, RANK)
    spoiled[f"{PEFT}model.layers.1.mlp.up_proj.lora_A.weight"] = torch.zeros(RANK, 63)
    adapter = write_adapter(tmp_path / "spoiled", spoiled)
    message = refused(adapter, tmp_path / "out", "does not fit", base=reference / "llava-stf")
    for line in (
        "missing: one of lora_A and lora_B of model.layers.0.mlp.up_proj",
        "missing in the base: model.layers.9.mlp.up_proj.weight",
        "A (4, 63) float32 and B (112, 4) float32 of model.layers.1.mlp.up_proj: the base's weight",
    ):
        assert f"\n  {line}" in message
    magnitude = {f"{PEFT}model.layers.0.mlp.up_proj.lora_magnitude_vector": torch.zeros(112)}
    dora = write_adapter(tmp_path / "dora", tensors | magnitude)
    refused(dora, tmp_path / "out", "with DoRA, which", base=reference / "llava-stf")


def test_a_new_connector_is_asked_for_by_name(peft: Path, reference: Path, tmp_path: Path) -> None:
    options = {"base": reference / "vicuna", "vision_tower": reference / "clip"}
    refused(
        peft, tmp_path / "out", r"neither .* nor .* has a projector; .* --system NAME", **options
    )
    found = read(peft, system="llava", **options)
    check_merged(found, load(reference / "vicuna"), load(peft), lambda module: ALPHA / RANK)


@pytest.fixture
def lora_run(request: pytest.FixtureRequest, checkpoint: Callable, tmp_path: Path) -> Path:
    """The directory of a LoRA run whose parameters are random ones, and its model beside it."""
    dtype = getattr(request, "param", "float32")
    source = checkpoint(lambda name, array: array.astype(dtype))
    native = tmp_path / "native"
    import_checkpoint(source, native, vocabulary_multiple=16)
    return write_run(tmp_path / "run", native)


def write_run(run: Path, native: Path) -> Path:
    """A LoRA run over a native checkpoint, whose parameters are random ones."""
    config = open_native(native).config
    rng = np.random.default_rng(3)
    trained = {
        entry.native: rng.standard_normal(entry.native_shape, np.float32)
        for entry in own_entries(config)
    }
    shapes = open_native(native).shapes
    for entry in text_entries(config.text, vocabulary=config.text.vocab_size):
        if not entry.native.startswith("text/layers/") or not entry.native.endswith("/kernel"):
            continue
        layers, *axes = shapes[entry.native].shape
        inputs = 2 if entry.native.endswith("output/kernel") else 1
        for which, shape in (("a", (*axes[:inputs], RANK)), ("b", (RANK, *axes[inputs:]))):
            values = rng.standard_normal((layers, *shape), np.float32)
            trained[adapter_path(entry.native, which)] = values
    content = {"model": str(native), "lora": {"rank": RANK, "alpha": float(ALPHA)}}
    with Checkpoints(run / "checkpoints", config=content, every=1, keep=1) as checkpoints:
        parameters = {name: jnp.asarray(array) for name, array in trained.items()}
        optimizer = make_optimizer(OptimizerConfig(), steps=1)
        checkpoints.save(0, init_state(parameters, optimizer))
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    return run


@pytest.mark.parametrize("lora_run", ["float32", "float16"], indirect=True)
def test_a_lora_run_comes_back_as_it_went_out(lora_run: Path, tmp_path: Path) -> None:
    """To the bit: as an adapter over the model that it began with, and as a whole model."""
    export_checkpoint(lora_run, tmp_path / "adapter", layout="lora")
    base = tmp_path / "parent" / "source"
    opened = open_source(tmp_path / "adapter", base=base, vocabulary_multiple=16)
    run, begun = open_model(lora_run), open_native(tmp_path / "native")
    wanted = {name: host_like(like.shape, like.dtype) for name, like in run.shapes.items()}
    stored, first = run.load(wanted), begun.load(wanted)
    changed = 0
    for leaf in opened.leaves():
        array = leaf.read()
        assert array.dtype == stored[leaf.path].dtype
        assert array.tobytes() == stored[leaf.path].tobytes(), leaf.path
        changed += not np.array_equal(array, first[leaf.path])
    # Every weight of the decoder's layers, and the connector.
    assert changed == 7 + 8
    export_checkpoint(lora_run, tmp_path / "whole", layout="llava-stf")
    whole = load(tmp_path / "whole")
    for name, array in read(tmp_path / "adapter", base=base).items():
        published = {"v": "model.vision_tower.vision_tower.", "m": "model."}
        theirs = name if name.startswith(("model.", "lm_head.")) else published[name[0]] + name
        assert array.tobytes() == whole[theirs].numpy().tobytes(), name


def test_the_files_of_an_exported_adapter_are_pefts(lora_run: Path, tmp_path: Path) -> None:
    export_checkpoint(lora_run, tmp_path / "out", layout="lora")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "non_lora_trainables.bin",
        "config.json",
    }
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (RANK, ALPHA, "LORA")
    assert sorted(settings["target_modules"]) == sorted(m.split(".")[1] for m in MODULES)
    tensors = load(tmp_path / "out")
    assert tensors.keys() == {
        f"{PEFT}{module}.lora_{half}.weight" for module in ADAPTED for half in "AB"
    }
    beside = torch.load(tmp_path / "out" / "non_lora_trainables.bin", weights_only=True)
    assert {name.partition(".mm_")[0] for name in beside} == {f"{PEFT}model"}
    # What PEFT itself computes of them is the run's own model.
    base, run = load(tmp_path / "parent" / "source"), open_model(lora_run)
    module = "model.layers.1.mlp.up_proj"
    a, b = (tensors[f"{PEFT}{module}.lora_{half}.weight"].double() for half in "AB")
    expected = base[f"{module}.weight"].double() + ALPHA / RANK * b @ a
    found = run.read("text/layers/mlp/up/kernel")[1].T
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


def test_routers_lie_beside_the_adapter(reference: Path, tmp_path: Path) -> None:
    """p-MoD's, which LoRA does not adapt: they are trained as a whole."""
    native, tower = tmp_path / "native", reference / "clip"
    import_checkpoint(reference / "vicuna", native, vision_tower=tower, system="pmod")
    export_checkpoint(native, tmp_path / "base", layout="llava")
    run = write_run(tmp_path / "run", native)
    export_checkpoint(run, tmp_path / "out", layout="lora")
    beside = torch.load(tmp_path / "out" / "non_lora_trainables.bin", weights_only=True)
    router = f"{PEFT}model.layers.1.router.router"
    assert {f"{router}.weight", f"{router}.bias"} < beside.keys()
    # The names of p-MoD's own code.
    adapted = {name.removeprefix(PEFT).rpartition(".lora_")[0] for name in load(tmp_path / "out")}
    assert "model.layers.0.self_attn.q_proj" in adapted
    assert "model.layers.1.decoder_layer.self_attn.q_proj" in adapted
    opened, stored = open_source(tmp_path / "out", base=tmp_path / "base"), open_model(run)
    wanted = {name: host_like(like.shape, like.dtype) for name, like in stored.shapes.items()}
    expected = stored.load(wanted)
    for leaf in opened.leaves():
        assert leaf.read().tobytes() == expected[leaf.path].tobytes(), leaf.path


def test_layouts_that_would_leave_something_out(lora_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"has trained its language model, too, .* lora$"):
        export_checkpoint(lora_run, out, layout="adapter")
    with pytest.raises(CheckpointError, match=r"is no LoRA run .*; use --layout llava-stf$"):
        export_checkpoint(tmp_path / "native", out, layout="lora")
    assert not out.exists()


def test_an_export_names_the_end_that_a_run_has_taught(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template may end in another token than its base model; other code knows what is written."""
    content = yaml.safe_load((lora_run / "config.yaml").read_text())
    (lora_run / "config.yaml").write_text(yaml.safe_dump(content | {"data": {"template": "v1"}}))
    export_checkpoint(lora_run, tmp_path / "same", layout="llava-stf")
    monkeypatch.setattr(exporter, "stop_ids", lambda template, tokenizer: frozenset({2, 9}))
    export_checkpoint(lora_run, tmp_path / "taught", layout="llava-stf")
    before, after = (
        json.loads((tmp_path / name / "generation_config.json").read_text())
        for name in ("same", "taught")
    )
    assert after == before | {"eos_token_id": [2, 9]} != before
