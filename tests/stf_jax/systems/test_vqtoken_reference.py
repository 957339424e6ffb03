"""VQToken against what its released code computed."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.convert.mapping import connector_entries
from stf_jax.data.batch import Batch
from stf_jax.data.tokenizer import IGNORED_LABEL, IMAGE_TOKEN_ID
from stf_jax.models.clustering import average_clusters, find_clusters, normalize
from stf_jax.models.layers import Init
from stf_jax.systems import vqtoken
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.vqtoken import VQAttention, VQToken, quantize
from tests.stf_jax.systems.reference import Case, assert_near, fill, find_case

PREFIX = "connector/attention/"


@pytest.fixture(scope="module")
def reference_case() -> Case:
    return find_case("vqtoken")


@partial(jax.jit, static_argnames="steps")
def cluster(units: jax.Array, start: jax.Array, *, steps: int) -> tuple[jax.Array, ...]:
    """All of the clusters over all of the tokens."""
    mask, used = jnp.ones((1, len(units)), bool), jnp.ones((1, len(start)), bool)
    labels, centroids = find_clusters(units[None], mask, start[None], used, steps=steps)
    means = average_clusters(units[None], mask, labels[:, 0], count=len(start))[0]
    return labels[0, 0], centroids[0, 0], means


def units_of(tokens: np.ndarray) -> jax.Array:
    return normalize(jnp.asarray(tokens.reshape(-1, tokens.shape[-1])))


def adaptive(case: Case, **fields: Any) -> VQToken:
    hyper = case.hyper
    return VQToken(
        clusters=hyper["max_K"],
        least=hyper["first_K"],
        steps=hyper["max_iteration_adaptive"],
        adaptive=True,
        **fields,
    )


def test_reference_fixed_clusters(reference_case: Case) -> None:
    """Every video: the first assignment and means, the last labels, the codebook."""
    case = reference_case
    for video in range(len(case.json["sizes"]["a"]["planted"])):
        units, order = units_of(case[f"a.{video}.tokens"]), case[f"a.{video}.init_order"]
        for count in case.json["sizes"]["a"]["ks"]:
            name, start = f"a.{video}.fixed{count}", units[order[:count]]
            labels, centroids, _ = cluster(units, start, steps=1)
            np.testing.assert_array_equal(labels, case[f"{name}.labels_first"].ravel())
            assert_near(centroids, case[f"{name}.centroids_first"], tolerance=1e-5)
            labels, _, means = cluster(units, start, steps=case.hyper["max_iteration_fixed"])
            np.testing.assert_array_equal(labels, case[f"{name}.labels"].ravel())
            assert_near(means, case[f"{name}.means"], tolerance=1e-5)


def test_reference_given_centroids(reference_case: Case) -> None:
    """Some clusters stay empty; the cap ends it before it has stopped."""
    case = reference_case
    units, start = units_of(case["a.0.tokens"]), jnp.asarray(case["a.given.init"])
    for steps in case.hyper["max_iteration_given"]:
        labels, centroids, means = cluster(units, start, steps=steps)
        np.testing.assert_array_equal(labels, case[f"a.given.{steps}.labels"])
        assert_near(centroids, case[f"a.given.{steps}.centroids"], tolerance=1e-5)
        empty = case.json["runs"][f"a.given.{steps}"]["empty"]
        assert not np.any(means[jnp.array(empty)])
    np.testing.assert_array_equal(labels, case["a.given.tokens_fn.labels"].ravel())
    assert_near(means, case["a.given.tokens_fn.means"], tolerance=1e-5)


def test_reference_elbow(reference_case: Case) -> None:
    """All videos in one batch, though they have different numbers of frames."""
    case = reference_case
    videos = [case[f"a.{n}.tokens"] for n in range(len(case.json["sizes"]["a"]["planted"]))]
    longest = max(map(len, videos))
    padded = np.stack([np.pad(v, ((0, longest - len(v)), (0, 0), (0, 0))) for v in videos])
    padded[0, len(videos[0]) :] = 3.0  # What stands there is no matter.
    patches = padded.shape[2]
    mask = np.arange(longest * patches) < np.array([[len(v) * patches] for v in videos])
    units = normalize(jnp.asarray(padded.reshape(len(videos), -1, padded.shape[-1])))
    order = np.stack([case[f"a.{n}.init_order"] for n in range(len(videos))])
    system = adaptive(case)
    run = jax.jit(partial(quantize, system))
    found = run(units, jnp.asarray(mask), jnp.asarray(order))
    honest = jax.jit(partial(quantize, dataclasses.replace(system, slip=False)))
    bends = honest(units, jnp.asarray(mask), jnp.asarray(order)).clusters
    means = average_clusters(units, jnp.asarray(mask), found.labels, count=system.most)
    for number, video in enumerate(videos):
        name = f"a.{number}.elbow"
        expected = case.json["runs"][name]
        assert int(found.clusters[number]) == expected["K"]
        assert int(bends[number]) == expected["elbow_without_the_offset_slip"]
        assert_near(found.distortions[number], case[f"{name}.distortions"], tolerance=1e-5)
        labels = found.labels[number, : len(video) * patches]
        np.testing.assert_array_equal(labels, case[f"{name}.labels"].ravel())
        assert_near(means[number, : expected["K"]], case[f"{name}.means"], tolerance=1e-5)
        assert not np.any(means[number, expected["K"] :])


def attention_of(
    tensors: Mapping[str, np.ndarray], *, patches: int, width: int, inner: int, heads: int
) -> VQAttention:
    """With released weights, through the table that imports them."""
    module = nnx.eval_shape(
        lambda: VQAttention(patches, width, inner=inner, heads=heads, init=Init(rngs=nnx.Rngs(0)))
    )
    side = round(patches**0.5)
    vision = VisionConfig(image_size=side, patch_size=1)
    config = LlavaConfig(
        vision=vision,
        text=dataclasses.replace(TextConfig.tiny(), width=width),
        system=VQToken(clusters=patches, attention_width=inner, heads=heads),
    )
    entries = [e for e in connector_entries(config) if e.native.startswith(PREFIX)]
    given = {f"cross_attention.{name}": tensor for name, tensor in tensors.items()}
    fill(module, entries, given, at=PREFIX)
    return module


def test_reference_attention(reference_case: Case) -> None:
    """Fewer frames than clusters, more, as many; and a probe of the norms' epsilon."""
    case = reference_case
    tensors, sizes = case.group("a.attn.weights."), case.json["sizes"]
    build_module = partial(
        attention_of,
        patches=sizes["a"]["N"],
        width=sizes["a"]["D"],
        inner=sizes["vq_attn"]["a_ffn"],
        heads=sizes["vq_attn"]["a_heads"],
    )
    run = jax.jit(lambda module, *given: module(*given))

    def attend(module: VQAttention, name: str, frames: int, clusters: int) -> np.ndarray:
        labels, codebook = (jnp.asarray(case[f"{name}.{n}"]) for n in ("index_map", "codebook"))
        out, valid = run(
            module, labels[None], codebook[None], jnp.array([frames]), jnp.array([clusters])
        )
        assert valid.all()
        return np.asarray(out[0])

    module = build_module(tensors)
    for number, (frames, clusters) in enumerate(sizes["a"]["attn_cases"]):
        name = f"a.attn.{number}"
        out = attend(module, name, frames, clusters)
        assert_near(out, case[f"{name}.out"], tolerance=1e-5)
        assert_near(_cross(module, case, name), case[f"{name}.cross"], tolerance=1e-5)
    small = ("to_q_proj.", "self_attn.out_proj.")
    scaled = {
        k: v * np.float32(2e-3 if any(s in k for s in small) else 1) for k, v in tensors.items()
    }
    frames, clusters = sizes["a"]["attn_cases"][0]
    out = attend(build_module(scaled), "a.attn.0", frames, clusters)
    assert_near(out, case["a.attn.probe.out"], tolerance=2e-4)


@jax.jit
def _cross_of(module: VQAttention, labels: jax.Array, codebook: jax.Array) -> jax.Array:
    rows = max(len(labels), len(codebook))
    x, memory = (a[jnp.arange(rows) % len(a)][None] for a in (labels, codebook))
    valid = jnp.ones((1, rows), bool)
    x = module.query(x, out=None)
    x = module.norm_1(x + module.self_attention(x, x, valid))
    return module.cross(x, memory, valid)[0]


def _cross(module: VQAttention, case: Case, name: str) -> jax.Array:
    labels, codebook = (jnp.asarray(case[f"{name}.{n}"]) for n in ("index_map", "codebook"))
    return _cross_of(module, labels, codebook)


@dataclasses.dataclass(frozen=True)
class Run:
    """A mode of the whole model."""

    case: Case
    name: str
    system: VQToken

    @property
    def visuals(self) -> list[np.ndarray]:
        """Of each row of the batch: an image, or the frames of a video."""
        named = {"image": self.case["b.image"]}
        for name in self.case.tensors:
            if name.startswith("b.video."):
                named[name.removeprefix("b.").replace(".", " ")] = self.case[name]
        return [named[name] for name in self.case.hyper["batch"]]

    @property
    def videos(self) -> list[int]:
        """The rows that show a video."""
        return [row for row, name in enumerate(self.case.hyper["batch"]) if name != "image"]

    @property
    def batch(self) -> Batch:
        """Videos are clips of all the batch's frames, some of which are not there."""
        case, visuals = self.case, self.visuals
        most = max(map(len, visuals))
        side = visuals[0].shape[-1]
        image = self.system.tokens(case.vision)
        joined = self.system.clip_tokens(most)
        pixels = np.zeros((len(visuals), most, side, side, 3), np.float32)
        clips = np.full((len(visuals), 1, most), -1, np.int32)
        rows = []
        for row, shown in enumerate(visuals):
            pixels[row, : len(shown)] = shown.transpose(0, 2, 3, 1)
            slots = np.arange(image)
            if row in self.videos:
                clips[row, 0, : len(shown)] = np.arange(len(shown))
                slots = most * image + np.arange(joined)
            real = case["b.attention_mask"][row] > 0
            ids, labels = case["b.input_ids"][row][real], case["b.labels"][row][real]
            at = ids == IMAGE_TOKEN_ID
            repeats = np.where(at, len(slots), 1)
            ids, at = np.repeat(ids, repeats), np.repeat(at, repeats)
            placed = np.full(len(ids), -1)
            placed[at] = slots
            rows.append((ids, np.where(at, IGNORED_LABEL, np.repeat(labels, repeats)), placed))
        length = max(len(ids) for ids, _, _ in rows)

        def pad(arrays: list[np.ndarray], value: int) -> jax.Array:
            wide = [np.pad(a, (0, length - len(a)), constant_values=value) for a in arrays]
            return jnp.asarray(np.stack(wide).astype(np.int32))

        ids, labels, placed = (list(column) for column in zip(*rows, strict=True))
        return Batch(
            ids=pad([np.maximum(row, 0) for row in ids], 0),
            labels=pad(labels, IGNORED_LABEL),
            positions=pad([np.arange(length)] * len(rows), 0),
            segments=pad([np.ones_like(row) for row in ids], 0),
            image_slots=pad(placed, -1),
            pixels=jnp.asarray(pixels),
            clips=jnp.asarray(clips),
        )


def run_of(case: Case, mode: str) -> Run:
    sizes = case.json["sizes"]["vq_attn"]
    fields: dict[str, Any] = {
        "taps": (case.tap,),
        "projector_width": case.text.width,
        "heads": sizes["b_heads"],
        "attention_width": sizes["b_ffn"],
        "output": "codebook" if mode == "released" else "attention",
    }
    if mode == "vqattn_fixed":
        steps = case.hyper["max_iteration_fixed"]
        return Run(case, mode, VQToken(clusters=case.hyper["fixed_K_b"], steps=steps, **fields))
    return Run(case, mode, adaptive(case, **fields))


@pytest.mark.parametrize("mode", ["released", "vqattn_fixed", "vqattn_elbow"])
def test_reference_model(reference_case: Case, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos of different lengths and an image in one batch: tokens, logits, loss, gradients."""
    case, run = reference_case, run_of(reference_case, mode)
    model = case.model(run.system, weights="b.weights.")
    batch, name = run.batch, f"b.{mode}"
    orders = np.zeros((len(run.visuals), run.system.clusters), np.int32)
    for number, row in enumerate(run.videos):
        orders[row] = case[f"b.init_order.{number}"][: run.system.clusters]
    monkeypatch.setattr(vqtoken, "choose_seeds", lambda *_, **__: jnp.asarray(orders))
    seen: dict[str, jax.Array] = {}
    original = vqtoken.quantize

    def watch(system: VQToken, units: jax.Array, *rest: jax.Array) -> vqtoken.Clusters:
        found = original(system, units, *rest)
        seen["labels"], seen["clusters"] = found.labels, found.clusters
        seen["means"] = average_clusters(units, rest[0], found.labels, count=system.most)
        if found.distortions is not None:
            seen["distortions"] = found.distortions
        return found

    monkeypatch.setattr(vqtoken, "quantize", watch)
    graph, state = nnx.split(model)

    @jax.jit
    def compute(state: nnx.State) -> Any:
        model = nnx.merge(graph, state)

        def mean(state: nnx.State) -> jax.Array:
            total, count = nnx.merge(graph, state).loss(batch)
            return total / count

        features = model.vision(batch.pixels.reshape(-1, *batch.pixels.shape[2:]))
        projected = model.connector(features).values
        joined = model.connector.join(
            vqtoken.Tokens(values=projected), rows=len(batch.pixels), clips=batch.clips
        )
        found = dict(seen)
        embeds, marks = model.insert(batch)
        return (
            (projected, joined, found, embeds, marks, model(batch)),
            jax.value_and_grad(mean)(state),
        )

    (projected, joined, found, embeds, marks, logits), (loss, gradient) = compute(state)
    projected = np.asarray(projected).reshape(*batch.pixels.shape[:2], *projected.shape[1:])
    clips = run.system.clip_tokens(batch.pixels.shape[1])
    for number, row in enumerate(run.videos):
        frames = len(run.visuals[row])
        expected = case.json["runs"][name][number]
        assert_near(projected[row, :frames], case[f"b.tokens.{number}"], tolerance=1e-5)
        assert int(found["clusters"][row]) == expected["K"]
        video = f"{name}.{number}"
        if f"{video}.labels" in case.tensors:
            labels = case[f"{video}.labels"]
            actual = np.asarray(found["labels"][row])[: labels.size]
            np.testing.assert_array_equal(actual, labels.ravel())
            means = found["means"][row, : expected["K"]]
            assert_near(means, case[f"{video}.means"], tolerance=1e-5)
        if f"{video}.distortions" in case.tensors:
            assert_near(found["distortions"][row], case[f"{video}.distortions"], tolerance=1e-5)
        valid = np.asarray(joined.valid[row, -clips:])
        assert valid.sum() == expected["to_llm"]
        if f"{video}.out" in case.tensors:
            out = np.asarray(joined.values[row, -clips:])[valid][:-1]
            assert_near(out, case[f"{video}.out"], tolerance=1e-5)
    real, theirs = np.asarray(marks.segment) > 0, case[f"{name}.mask"] > 0
    np.testing.assert_array_equal(real.sum(axis=1), theirs.sum(axis=1))
    np.testing.assert_array_equal(
        np.asarray(batch.labels)[real], case[f"{name}.spliced_labels"][theirs]
    )
    if f"{name}.embeds" in case.tensors:
        assert_near(np.asarray(embeds)[real], case[f"{name}.embeds"][theirs], tolerance=1e-5)
    assert_near(np.asarray(logits)[real], case[f"{name}.logits"][theirs], tolerance=1e-4)
    assert_near(loss, case[f"{name}.loss"][0], tolerance=1e-5)
    if case.group(f"{name}.grad."):
        case.check_gradients(model, gradient, prefix=f"{name}.grad.")
