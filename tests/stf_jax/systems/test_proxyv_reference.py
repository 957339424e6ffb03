"""ProxyV against what its released code computed: every tensor of the folder."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stf_jax.config.vision import VisionConfig
from stf_jax.convert.mapping import own_entries, table, text_entries
from stf_jax.data.batch import Batch
from stf_jax.data.tokenizer import IGNORED_LABEL, IMAGE_TOKEN_ID
from stf_jax.models.connector import Tokens
from stf_jax.models.layers import unstack
from stf_jax.models.llama import DecoderLayer
from stf_jax.models.llava import Llava
from stf_jax.models.marks import Marks, visible
from stf_jax.models.proxies import VisionMLP, by_position, shrink_matrix, through_proxies
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.proxyv import ProxyV, ProxyVConnector, ProxyVLlama
from tests.stf_jax.systems.reference import Case, assert_near, fill, find_case, insert_images

GROUPS = ("one", "crops", "learn")


@pytest.fixture(scope="module")
def reference_case() -> Case:
    return find_case("proxyv")


def model_of(case: Case, *, learned: bool = False) -> Llava:
    """With the reference's weights; the tower and the projector, which it lacks, are zeros."""
    sizes, hyper = case.json["sizes"], case.hyper
    vision = VisionConfig(
        image_size=14 * math.isqrt(sizes["vision_tokens_per_crop"]),
        width=32,
        mlp_width=32,
        layers=2,
        heads=2,
    )
    text = case.decoder_text
    system = ProxyV(
        taps=(1,),
        projector_width=32,
        start=hyper["proxyv_start_layer"],
        reduce=hyper["proxyv_reduce_factor"],
        learned=learned,
        mlp_width=sizes["vision_mlp_hidden"],
        slip=True,
    )
    config = LlavaConfig(vision=vision, text=text, system=system)
    model = Llava.abstract(config)
    nnx.update(model, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), nnx.state(model)))
    given = {
        name.replace("model.image_newline", "image_newline"): tensor
        for name, tensor in case.group("w.").items()
    }
    entries = [*own_entries(config), *text_entries(text, vocabulary=text.vocab_size)]
    fill(model, [e for e in entries if e.tensors[0] in given], given)
    return model


@dataclasses.dataclass(frozen=True)
class Group:
    """The rows of a group in natural order, and where a packed position stands in it.

    The reference packs [full tokens of all crops | newlines | text], and fills rows up with crops
    and text that are not real: -1 here.
    """

    case: Case
    name: str
    model: Llava
    batch: Batch
    packed: np.ndarray

    @classmethod
    def of(cls, case: Case, name: str) -> "Group":
        tokens = case.json["sizes"]["vision_tokens_per_crop"]
        ids, mask, labels = (
            case.tensors.get(f"{name}.input_{what}") for what in ("ids", "mask", "labels")
        )
        assert ids is not None
        mask = np.ones(ids.shape, bool) if mask is None else mask
        labels = np.full(ids.shape, IGNORED_LABEL) if labels is None else labels
        # As many images as crops, one after the other.
        rows, orders = [], []
        features = features_of(case, name)
        for row, real in enumerate(mask):
            crops = len(features[row]) if (ids[row] == IMAGE_TOKEN_ID).any() else 0
            times = np.where(ids[row] == IMAGE_TOKEN_ID, crops, 1)[real]
            rows.append([np.repeat(array[row][real], times) for array in (ids, labels)])
            orders.append(cls._order(ids[row][real], crops, tokens, most=max(map(len, features))))
        length = max(len(some) for some, _ in rows)
        padded = [np.full((len(rows), length), 0) for _ in range(3)]
        for row, (some, other) in enumerate(rows):
            at = slice(len(some))
            padded[0][row, at], padded[1][row, at], padded[2][row, at] = some, other, 1
        shown = np.zeros((sum(map(len, features)) + len(rows), 3, 1, 1))
        batch = insert_images(*padded, tokens=tokens + 1, images=shown)
        packed = np.full((len(rows), max(map(len, orders))), -1)
        for row, order in enumerate(orders):
            packed[row, : len(order)] = order
        return cls(case, name, model_of(case, learned=name == "learn"), batch, packed)

    @staticmethod
    def _order(ids: np.ndarray, crops: int, tokens: int, *, most: int) -> list[int]:
        text = len(ids) - (crops > 0)
        before = int(np.argmax(ids == IMAGE_TOKEN_ID)) if crops else text
        full = [before + q + q // tokens for q in range(crops * tokens)]
        newlines = [before + tokens + (tokens + 1) * crop for crop in range(crops)]
        behind = before + crops * (tokens + 1)
        return [
            *(full + [-1] * ((most - crops) * tokens)),
            *(newlines + [-1] * (most - crops)),
            *range(before),
            *range(behind, behind + text - before),
        ]

    @property
    def features(self) -> list[np.ndarray]:
        return features_of(self.case, self.name)

    @property
    def most(self) -> int:
        """Crops of the row that has the most."""
        return max(map(len, self.features))

    @property
    def full(self) -> int:
        """Packed positions of full tokens."""
        return self.most * self.model.text.tokens

    @property
    def real(self) -> np.ndarray:
        return self.packed >= 0

    def insert(self, model: Llava, features: list[Any]) -> tuple[jax.Array, Marks]:
        connector = model.connector
        assert isinstance(connector, ProxyVConnector)
        width = features[0].shape[-1]
        most = self.batch.pixels.shape[1]
        rows = []
        for row in features:
            ended = connector.end(jnp.asarray(row))[:most]
            rows.append(jnp.pad(ended, ((0, most - len(ended)), (0, 0), (0, 0))))
        values = jnp.stack(rows).reshape(len(rows), -1, width)
        return model._insert_tokens(self.batch, Tokens(values=values))

    def pack(self, array: Any, *, start: int = 0) -> np.ndarray:
        """Positions of a row as the reference packs them, those from `start` on."""
        order = np.maximum(self.packed[:, start:], 0)
        return np.take_along_axis(
            np.asarray(array), order.reshape(*order.shape, *[1] * (array.ndim - 2)), axis=1
        )


def features_of(case: Case, name: str) -> list[np.ndarray]:
    if f"{name}.image_features" in case.tensors:
        return [case[f"{name}.image_features"]]
    found = case.group(f"{name}.image_features.")
    return [found[str(row)] for row in range(len(found))]


@pytest.fixture(scope="module", params=GROUPS)
def group(request: pytest.FixtureRequest, reference_case: Case) -> Group:
    return Group.of(reference_case, request.param)


def compare(actual: Any, expected: np.ndarray, real: np.ndarray, *, tolerance: float) -> None:
    """Of what is real."""
    assert actual.shape == expected.shape
    assert real.any()
    assert_near(np.asarray(actual)[real], expected[real], tolerance=tolerance)


def test_reference_sequence_and_masks(group: Group) -> None:
    """Positions, labels, and who sees whom, exactly."""
    case, real = group.case, group.real

    @jax.jit
    def run(model: Llava) -> tuple[Any, ...]:
        x, marks = group.insert(model, group.features)
        crops = model.text.find(marks, group.most)
        whole = crops.proxies.join(crops.marks)
        seen = visible(by_position, crops.marks, crops.marks)
        return x, crops, seen, visible(through_proxies, whole, whole)

    x, crops, seen, through = run(group.model)
    seen, through = np.asarray(seen), np.asarray(through)
    expected = case.group(f"{group.name}.")
    np.testing.assert_array_equal(expected["mask"], real)
    np.testing.assert_array_equal(
        group.pack(crops.marks.position)[real], expected["position_ids"][real]
    )
    proxies = np.asarray(crops.proxies.segment) > 0
    np.testing.assert_array_equal(
        np.asarray(crops.proxies.position)[proxies], expected["proxy_position_ids"][proxies]
    )
    # Labels of the reference are those of the next position.
    labels = np.pad(
        np.asarray(group.batch.labels)[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL
    )
    np.testing.assert_array_equal(group.pack(labels)[real], expected["labels"][real])
    if "embeds" in expected:
        compare(group.pack(x), expected["embeds"], real, tolerance=1e-6)
    count = proxies.shape[1]
    for row, order in enumerate(group.packed):
        others = np.where(order < 0, -1, order + count)
        places = np.where(proxies[row], np.arange(count), -1)
        queries = np.concatenate([places, others[group.full :]])
        keys = np.concatenate([others[: group.full], places, others[group.full :]])
        for name, array, q, k in (
            ("allow_regular", seen[row], order, order),
            ("allow_proxy", through[row], queries, keys),
        ):
            found = array[np.ix_(q, k)] & (k >= 0)
            np.testing.assert_array_equal(found[q >= 0], expected[name][row][q >= 0])


@dataclasses.dataclass
class Seen:
    """What went on inside a forward pass."""

    proxies: list[Any] = dataclasses.field(default_factory=list)
    layers: list[Any] = dataclasses.field(default_factory=list)
    full: list[Any] = dataclasses.field(default_factory=list)


def watch(seen: Seen) -> Iterator[Any]:
    """Patches that write down what layers, VisionMLPs and the maker of proxies give."""
    for kind, name, where in (
        (DecoderLayer, "finish", seen.layers),
        (VisionMLP, "__call__", seen.full),
        (ProxyVLlama, "make_proxies", seen.proxies),
    ):
        original = getattr(kind, name)

        def write(*args: Any, _original: Any = original, _where: list[Any] = where) -> Any:
            _where.append(_original(*args))
            return _where[-1]

        yield mock.patch.object(kind, name, write)


def test_reference_layers_logits_and_loss(group: Group) -> None:
    """What each layer gives, too; the last VisionMLP, which nothing reads, is computed here."""
    case, model = group.case, group.model
    listed = nnx.merge(*nnx.split(model))
    listed.text.layers = unstack(listed.text.layers)
    graph, state = nnx.split(listed)

    @jax.jit
    def run(state: nnx.State) -> dict[str, Any]:
        model, seen = nnx.merge(graph, state), Seen()
        x, marks = group.insert(model, group.features)
        first, second, third = watch(seen)
        with first, second, third:
            hidden = model.text(x, marks=marks)
        last = unstack(model.text.vision_mlp)[-1]
        (proxies, splat), rows = seen.proxies[0], len(x)
        made = seen.layers[-1][:, : proxies.size // proxies.shape[2] // rows]
        seen.full.append(last(seen.full[-1], made.reshape(proxies.shape), splat))
        total, known = model._entropy_of(group.batch, x, marks, chunk=256, remat="none")
        return {
            "proxies": proxies.reshape(made.shape),
            **{f"layer.{number}.out": out for number, out in enumerate(seen.layers)},
            **{
                f"visionmlp.{number}.out": out.reshape(rows, -1, out.shape[2])
                for number, out in enumerate(seen.full)
            },
            "logits": model.text.logits(hidden),
            "loss": total / known,
        }

    found = run(state)
    start, full, real = model.config.system.start, group.full, group.real
    # The model has room for more images where there is much text.
    count, size = found["proxies"].shape[1], case.json["sizes"]["proxies_per_crop"]
    some = group.most * size
    proxies = np.repeat(real[:, full : full + group.most], size, axis=1)
    whole = np.concatenate([proxies, real[:, full:]], axis=1)
    compared = 0
    inputs = ("input_", "image_features.", "grad.", "allow_", "alone.")
    sequence = ("embeds", "position_ids", "mask", "labels", "proxy_position_ids")
    for name, tensor in case.group(f"{group.name}.").items():
        if name.startswith(inputs) or name in sequence:
            continue
        compared += 1
        if name == "loss":
            np.testing.assert_allclose(found[name], tensor, rtol=1e-5)
        elif name == "logits":
            compare(group.pack(found[name], start=full), tensor, real[:, full:], tolerance=1e-4)
        elif name == "proxies":
            compare(found[name][:, :some], tensor, proxies, tolerance=1e-4)
        elif name.startswith("visionmlp."):
            compare(found[name][:, :full], tensor, real[:, :full], tolerance=1e-4)
        elif name == "final_in":
            last = found[f"layer.{model.config.text.layers - 1}.out"][:, count:]
            mlps = [n for n in found if n.startswith("visionmlp.")]
            images = found[max(mlps)][:, :full]
            both = np.concatenate([images, group.pack(last, start=full)], axis=1)
            compare(both, tensor, real, tolerance=1e-4)
        elif int(name.split(".")[1]) < start:
            compare(group.pack(found[name]), tensor, real, tolerance=1e-4)
        else:
            both = np.concatenate(
                [found[name][:, :some], group.pack(found[name][:, count:], start=full)], axis=1
            )
            compare(both, tensor, whole, tolerance=1e-4)
    assert compared > 3


@pytest.mark.parametrize("name", ["one", "learn"])
def test_reference_gradients(reference_case: Case, name: str) -> None:
    """Of weights and of image features; the last VisionMLP has none."""
    case = reference_case
    group = Group.of(case, name)
    graph, state = nnx.split(group.model)

    @jax.jit
    @jax.grad
    def slope(both: tuple[nnx.State, list[Any]]) -> jax.Array:
        model = nnx.merge(graph, both[0])
        x, marks = group.insert(model, both[1])
        total, known = model._entropy_of(group.batch, x, marks, chunk=256, remat="none")
        return total / known

    weights, features = slope((state, [jnp.asarray(row) for row in group.features]))
    actual = case.gradients(group.model, weights)
    expected = case.group(f"{name}.grad.")
    assert expected
    for key, tensor in expected.items():
        if key.startswith("image_features."):
            found: Any = features[int(key.rpartition(".")[2])]
        else:
            found = actual[key.replace("model.image_newline", "image_newline")]
        assert_near(found, tensor, tolerance=1e-5)
    last = group.model.config.text.layers - group.model.config.system.start - 1
    own = [key for key in actual if f"vision_mlp_layers.{last}." in key]
    assert own
    assert not any(actual[key].any() for key in own)


def test_reference_modules_alone(reference_case: Case) -> None:
    """The resize, a VisionMLP, and learned proxies; the published size, too."""
    case = reference_case
    model, learned = model_of(case), model_of(case, learned=True)
    full = jnp.asarray(case["vm.full"])
    proxies, splat = model.text.make_proxies(full)
    assert_near(proxies, case["vm.proxies_of_full"], tolerance=1e-5)
    given = jnp.asarray(case["vm.proxy"])
    first = unstack(model.text.vision_mlp)[0]
    assert_near(first(full, given, splat), case["vm.out"], tolerance=1e-5)
    alone, weights = learned.text.make_proxies(full)
    assert_near(alone, case["learn.alone.proxies"], tolerance=1e-5)
    assert_near(weights, case["learn.alone.splat"], tolerance=1e-5)
    for name, tensor in case.group("vm.full").items():
        if name:
            from_grid = case[f"vm.proxies{name}"]
            reduce = math.isqrt(tensor.shape[1] // from_grid.shape[1])
            shrink = shrink_matrix(math.isqrt(tensor.shape[1]), reduce)
            found = np.einsum("pn,mnh->mph", shrink, tensor)
            assert_near(found, from_grid, tolerance=1e-6)


@pytest.mark.parametrize("gathered", [False, True], ids=["masked", "gathered"])
def test_reference_decoding(reference_case: Case, gathered: bool) -> None:
    """The cache after the prompt, and greedy tokens with the logits that chose them."""
    case = reference_case
    group = Group.of(case, "dec")
    model, length = group.model, group.batch.ids.shape[1]
    model.text.layers = unstack(model.text.layers)
    graph, state = nnx.split(model)

    @jax.jit
    def prefill(state: nnx.State) -> Any:
        model = nnx.merge(graph, state)
        x, marks = group.insert(model, group.features)
        hidden, cache = model.text.prefill(
            x, marks=marks, last=jnp.array([length - 1]), images=group.most if gathered else None
        )
        return model.text.logits(hidden[:, None])[:, 0], cache

    logits, cache = prefill(state)
    tokens = case["dec.tokens"]
    assert [key.shape[2] for key in cache.keys] == case["dec.cache_lengths"].tolist()
    for name, tensor in case.group("dec.cache.").items():
        kind, layer = name.split(".")
        stored = (cache.keys if kind == "k" else cache.values)[int(layer)]
        natural = np.asarray(stored).swapaxes(1, 2)
        assert_near(group.pack(natural)[0].swapaxes(0, 1), tensor, tolerance=1e-4)
    cache = cache.grow(len(tokens))
    extend = jax.jit(lambda state, *args, **more: nnx.merge(graph, state).extend(*args, **more))
    for step, token in enumerate(tokens):
        assert_near(logits[0], case["dec.logits"][step], tolerance=1e-4)
        assert int(logits[0].argmax()) == token
        logits, cache = extend(
            state,
            jnp.full((1, 1), token),
            start=jnp.array([length + step]),
            lengths=jnp.array([1]),
            cache=cache,
        )


def test_reference_names_every_weight(reference_case: Case) -> None:
    """The table of weights is what the released code calls them, and nothing is left over."""
    model = model_of(reference_case, learned=True)
    names = {name for e in table(model.config) for name in e.tensors}
    given = {
        name.replace("model.image_newline", "image_newline") for name in reference_case.group("w.")
    }
    assert given <= names
    rest = names - given
    assert all(name.startswith(("vision_model.", "mm_projector.")) for name in rest)
