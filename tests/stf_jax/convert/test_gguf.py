"""GGUF files become the LLaMA that they were made from, and one line refuses all others."""

import json
import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from stf_jax.cli.main import main
from stf_jax.config.text import RopeScaling
from stf_jax.convert import open_source
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.util.errors import CheckpointError
from tests.stf_jax.convert.gguf_writer import SIZES, draw_tensors, write_gguf
from tests.stf_jax.convert.refusal import refused

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (extra gguf)")

Make = Callable[..., Path]
TEXTS = (
    "The year 1984 had 366 days; 12,345 of them?",
    "  def f(x):\n\treturn x ** 2\n\n",
    "Ünïcödé, 日本語 and 🎉 don't  matter.",
    "<|im_start|>user\nHi<|im_end|>",
    "",
)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a small GGUF file; further arguments are those of `write_gguf`."""
    return lambda **options: write_gguf(tmp_path / "model.gguf", draw_tensors(), **options)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_every_tensor_is_the_dequantized_one_with_its_rows_in_the_order_of_transformers(
    kind: str, make: Make, reference: Path
) -> None:
    tensors = draw_tensors()
    source = open_source(make(kind=kind), vision_tower=reference / "clip")
    plain = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}
    number = gguf.GGMLQuantizationType[kind]
    for name, array in tensors.items():
        found = source.tensors[name].read()
        if array.ndim == 1 or kind == "F32":
            expected = array
        elif kind in plain:
            expected = array.astype(plain[kind])
        else:
            expected = gguf.dequantize(gguf.quantize(array, number), number)
        assert found.dtype == expected.dtype == source.tensors[name].info.dtype
        assert found.shape == source.tensors[name].info.shape
        np.testing.assert_array_equal(found, expected, err_msg=name)


def test_the_config_is_what_was_written(make: Make, reference: Path) -> None:
    extra = {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 5,
        "tokenizer.ggml.eot_token_id": 7,
        "tokenizer.ggml.padding_token_id": 3,
    }
    text = open_source(make(extra=extra), vision_tower=reference / "clip").config.text
    assert (text.vocab_size, text.width, text.mlp_width, text.layers) == (96, 64, 96, 2)
    assert (text.heads, text.kv_heads, text.head_dim, text.max_positions) == (4, 2, 16, 128)
    # A float32 in the file, 9.999999747378752e-06.
    assert (text.norm_eps, text.rope_theta, text.tie_embeddings) == (1e-5, 20000.0, True)
    assert (text.bos_id, text.eos_ids, text.pad_id) == (1, (5, 7), 3)


def test_an_output_matrix_of_its_own_is_read(tmp_path: Path, reference: Path) -> None:
    sizes = SIZES | {"tie_word_embeddings": False}
    path = write_gguf(tmp_path / "model.gguf", draw_tensors(sizes), sizes=sizes, kind="Q8_0")
    source = open_source(path, vision_tower=reference / "clip")
    assert not source.config.text.tie_embeddings
    assert source.tensors["lm_head.weight"].info.shape == (96, 64)


def llama_3_factors(factor: float, *, high: float = 4.0) -> np.ndarray:
    """As llama.cpp writes them for Llama 3.1."""
    factors = []
    for at in range(0, SIZES["head_dim"], 2):
        length = 2 * math.pi * SIZES["rope_theta"] ** (at / SIZES["head_dim"])
        if length < 8192 / high:
            factors.append(1.0)
        elif length > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / length - 1) / (high - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors)


def test_the_frequencies_of_llama_3_are_told_from_their_factors(
    make: Make, reference: Path, tmp_path: Path
) -> None:
    path = make(factors=llama_3_factors(8.0))
    text = open_source(path, vision_tower=reference / "clip").config.text
    assert text.rope_scaling == RopeScaling(kind="llama3", factor=8.0)
    refused(make(factors=llama_3_factors(8.0, high=2.0)), tmp_path / "out", "otherwise than Llama")


def test_linear_scaling_is_read_and_yarn_refused(
    make: Make, reference: Path, tmp_path: Path
) -> None:
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    text = open_source(make(extra=extra), vision_tower=reference / "clip").config.text
    assert text.rope_scaling == RopeScaling(kind="linear", factor=4.0)
    extra["llama.rope.scaling.type"] = "yarn"
    refused(make(extra=extra), tmp_path / "out", "model.gguf: rope scaling 'yarn' is not supp")


def byte_level(pre: str) -> tuple[dict[str, Any], tokenizers.Tokenizer]:
    """A byte-level tokenizer as metadata, and as the library makes it."""
    splits = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        ),
    }
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splits[pre]
    tokenizer.train_from_iterator(
        [*TEXTS, "1984 366 12 345 1984 366 345"] * 3,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    content = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in content["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    }
    return metadata, tokenizer


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
def test_a_byte_level_tokenizer_gives_the_ids_that_the_library_gave(
    pre: str, make: Make, reference: Path
) -> None:
    metadata, expected = byte_level(pre)
    sizes = SIZES | {"vocab_size": expected.get_vocab_size()}
    path = write_gguf(
        make().with_name("tokens.gguf"), draw_tensors(sizes), sizes=sizes, extra=metadata
    )
    source = open_source(path, vision_tower=reference / "clip")
    folder = source.files["tokenizer.json"].parent
    tokenizer = load_tokenizer(folder)
    for text in TEXTS:
        ids = expected.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 2)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}"


def test_a_tokenizer_of_llama_3_cuts_words_and_puts_a_beginning_as_llama_3_does(
    make: Make, reference: Path
) -> None:
    metadata, _ = byte_level("gpt-2")
    # A word that is a token, which no merges lead to.
    metadata["tokenizer.ggml.tokens"].append("zebraic")
    metadata["tokenizer.ggml.token_type"].append(1)
    count = len(metadata["tokenizer.ggml.tokens"])
    sizes = SIZES | {"vocab_size": count}
    path = write_gguf(
        make().with_name("tokens.gguf"),
        draw_tensors(sizes),
        sizes=sizes,
        extra=metadata | {"tokenizer.ggml.pre": "llama-bpe"},
    )
    source = open_source(path, vision_tower=reference / "clip")
    tokenizer = load_tokenizer(source.files["tokenizer.json"].parent)
    words = tokenizer.backend.pre_tokenizer.pre_tokenize_str("I'LL pay 12345!\n\nNow (you)")
    # Digits in groups of three; a mark before a word belongs to it; letters of any case after '.
    expected = ["I", "'LL", "Ġpay", "Ġ", "123", "45", "!ĊĊ", "Now", "Ġ(", "you", ")"]
    assert [word for word, _ in words] == expected
    assert tokenizer.encode("zebraic") == [count - 1]
    assert tokenizer.bos_id == 1


def test_a_sentencepiece_tokenizer_gives_the_ids_of_its_model(make: Make, reference: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(reference / "vicuna" / "tokenizer.model"))
    count = model.get_piece_size()

    def kind(token: int) -> int:
        if model.is_unknown(token):
            return 2
        return 3 if model.is_control(token) else 6 if model.is_byte(token) else 1

    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(token) for token in range(count)],
        "tokenizer.ggml.scores": [model.get_score(token) for token in range(count)],
        "tokenizer.ggml.token_type": [kind(token) for token in range(count)],
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
    }
    sizes = SIZES | {"vocab_size": count}
    path = write_gguf(
        make().with_name("tokens.gguf"), draw_tensors(sizes), sizes=sizes, extra=metadata
    )
    source = open_source(path, vision_tower=reference / "clip")
    found = load_tokenizer(source.files["tokenizer.model"].parent)
    expected = load_tokenizer(reference / "vicuna")
    assert found.bos_id == expected.bos_id == model.bos_id()
    for text in TEXTS:
        assert found.encode(text) == expected.encode(text)


def test_the_command_makes_a_whole_model_of_a_gguf_file(
    make: Make, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata, tokenizer = byte_level("smollm")
    sizes = SIZES | {"vocab_size": tokenizer.get_vocab_size()}
    path = write_gguf(
        tmp_path / "x.gguf", draw_tensors(sizes), sizes=sizes, extra=metadata, kind="Q4_1"
    )
    tower = ["--vision-tower", str(reference / "clip"), "--system", "llava"]
    assert main(["convert", "import", str(path), str(tmp_path / "out"), *tower]) == 0
    assert main(["convert", "inspect", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.out.endswith("  whole\n")
    assert not said.err


def spoil(path: Path, name: str, kind: int) -> Path:
    """Gives a tensor another type, whose number follows its two dimensions."""
    content = bytearray(path.read_bytes())
    at = content.index(name.encode()) + len(name) + 4 + 2 * 8
    content[at : at + 4] = struct.pack("<I", kind)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "gemma3"}, "of the family 'gemma3', which stf_jax does not read; take a LLaMA"),
        ({"extra": {"llama.expert_count": 8}}, "with a mixture of experts, which stf_jax does not"),
        ({"extra": {"llama.attention.key_length": 32}}, "turns 16 of 32 dimensions of a head"),
        ({"extra": {"tokenizer.ggml.model": "bert"}}, "no tokens, or others than str: take the ch"),
        (
            {
                "extra": {
                    "tokenizer.ggml.model": "t5",
                    "tokenizer.ggml.tokens": ["a"],
                    "tokenizer.ggml.token_type": [1],
                }
            },
            "of the kind 't5'; 'gpt2' and 'llama' are read: take the checkpoint",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_what_is_no_llama_is_refused_in_one_line(
    options: dict[str, Any], message: str, make: Make, tmp_path: Path
) -> None:
    assert "\n" not in refused(make(**options), tmp_path / "out", message)


@pytest.mark.parametrize(("kind", "what"), [(99, "unknown"), (15, "Q8_K"), (26, "I32")])
def test_quantization_that_nothing_dequantizes_is_refused(
    kind: int, what: str, make: Make, tmp_path: Path
) -> None:
    path = spoil(make(), "blk.1.ffn_up.weight", kind)
    message = f"blk.1.ffn_up.weight has the quantization type {kind}, which the package gguf does"
    assert "\n" not in refused(path, tmp_path / "out", message)


def test_quantized_weights_without_the_package_name_the_extra(
    make: Make, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, quantized = make(kind="BF16"), tmp_path / "quantized.gguf"
    write_gguf(quantized, draw_tensors(), kind="Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(quantized, tmp_path / "out", r"install what reads them: pip install 'stf-jax\[gguf\]'")
    assert open_source(plain, vision_tower=reference / "clip").config.text.layers == 2


def test_a_file_that_ends_anywhere_is_refused_in_one_line(make: Make, tmp_path: Path) -> None:
    path = make(kind="Q4_0", extra=byte_level("smollm")[0])
    whole = path.read_bytes()
    for part in (4, 7, 20, 60, 500, 2000, 6000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:part])
        with pytest.raises(CheckpointError, match=r"download or copy it again$") as caught:
            open_source(path)
        assert "\n" not in str(caught.value)


def test_a_damaged_length_ends_at_once(make: Make) -> None:
    path = make(extra={"tokenizer.ggml.token_type": [1, 2, 3]})
    whole = path.read_bytes()
    at = whole.index(b"token_type") + len(b"token_type") + 4 + 4
    path.write_bytes(whole[:at] + struct.pack("<Q", 2**60) + whole[at + 8 :])
    with pytest.raises(CheckpointError, match=r"is no whole GGUF file .*ends within its header"):
        open_source(path)


def test_a_directory_with_a_gguf_file_says_to_name_the_file(make: Make, tmp_path: Path) -> None:
    path = make()
    said = refused(path.parent, tmp_path / "out", "name one of them: .*model.gguf")
    assert "\n" not in said
