"""The engine: what an answer may depend on, where it ends, and what is compiled for it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.engine import Engine
from stf_jax.infer.program import Program, Slots
from stf_jax.infer.prompts import Prompt, bucket
from stf_jax.infer.sampling import GREEDY, Sampling
from stf_jax.models.llava import Llava
from stf_jax.store.arrays import flatten, unflatten
from stf_jax.systems import tiny_config
from stf_jax.systems.base import LlavaConfig

TINY = tiny_config()
# One token in thirty ends an answer, so that the answers of a batch have many lengths.
EOS_IDS = tuple(range(20, 40))
CONTEXT = 120
CONFIG = dataclasses.replace(
    TINY, text=dataclasses.replace(TINY.text, eos_ids=EOS_IDS, max_positions=CONTEXT)
)
SAMPLED = Sampling(temperature=1.3, top_k=100, top_p=0.95, seed=11)


def make_engine(config: LlavaConfig) -> Engine:
    rng, model = np.random.default_rng(0), Llava.abstract(config)
    # Larger weights than training starts from: logits then depend on all of the prompt.
    weights = {
        path: jnp.asarray(rng.normal(path.endswith("scale"), 0.2, leaf.shape), leaf.dtype)
        for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items()
    }
    nnx.update(model, unflatten(weights))
    return Engine(model)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(CONFIG)


@pytest.fixture(scope="module")
def endless() -> Engine:
    """The same weights; no token ends an answer, and there is room for all."""
    text = dataclasses.replace(CONFIG.text, eos_ids=(), max_positions=4096)
    return make_engine(dataclasses.replace(CONFIG, text=text))


def prompt(length: int, *, images: int = 0, seed: int = 0) -> Prompt:
    """A random prompt of `length` positions; images, if any, come after the first token."""
    rng = np.random.default_rng([length, images, seed])
    size, ids = CONFIG.vision.image_size, rng.integers(40, 600, length)
    ids[1 : 1 + images * CONFIG.tokens_per_image] = IMAGE_TOKEN_ID
    assert images == 0 or length > 1 + images * CONFIG.tokens_per_image
    return Prompt(
        ids=ids.astype(np.int32),
        pixels=rng.standard_normal((images, size, size, 3), dtype=np.float32),
    )


def answers(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    new: int = 30,
    sampling: Sampling = GREEDY,
    every: int | None = None,
    slots: int = 4,
    share: bool = True,
) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]

    def take(number: int, ids: np.ndarray) -> bool:
        rows[number] += ids.tolist()
        return True

    finished = engine.run(
        prompts,
        slots=slots,
        max_new_tokens=new,
        sampling=sampling,
        every=every or new,
        take=take,
        share=share,
    )
    assert sorted(finished) == list(range(len(prompts)))
    return rows


# Short and long, of few buckets, each of which is a program to compile.
LENGTHS = st.integers(10, 14) | st.integers(60, 64)
PROMPTS = st.tuples(LENGTHS, st.integers(0, 2), st.integers(0, 99)).map(
    lambda drawn: prompt(drawn[0], images=drawn[1], seed=drawn[2])
)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@settings(derandomize=True, deadline=None, database=None, max_examples=3, phases=(Phase.generate,))
@given(prompts=st.lists(PROMPTS, min_size=4, max_size=4))
def test_neighbors_change_nothing(
    engine: Engine, sampling: Sampling, prompts: list[Prompt]
) -> None:
    together = answers(engine, prompts, sampling=sampling)
    alone = [answers(engine, [one], sampling=sampling)[0] for one in prompts]
    assert together == alone


def test_position_in_the_batch_changes_nothing(engine: Engine) -> None:
    prompts = [prompt(20 + i, images=i % 2) for i in range(4)]
    for sampling in (GREEDY, SAMPLED):
        forward = answers(engine, prompts, sampling=sampling)
        assert answers(engine, prompts[::-1], sampling=sampling) == forward[::-1]


def test_same_shapes_compile_nothing(compilations: list[str]) -> None:
    engine = make_engine(CONFIG)
    compilations.clear()
    warm = [prompt(5 + length, images=1) for length in (16, 24, 32)] + [prompt(50)]
    answers(engine, warm)
    answers(engine, warm, sampling=SAMPLED)
    answers(engine, warm, sampling=Sampling(temperature=1.0))
    assert compilations  # or the listener hears nothing
    compilations.clear()
    answers(engine, [prompt(37, images=1), *(prompt(n) for n in range(3, 64, 9))], new=35, every=7)
    answers(engine, [prompt(20 + n % 17, images=1) for n in range(9)], new=60, share=False)
    answers(engine, [prompt(30, images=1)], new=60)
    for sampling in (
        SAMPLED,
        Sampling(temperature=0.2),
        Sampling(temperature=2.0, top_k=3, top_p=0.1, seed=5),
    ):
        answers(engine, [prompt(40), prompt(33, images=1)], sampling=sampling, every=3)
    assert compilations == []
    answers(engine, [prompt(66), prompt(3)])
    assert compilations  # the next bucket


def test_buckets() -> None:
    sizes = sorted({bucket(length) for length in range(1, 3000)})
    assert sizes[:11] == [64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024]
    for length in range(1, 3000):
        assert bucket(length) >= length
        assert length <= 64 or bucket(length) <= (1.5 if length <= 512 else 1.25) * length


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_streaming_gives_the_same_tokens(engine: Engine, sampling: Sampling) -> None:
    prompts = [prompt(20 + i, images=i % 2, seed=i) for i in range(6)]
    whole = answers(engine, prompts, sampling=sampling, every=30)
    assert len({len(row) for row in whole}) > 1
    for every in (1, 3, 29, 100):
        assert answers(engine, prompts, sampling=sampling, every=every) == whole


def test_chunks_come_as_asked_for(endless: Engine) -> None:
    chunks: list[int] = []

    def take(number: int, ids: np.ndarray) -> bool:
        chunks.append(len(ids))
        return True

    list(endless.run([prompt(20)], slots=1, max_new_tokens=8, sampling=GREEDY, every=3, take=take))
    assert chunks == [4, 3, 1]  # with the first of them comes the prompt's own


def test_ends_at_end_of_sequence(engine: Engine, endless: Engine) -> None:
    prompts = [prompt(20 + i, seed=i) for i in range(6)]
    ended = answers(engine, prompts, sampling=SAMPLED)
    for row, goes_on in zip(ended, answers(endless, prompts, sampling=SAMPLED), strict=True):
        ends = [i for i, token in enumerate(goes_on) if token in EOS_IDS]
        assert row == (goes_on[: ends[0] + 1] if ends else goes_on)
    assert len({len(row) for row in ended}) > 2


def test_decoding_stops_with_the_last_row(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt(20 + i, seed=i) for i in range(6)]
    calls, original = [], Program.decode

    def spy(*arguments: Any, **options: Any) -> Slots:
        calls.append(options["every"])
        return original(*arguments, **options)

    monkeypatch.setattr(Program, "decode", spy)
    said = answers(engine, prompts, sampling=SAMPLED, new=60, every=1, slots=6)
    longest = max(map(len, said))
    assert 2 < longest < 60
    # Admitting gives the first token.
    assert len(calls) == longest - 1


@pytest.mark.parametrize("new", [1, 2, 30, 64])
def test_length_limit(endless: Engine, new: int) -> None:
    prompts = [prompt(20), prompt(40)]
    cut = answers(endless, prompts, new=new)
    assert [len(row) for row in cut] == [new, new]
    assert cut == [row[:new] for row in answers(endless, prompts, new=64)]


@pytest.mark.parametrize("room", [1, 2, 7])
def test_context_limit(endless: Engine, room: int) -> None:
    """The last position is used, and one token is predicted from it; no neighbor is cut."""
    text = dataclasses.replace(CONFIG.text, eos_ids=(), max_positions=90)
    limited = make_engine(dataclasses.replace(CONFIG, text=text))
    prompts = [prompt(90 - room), prompt(20)]
    long, short = answers(endless, prompts)
    assert answers(limited, prompts) == [long[: room + 1], short]
    assert answers(limited, prompts, every=1) == [long[: room + 1], short]


def test_the_cache_is_no_longer_than_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = [], Program.start

    def spy(*arguments: Any, **options: int) -> Slots:
        seen.append(options)
        return original(*arguments, **options)

    monkeypatch.setattr(Program, "start", spy)
    engine = make_engine(CONFIG)
    long = answers(engine, [prompt(20)], new=20_000)
    assert seen == [{"slots": 4, "contexts": (bucket(CONTEXT),), "new": bucket(CONTEXT)}]
    assert long == answers(engine, [prompt(20)], new=CONTEXT)


def test_prompt_too_long(engine: Engine) -> None:
    with pytest.raises(
        ValueError, match="prompt 2, 4 of 4, of 120, 121 tokens, images included, leaves no room"
    ) as e:
        answers(engine, [prompt(5), prompt(CONTEXT), prompt(5), prompt(CONTEXT + 1)])
    assert "context of 120; shorten it or give fewer images" in str(e.value)
    assert len(answers(engine, [prompt(CONTEXT - 1)])[0]) <= 2


def test_no_tokens_wanted(engine: Engine) -> None:
    with pytest.raises(ValueError, match="max_new_tokens is 0; give 1 or more"):
        answers(engine, [prompt(5)], new=0, every=1)


@pytest.mark.parametrize("new", [2.5, 2.0, "2", None])
def test_only_whole_tokens(engine: Engine, new: Any) -> None:
    with pytest.raises(ValueError, match=f"max_new_tokens is {new}; give 1 or more, a whole"):
        answers(engine, [prompt(5)], new=new, every=1)


def test_seeds(endless: Engine) -> None:
    def ask(seed: int) -> list[list[int]]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return answers(endless, [prompt(20), prompt(21)], sampling=sampling)

    drawn = [ask(seed) for seed in range(5)]
    assert ask(3) == drawn[3]
    rows = [tuple(row) for batch in drawn for row in batch]
    assert len(set(rows)) == len(rows)


def test_images_matter(endless: Engine) -> None:
    """The pixels that belong to a prompt, in their order, and no others."""
    one = prompt(30, images=2)
    plain = answers(endless, [one])
    swapped = dataclasses.replace(one, pixels=one.pixels[::-1])
    assert answers(endless, [swapped]) != plain
    assert answers(endless, [dataclasses.replace(one, pixels=one.pixels + 1)]) != plain
