"""Rendered text against text written by hand; ids are compared in test_encoding.py."""

import json
from pathlib import Path

import pytest

from stf_jax.data.conversation import TextPiece, read_turns, render_conversation, render_prompt
from stf_jax.data.templates import TEMPLATES, get_template

USER = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


def talk(*values: str) -> list[dict[str, str]]:
    senders = ("human", "gpt")
    return [{"from": senders[i % 2], "value": value} for i, value in enumerate(values)]


def text(pieces: list[TextPiece]) -> str:
    return "".join(piece.text for piece in pieces)


def supervised(pieces: list[TextPiece]) -> list[str]:
    return [piece.text for piece in pieces if piece.supervised]


def test_the_golden_file_has_no_template_that_is_missing_here(reference: Path) -> None:
    golden = json.loads((reference / "tokenization.json").read_text(encoding="utf-8"))
    ours = {"chatml", "smollm2", "llama_3"}  # Not in LLaVA-1.5; see test_fit.py.
    assert set(golden["training"]) | {"vicuna_v1"} | ours == set(TEMPLATES)
    assert get_template("vicuna_v1") is get_template("v1")


def test_prompts_match_the_reference(reference: Path) -> None:
    golden = json.loads((reference / "tokenization.json").read_text(encoding="utf-8"))
    for name, expected in golden["prompts"].items():
        prompt = render_prompt(
            "<image>\nWhat is the color of the bus?", template=get_template(name)
        )
        assert prompt.text == expected["prompt"], name


def test_v1_supervises_each_reply_with_its_space_and_end() -> None:
    pieces = render_conversation(
        talk("<image>\nHow many?", "Two.", "Sure?", "Yes"),
        template=get_template("v1"),
        num_images=1,
    )
    assert text(pieces) == (
        f"{USER} USER: <image>\nHow many? ASSISTANT: Two.</s>USER: Sure? ASSISTANT: Yes</s>"
    )
    assert supervised(pieces) == [" Two.</s>", " Yes</s>"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v1", f"{USER} USER: a ASSISTANT: b</s>USER: c ASSISTANT:"),
        ("plain", "a\nb\nc\n"),
        ("mistral_instruct", "[INST] a [/INST] b </s>[INST] c [/INST]"),
        (
            "chatml_direct",
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\na<|im_end|>"
            "<|im_start|>assistant\nb<|im_end|><|im_start|>user\nc<|im_end|>"
            "<|im_start|>assistant\n",
        ),
    ],
)
def test_a_prompt_with_history_ends_open(name: str, expected: str) -> None:
    prompt = render_prompt("c", template=get_template(name), history=[("a", "b")])
    assert prompt.text == expected
    assert [prompt.text[start:end] for start, end in prompt.typed] == ["a", "b", "c"]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("v0", "plain")])
def test_a_prompt_is_what_training_saw_before_the_reply(name: str) -> None:
    template = get_template(name)
    trained = text(
        render_conversation(talk("<image>\na", "b", "c", "d"), template=template, num_images=1)
    )
    prompt = render_prompt("c", template=template, history=[("<image>\na", "b")])
    end = template.reply_start + "d" + template.reply_end + template.closing
    assert trained == prompt.text + end


def test_a_caption_keeps_the_image_and_drops_the_question() -> None:
    pieces = render_conversation(
        talk("Describe this.\n<image>", "A dog."), template=get_template("plain"), num_images=1
    )
    assert text(pieces) == "<image>A dog.\n"
    assert supervised(pieces) == ["A dog.\n"]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is it?\n<image>", "<image>\nWhat is it?"),
        ("<image>\nand <image>\nWhich?", "<image>\nand \nWhich?"),
        ("  <image>\n  What?  ", "<image>\nWhat?"),
        ("<image>", "<image>"),
    ],
)
def test_training_puts_the_image_first(question: str, expected: str) -> None:
    pieces = render_conversation(
        talk(question, "b"), template=get_template("mistral_instruct"), num_images=1
    )
    assert pieces[0].text == f"[INST] {expected}"


def test_several_images_stay_where_they_are() -> None:
    question = "Is <image> like <image>?"
    pieces = render_conversation(
        talk(question, "No"), template=get_template("mistral_instruct"), num_images=2
    )
    assert pieces[0].text == f"[INST] {question}"


def test_without_an_image_the_marker_is_ordinary_text() -> None:
    question = "What does <image> do in SVG? "
    pieces = render_conversation(
        talk(question, "No"), template=get_template("mistral_instruct"), num_images=0
    )
    assert pieces[0].text == f"[INST] {question}"


def test_mmtag_wraps_the_image_in_training_and_in_prompts() -> None:
    template = get_template("v1_mmtag")
    pieces = render_conversation(talk("<image>\na", "b"), template=template, num_images=1)
    wrapped = "USER: <Image><image></Image>\na ASSISTANT:"
    assert wrapped in text(pieces)
    assert wrapped in render_prompt("<image>\na", template=template).text


def test_an_empty_reply_is_not_supervised_and_leaves_the_others() -> None:
    pieces = render_conversation(
        talk("a", "", "c", "d"), template=get_template("mistral_instruct"), num_images=0
    )
    assert text(pieces) == "[INST] a [/INST] </s>[INST] c [/INST] d </s>"
    assert supervised(pieces) == [" d </s>"]
    pieces = render_conversation(talk("a", ""), template=get_template("v1"), num_images=0)
    assert text(pieces).endswith("USER: a ASSISTANT:")
    assert supervised(pieces) == []


def test_an_opening_reply_is_dropped_save_under_v0() -> None:
    conversation = [{"from": "gpt", "value": "Hi."}, *talk("a", "b")]
    v1 = render_conversation(conversation, template=get_template("v1"), num_images=0)
    assert "Hi." not in text(v1)
    v0 = render_conversation(conversation, template=get_template("v0"), num_images=0)
    assert "questions.\n\n### Assistant: Hi.\n### Human: a\n### Assistant: b\n### " in text(v0)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "no turn from 'human'"),
        ([{"from": "gpt", "value": "a"}], "no turn from 'human'"),
        (talk("a"), "last turn is from 'human'; add the reply"),
        (talk("a", "b", "c"), "last turn is from 'human'; add the reply"),
        ([*talk("a"), *talk("b", "c")], "turn 2: two turns running from 'human'; merge"),
        ([*talk("a", "b"), {"from": "gpt", "value": "c"}], "turn 3: two turns running from 'gpt'"),
        ([{"from": "gpt", "value": "a"}, {"from": "gpt", "value": "b"}], "turn 2: two turns"),
        ([{"from": "system", "value": "a"}], "turn 1: 'from' is 'system'; it must be 'human' or"),
        ([{"value": "a"}], "turn 1: 'from' is None"),
        ([{"from": "human"}], "turn 1: 'value' is None; it must be a string"),
    ],
)
def test_bad_conversations_get_one_line_with_the_fix(
    conversation: list[dict[str, str]], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_turns(conversation, get_template("v1"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "values", "num_images", "message"),
    [
        ("v1", ("a", "b"), 1, "0 <image> in the conversation but 1 images"),
        ("v1", ("<image>", "b", "<image>", "d"), 1, "2 <image> in the conversation but 1 images"),
        ("v1", ("<image>", "b"), 2, "1 <image> in the conversation but 2 images"),
        ("plain", ("<image>", "b", "c", "d"), 1, "one caption, not 4 turns .* use 'v1'"),
        ("plain", ("a", "b"), 0, "one caption, not 2 turns with 0 images"),
        ("plain", ("a", "b"), 1, "one question with <image>"),
    ],
)
def test_images_and_markers_must_agree(
    name: str, values: tuple[str, ...], num_images: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        render_conversation(talk(*values), template=get_template(name), num_images=num_images)


def test_empty_questions_and_unknown_templates_are_refused() -> None:
    with pytest.raises(ValueError, match="question is empty; ask something"):
        render_prompt(" \n", template=get_template("v1"))
    with pytest.raises(ValueError, match="question is empty; ask something"):
        render_prompt("b", template=get_template("v1"), history=[("", "a")])
    with pytest.raises(ValueError, match=r"unknown template 'v2': choose one of .*, v1,"):
        get_template("v2")
