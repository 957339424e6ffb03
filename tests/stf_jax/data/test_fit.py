"""Templates against tokenizers: what a reply ends in, and what transformers makes of the turns."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers

from stf_jax.data.builder import build
from stf_jax.data.config import DataConfig, DatasetSource
from stf_jax.data.conversation import render_prompt, take_system
from stf_jax.data.encoding import encode_conversation
from stf_jax.data.fit import fit_template, stop_ids
from stf_jax.data.images import ImageProcessor
from stf_jax.data.index import index_name
from stf_jax.data.pipeline import TrainingData
from stf_jax.data.show import show
from stf_jax.data.templates import TEMPLATES, get_template
from stf_jax.data.tokenizer import IGNORED_LABEL, Tokenizer, encode_prompt, load_tokenizer
from stf_jax.data.validator import check
from tests.stf_jax.data.byte_level import write_byte_level, write_chatml, write_llama_3

SPOKEN = [("human", "How many?"), ("gpt", "Two."), ("human", "Sure? é"), ("gpt", "Yes")]
TURNS = [{"from": sender, "value": text} for sender, text in SPOKEN]
ROLES = {"human": "user", "gpt": "assistant"}
KINDS = {"chatml": write_chatml, "smollm2": write_chatml, "llama_3": write_llama_3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[..., Path]], Path]:
    @cache
    def make(write: Callable[..., Path]) -> Path:
        return write(tmp_path_factory.mktemp("tokenizer"))

    return make


def messages(system: str) -> list[dict[str, str]]:
    spoken = [{"role": ROLES[sender], "content": text} for sender, text in SPOKEN]
    return [{"role": "system", "content": system}, *spoken]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", KINDS)
def test_ids_are_those_of_the_tokenizers_own_chat_template(
    folder: Any, name: str, system: str | None
) -> None:
    path = folder(KINDS[name])
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer = load_tokenizer(path)
    template = fit_template(name, tokenizer)
    turns = TURNS if system is None else [{"from": "system", "value": system}, *TURNS]
    spoken = messages(system or template.system)
    encoded = encode_conversation(tokenizer, turns, template=template, num_images=0)
    assert encoded.ids.tolist() == theirs.apply_chat_template(spoken, return_dict=False)
    supervised = encoded.ids[encoded.labels != IGNORED_LABEL].tolist()
    end = tokenizer.eos_id
    assert supervised == [*tokenizer.encode("Two."), end, *tokenizer.encode("Yes"), end]

    _, template = take_system(turns, template)
    prompt = render_prompt("Sure? é", template=template, history=[("How many?", "Two.")])
    expected = theirs.apply_chat_template(
        spoken[:-1], add_generation_prompt=True, return_dict=False
    )
    assert encode_prompt(tokenizer, prompt).tolist() == expected


@pytest.mark.parametrize("write", [write_byte_level, write_chatml, write_llama_3])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_reply_ends_where_generation_stops_or_the_template_is_refused(
    folder: Any, name: str, write: Callable[..., Path]
) -> None:
    tokenizer = load_tokenizer(folder(write))
    if set(get_template(name).markers) - set(tokenizer.backend.get_vocab()):
        with pytest.raises(ValueError, match="learn where a reply ends") as error:
            fit_template(name, tokenizer)
        assert "\n" not in str(error.value)
        return
    template = fit_template(name, tokenizer)
    turns = [{"from": "human", "value": "<image>"}, TURNS[1]]
    encoded = encode_conversation(tokenizer, turns, template=template, num_images=1)
    supervised = encoded.ids[encoded.labels != IGNORED_LABEL].tolist()
    if name in ("v0", "plain"):
        assert tokenizer.decode(supervised).endswith(template.stop_strings)
    else:
        assert supervised[-1] in stop_ids(template, tokenizer)
        assert supervised.count(supervised[-1]) == 1


def test_a_template_of_llama_ends_in_the_tokenizers_own_end_of_text(tmp_path: Path) -> None:
    base = load_tokenizer(write_llama_3(tmp_path, end="<|end_of_text|>"))
    assert fit_template("v1", base).reply_end == "<|end_of_text|>"
    assert fit_template("llava_llama_2", base).before_question == "<|begin_of_text|>[INST] "
    # A base model that learns the template of its Instruct sibling stops at either end.
    ends = {base.backend.token_to_id(one) for one in ("<|end_of_text|>", "<|eot_id|>")}
    assert stop_ids(fit_template("llama_3", base), base) == ends


def test_the_reference_tokenizer_takes_every_template_but_those_of_other_tokens(
    tokenizer: Tokenizer,
) -> None:
    for name in TEMPLATES:
        if name in ("mpt", "chatml_direct", *KINDS):
            with pytest.raises(ValueError, match=rf"template '{name}' needs <\|"):
                fit_template(name, tokenizer)
        else:
            assert fit_template(name, tokenizer) == get_template(name)


def test_an_index_of_the_characters_of_an_end_is_not_taken(folder: Any) -> None:
    """Older releases counted `</s>` in characters where the tokenizer has no such token."""
    tokenizer = load_tokenizer(folder(write_byte_level))
    now, before = fit_template("v1", tokenizer), get_template("v1")
    assert index_name(tokenizer, now) != index_name(tokenizer, before)


def test_it_is_refused_wherever_a_template_meets_a_tokenizer(
    corpus: Any, dataset: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    files: dict[str, Any] = {"images": corpus.images, "tokenizer": tokenizer, "workers": 0}
    config = DataConfig(datasets=(DatasetSource(path=str(dataset)),), template="llama_3")
    for call in (
        lambda: check([corpus.json], template="llama_3", **files),
        lambda: build([corpus.json], tmp_path / "out", template="llama_3", **files),
        lambda: build([corpus.json], dataset, template="llama_3", **files),
        lambda: show(dataset, 0, tokenizer=tokenizer, template="llama_3"),
        lambda: TrainingData(
            config, tokenizer=tokenizer, image_processor=ImageProcessor(), tokens_per_image=4
        ),
    ):
        with pytest.raises(ValueError, match=r"template 'llama_3' needs <\|"):
            call()
    assert not (tmp_path / "out").exists()


def test_strict_labels_are_refused_where_the_reference_has_no_template() -> None:
    with pytest.raises(ValueError, match="which has no template 'chatml'; leave them out"):
        DataConfig(template="chatml", strict_labels=True)
