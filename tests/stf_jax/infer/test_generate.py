"""Generation: what an answer may depend on, where it ends, and what is compiled for it."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stf_jax.checkpoint import flatten, unflatten
from stf_jax.config import LlavaConfig
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.generate import Generator
from stf_jax.infer.prompts import Prompt, bucket
from stf_jax.infer.sampling import GREEDY, Sampling
from stf_jax.models.cache import KVCache
from stf_jax.models.llava import Llava

TINY = LlavaConfig.tiny()
# One token in thirty ends an answer, so that the answers of a batch have many lengths.
EOS_IDS = tuple(range(20, 40))
CONTEXT = 120
CONFIG = dataclasses.replace(
    TINY, text=dataclasses.replace(TINY.text, eos_ids=EOS_IDS, max_positions=CONTEXT)
)
SAMPLED = Sampling(temperature=1.3, top_k=100, top_p=0.95, seed=11)


def make_generator(config: LlavaConfig) -> Generator:
    rng, model = np.random.default_rng(0), Llava.abstract(config)
    # Larger weights than training starts from: logits then depend on all of the prompt.
    weights = {
        path: jnp.asarray(rng.normal(path.endswith("scale"), 0.2, leaf.shape), leaf.dtype)
        for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items()
    }
    nnx.update(model, unflatten(weights))
    return Generator(model)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return make_generator(CONFIG)


@pytest.fixture(scope="module")
def endless() -> Generator:
    """The same weights; no token ends an answer, and there is room for all."""
    text = dataclasses.replace(CONFIG.text, eos_ids=(), max_positions=4096)
    return make_generator(dataclasses.replace(CONFIG, text=text))


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
    generator: Generator,
    prompts: Sequence[Prompt],
    *,
    new: int = 30,
    sampling: Sampling = GREEDY,
    every: int | None = None,
) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for chunk in generator.stream(
        prompts, max_new_tokens=new, sampling=sampling, every=every or new
    ):
        for row, ids in zip(rows, chunk, strict=True):
            row.extend(ids.tolist())
    return rows


PROMPTS = st.tuples(st.integers(10, 90), st.integers(0, 2), st.integers(0, 99)).map(
    lambda drawn: prompt(drawn[0], images=drawn[1], seed=drawn[2])
)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@settings(derandomize=True, deadline=None, database=None, max_examples=3, phases=(Phase.generate,))
@given(prompts=st.lists(PROMPTS, min_size=4, max_size=4))
def test_neighbours_change_nothing(
    generator: Generator, sampling: Sampling, prompts: list[Prompt]
) -> None:
    together = answers(generator, prompts, sampling=sampling)
    alone = [answers(generator, [one], sampling=sampling)[0] for one in prompts]
    assert together == alone


def test_position_in_the_batch_changes_nothing(generator: Generator) -> None:
    prompts = [prompt(20 + i, images=i % 2) for i in range(4)]
    for sampling in (GREEDY, SAMPLED):
        forward = answers(generator, prompts, sampling=sampling)
        assert answers(generator, prompts[::-1], sampling=sampling) == forward[::-1]


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """An entry for each program that XLA compiles while the test runs."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_same_shapes_compile_nothing(compilations: list[str]) -> None:
    generator = make_generator(CONFIG)
    compilations.clear()
    answers(generator, [prompt(20, images=1), prompt(50)])
    answers(generator, [prompt(20, images=1), prompt(50)], sampling=SAMPLED)
    assert compilations  # or the listener hears nothing
    compilations.clear()
    answers(generator, [prompt(64, images=1), prompt(3)], new=64, every=7)
    answers(generator, [prompt(11), prompt(12, images=1)], new=1)
    for sampling in (
        SAMPLED,
        Sampling(temperature=0.2),
        Sampling(temperature=2.0, top_k=3, top_p=0.1, seed=5),
    ):
        answers(generator, [prompt(8), prompt(33, images=1)], sampling=sampling, every=3)
    assert compilations == []
    answers(generator, [prompt(65, images=1), prompt(3)])
    assert compilations  # the next bucket


def test_buckets() -> None:
    sizes = sorted({bucket(length) for length in range(1, 3000)})
    assert sizes[:7] == [64, 96, 128, 192, 256, 384, 512]
    for length in range(1, 3000):
        assert bucket(length) >= length
        assert length <= 64 or bucket(length) <= 1.5 * length


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_streaming_gives_the_same_tokens(generator: Generator, sampling: Sampling) -> None:
    prompts = [prompt(20 + i, images=i % 2, seed=i) for i in range(6)]
    whole = answers(generator, prompts, sampling=sampling, every=30)
    assert len({len(row) for row in whole}) > 1
    for every in (1, 3, 29, 100):
        assert answers(generator, prompts, sampling=sampling, every=every) == whole


def test_chunks_come_as_asked_for(endless: Generator) -> None:
    stream = endless.stream([prompt(20)], max_new_tokens=8, sampling=GREEDY, every=3)
    assert [[len(row) for row in chunk] for chunk in stream] == [[3], [3], [2]]


def test_ends_at_end_of_sequence(generator: Generator, endless: Generator) -> None:
    prompts = [prompt(20 + i, seed=i) for i in range(6)]
    ended = answers(generator, prompts, sampling=SAMPLED)
    for row, goes_on in zip(ended, answers(endless, prompts, sampling=SAMPLED), strict=True):
        ends = [i for i, token in enumerate(goes_on) if token in EOS_IDS]
        assert row == (goes_on[: ends[0] + 1] if ends else goes_on)
    assert len({len(row) for row in ended}) > 2


def test_decoding_stops_with_the_last_row(generator: Generator) -> None:
    prompts = [prompt(20 + i, seed=i) for i in range(6)]
    whole = answers(generator, prompts, sampling=SAMPLED, new=60)
    longest = max(map(len, whole))
    assert longest < 60
    stream = generator.stream(prompts, max_new_tokens=60, sampling=SAMPLED, every=1)
    assert len(list(stream)) == longest


@pytest.mark.parametrize("new", [1, 2, 30, 64])
def test_length_limit(endless: Generator, new: int) -> None:
    prompts = [prompt(20), prompt(40)]
    cut = answers(endless, prompts, new=new)
    assert [len(row) for row in cut] == [new, new]
    assert cut == [row[:new] for row in answers(endless, prompts, new=64)]


@pytest.mark.parametrize("room", [1, 2, 7])
def test_context_limit(endless: Generator, room: int) -> None:
    """The last position is used, and one token is predicted from it; no neighbour is cut."""
    text = dataclasses.replace(CONFIG.text, eos_ids=(), max_positions=90)
    limited = make_generator(dataclasses.replace(CONFIG, text=text))
    prompts = [prompt(90 - room), prompt(20)]
    long, short = answers(endless, prompts)
    assert answers(limited, prompts) == [long[: room + 1], short]
    assert answers(limited, prompts, every=1) == [long[: room + 1], short]


def test_the_cache_is_no_longer_than_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = [], KVCache.from_prefill

    def spy(*arguments: Any, slots: int) -> KVCache:
        seen.append(slots)
        return original(*arguments, slots=slots)

    monkeypatch.setattr(KVCache, "from_prefill", spy)
    long = answers(make_generator(CONFIG), [prompt(20)], new=20_000)
    assert seen == [bucket(20) + bucket(CONTEXT)]
    assert long == answers(make_generator(CONFIG), [prompt(20)], new=CONTEXT)


def test_prompt_too_long(generator: Generator) -> None:
    with pytest.raises(
        ValueError, match="a prompt of 120 tokens, images included, leaves no room"
    ) as e:
        answers(generator, [prompt(5), prompt(CONTEXT)])
    assert "context of 120; shorten it or give fewer images" in str(e.value)
    assert len(answers(generator, [prompt(CONTEXT - 1)])[0]) <= 2


def test_no_tokens_wanted(generator: Generator) -> None:
    with pytest.raises(ValueError, match="max_new_tokens is 0; give 1 or more"):
        answers(generator, [prompt(5)], new=0, every=1)


@pytest.mark.parametrize("new", [2.5, 2.0, "2", None])
def test_only_whole_tokens(generator: Generator, new: Any) -> None:
    with pytest.raises(ValueError, match=f"max_new_tokens is {new}; give 1 or more, a whole"):
        answers(generator, [prompt(5)], new=new, every=1)


def test_seeds(endless: Generator) -> None:
    def ask(seed: int) -> list[list[int]]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return answers(endless, [prompt(20), prompt(21)], sampling=sampling)

    drawn = [ask(seed) for seed in range(5)]
    assert ask(3) == drawn[3]
    rows = [tuple(row) for batch in drawn for row in batch]
    assert len(set(rows)) == len(rows)


def test_images_matter(endless: Generator) -> None:
    """The pixels that belong to a prompt, in their order, and no others."""
    one = prompt(30, images=2)
    plain = answers(endless, [one])
    swapped = dataclasses.replace(one, pixels=one.pixels[::-1])
    assert answers(endless, [swapped]) != plain
    assert answers(endless, [dataclasses.replace(one, pixels=one.pixels + 1)]) != plain
