"""ProxyV by its properties: rows at random, other forms of the same layers, files, and figures."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.convert import export_checkpoint, import_checkpoint, open_source
from stf_jax.convert.infer import infer_system, system_keys
from stf_jax.convert.mapping import own_entries, table
from stf_jax.models import flops
from stf_jax.models.layers import Init, parameter_count, unstack
from stf_jax.models.llama import Llama
from stf_jax.models.llava import Llava
from stf_jax.models.lora import LoRAConfig
from stf_jax.models.marks import IMAGE, TEXT, Marks
from stf_jax.store.arrays import flatten
from stf_jax.store.checkpoint import open_native
from stf_jax.systems import named_config
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.proxyv import ProxyV, ProxyVLlama
from stf_jax.train.optimizer import split_trained
from tests.stf_jax.systems.conftest import TEXT as SMALL
from tests.stf_jax.systems.conftest import VISION

LAYERS, LENGTH, IMAGES, WIDTH = 3, 68, 3, 32
SIZE = VISION.patches + 1
TINY = dataclasses.replace(
    SMALL, layers=LAYERS, width=WIDTH, mlp_width=48, heads=4, kv_heads=2, vocab_size=8
)
KINDS = {
    "resized": ProxyV(taps=(3,), start=1, reduce=2, mlp_width=16),
    "learned": ProxyV(taps=(3,), start=0, reduce=2, mlp_width=16, learned=True, slip=True),
}

forward = jax.jit(lambda model, x, marks: model(x, marks=marks))
prefill = jax.jit(ProxyVLlama.prefill, static_argnames="images")
extend = jax.jit(ProxyVLlama.extend)


def decoder(system: ProxyV, seed: int = 0) -> ProxyVLlama:
    """Weights large enough to tell right from wrong; layers one by one, as answers have them."""
    model = nnx.eval_shape(
        lambda: ProxyVLlama(system, VISION, TINY, init=Init(rngs=nnx.Rngs(0)), lora=None)
    )
    rng = np.random.default_rng(seed)
    nnx.update(
        model,
        jax.tree.map(
            lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
            nnx.state(model),
        ),
    )
    model.layers = unstack(model.layers)
    return model


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> ProxyVLlama:
    return decoder(KINDS[request.param])


# The text before, between and behind the images of a row; none between images makes them crops.
TEXTS = st.lists(st.integers(0, 4), min_size=IMAGES + 1, max_size=IMAGES + 1)


def marks_of(*sequences: Sequence[int], length: int = LENGTH) -> Marks:
    """One row of these sequences, each given by its lengths of text; padding behind."""
    position, segment, image = (np.zeros(length, np.int32) for _ in range(3))
    image[:] = -1
    at = number = 0
    for which, texts in enumerate(sequences, 1):
        begin, at = at, at + texts[0]
        for text in texts[1:]:
            image[at : at + SIZE] = number
            number, at = number + 1, at + SIZE + text
        assert at <= length
        position[begin:at], segment[begin:at] = np.arange(at - begin), which
    kind = np.where(image >= 0, IMAGE, TEXT)
    parts = {"position": position, "segment": segment, "kind": kind, "image": image}
    return Marks(**{name: jnp.asarray(array[None], jnp.int32) for name, array in parts.items()})


def values_of(seed: int) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((1, LENGTH, WIDTH)), jnp.float32)


def is_read(model: ProxyVLlama, marks: Marks) -> np.ndarray:
    """Positions whose hidden state something is predicted from."""
    full = np.asarray(model.find(marks, IMAGES).slots) >= 0
    return (np.asarray(marks.segment) > 0) & ~full


@settings(max_examples=10, deadline=None)
@given(texts=TEXTS, more=st.integers(1, 4), seed=st.integers(0, 99))
def test_gathered_is_masked_and_decoding_continues_the_forward_pass(
    model: ProxyVLlama, texts: list[int], more: int, seed: int
) -> None:
    """Wherever images stand, with other text or none between; caches are alike."""
    x, length = values_of(seed), IMAGES * SIZE + sum(texts)
    more = min(more, LENGTH - length)
    marks = marks_of(texts)
    longer = marks_of([*texts[:-1], texts[-1] + more])
    expected = np.asarray(forward(model, x, longer))
    last = jnp.array([length - 1])
    masked, cache = prefill(model, x, marks=marks, last=last)
    gathered, other = prefill(model, x, marks=marks, last=last, images=IMAGES)
    np.testing.assert_allclose(masked[0], expected[0, length - 1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(gathered, masked, rtol=0, atol=1e-4)
    assert cache.sizes == other.sizes == (LENGTH,)
    for one, two in zip(cache.keys + cache.values, other.keys + other.values, strict=True):
        np.testing.assert_allclose(
            one[:, :, :length], two[:, :, :length], rtol=0, atol=1e-4 * np.abs(one).max()
        )
    if not more:
        return
    # What comes later, such as another turn of a chat, sees every vision token.
    position = jnp.arange(4)[None] + int(other.next_position(jnp.array([length]))[0])
    found, _ = extend(
        model,
        jnp.pad(x, ((0, 0), (0, 4), (0, 0)))[:, length : length + 4],
        marks=Marks.text(position, (jnp.arange(4) < more)[None].astype(jnp.int32)),
        slots=length + jnp.arange(4)[None],
        cache=other,
    )
    wanted = expected[:, length : length + more]
    np.testing.assert_allclose(found[:, :more], wanted, rtol=0, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(texts=TEXTS, cut=st.integers(0, IMAGES), seed=st.integers(0, 99))
def test_sequences_of_a_row_do_not_see_each_other(
    model: ProxyVLlama, texts: list[int], cut: int, seed: int
) -> None:
    """A row that is packed of two gives what each gives alone; images of one may end it."""
    first, second = texts[: cut + 1], [1, *texts[cut + 1 :]]
    marks = marks_of(first, second)
    x = values_of(seed)
    packed, read = np.asarray(forward(model, x, marks)), is_read(model, marks)
    start = 0
    for texts in (first, second):
        size = sum(texts) + SIZE * (len(texts) - 1)
        rolled, alone = jnp.roll(x, -start, axis=1), marks_of(texts)
        found = np.asarray(forward(model, rolled, alone))[0, :size]
        wanted = packed[0, start : start + size]
        kept = read[0, start : start + size]
        np.testing.assert_allclose(found[kept], wanted[kept], rtol=0, atol=1e-4)
        start += size


def plain_of(model: ProxyVLlama) -> Llama:
    plain = nnx.eval_shape(lambda: Llama(TINY, init=Init(rngs=nnx.Rngs(0))))
    plain.layers = nnx.List([layer for layer in model.layers])
    for name in ("embedding", "norm", "head"):
        setattr(plain, name, getattr(model, name))
    return plain


def test_text_alone_is_llama(model: ProxyVLlama) -> None:
    """Though its row has room for images; and where no layer has proxies, images are, too."""
    x, text = values_of(1), marks_of([20])
    shown = jnp.arange(20)
    plain = plain_of(model)
    found, expected = forward(model, x, text), forward(plain, x, text)
    np.testing.assert_allclose(found[:, shown], expected[:, shown], rtol=0, atol=1e-4)
    marks = marks_of([3, 2, 0, 4])
    images = forward(plain, x, marks)
    assert np.abs(forward(model, x, marks) - images)[is_read(model, marks)].max() > 1e-2
    without = decoder(dataclasses.replace(model.system, start=LAYERS, slip=False))
    assert without.vision_mlp is without.proxies is None
    for name in ("embedding", "norm", "head", "layers"):
        setattr(without, name, getattr(model, name))
    real = marks.segment > 0
    np.testing.assert_array_equal(forward(without, x, marks)[real], images[real])


@pytest.mark.parametrize("layers", [1, 2])
def test_proxies_reach_text_one_layer_later(layers: int) -> None:
    """Text sees no proxy; a VisionMLP tells full tokens, which the next layer reads."""
    model = decoder(dataclasses.replace(KINDS["resized"], start=LAYERS - layers))
    x, marks = values_of(2), marks_of([2, 3, 0, 2])
    make = ProxyVLlama.make_proxies

    def make_others(self: ProxyVLlama, full: Any) -> Any:
        proxies, splat = make(self, full)
        return 5 - proxies, splat

    expected = model(x, marks=marks)
    with mock.patch.object(ProxyVLlama, "make_proxies", make_others):
        found = model(x, marks=marks)
    moved = np.abs(found - expected)[is_read(model, marks)].max()
    assert (moved > 1e-3) == (layers > 1)


def test_newlines_of_further_crops_slip() -> None:
    """Alone, images have no slip; what follows them does not move."""
    marks = marks_of([2, 3, 0, 1])
    meant, slipped = (decoder(KINDS[name]).find(marks, IMAGES) for name in ("resized", "learned"))
    newlines = np.flatnonzero(np.asarray(meant.marks.kind[0]) > IMAGE)
    assert newlines.tolist() == [2 + SIZE - 1, 5 + 2 * SIZE - 1, 5 + 3 * SIZE - 1]
    moved = np.asarray(meant.marks.position - slipped.marks.position)[0]
    assert np.flatnonzero(moved).tolist() == newlines[2:].tolist()
    assert moved[newlines[2]] == SIZE
    proxies = np.asarray(meant.proxies.position[0])
    count = len(proxies) // IMAGES
    begins = np.repeat([2, 5 + SIZE, 5 + SIZE], count)
    assert (proxies - begins).tolist() == [*range(count), *range(2 * count)]


def test_its_config_and_names_are_those_released() -> None:
    """A published config has the slip; ours without it says so."""
    vision, text = VisionConfig.clip_l_336(), TextConfig.vicuna_7b()
    config = named_config("llava_proxyv_7b")
    assert config.system == ProxyV()
    assert named_config("llava_proxyv_13b").system.to_dict()["start"] == 16
    shapes = {name: e.shape for e in table(config) for name in e.tensors}
    assert shapes["image_newline"] == (4096,)
    assert shapes["model.vision_mlp_layers.19.proj.0.weight"] == (1024, 2048)
    assert "model.vision_mlp_layers.20.proj.0.weight" not in shapes
    hf = {
        "proxyv": True,
        "proxyv_start_layer": 12,
        "proxyv_reduce_factor": 4,
        "learn_proxy": False,
        "per_crop_token_len": 576,
        "num_of_vision_mlp_layers": 20,
    }
    published = LlavaConfig(vision=vision, text=text, system=ProxyV(slip=True))
    assert infer_system(shapes, hf, vision) == published.system
    assert system_keys(published) == {"mm_vision_select_layer": -2, **hf}
    assert system_keys(config)["mm_system"]["slip"] is False
    # Without a key the weights tell all but the factor.
    assert infer_system(shapes, {}, vision) == ProxyV()
    learned = dataclasses.replace(config, system=ProxyV(start=16, learned=True, mlp_width=512))
    shapes = {name: e.shape for e in table(learned) for name in e.tensors}
    assert infer_system(shapes, {}, vision) == learned.system


def test_new_weights_go_out_and_come_back(reference: Path, tmp_path: Path) -> None:
    """Under the released names, over a language model; learned proxies, too."""
    import_checkpoint(
        reference / "vicuna",
        tmp_path / "native",
        vision_tower=reference / "clip",
        system="proxyv",
        fields={"learned": True, "start": 1},
    )
    export_checkpoint(tmp_path / "native", tmp_path / "torch", layout="llava")
    opened = open_source(tmp_path / "torch")
    begun = open_native(tmp_path / "native")
    assert opened.config == begun.config
    for leaf in opened.leaves():
        np.testing.assert_array_equal(leaf.read(), begun.read(leaf.path))
    files = list((tmp_path / "torch").glob("*.safetensors"))
    names = {name for file in files for name in safe_open(file, "numpy").keys()}  # noqa: SIM118
    assert {"model.image_newline", "model.proxyv_initializer.proxyv_tokens"} <= names
    assert "model.vision_mlp_layers.0.layernorm_post.weight" in names
    hf = json.loads((tmp_path / "torch" / "config.json").read_text())
    assert (hf["proxyv"], hf["learn_proxy"], hf["proxyv_start_layer"]) == (True, True, 1)
    added = ("text/vision_mlp/", "text/proxies/")
    own = [leaf for leaf in opened.leaves() if leaf.path.startswith(added)]
    assert len(own) == 7
    for leaf in own:
        values = leaf.read()
        assert (values == 1).all() if leaf.path.endswith("scale") else values.std() > 0


def test_every_stage_trains_what_it_adds() -> None:
    """Stage 1 trains projector, newline and VisionMLPs, as released; adapters are LLaMA's alone."""
    config = LlavaConfig(
        vision=VISION, text=SMALL, system=ProxyV.for_model(vision=VISION, text=SMALL)
    )
    lora = Llava.abstract(config, lora=LoRAConfig(rank=2), training=True)
    parameters = flatten(nnx.to_pure_dict(nnx.state(lora, nnx.Param)))
    own = {entry.native for entry in own_entries(config)}
    assert {path for path in own if path.startswith("text/vision_mlp/")}
    assert split_trained(parameters, "pretrain")[0].keys() == own
    adapted = split_trained(parameters, "lora")[0].keys() - own
    assert adapted
    assert all(path.startswith("text/layers/") and "/lora/" in path for path in adapted)


def test_parameters_and_flops_are_those_published() -> None:
    """The paper's 46 and 36 per cent less at 5 crops and 50 tokens of text."""
    config = named_config("llava_proxyv_7b")
    added = sum(
        np.prod(entry.shape, dtype=int)
        for entry in config.system.decoder_weights(config.vision, config.text)
    )
    assert added == 14_684_160
    mlps = Llava.abstract(config).text.vision_mlp
    assert parameter_count(mlps) == 20 * added
    length = 5 * config.tokens_per_image + 50
    # The paper leaves out the head.
    head = 2 * length * config.text.width * config.text.padded_vocab_size
    for start, saved in ((12, 0.455), (16, 0.364)):
        system = dataclasses.replace(config.system, start=start)
        some, none = (
            flops.forward(
                dataclasses.replace(config, system=dataclasses.replace(system, start=first)),
                rows=1,
                length=length,
                images=5,
            ).text
            for first in (start, config.text.layers)
        )
        part = (some - head) / (none - head)
        assert part == pytest.approx(1 - saved, abs=1.5e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": 3}, "start is 3; the language model has 2 layers, and 2 is none with proxies"),
        ({"start": -1}, "ProxyV.start is -1; give the number of a layer, from 0 on"),
        ({"reduce": 3}, "reduce 3 does not divide the 4 patches along a side"),
        ({"reduce": 0}, "reduce is 0"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlavaConfig(vision=VISION, text=SMALL, system=ProxyV(taps=(3,), **{"start": 1, **fields}))
