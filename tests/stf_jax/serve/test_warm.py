"""After the warm-up nothing compiles; a budget is a model of its own."""

import asyncio
import contextlib
import dataclasses
import itertools
import time
from types import SimpleNamespace
from typing import Any

import httpx
import jax
import numpy as np
import pytest

import stf_jax
from stf_jax.data.batch import Batch
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.answers import AnswerBuilder
from stf_jax.infer.prompts import Prompt
from stf_jax.infer.sampling import GREEDY, Sampling
from stf_jax.infer.scheduler import Scheduler
from stf_jax.infer.slots import Suffixes
from stf_jax.serve.app import Ready, Service, make_app
from stf_jax.serve.prompts import Prompts
from stf_jax.serve.schema import ApiError, Message
from stf_jax.serve.server import ServeConfig, make_ready
from stf_jax.serve.worker import Piece, Usage
from stf_jax.systems.base import LlavaConfig
from tests.stf_jax.serve.conftest import asks, png
from tests.stf_jax.systems.conftest import config_of

KINDS = (GREEDY, Sampling(temperature=1.0, seed=3), Sampling(temperature=1.0, top_p=0.5))


class Recorder:
    """Stands for the compiled functions: notes with which shapes they are called."""

    def __init__(self, config: LlavaConfig):
        self.config, self.row_multiple = config, 1
        self.seen: set[object] = set()

    def start(self, *, slots: int, contexts: tuple[int, ...], new: int) -> SimpleNamespace:
        none, yes = np.zeros(slots, np.int32), np.ones(slots, bool)
        tokens = np.full((slots, new), 5, np.int32)
        return SimpleNamespace(tokens=tokens, counts=none, finished=yes.copy(), finite=yes)

    def pool(self, *, rows: int, contexts: tuple[int, ...]) -> SimpleNamespace:
        return SimpleNamespace(sizes=contexts)

    def prefill(self, batch: Batch) -> None:
        self._note("prefill", batch)

    def keep(self, pool: object, prefixes: object, at: object) -> object:
        return pool

    def insert(
        self,
        state: SimpleNamespace,
        pool: object,
        questions: Suffixes,
        *,
        lengths: tuple[int, ...],
        choice: str,
    ) -> SimpleNamespace:
        self._note("insert", questions, lengths, choice)
        at = questions.slots[questions.slots < len(state.counts)]
        state.counts[at], state.finished[at] = 1, False
        return state

    def decode(self, state: SimpleNamespace, *, choice: str, **_: object) -> SimpleNamespace:
        self._note("decode", choice)
        state.finished[:] = True
        return state

    def clear(self, state: SimpleNamespace, which: object) -> SimpleNamespace:
        return state

    def _note(self, name: str, *given: object) -> None:
        leaves, form = jax.tree.flatten(given)
        self.seen.add(
            (name, str(form), *(leaf if np.ndim(leaf) == 0 else leaf.shape for leaf in leaves))
        )


@pytest.mark.parametrize("name", ["stf", "m3", "quecc", "fastv"])
def test_requests_bring_no_shape_that_was_not_warm(model: stf_jax.Model, name: str) -> None:
    """Which is all that decides whether something compiles."""
    config = config_of(name)
    text = dataclasses.replace(config.text, max_positions=400)
    config = dataclasses.replace(config, text=text)
    recorder = Recorder(config)
    engine: Any = SimpleNamespace(
        config=config, program=recorder, open=lambda room: Scheduler(recorder, room)
    )
    processor = dataclasses.replace(model.image_processor, image_size=config.image_size)
    stub: Any = SimpleNamespace(
        config=config, tokenizer=model.tokenizer, image_processor=processor, engine=engine
    )
    serve = ServeConfig(
        name="tiny", slots=4, max_new_tokens=8, prefixes=4, images=5, prefix_context=200
    )
    ready = make_ready(stub, serve, Service(name="tiny"))
    warm, rng = set(recorder.seen), np.random.default_rng(0)
    assert {one[0] for one in warm} == {"prefill", "insert", "decode"}  # type: ignore[index]
    asked = []
    for number in range(60):
        images = [png((number, n, 9)) for n in range(rng.integers(0, 5))]
        words = "cat " * int(rng.choice([1, 9, 40, 90]))
        turns = [Message.model_validate(asks(words + "?", *images))]
        if number % 3 == 0:
            said = Message(role="assistant", content="Yes. " * int(rng.integers(1, 9)))
            turns = [*turns, said, Message.model_validate(asks("Why?", *images[:1]))]
        if number % 4 == 0:
            turns = [Message(role="system", content="Hm."), *turns]
        budget = int(rng.choice(ready.prompts.budgets))
        prompt = ready.prompts.chat(turns, tokens=budget)[0]
        with contextlib.suppress(ApiError):
            asked.append((prompt, ready.worker.fits(prompt)))
    assert len(asked) > 30

    async def ask(prompt: Prompt, most: int, kind: Sampling) -> None:
        builder = AnswerBuilder(model.tokenizer, stop_ids=(), stops=())
        options = {"sampling": kind, "most": most, "came": time.monotonic()}
        async for _ in ready.worker.answer(prompt, builder, **options):
            pass

    async def ask_all() -> None:
        kinds = itertools.cycle(KINDS)
        await asyncio.gather(*(ask(prompt, most, next(kinds)) for prompt, most in asked))

    try:
        asyncio.run(ask_all())
    finally:
        ready.worker.close()
    assert recorder.seen == warm


class _Worker(SimpleNamespace):
    """Notes what it is asked."""

    def fits(self, prompt: Prompt) -> int:
        self.prompts.append(prompt)
        return 8

    async def answer(self, *_: object, **options: object) -> Any:
        usage = Usage(prompt=1, image=0, cached=0, new=1)
        yield Piece(text="Yes.", finish_reason="stop", usage=usage)


def test_each_budget_is_a_model(model: stf_jax.Model) -> None:
    config = config_of("m3")
    budgets = config.system.budgets(config.vision)
    processor = dataclasses.replace(model.image_processor, image_size=config.image_size)
    stub: Any = SimpleNamespace(
        config=config,
        tokenizer=model.tokenizer,
        image_processor=processor,
        make_builder=model.make_builder,
    )
    worker = _Worker(check_queue=lambda: None, context=99, broken=None, prompts=[])
    service = Service(name="m")
    prompts = Prompts(stub, template="v1", budgets=budgets[:2])
    service.ready = Ready(model=stub, prompts=prompts, worker=worker)  # type: ignore[arg-type]
    many, few = budgets[:2]

    async def play() -> None:
        transport = httpx.ASGITransport(app=make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            listed = (await client.get("/v1/models")).json()["data"]
            assert [one["id"] for one in listed] == ["m", f"m@{many}", f"m@{few}"]
            assert [one["image_tokens"] for one in listed] == [[many, few], [many], [few]]

            async def ask(**body: object) -> httpx.Response:
                message = asks("What is this?", png((9, 9, 9)))
                return await client.post(
                    "/v1/chat/completions", json={"messages": [message], **body}
                )

            for body, budget in (
                ({"model": "m"}, many),
                ({"model": f"m@{few}"}, few),
                ({"model": f"m@{few}", "image_tokens": few}, few),
                ({"image_tokens": few}, few),
            ):
                answer = await ask(**body)
                assert answer.json()["model"] == body.get("model", "m")
                prompt = worker.prompts[-1]
                assert prompt.budget == np.sum(prompt.ids == IMAGE_TOKEN_ID) == budget
            assert (await ask(model="m@7")).status_code == 404
            assert (await ask(model=f"m@{few}", image_tokens=many)).status_code == 400
            other = await ask(image_tokens=budgets[-1])
            assert f"in {many} or {few} tokens" in other.json()["error"]["message"]

    asyncio.run(play())
