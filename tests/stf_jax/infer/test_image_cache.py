"""Images that were encoded before: answers are those with the images themselves."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import stf_jax
from stf_jax.data.images import ImageProcessor
from stf_jax.data.tokenizer import Tokenizer, load_tokenizer, put_images_first
from stf_jax.infer.image_cache import ImageCache
from stf_jax.infer.model import Model, Request
from stf_jax.models.llava import Llava
from stf_jax.parallel.sharding import ShardingRules, make_mesh
from stf_jax.store.arrays import flatten, unflatten
from stf_jax.systems.voco import VoCo
from stf_jax.util.errors import CheckpointError
from tests.stf_jax.systems.conftest import TEXT, VISION, build, config_of

QUESTIONS = ("What is this?", "How many cats are there?", "Why?")
COUNT = 2


@pytest.fixture(scope="module")
def tokenizer(reference: Path) -> Tokenizer:
    return load_tokenizer(reference / "llava-stf")


def network_of(tokenizer: Tokenizer, *, count: int = COUNT, seed: int = 0) -> Llava:
    token = tokenizer.vocab_size
    text = dataclasses.replace(TEXT, vocab_size=token + 1, vocab_padding=7, max_positions=512)
    system = VoCo.for_model(vision=VISION, text=text)
    config = dataclasses.replace(config_of("voco"), text=text)
    system = dataclasses.replace(system, count=count)
    return build(dataclasses.replace(config, system=system), seed=seed)


def model_of(network: Llava, tokenizer: Tokenizer, **options: object) -> Model:
    first = network.config.images_first
    side = network.config.image_size
    return Model(
        network,
        tokenizer=tokenizer if first is None else put_images_first(tokenizer, first),
        image_processor=ImageProcessor(image_size=side, shortest_edge=side),
        **options,
    )


@pytest.fixture(scope="module")
def voco(tokenizer: Tokenizer) -> Model:
    return model_of(network_of(tokenizer), tokenizer)


@pytest.fixture(scope="module")
def images(reference: Path) -> list[Path]:
    return [reference / "images" / name for name in ("0.png", "1.png")]


@pytest.fixture(scope="module")
def encoded(voco: Model, images: list[Path]) -> ImageCache:
    return voco.encode_images(images[0])


def ask(model: Model, shown: list[object]) -> list[list[int]]:
    """Every question about each."""
    requests = [Request(prompt=text, images=one) for one in shown for text in QUESTIONS]
    answers = model.generate(requests, max_new_tokens=5, slots=4)
    return [answer.token_ids for answer in answers]


def test_an_image_is_its_vocos(
    voco: Model, encoded: ImageCache, images: list[Path], tmp_path: Path
) -> None:
    """In `COUNT` slots a layer, and in a file; beside requests that bring their images along."""
    expected = ask(voco, [images[0], images[1]])
    assert expected[:3] != expected[3:]
    assert encoded.slots == (COUNT,)
    each = 2 * TEXT.layers * TEXT.kv_heads * TEXT.head_dim * 4
    assert encoded.nbytes == COUNT * each
    encoded.save(tmp_path / "image.safetensors")
    loaded = voco.load_images(tmp_path / "image.safetensors")
    np.testing.assert_array_equal(loaded.ids, encoded.ids)
    jax.tree.map(np.testing.assert_array_equal, loaded.cache, encoded.cache)
    for one in (encoded, loaded):
        assert ask(voco, [one, images[1]]) == expected
    # Over a file that is there.
    encoded.save(tmp_path / "image.safetensors")


def test_several_images_at_once(voco: Model, images: list[Path]) -> None:
    both = voco.encode_images(images)
    assert both.slots == (2 * COUNT,)
    together, alone = ask(voco, [images, images[0]])[:3], ask(voco, [images[0]])
    assert ask(voco, [both]) == together != alone


def test_other_systems_keep_the_text_in_front(model: stf_jax.Model, images: list[Path]) -> None:
    """The reference's model: all vision tokens of the image, and the system text."""
    encoded = model.encode_images(images[0])
    assert encoded.slots == (len(encoded.ids),)
    requests = [Request(prompt="How many?", images=one) for one in (encoded, images[0])]
    first, second = model.generate(requests, max_new_tokens=6)
    assert first == second


def test_a_mesh_and_int8(tokenizer: Tokenizer, images: list[Path], tmp_path: Path) -> None:
    network, mesh = network_of(tokenizer), make_mesh(data=2, fsdp=2, tensor=2)
    weights = flatten(nnx.to_pure_dict(nnx.state(network)))
    with jax.set_mesh(mesh):
        spread = Llava.abstract(network.config, rules=ShardingRules.default())
        like = flatten(nnx.to_pure_dict(nnx.state(spread)))
        placed = {path: jax.device_put(weights[path], like[path].sharding) for path in like}
        nnx.update(spread, unflatten(placed))
    model = model_of(spread, tokenizer, mesh=mesh, cache_dtype="int8")
    encoded = model.encode_images(images[0])
    assert encoded.slots == (COUNT,)
    encoded.save(tmp_path / "image.safetensors")
    loaded = model.load_images(tmp_path / "image.safetensors")
    requests = [Request(prompt="Why?", images=one) for one in (loaded, images[0])]
    first, second = model.generate(requests, max_new_tokens=5)
    assert first == second


def test_what_does_not_fit_is_refused(
    voco: Model, encoded: ImageCache, tokenizer: Tokenizer, images: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "image.safetensors"
    encoded.save(path)
    other = model_of(network_of(tokenizer, count=1), tokenizer)
    with pytest.raises(
        CheckpointError, match=r"another model sees them \(system 'voco; .*count 2; .*', here"
    ):
        other.load_images(path)
    with pytest.raises(ValueError, match="the images were encoded by another model"):
        ask(other, [encoded])
    with pytest.raises(ValueError, match="encode them with this template and number of tokens"):
        voco.generate([Request(prompt="a <image>\n<image>", images=encoded)])
    with pytest.raises(ValueError, match="encoded images or clips, not both"):
        voco.generate([Request(prompt="a", images=encoded, clips="clip.mp4")])
    with pytest.raises(ValueError, match="the prompt is empty"):
        voco.generate([Request(prompt=" ", images=encoded)])
    with pytest.raises(ValueError, match="there is no image to encode"):
        voco.encode_images([])
    with pytest.raises(CheckpointError, match=r"none is missing"):
        voco.load_images(tmp_path / "none")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"image.safetensors is damaged; copy it again"):
        voco.load_images(path)
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="is truncated"):
        voco.load_images(path)


def test_weights_are_no_images(voco: Model, reference: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no images; save an ImageCache there"):
        voco.load_images(reference / "vicuna" / "model.safetensors")


def test_a_system_that_reads_the_question_is_refused(
    tokenizer: Tokenizer, images: list[Path]
) -> None:
    model = model_of(build(config_of("quecc")), tokenizer)
    with pytest.raises(ValueError, match="keeps of an image what the question wants"):
        model.encode_images(images)
