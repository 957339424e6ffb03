"""Requests that come and go: each answer is what it would be alone."""

import dataclasses

import numpy as np
import pytest

from stf_jax.infer.engine import Engine, room_for
from stf_jax.infer.prompts import Prompt, bucket
from stf_jax.infer.room import Room, Ticket
from stf_jax.infer.sampling import GREEDY, Sampling
from stf_jax.infer.scheduler import Scheduler
from tests.stf_jax.infer.test_engine import CONFIG, SAMPLED, answers, make_engine, prompt

NEW = 24


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(CONFIG)


def shown(length: int, image: int, *, images: int = 1) -> Prompt:
    """A prompt whose images and first positions are those of all with the same number."""
    whole, ids = prompt(length, images=images, seed=image), prompt(length, images=images).ids.copy()
    ids[0] = 41
    pixels = prompt(14, images=images, seed=image).pixels
    return dataclasses.replace(whole, ids=ids, pixels=pixels, image_key=(image, images))


def room(*, kept: int = 4, slots: int = 4, rows: int = 2) -> Room:
    ids = [np.zeros(CONFIG.text.max_positions - NEW, np.int32)]
    sizes = room_for(CONFIG, ids, NEW)
    return Room(slots=slots, rows=rows, contexts=sizes, new=bucket(NEW), kept=kept, prefixes=sizes)


def drain(scheduler: Scheduler) -> None:
    while scheduler.busy:
        scheduler.step(every=3)


def test_arrivals_at_any_time_with_their_own_sampling(engine: Engine) -> None:
    """Greedy and drawn ones side by side, limits of their own, some canceled on the way."""
    rng = np.random.default_rng(3)
    scheduler = engine.open(room())
    asked: list[tuple[Ticket, Prompt, Sampling, int]] = []
    canceled: set[Ticket] = set()
    for number in range(24):
        one = (
            shown(12 + number % 5, number % 3)
            if number % 2
            else prompt(10 + number, images=number % 4 // 2, seed=number)
        )
        sampling = GREEDY if number % 3 else dataclasses.replace(SAMPLED, seed=number)
        most = int(rng.integers(1, NEW))
        ticket = scheduler.submit(one, sampling=sampling, most=most)
        asked.append((ticket, one, sampling, most))
        for _ in range(rng.integers(0, 3)):
            scheduler.step(every=int(rng.integers(1, 4)))
        if number % 5 == 4:
            gone = asked[int(rng.integers(0, len(asked)))][0]
            if not gone.finished:
                scheduler.cancel(gone)
                canceled.add(gone)
    drain(scheduler)
    scheduler.close()
    assert 0 < len(canceled) < 6
    assert sum(ticket.reused > 0 for ticket, *_ in asked) > 3
    assert (scheduler.running, scheduler.queued) == (0, 0)
    for ticket, one, sampling, most in asked:
        alone = answers(engine, [one], new=most, sampling=sampling)[0]
        if ticket in canceled:
            assert ticket.ids == alone[: len(ticket.ids)]
        else:
            assert ticket.finished
            assert ticket.ids == alone


def test_prefixes_stay_until_others_need_their_room(engine: Engine) -> None:
    scheduler = engine.open(room(kept=2))

    def ask(image: int) -> Ticket:
        ticket = scheduler.submit(shown(14, image), sampling=GREEDY, most=4)
        drain(scheduler)
        assert ticket.ids == answers(engine, [shown(14, image)], new=4)[0]
        return ticket

    prefix = 1 + CONFIG.tokens_per_image
    # The third image takes the row of the one that was used longest ago.
    reused = [ask(image).reused for image in (0, 1, 0, 2, 0, 1, 0)]
    assert reused == [0, 0, prefix, 0, prefix, 0, prefix]
    assert scheduler.held == 2
    scheduler.close()


def test_an_image_that_cannot_be_read_stops_no_other(engine: Engine) -> None:
    def broken() -> np.ndarray:
        raise ValueError("cat.jpg is no image")

    bad = dataclasses.replace(shown(14, 5), pixels=broken)
    scheduler = engine.open(room())
    tickets = [
        scheduler.submit(one, sampling=GREEDY, most=4) for one in (shown(14, 0), bad, shown(15, 0))
    ]
    drain(scheduler)
    scheduler.close()
    assert [str(ticket.error) for ticket in tickets] == ["None", "cat.jpg is no image", "None"]
    for ticket, one in zip(tickets, (shown(14, 0), bad, shown(15, 0)), strict=True):
        assert ticket.finished
        assert ticket.ids == ([] if one is bad else answers(engine, [one], new=4)[0])
    with pytest.raises(ValueError, match=r"cat\.jpg is no image"):
        answers(engine, [shown(14, 0), bad])


def test_what_is_not_finite_reaches_nobody_later(engine: Engine) -> None:
    spoiled = dataclasses.replace(shown(100, 7), image_key=7)
    spoiled.pixels[:] = np.nan  # type: ignore[index]
    scheduler = engine.open(room(slots=1, rows=1))
    asked = [spoiled, shown(14, 0), spoiled, prompt(16)]
    tickets = [scheduler.submit(one, sampling=GREEDY, most=6) for one in asked]
    drain(scheduler)
    scheduler.close()
    for ticket, one in zip(tickets, asked, strict=True):
        assert ticket.finished
        assert one is spoiled or ticket.ids == answers(engine, [one], new=6)[0]


def test_after_the_warm_up_nothing_compiles(engine: Engine, compilations: list[str]) -> None:
    """Room of its own size, so that no other test has compiled for it."""
    coarse = dataclasses.replace(room(slots=3, rows=3), is_coarse=True)
    scheduler = engine.open(coarse)
    lengths = [prompt(length) for length in range(1, 60)]
    lengths += [shown(length, 0, images=n) for n in (1, 2) for length in range(12, 60)]
    compilations.clear()
    programs = scheduler.warm_up(lengths, longest=32)
    assert len(compilations) >= programs > 0
    compilations.clear()
    tickets = [
        scheduler.submit(one, sampling=sampling, most=5)
        for one in (shown(14, 0), prompt(30), shown(40, 1, images=2), prompt(3), shown(36, 2))
        for sampling in (GREEDY, SAMPLED, Sampling(temperature=1.0))
    ]
    drain(scheduler)
    scheduler.close()
    assert compilations == []
    assert tickets[0].ids == answers(engine, [shown(14, 0)], new=5)[0]
    assert tickets[7].ids == answers(engine, [shown(40, 1, images=2)], new=5, sampling=SAMPLED)[0]
