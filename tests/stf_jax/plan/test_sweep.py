"""Which neighbors are tried, and which are kept; the compiler is stood in for."""

import dataclasses

import pytest

from stf_jax.data.config import DataConfig
from stf_jax.plan.phases import InferencePlan, Phase
from stf_jax.plan.report import headline, render, render_changes, render_sweep
from stf_jax.plan.request import Plan, Traffic
from stf_jax.plan.sweep import best, inference_changes, sweep, training_changes
from stf_jax.train.config import TrainConfig

CONFIG = TrainConfig(model="m", out="o", remat="dots", data=DataConfig(batch_size=32))
FITS = Plan(
    topology="v5e:4x4",
    mesh={"data": 1, "fsdp": 16, "tensor": 1},
    rows=32,
    length=2048,
    model_flops={"vision": 1e13, "connector": 2e13, "text": 3e14},
    peak_flops=1e14,
    limit=16 * 2**30,
    fits=True,
    arguments=2**30,
    temporaries=2**31,
    peak=3 * 2**30,
    hardware_flops=3e13,
    cycles_seconds=0.3,
    kernel_seconds=0.1,
    exposed_seconds=0.05,
    collective_seconds=0.2,
    traffic=(
        Traffic(
            kind="all-gather", count=3, bytes=9e9, exposed=0, largest=9 * 10**6, what="bf16[9]"
        ),
    ),
    top=((0.1, "decoder/dot_general", "bf16[1,2]"),),
)
DOES_NOT = dataclasses.replace(FITS, fits=False, needed=20 * 2**30)


def test_the_estimate() -> None:
    """Computation and what does not overlap it, but never less than all collectives."""
    assert FITS.step_seconds == pytest.approx(0.45)
    assert FITS.ideal_seconds == pytest.approx(3.3e14 / 1e14 / 16)
    assert FITS.mfu == pytest.approx(FITS.ideal_seconds / 0.45)
    slow = dataclasses.replace(FITS, collective_seconds=2.0)
    assert slow.step_seconds == 2.0
    assert Plan.from_json(FITS.to_json()) == FITS


def test_only_what_divides_is_tried() -> None:
    calls: list[tuple[str, ...]] = []

    def ask(overrides: tuple[str, ...]) -> Plan:
        calls.append(overrides)
        if "--mesh.tensor=4" in overrides:
            raise ValueError("the mesh does not divide the model")
        if "--remat=none" in overrides:
            return DOES_NOT
        return dataclasses.replace(FITS, cycles_seconds=0.1 * len(calls))

    tried = list(sweep(CONFIG, chips=16, ask=ask))
    # 32 rows over 16 chips are one or two micro-batches; over 8 and 4 too.
    assert len(calls) == len(tried) == 3 * 2 * 4
    assert calls[0][:3] == ("--mesh.data=1", "--mesh.fsdp=16", "--mesh.tensor=1")
    best_plans = best(tried, count=3)
    assert [plan.step_seconds for _, plan in best_plans] == sorted(
        plan.step_seconds for _, plan in tried if plan is not None and plan.fits
    )[:3]
    assert "estimated step" in render_sweep(best_plans)
    assert render_sweep([]) == "nothing fits; use a larger slice"


@pytest.mark.parametrize(
    ("enough", "changes", "advice"),
    [
        ("--remat=full", [("--remat=full",)], "it fits with --remat=full"),
        (
            "--micro_batches=2",
            [("--remat=full", "--micro_batches=2")],
            "it fits with --remat=full --micro_batches=2",
        ),
        ("never", [], "no fewer rows at a time would fit it: use a larger slice, or stage lora"),
    ],
)
def test_what_would_make_it_fit(enough: str, changes: list[tuple[str, ...]], advice: str) -> None:
    actual = training_changes(
        CONFIG, chips=16, ask=lambda overrides: FITS if enough in overrides else DOES_NOT
    )
    assert actual == changes
    assert render_changes(DOES_NOT, actual) == advice


PREFILL = Phase(
    name="prefill",
    rows=16,
    length=192,
    needed=18 * 2**30,
    memory_seconds=0.01,
    cycles_seconds=0.15,
    kernel_seconds=0.05,
)
DECODE = Phase(
    name="decode",
    rows=64,
    length=1,
    needed=14 * 2**30,
    memory_seconds=0.016,
    cycles_seconds=0.04,
)
INSERT = dataclasses.replace(PREFILL, name="insert", length=64, needed=13 * 2**30)
ANSWERS = InferencePlan(
    topology="v6e:1x1",
    mesh={"data": 1, "fsdp": 1, "tensor": 1},
    slots=64,
    context=384,
    new_tokens=128,
    images=1,
    dtype="bfloat16",
    cache_dtype="bfloat16",
    limit=20 * 2**30,
    weights=10 * 2**30,
    cache=4 * 2**30,
    prefixes=2**30,
    phases=(PREFILL, INSERT, DECODE),
)


def test_the_estimate_of_answers() -> None:
    """A call takes as long as its arithmetic or its reading, whichever is more."""
    assert ANSWERS.fits
    assert ANSWERS.needed == 18 * 2**30
    assert DECODE.seconds == 0.04
    assert DECODE.bandwidth == pytest.approx(0.4)
    assert dataclasses.replace(DECODE, cycles_seconds=0.01).seconds == 0.016
    assert ANSWERS.tokens_per_second == pytest.approx(64 / 0.04)
    # Two sixteenths of 0.2 s, and the second token on.
    assert ANSWERS.questions_per_second(1) == pytest.approx(1 / 0.025)
    assert ANSWERS.questions_per_second(3) == pytest.approx(1 / (0.025 + 2 * 0.04 / 64))
    assert InferencePlan.from_json(ANSWERS.to_json()) == ANSWERS
    text = render(ANSWERS)
    assert "peak 18.00 GiB a chip of 20.00 GiB" in text
    assert "the next token of 64 slots in 40.0 ms" in text
    assert "40 % of its rate is reached" in text
    assert "1,600 tokens a second" in text
    assert headline(ANSWERS) == (
        "v6e:1x1: 64 slots, peak 18.00 GiB of 20.00 GiB a chip; estimated prefill 200 ms for 16 "
        "prompts, decode 40.0 ms a step at 40 % of HBM's rate, 1600 tokens/s"
    )


@pytest.mark.parametrize(
    ("limit", "changes", "calls"),
    [
        # 18 GiB with 5 of cache: half of it leaves 15.5.
        (16, [("--slots=32",), ("--cache_dtype=int8",)], ["--slots=32", "--cache_dtype=int8"]),
        (15, [("--slots=16",)], ["--slots=16"]),
        (12, [], []),
    ],
)
def test_what_would_make_an_engine_fit(
    limit: int, changes: list[tuple[str, ...]], calls: list[str]
) -> None:
    too_large, seen = dataclasses.replace(ANSWERS, limit=limit * 2**30), list[str]()

    def ask(overrides: tuple[str, ...]) -> InferencePlan:
        seen.extend(overrides)
        return ANSWERS

    assert not too_large.fits
    assert inference_changes(too_large, ask=ask) == changes
    assert seen == calls
    if not changes:
        advice = render_changes(too_large, changes)
        assert "the weights take 10.00 GiB a chip" in advice
        assert "--mesh.tensor" in advice


def test_what_a_person_reads() -> None:
    text = render(FITS)
    assert "peak 3.00 GiB a chip of 16.00 GiB" in text
    assert "330.0 T a step (vision 10.0 T, connector 20.0 T, text 300.0 T)" in text
    assert "9.0 GB to a chip" in text
    assert headline(FITS) == (
        "v5e:4x4: peak 3.00 GiB of 16.00 GiB a chip; estimated step 0.45 s, estimated MFU 46 %"
    )
    assert "does not fit: needs 20.00 GiB a chip, 4.00 GiB more than there are" in render(DOES_NOT)
