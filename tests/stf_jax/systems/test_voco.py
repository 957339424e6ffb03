"""VoCo-LLaMA against what its released code computed, and by its properties."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.convert.infer import infer_system, system_keys
from stf_jax.convert.mapping import connector_entries, text_entries
from stf_jax.data.tokenizer import IGNORED_LABEL, IMAGE_TOKEN_ID
from stf_jax.models.cache import KVCache
from stf_jax.models.layers import Init
from stf_jax.models.llama import Llama
from stf_jax.models.llava import Llava
from stf_jax.models.lora import LoRAConfig
from stf_jax.models.marks import IMAGE, TEXT, Marks, visible
from stf_jax.models.selection import hide
from stf_jax.plan.inference import _prompt as make_prompt
from stf_jax.store.arrays import flatten
from stf_jax.systems import named_config
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.voco import BEFORE, VoCo, VoCoLlama, rule
from tests.stf_jax.systems.conftest import config_of
from tests.stf_jax.systems.reference import Case, assert_near, fill, find_case


@pytest.fixture(scope="module")
def reference_case() -> Case:
    return find_case("voco")


@pytest.fixture(scope="module")
def decoder(reference_case: Case) -> VoCoLlama:
    """The language model with the reference's weights."""
    case = reference_case
    text = case.decoder_text
    make = nnx.eval_shape(lambda: decoder_of(case, text))
    entries = text_entries(text, vocabulary=text.vocab_size)
    fill(make, entries, case.group("w."), at="text/")
    return make


def decoder_of(case: Case, text: TextConfig) -> VoCoLlama:
    return VoCoLlama(
        text,
        token_id=case.hyper["voco_token_id"],
        tokens_per_image=case.json["sizes"]["vision_tokens"],
        init=Init(rngs=nnx.Rngs(0)),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Ids as the reference has them, with images spliced in and padding on the left."""

    ids: np.ndarray
    images: np.ndarray
    slots: np.ndarray
    labels: np.ndarray
    mask: np.ndarray

    @classmethod
    def of(cls, case: Case, prefix: str = "", *, labels: np.ndarray | None = None) -> "Rows":
        """The rows of `prefix`input_ids; row r has image r of the case."""
        given, count = case[f"{prefix}input_ids"], case.json["sizes"]["vision_tokens"]
        real = case.tensors.get(f"{prefix}input_mask", np.ones(given.shape, bool))
        labels = np.full(given.shape, IGNORED_LABEL) if labels is None else labels
        rows = []
        for ids, some, mask in zip(given, labels, real, strict=True):
            repeats = np.where(ids == case.hyper["image_placeholder"], count, 1)[mask]
            hidden = np.where(ids == case.hyper["image_placeholder"], IGNORED_LABEL, some)
            rows.append((np.repeat(ids[mask], repeats), np.repeat(hidden[mask], repeats)))
        length = max(len(ids) for ids, _ in rows)
        shape = (len(rows), length)
        result = cls(
            ids=np.zeros(shape, np.int32),
            images=np.zeros(shape, bool),
            slots=np.zeros(shape, np.int32),
            labels=np.full(shape, IGNORED_LABEL, np.int32),
            mask=np.zeros(shape, bool),
        )
        for row, (ids, some) in enumerate(rows):
            at = slice(length - len(ids), None)
            images = ids == case.hyper["image_placeholder"]
            result.ids[row, at], result.labels[row, at] = ids, some
            result.images[row, at], result.mask[row, at] = images, True
            result.slots[row, at][images] = np.arange(images.sum())
        return result

    def embed(self, decoder: Llama, features: Any) -> jax.Array:
        inserted = jnp.take_along_axis(features, self.slots[..., None], axis=1)
        return jnp.where(self.images[..., None], inserted, decoder.embed(jnp.maximum(self.ids, 0)))

    def marks(self, decoder: Llama) -> Marks:
        position = np.broadcast_to(np.arange(self.ids.shape[1], dtype=np.int32), self.ids.shape)
        plain = Marks(
            position=jnp.asarray(position),
            segment=jnp.asarray(self.mask, jnp.int32),
            kind=jnp.where(self.images, IMAGE, TEXT),
            image=jnp.where(self.images, 0, -1),
        )
        return decoder.mark(jnp.asarray(self.ids), plain)


@jax.jit
def see(decoder: VoCoLlama, rows: Rows) -> jax.Array:
    """What each position sees."""
    marks = rows.marks(decoder)
    return visible(rule, marks, marks)


@jax.jit
def insert(decoder: VoCoLlama, rows: Rows, features: Any) -> tuple[jax.Array, Marks]:
    """Embeddings and marks."""
    return rows.embed(decoder, features), rows.marks(decoder)


def test_reference_rule(reference_case: Case, decoder: VoCoLlama) -> None:
    """Rows of bare ids, before AND with causality: so what a position sees of what it may."""
    names = {name.split(".")[0] for name in reference_case.group("rule.")}
    assert names
    for name in names:
        ids, allow = (reference_case[f"rule.{name}.{part}"] for part in ("ids", "allow"))
        nothing, everything = np.zeros_like(ids), np.ones(ids.shape, bool)
        rows = Rows(ids, nothing > 0, nothing, nothing, everything)
        past = np.tril(np.ones(ids.shape[1:] * 2, bool))
        np.testing.assert_array_equal(see(decoder, rows), allow & past)


def test_reference_mask(reference_case: Case, decoder: VoCoLlama) -> None:
    """What every layer is given, on real rows; with a text-only row, too."""
    for prefix, name in (
        ("", "allow"),
        ("mixed.", "mixed.allow"),
        ("infer.", "infer.single.allow"),
    ):
        rows = Rows.of(reference_case, prefix)
        seen = np.asarray(see(decoder, rows))
        expected = reference_case[name]
        if prefix == "":
            np.testing.assert_array_equal(rows.mask, reference_case["mask"])
        if prefix == "infer.":
            expected = expected[:, : rows.ids.shape[1], : rows.ids.shape[1]]
        np.testing.assert_array_equal(seen[rows.mask], expected[rows.mask])


def test_reference_hidden_states_loss_and_gradients(
    reference_case: Case, decoder: VoCoLlama
) -> None:
    case = reference_case
    rows = Rows.of(case, labels=case["input_labels"])
    np.testing.assert_array_equal(rows.labels, case["labels"])
    graph, state = nnx.split(decoder)
    targets = np.pad(rows.labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)

    @jax.jit
    def run(state: nnx.State, features: jax.Array) -> Any:
        def loss(state: nnx.State, features: jax.Array) -> Any:
            model = nnx.merge(graph, state)
            x, marks = rows.embed(model, features), rows.marks(model)
            logits = model.logits(model(x, marks=marks))
            chosen = jnp.take_along_axis(
                jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], axis=2
            )[..., 0]
            known = targets != IGNORED_LABEL
            return -jnp.where(known, chosen, 0).sum() / known.sum(), (x, logits)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, features)

    (loss, (embeds, logits)), (gradient, to_features) = run(
        state, jnp.asarray(case["image_features"])
    )
    real = case["mask"]
    assert_near(np.asarray(embeds)[real], case["embeds"][real], tolerance=1e-5)
    assert_near(np.asarray(logits)[real], case["logits"][real], tolerance=1e-4)
    assert_near(loss, case["loss"], tolerance=1e-5)
    leaves = flatten(nnx.to_pure_dict(gradient))
    actual = {"image_features": np.asarray(to_features)}
    for entry in text_entries(decoder.config, vocabulary=decoder.config.vocab_size):
        leaf = np.asarray(leaves[entry.native.removeprefix("text/")])
        for name, part in zip(
            entry.tensors, leaf if entry.layers is not None else [leaf], strict=True
        ):
            actual[name] = entry.transform.torch(part)
    for name, expected in case.group("grad.").items():
        assert_near(actual[name], expected, tolerance=1e-5)
    _, marks = insert(decoder, rows, jnp.asarray(case["image_features"]))
    hidden = [embeds, *layer_outputs(decoder, embeds, marks)]
    for layer, x in enumerate(hidden):
        expected = case[f"hidden.{layer}"]
        assert_near(np.asarray(x)[real], expected[real], tolerance=1e-4)


def layer_outputs(decoder: VoCoLlama, x: jax.Array, marks: Marks) -> list[jax.Array]:
    """Hidden states after 1, 2, ... layers; the last one normed."""
    graph, state = nnx.split(decoder)

    def after(layers: int) -> jax.Array:
        part = nnx.State(state)
        part["layers"] = jax.tree.map(lambda leaf: leaf[:layers], state["layers"])

        @jax.jit
        def run(part: nnx.State) -> jax.Array:
            cut = nnx.merge(graph, part)
            if layers < decoder.config.layers:
                cut.norm = lambda x: x
            return cut(x, marks=marks)

        return run(part)

    return [after(layers) for layers in range(1, decoder.config.layers + 1)]


def test_reference_mixed_batch(reference_case: Case, decoder: VoCoLlama) -> None:
    """A row of text alone beside one with an image, in both orders."""
    case = reference_case
    rows = Rows.of(case, "mixed.")
    features = jnp.asarray(case["image_features"][1:][: len(rows.ids)])
    for order in (slice(None), slice(None, None, -1)):
        turned = Rows(*(getattr(rows, f.name)[order] for f in dataclasses.fields(rows)))
        logits = np.asarray(forward(decoder, *insert(decoder, turned, features[order])))
        expected, real = case["mixed.logits"][order], turned.mask
        assert_near(logits[real], expected[real], tolerance=1e-4)


def test_reference_inference(reference_case: Case, decoder: VoCoLlama) -> None:
    """Masked pass, the two passes over the cut cache, and greedy decoding."""
    case = reference_case
    rows, tokens = Rows.of(case, "infer."), case["infer.decode.tokens"]
    features = jnp.asarray(case["image_features"][:1])
    length, count = rows.ids.shape[1], case.json["sizes"]["vision_tokens"]
    x, marks = insert(decoder, rows, features)
    single = forward(decoder, x, marks)
    assert_near(single, case["infer.single.logits"], tolerance=1e-4)

    end = case["infer.pass1.logits"].shape[1]
    assert VoCo(count=1, token_id=decoder.token_id).split(rows.ids[0]).prefilled == end
    first = jax.tree.map(lambda array: array[:, :end], marks)
    logits = forward(decoder, x[:, :end], first)
    assert_near(logits, case["infer.pass1.logits"], tolerance=1e-4)

    for images in (None, 1):
        at = jnp.array([end - 1])
        _, cache = prefill(decoder, x[:, :end], marks=first, last=at, images=images)
        (group,) = cache.groups
        kept = case["infer.cache.k.0"].shape[1]
        assert group.slots == end - (images or 0) * count
        assert end - int(group.dropped[0]) == kept == case.json["sizes"]["voco_tokens"]
        for layer in range(decoder.config.layers):
            for name, stored in (("k", cache.keys), ("v", cache.values)):
                assert_near(
                    stored[layer][0, :, :kept],
                    case[f"infer.cache.{name}.{layer}"],
                    tolerance=1e-5,
                )
        cache = cache.resize([length + len(tokens)])
        logits, cache = answer(decoder, cache, rows.ids[:, end:], start=end)
        assert_near(logits, case["infer.pass2.logits"], tolerance=1e-4)
        chosen = []
        for step, expected in enumerate(case["infer.decode.logits"]):
            assert_near(logits[0, -1], expected, tolerance=1e-4)
            chosen.append(int(logits[0, -1].argmax()))
            logits, cache = answer(
                decoder, cache, np.array([chosen[-1:]], np.int32), start=length + step
            )
        assert chosen == tokens.tolist()


def answer(
    decoder: VoCoLlama, cache: KVCache, ids: np.ndarray, *, start: int
) -> tuple[jax.Array, KVCache]:
    """Logits of further tokens against the cache."""
    at = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return read_text(decoder, cache, jnp.asarray(ids), start + at)


@jax.jit
def read_text(
    decoder: VoCoLlama, cache: KVCache, ids: jax.Array, at: jax.Array
) -> tuple[jax.Array, KVCache]:
    marks = Marks.text(at, jnp.ones_like(at))
    hidden, cache = decoder.extend(decoder.embed(ids), marks=marks, slots=at, cache=cache)
    return decoder.logits(hidden), cache


prefill = jax.jit(VoCoLlama.prefill, static_argnames="images")
# As LLaMA would keep it: everything, the image too.
prefill_whole = jax.jit(Llama.prefill)
forward = jax.jit(lambda decoder, x, marks: decoder.logits(decoder(x, marks=marks)))

# A sequence: BOS and an image, newline and vocos, text.
K, LENGTH = 4, 24
SMALL = TextConfig(vocab_size=50, width=16, mlp_width=24, layers=2, heads=4, kv_heads=2, head_dim=4)
TOKEN = 49


@pytest.fixture(scope="module")
def small() -> VoCoLlama:
    """With weights large enough to tell right from wrong."""

    def make() -> VoCoLlama:
        init = Init(rngs=nnx.Rngs(0))
        return VoCoLlama(SMALL, token_id=TOKEN, tokens_per_image=K, init=init)

    decoder, rng = nnx.eval_shape(make), np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
    state = jax.tree.map(draw, nnx.state(decoder))
    nnx.update(decoder, state)
    return decoder


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Random ids, of which `images` * K stand for images and come with vocos."""

    images: int
    vocos: int
    text: int
    seed: int

    @property
    def ids(self) -> np.ndarray:
        rng = np.random.default_rng(self.seed)
        ids = rng.integers(2, TOKEN, 1 + self.images * K + 1 + self.vocos + self.text)
        ids[self.end - self.vocos : self.end] = TOKEN
        return ids.astype(np.int32)

    @property
    def end(self) -> int:
        """Behind the last voco."""
        return 2 + self.images * K + self.vocos if self.vocos else 1

    def placed(self, at: int = 0, segment: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, positions and segments of a row in which it begins there."""
        row = [np.zeros(LENGTH, np.int32) for _ in range(3)]
        ids = self.ids
        for array, values in zip(row, (ids, np.arange(len(ids)), segment), strict=True):
            array[at : at + len(ids)] = values
        return row[0], row[1], row[2]


def marked(decoder: VoCoLlama, *parts: Sequence) -> tuple[jax.Array, Marks, list[slice]]:
    """Embeddings and marks of a row that holds these one after the other, and where each lies."""
    rows, places, at = [], [], 0
    for segment, part in enumerate(parts, start=1):
        rows.append(part.placed(at, segment))
        places.append(slice(at, at + len(part.ids)))
        at = places[-1].stop
    ids, position, segments = (jnp.asarray(sum(arrays))[None] for arrays in zip(*rows, strict=True))
    return decoder.embed(ids), decoder.mark(ids, Marks.text(position, segments)), places


SEQUENCES = st.builds(
    Sequence,
    images=st.integers(0, 1),
    vocos=st.integers(1, 3),
    text=st.just(3),
    seed=st.integers(0, 99),
)


@settings(max_examples=10, deadline=None)
@given(first=SEQUENCES, second=SEQUENCES, images=st.booleans())
def test_two_passes_are_the_masked_pass(
    small: VoCoLlama, first: Sequence, second: Sequence, images: bool
) -> None:
    """Also of a sequence that shares its row with another: kinds go by segment."""
    x, marks, places = marked(small, first, second)
    packed = forward(small, x, marks)[0]
    for part, place in zip((first, second), places, strict=True):
        x, marks, _ = marked(small, part)
        alone = hide(marks, jnp.arange(LENGTH)[None] < part.end)
        count = part.images if images else None
        _, cache = prefill(small, x, marks=alone, last=jnp.array([part.end - 1]), images=count)
        assert cache.sizes == (LENGTH - (count or 0) * K,)
        assert part.end - int(cache.groups[0].dropped[0]) == part.vocos
        logits, _ = answer(small, cache, part.ids[None, part.end :], start=part.end)
        expected = packed[place][part.end :]
        np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-4)


@settings(max_examples=5, deadline=None)
@given(part=SEQUENCES, value=st.floats(-9, 9))
def test_nothing_before_the_vocos_reaches_text(
    small: VoCoLlama, part: Sequence, value: float
) -> None:
    """Other keys and values of BOS and image, beside the same of the vocos, change nothing."""
    x, marks, _ = marked(small, part)
    alone = hide(marks, jnp.arange(LENGTH)[None] < part.end)
    _, cache = prefill_whole(small, x, marks=alone, last=jnp.array([part.end - 1]))
    hidden = np.asarray(marks.kind == BEFORE)[:, None, :, None]
    assert hidden.sum() == part.end - part.vocos
    keys, values = (
        tuple(jnp.where(hidden, value, layer) for layer in layers)
        for layers in (cache.keys, cache.values)
    )
    spoiled = dataclasses.replace(cache, keys=keys, values=values)
    text = part.ids[None, part.end :]
    expected, _ = answer(small, cache, text, start=part.end)
    logits, _ = answer(small, spoiled, text, start=part.end)
    np.testing.assert_array_equal(logits, expected)


def test_the_image_reaches_text_through_the_vocos(small: VoCoLlama) -> None:
    x, marks, _ = marked(small, Sequence(images=1, vocos=1, text=3, seed=0))
    changed = forward(small, x.at[:, 1].add(1.0), marks) - forward(small, x, marks)
    assert np.abs(changed[0, 7:10]).max() > 1e-3


@settings(max_examples=5, deadline=None)
@given(part=st.builds(Sequence, images=st.just(1), vocos=st.just(0), text=st.integers(1, 8),
                      seed=st.integers(0, 99)))  # fmt: skip
def test_without_vocos_it_is_llama(small: VoCoLlama, part: Sequence) -> None:
    plain = nnx.eval_shape(lambda: Llama(SMALL, init=Init(rngs=nnx.Rngs(0))))
    nnx.update(plain, nnx.state(small))
    x, marks, (place,) = marked(small, part)
    actual, expected = (forward(model, x, marks)[0, place] for model in (small, plain))
    np.testing.assert_array_equal(actual, expected)


def test_what_does_not_fit_is_refused() -> None:
    vision, text = VisionConfig.tiny(), TextConfig.tiny()
    with pytest.raises(ValueError, match=r"VoCo.count is 0; it must be at least 1"):
        VoCo(count=0)
    with pytest.raises(ValueError, match="token_id 32000 is no row of a vocabulary of 600"):
        LlavaConfig(vision=vision, text=text, system=VoCo(taps=(3,)))
    system = VoCo(taps=(3,), count=2, token_id=5)
    image = [IMAGE_TOKEN_ID] * system.tokens(vision)
    assert system.held(np.array([1, *image, 5, 5, 7]), vision) == (3,)
    assert system.held(np.array([1, 7]), vision) == (2,)
    with pytest.raises(ValueError, match="1 images and 1 <voco>, and VoCo-LLaMA needs 2 an image"):
        system.held(np.array([1, *image, 5, 7]), vision)


def test_adapters_lie_in_its_layers() -> None:
    """LoRA trains them as in LLaMA."""
    make = partial(Llava.abstract, config_of("voco"))
    plain, adapted = (
        flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        for model in (make(), make(lora=LoRAConfig()))
    )
    assert isinstance(make().text, VoCoLlama)
    new = adapted.keys() - plain.keys()
    assert len(new) == 14
    assert all(path.startswith("text/layers/") for path in new)


def test_a_plan_has_its_vocos() -> None:
    """The planner's prompt is one that the system takes."""
    config = named_config("llava_voco_7b")
    assert config.text.vocab_size == TextConfig.vicuna_7b().vocab_size + 1
    behind = config.images_first.tokens(2)
    prompt = make_prompt(config, 40 + 2 * 576 + len(behind), 2, 576, behind, 0)
    assert config.system.held(prompt.ids, config.vision) == (2,)
    assert config.system.split(prompt.ids).prefilled == len(prompt.ids)


def test_config_json_says_how_many() -> None:
    """With the vocabulary, or with keys of our own; without them it is another system."""
    config = config_of("voco")
    shapes = {name: e.shape for e in connector_entries(config) for name in e.tensors}
    keys = system_keys(config)
    assert keys["voco_num"] == config.system.count
    assert infer_system(shapes, keys, config.vision) == config.system
    hf = {"voco_num": 4, "mm_vision_select_layer": -2}
    shapes["model.embed_tokens.weight"] = (32001, config.text.width)
    assert infer_system(shapes, hf, config.vision) == dataclasses.replace(
        config.system, count=4, token_id=32000
    )
    del hf["voco_num"]
    assert infer_system(shapes, hf, config.vision).name == "llava"
