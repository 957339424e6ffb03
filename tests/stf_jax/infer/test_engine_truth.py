"""The engine gives the reference's tokens, and those of a decoder without cache or slots."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import stf_jax
from stf_jax.data.conversation import render_prompt
from stf_jax.data.images import load_image
from stf_jax.data.templates import get_template
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID, encode_prompt, expand_images
from stf_jax.infer import engine as engine_module
from stf_jax.infer import prompts as prompts_module
from stf_jax.infer.engine import Engine
from stf_jax.infer.prompts import Prompt, pad_prompts
from stf_jax.infer.sampling import GREEDY
from stf_jax.models.cache import CacheDType
from stf_jax.models.llava import Llava
from stf_jax.parallel.sharding import make_mesh
from stf_jax.store.arrays import flatten, unflatten
from stf_jax.systems import tiny_config
from tests.switch import ALL

MESHES = {"fsdp 8": {"fsdp": 8}, "data 2 x tensor 4": {"data": 2, "tensor": 4}}


def answers(engine: Engine, prompts: list[Prompt], lengths: list[int], **options: Any) -> Any:
    """Each answer cut where its length says."""
    actual: list[list[int]] = [[] for _ in prompts]

    def take(number: int, ids: np.ndarray) -> bool:
        actual[number] += ids.tolist()
        return len(actual[number]) < lengths[number]

    run = engine.run(prompts, max_new_tokens=max(lengths), sampling=GREEDY, take=take, **options)
    assert sorted(run) == list(range(len(prompts)))
    return [row[:length] for row, length in zip(actual, lengths, strict=True)]


@functools.cache
def loaded(path: Path, axes: str | None) -> stf_jax.Model:
    return stf_jax.load(path, mesh=None if axes is None else make_mesh(**MESHES[axes]))


@pytest.mark.portable
@pytest.mark.parametrize(
    ("axes", "slots", "share", "step"),
    [
        (None, 1, True, 64),
        (None, 3, False, 1),
        (None, 16, True, 100),
        ("data 2 x tensor 4", 8, True, 64),
        *([(None, 4, True, 64), ("fsdp 8", 8, True, 64)] if ALL else []),
    ],
)
def test_reference(
    reference: Path,
    reference_answers: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    axes: str | None,
    slots: int,
    share: bool,
    step: int,
) -> None:
    """Lengths are padded to multiples of `step`."""
    for module in (engine_module, prompts_module):
        monkeypatch.setattr(module, "bucket", lambda length, least=0: -(-length // step) * step)
    model = loaded(reference / "llava-stf", axes)
    cases = reference_answers * 3
    prompts = []
    for case in cases:
        text = f"<image>\n{case['question'].removeprefix('<image>').strip()}"
        text = render_prompt(text, template=get_template(case["template"]))
        ids = encode_prompt(model.tokenizer, text)
        pixels = model.image_processor.pixels(load_image(reference / "images" / case["image"]))
        prompts.append(
            Prompt(
                ids=expand_images(ids, tokens_per_image=model.config.tokens_per_image),
                pixels=pixels[None],
                image_key=case["image"],
            )
        )
    longest = max(len(case["output_ids"]) for case in cases) - 1
    lengths = [longest] * len(cases)
    actual = answers(model.engine, prompts, lengths, slots=slots, share=share, every=5)
    assert actual == [case["output_ids"][1:] for case in cases]


TINY = tiny_config()
# One token in thirty ends an answer.
CONFIG = dataclasses.replace(
    TINY, text=dataclasses.replace(TINY.text, eos_ids=tuple(range(20, 40)), max_positions=120)
)
NEW, LONGEST = 12, 80


@pytest.fixture(scope="module")
def network() -> Llava:
    rng, network = np.random.default_rng(0), Llava.abstract(CONFIG)
    # Larger weights than training starts from: logits then depend on all of the prompt.
    weights = {
        path: jnp.asarray(rng.normal(path.endswith("scale"), 0.2, leaf.shape), leaf.dtype)
        for path, leaf in flatten(nnx.to_pure_dict(nnx.state(network))).items()
    }
    nnx.update(network, unflatten(weights))
    return network


@pytest.fixture(scope="module")
def engine(network: Llava) -> Engine:
    return Engine(nnx.merge(*nnx.split(network)))


FORWARD = jax.jit(Llava.__call__)


def without_cache(network: Llava, prompts: list[Prompt], lengths: list[int]) -> list[list[int]]:
    """The most likely token after all that came before, computed anew for each token."""
    rows, ids = [[] for _ in prompts], [prompt.ids for prompt in prompts]
    for _ in range(max(lengths)):
        now = [dataclasses.replace(p, ids=one) for p, one in zip(prompts, ids, strict=True)]
        # A row of the greatest length and images keeps the shapes.
        size = CONFIG.vision.image_size
        full = Prompt(ids=np.ones(96, np.int32), pixels=np.zeros((2, size, size, 3), np.float32))
        batch = pad_prompts([*now, full], rows=20, image_size=size)
        logits = np.asarray(FORWARD(network, batch))
        chosen = [int(logits[row, len(one) - 1].argmax()) for row, one in enumerate(ids)]
        for row, token in enumerate(chosen):
            over = rows[row] and rows[row][-1] in CONFIG.text.eos_ids
            if not over and len(rows[row]) < lengths[row]:
                rows[row].append(token)
        ids = [np.append(one, token) for one, token in zip(ids, chosen, strict=True)]
    return rows


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[Prompt], list[int]]:
    """Twenty less one, about a few images or none, with their stop points."""
    prompts = []
    for _ in range(19):
        images, image = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        rng = np.random.default_rng([images, image])
        size = CONFIG.vision.image_size
        before = rng.integers(40, 600, 3 + 9 * image)
        vision = np.full(images * CONFIG.tokens_per_image, IMAGE_TOKEN_ID)
        seed = draw(st.integers(0, 999))
        after = np.random.default_rng(seed).integers(40, 600, draw(st.integers(1, 40)))
        prompts.append(
            Prompt(
                ids=np.concatenate([before, vision, after]).astype(np.int32),
                pixels=rng.standard_normal((images, size, size, 3), dtype=np.float32),
                image_key=(images, image) if draw(st.booleans()) else None,
            )
        )
    return prompts, draw(st.lists(st.integers(1, NEW), min_size=19, max_size=19))


@pytest.mark.slow
@settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=11 if ALL else 6,
    phases=(Phase.generate,),
)
@given(
    requests_and_lengths=requests(),
    slots=st.sampled_from([1, 8]),
    every=st.sampled_from([1, 3, 20]),
    share=st.booleans(),
)
def test_random_requests(
    engine: Engine,
    network: Llava,
    requests_and_lengths: tuple[list[Prompt], list[int]],
    slots: int,
    every: int,
    share: bool,
) -> None:
    """A hundred of them."""
    prompts, lengths = requests_and_lengths
    actual = answers(engine, prompts, lengths, slots=slots, every=every, share=share)
    assert actual == without_cache(network, prompts, lengths)


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 0.9), ("int8", 0.7)])
def test_coarser_caches(network: Llava, dtype: CacheDType, least: float) -> None:
    """Random weights make close choices of nearly all; most come out the same all the same."""
    rng, size = np.random.default_rng(0), CONFIG.vision.image_size
    prompts = [
        Prompt(
            ids=rng.integers(40, 600, 20 + 3 * number).astype(np.int32),
            pixels=np.zeros((0, size, size, 3), np.float32),
        )
        for number in range(19)
    ]
    coarse = Engine(nnx.merge(*nnx.split(network)), cache_dtype=dtype)
    actual = answers(coarse, prompts, [3] * 19, slots=8, every=3)
    expected = without_cache(network, prompts, [3] * 19)
    same = [one == other for one, other in zip(actual, expected, strict=True)]
    assert least <= np.mean(same)
