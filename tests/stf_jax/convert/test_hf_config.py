"""Keys of the wrong type, and those that a file leaves out."""

from typing import Any

import pytest

from stf_jax.config.text import TextConfig
from stf_jax.convert.hf_config import TEXT_DEFAULTS, VISION_DEFAULTS, text_from_hf, vision_from_hf

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("value", ["64", 64.0, True, None, [64], 0, -3])
@pytest.mark.parametrize("key", [*TEXT_DEFAULTS, "max_position_embeddings"])
def test_sizes_of_the_language_model(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{key} is .* in this config.json; give ") as error:
        text_from_hf({key: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", ["64", 64.0, True, None, [64], 0, -3])
@pytest.mark.parametrize("key", VISION_DEFAULTS)
def test_sizes_of_the_tower(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{key} is .* in this config.json; give ") as error:
        vision_from_hf({key: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"num_key_value_heads": "4"}, "num_key_value_heads is '4'"),
        ({"head_dim": 1.5}, "head_dim is 1.5"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_parameters": {"rope_theta": [1]}}, r"rope_theta is \[1\]"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing in this config.json"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": "1"}}, "low_freq_factor is '1'"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8.5}}, "is 8.5"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"bos_token_id": "<s>"}, "bos_token_id is '<s>'"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id is '</s>'"),
        ({"eos_token_id": []}, r"eos_token_id is \[\]"),
        ({"pad_token_id": 0.0}, "pad_token_id is 0.0"),
        ({"hidden_act": 3}, "hidden_act is 3"),
        ({"attention_bias": "no"}, "attention_bias is 'no'"),
    ],
)
def test_mistyped(hf: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_from_hf(hf)


@pytest.mark.parametrize(("value", "most"), [(10**9, 4096), (10**30, 4096)])
def test_more_layers_than_any_model_has(value: int, most: int) -> None:
    """Each has names of its own, so that a list of them would have no end."""
    for read in (text_from_hf, vision_from_hf):
        with pytest.raises(ValueError, match=f"layers is {value}; it must be at most {most}"):
            read({"num_hidden_layers": value})


def test_mistyped_in_the_tower() -> None:
    with pytest.raises(ValueError, match=r"layer_norm_eps is '1e-5' in this config.json"):
        vision_from_hf({"vision_config": {"layer_norm_eps": "1e-5"}})
    with pytest.raises(ValueError, match=r"vision_config is 3 in this config.json; give"):
        vision_from_hf({"vision_config": 3})


def test_null_where_transformers_writes_it() -> None:
    keys = ("num_key_value_heads", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id")
    silent = dict.fromkeys([*keys, "rope_scaling", "rope_parameters"])
    assert text_from_hf(silent) == text_from_hf({})
    assert text_from_hf({"eos_token_id": [2, 7]}).eos_ids == (2, 7)
    assert text_from_hf({"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}) == TextConfig()
