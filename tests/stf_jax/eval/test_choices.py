"""Closed choice: likelihoods are those of the whole forward pass, whatever is shared."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from stf_jax.data.fit import fit_template
from stf_jax.data.images import ImageProcessor
from stf_jax.data.tokenizer import Tokenizer, encode_prompt, load_tokenizer
from stf_jax.eval.choices import Choice, ChoiceScorer, encode_reply
from stf_jax.infer.model import Model, Request
from stf_jax.infer.prompts import pad_prompts
from stf_jax.models.llava import Llava
from tests.stf_jax.systems.conftest import TEXT, build, config_of

ANSWERS = ("yes", "no, it is not", "a cat")


@pytest.fixture(scope="module")
def tokenizer(reference: Path) -> Tokenizer:
    return load_tokenizer(reference / "llava-stf")


@pytest.fixture(scope="module")
def images(reference: Path) -> list[Path]:
    return [reference / "images" / name for name in ("0.png", "1.png")]


def network_of(system: str, tokenizer: Tokenizer) -> Llava:
    text = dataclasses.replace(TEXT, vocab_size=tokenizer.vocab_size, max_positions=512)
    return build(dataclasses.replace(config_of(system), text=text))


def model_of(network: Llava, tokenizer: Tokenizer) -> Model:
    side = network.config.image_size
    processor = ImageProcessor(image_size=side, shortest_edge=side)
    return Model(network, tokenizer=tokenizer, image_processor=processor)


def questions(images: list[Path]) -> list[Choice]:
    """Two about the first image, one about the second, one about none."""
    asked = [
        ("What is this?", images[0]),
        ("Is there any cat in the image, or is there none?", images[0]),
        ("What?", images[1]),
        ("Why?", None),
    ]
    return [
        Choice(request=Request(prompt=text, images=shown), answers=ANSWERS[: 2 + number % 2])
        for number, (text, shown) in enumerate(asked)
    ]


# One attends causally to whole prompts; one drops vision tokens by what the question says.
@pytest.mark.parametrize("system", ["stf", "fastv"])
def test_likelihoods_are_those_of_the_forward_pass(
    system: str, tokenizer: Tokenizer, images: list[Path]
) -> None:
    network, choices = network_of(system, tokenizer), questions(images)
    reference = jax.jit(network_of(system, tokenizer))
    model, template = model_of(network, tokenizer), fit_template("v1", tokenizer)
    scores = ChoiceScorer(model, rows=2).score(choices)
    prompts = model.make_prompts([choice.request for choice in choices], template=template)
    for choice, prompt, found in zip(choices, prompts, scores, strict=True):
        for answer, score in zip(choice.answers, found, strict=True):
            reply = encode_reply(tokenizer, template, answer)
            whole = dataclasses.replace(prompt, ids=np.concatenate([prompt.ids, reply]))
            batch = pad_prompts([whole], rows=1, image_size=network.config.image_size)
            # What follows the question is the answer: only what stands before it decides.
            batch.labels[0, len(prompt.ids) : len(whole.ids)] = reply
            logits = jax.nn.log_softmax(reference(batch)[0])
            at = np.arange(len(prompt.ids) - 1, len(whole.ids) - 1)
            expected = float(logits[at, reply].sum())
            assert score == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_reply_is_what_training_supervises(tokenizer: Tokenizer) -> None:
    template = fit_template("v1", tokenizer)
    for reply in ANSWERS:
        ids = encode_prompt(tokenizer, f"a{template.before_reply} {reply}{template.reply_end}")
        before = encode_prompt(tokenizer, f"a{template.before_reply}")
        np.testing.assert_array_equal(encode_reply(tokenizer, template, reply), ids[len(before) :])


def test_what_cannot_be_scored_is_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = ChoiceScorer(model_of(network_of("stf", tokenizer), tokenizer))
    for answers, problem in (
        ((), "no answers to choose from"),
        ((" cat",), "strip it"),
        (("a cat " * 200 + "sat",), r"context 512; shorten it"),
    ):
        choice = Choice(request=Request(prompt="What?"), answers=answers)
        with pytest.raises(ValueError, match=problem):
            scorer.choose([choice])
    with pytest.raises(ValueError, match="rows is 0"):
        ChoiceScorer(scorer._model, rows=0)
    # The largest of numbers that are none would be the first of them.
    none = iter([(0, np.array([-1.0, np.nan]))])
    monkeypatch.setattr(scorer, "_score_group", lambda *_: none)
    choice = Choice(request=Request(prompt="What?"), answers=("a", "b"))
    with pytest.raises(ValueError, match="an answer to choice 1 has a likelihood that is no num"):
        scorer.choose([choice])
