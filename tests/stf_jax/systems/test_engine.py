"""The engine with systems that the reference's model is not: budgets, and slots that are empty.

`STF_JAX_REQUESTS=200` asks as many of each system, instead of five for each budget.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.engine import Engine
from stf_jax.infer.prompts import Prompt, pad_prompts
from stf_jax.infer.room import Room
from stf_jax.infer.sampling import GREEDY
from stf_jax.infer.scheduler import Scheduler
from stf_jax.infer.session import Session
from stf_jax.models.cache import KVCache
from stf_jax.models.llava import Llava
from stf_jax.models.marks import Marks
from stf_jax.systems import SYSTEMS
from tests.stf_jax.systems.conftest import build, cache_bytes, config_of, own_tokens


class Watched(Engine):
    """Which scheduler it opened last."""

    scheduler: Scheduler

    def open(self, room: Room) -> Scheduler:
        self.scheduler = super().open(room)
        return self.scheduler


def ask(engine: Engine, prompts: list[Prompt], *, slots: int) -> dict[int, list[int]]:
    said: dict[int, list[int]] = {}

    def take(number: int, ids: np.ndarray) -> bool:
        said.setdefault(number, []).extend(ids.tolist())
        return True

    order = engine.run(prompts, slots=slots, max_new_tokens=4, sampling=GREEDY, every=2, take=take)
    assert sorted(order) == list(range(len(prompts)))
    return said


REQUESTS = int(os.environ.get("STF_JAX_REQUESTS", "0"))

# Several budgets, empty slots, questions, codebooks; and what acts inside the language model.
BEFORE = ("m3", "prumerge", "quecc", "vistog", "vqtoken")
INSIDE = ("voco", "proxyv", "videollm_mod", "pmod", "fastv", "pyramiddrop", "gsearch")


@pytest.mark.parametrize("name", [*BEFORE, *INSIDE])
def test_a_mixed_batch_answers_as_one_at_a_time(name: str, compilations: list[str]) -> None:
    """Of every budget, images shared, two and none; a second call compiles nothing.

    The cache takes what `stf_jax.plan` says, see plan/test_memory.py.
    """
    assert name in SYSTEMS
    config = config_of(name)
    engine = Watched(build(config, seed=2))
    rng = np.random.default_rng(0)
    side = config.image_size
    pixels = rng.standard_normal((3, side, side, 3)).astype(np.float32)
    prompts: list[Prompt] = []
    kinds = [
        (budget, images)
        for budget in config.system.budgets(config.vision)
        for images in ((0,), (0,), (1, 2), (2,), ())
    ]
    for budget, images in kinds * max(REQUESTS // len(kinds), 1):
        parts = [rng.integers(3, 599, 2)]
        parts += [np.full(budget, IMAGE_TOKEN_ID)] * len(images)
        # Those about one image share what stands before it.
        parts[0] = np.array([7, 8]) if len(images) == 1 else parts[0]
        parts += [own_tokens(config) * len(images)]
        ids = np.concatenate([*parts, rng.integers(3, 599, rng.integers(1, 6))])
        prompts.append(
            Prompt(
                ids=ids.astype(np.int32),
                pixels=pixels[list(images)],
                image_key=images or None,
                budget=budget,
                question=rng.integers(3, 600, rng.integers(1, 4)).astype(np.int32)
                if config.question_length
                else None,
            )
        )
    together = ask(engine, prompts, slots=4)
    compilations.clear()
    assert ask(engine, prompts, slots=4) == together
    assert not compilations
    # The arrays that it holds, which are what a plan counts.
    prefixes = [p.ids[: config.system.split(p.ids).prefilled] for p in prompts]
    for cache, ids, new in (
        (engine.scheduler._state.cache, [p.ids for p in prompts], 4),
        (engine.scheduler._pool, prefixes, 0),
    ):
        rows = len(jax.tree.leaves(cache)[0])
        each = cache_bytes(config, ids, cache.layer_groups, new=new, itemsize=4)
        assert sum(array.nbytes for array in jax.tree.leaves(cache)) == rows * sum(each)
    for number, prompt in enumerate(prompts):
        assert ask(engine, [prompt], slots=4)[0] == together[number]
    # The images matter, and so does the budget.
    assert len({tuple(answer) for answer in together.values()}) > 3


@pytest.mark.parametrize("name", ["proxyv", "pmod"])
def test_a_later_turn_sees_what_the_cache_holds(name: str) -> None:
    """A turn of text costs its own tokens and answers as the whole conversation would, anew.

    A new image makes the session compute everything, since it may compete with the earlier ones.
    """
    config = config_of(name)
    engine = Engine(build(config, seed=2))
    session = Session(engine.program)
    rng = np.random.default_rng(0)
    side = config.image_size
    pixels = rng.standard_normal((2, side, side, 3)).astype(np.float32)
    image = np.full(config.tokens_per_image, IMAGE_TOKEN_ID)
    turns = [
        (1, [7, 8], image, rng.integers(3, 600, 5)),
        (1, rng.integers(3, 600, 3)),
        (1, rng.integers(3, 600, 9)),
        (2, [9], image, rng.integers(3, 600, 4)),
    ]
    ids, costs = np.zeros(0, np.int32), []
    for images, *parts in turns:
        ids = np.concatenate([ids, *parts]).astype(np.int32)
        prompt = Prompt(
            ids=ids,
            pixels=pixels[:images],
            image_key=images,
            budget=config.tokens_per_image,
        )
        answer = np.concatenate(
            list(session.stream(prompt, sampling=GREEDY, max_new_tokens=4, every=2))
        )
        assert answer.tolist() == ask(engine, [prompt], slots=1)[0]
        costs.append(session.computed)
        ids = np.concatenate([ids, answer])
    # The last token of an answer is in no cache.
    assert costs == [len(image) + 7, 1 + 3, 1 + 9, len(ids) - 4]


def test_the_question_that_a_chat_begins_with_ranks_its_images() -> None:
    """Later turns answer from what it has left, as if they were the rest of the first prompt."""
    config = config_of("pyramiddrop")
    model = build(config, seed=2)
    whole = build(config, seed=2)
    session = Session(Engine(model).program)
    rng = np.random.default_rng(1)
    side, tokens = config.image_size, config.tokens_per_image
    pixels = rng.standard_normal((1, side, side, 3)).astype(np.float32)
    first = np.concatenate([[7, 8], np.full(tokens, IMAGE_TOKEN_ID), rng.integers(3, 600, 5)])

    def turn(ids: np.ndarray) -> list[int]:
        prompt = Prompt(ids=ids.astype(np.int32), pixels=pixels, image_key=1, budget=tokens)
        said = session.stream(prompt, sampling=GREEDY, max_new_tokens=4, every=2)
        return np.concatenate(list(said)).tolist()

    answer = turn(first)
    second = np.concatenate([first, answer, rng.integers(3, 600, 12)])
    later = turn(second)
    assert session.computed == 1 + 12

    # Prefilled with the first prompt alone.
    prompt = Prompt(ids=first.astype(np.int32), pixels=pixels, budget=tokens)
    batch = pad_prompts([prompt], rows=1, image_size=side, uniform=True)
    _, cache = jax.jit(Llava.prefill)(whole, batch)
    rest = np.concatenate([second[len(first) :], later[:-1]]).astype(np.int32)

    @jax.jit
    def extend(model: Llava, ids: jax.Array, cache: KVCache) -> jax.Array:
        index = jnp.arange(len(ids), dtype=jnp.int32)
        slots, position = len(first) + index[None], cache.next_position(jnp.array([len(first)]))
        marks = Marks.text(position[:, None] + index, jnp.ones_like(index)[None])
        x = model.text.embed(ids[None])
        hidden, _ = model.text.extend(x, marks=marks, slots=slots, cache=cache.grow(len(ids)))
        return model.text.logits(hidden)[0]

    logits = np.asarray(extend(whole, jnp.asarray(rest), cache))
    assert logits[-len(later) :].argmax(axis=1).tolist() == later
