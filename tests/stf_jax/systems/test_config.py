"""Configs: from and to Hugging Face's field by field, published sizes, and refusals."""

import dataclasses
import json

import pytest
import transformers
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from stf_jax.config.text import RopeScaling, TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.convert.hf_config import text_from_hf, text_to_hf, vision_from_hf, vision_to_hf
from stf_jax.models.connector import VisionFeatures
from stf_jax.models.layers import Init, parameter_count
from stf_jax.models.llava import Llava
from stf_jax.systems import config_from_dict, named_config, tiny_config
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.stf import STF, MBTFConfig, STFConnector

# Every field away from its default, so that none can be forgotten.
VISION = VisionConfig(
    image_size=84,
    patch_size=12,
    width=48,
    mlp_width=100,
    layers=7,
    heads=3,
    norm_eps=1e-4,
    activation="gelu",
)
TEXT = TextConfig(
    vocab_size=777,
    width=96,
    mlp_width=123,
    layers=5,
    heads=6,
    kv_heads=2,
    head_dim=24,
    norm_eps=2e-6,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
        kind="llama3",
        factor=8.0,
        low_frequency_factor=1.5,
        high_frequency_factor=5.0,
        original_positions=2048,
    ),
    max_positions=1234,
    tie_embeddings=True,
    bos_id=11,
    eos_ids=(12, 13),
    pad_id=14,
)
# The padding for a mesh and the form of the weights are ours alone: no published config has them.
NOT_IN_HF = {"vocab_padding", "quantization"}


def fields(config: object) -> dict[str, object]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


@pytest.mark.parametrize("config", [VISION, TEXT])
def test_no_field_is_at_its_default(config: object):
    for name, value in fields(config).items():
        assert name in NOT_IN_HF or value != getattr(type(config)(), name), name


def test_hf_round_trip_field_by_field():
    vision = vision_from_hf(json.loads(json.dumps(vision_to_hf(VISION))))
    text = text_from_hf(json.loads(json.dumps(text_to_hf(TEXT))))
    assert fields(vision) == fields(VISION)
    assert fields(text) == fields(TEXT)


def test_older_spellings():
    hf = text_to_hf(TEXT)
    del hf["rope_parameters"]
    assert text_from_hf(hf) == TEXT
    del hf["rope_scaling"]["rope_type"]
    assert text_from_hf(hf) == TEXT
    assert vision_from_hf({"vision_config": vision_to_hf(VISION), "model_type": "clip"}) == VISION


def test_defaults_are_those_of_transformers():
    ours = text_from_hf({"model_type": "llama"})
    theirs = text_from_hf(transformers.LlamaConfig().to_dict())
    assert ours == dataclasses.replace(theirs, pad_id=ours.pad_id)
    assert vision_from_hf({}) == vision_from_hf(transformers.CLIPVisionConfig().to_dict())


def test_parameter_counts_are_those_published():
    stf, llava = named_config("llava_stf_7b"), named_config("llava_1_5_7b")
    model = Llava.abstract(stf)
    assert isinstance(model.connector, STFConnector)
    assert parameter_count(model.connector.mbtf) == 37_753_856
    assert parameter_count(model.connector.projector) == 134_238_208
    assert parameter_count(model.text) == 6_738_415_616
    # The patch and position embeddings and layers 1 to 23: what comes before the last tap.
    assert parameter_count(model.vision) == 290_909_184
    assert parameter_count(Llava.abstract(llava).connector) == 20_979_712
    larger = Llava.abstract(named_config("llava_stf_13b"))
    assert parameter_count(larger.connector.projector) == 151_016_448
    assert parameter_count(larger.text) == 13_015_864_320
    assert stf.tokens_per_image == 144
    assert llava.tokens_per_image == 576


@pytest.mark.parametrize("name", ["llava_stf_7b", "llava_stf_13b", "llava_1_5_7b", "tiny"])
def test_dictionary_round_trip(name: str):
    config = named_config(name)
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_dictionary_with_every_field():
    config = LlavaConfig(
        vision=VISION,
        text=dataclasses.replace(TEXT, vocab_padding=3),
        system=STF(
            taps=(5, 2, 0),
            mbtf=MBTFConfig(mlp_width=77, last_activation=True),
            window=7,
            projector_width=99,
        ),
    )
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("text", "widht", 3, "widht"),
        ("text", "width", "wide", "width"),
        ("text", "kv_heads", 3, "8 heads cannot share 3"),
        ("vision", "patch_size", 13, "not a multiple of patch_size 13"),
        ("vision", "heads", 5, "does not divide by 5"),
        ("system", "window", 3, "window 3 does not divide"),
        ("system", "taps", [5], "tap 5 lies beyond"),
        ("system", "taps", [0], r"taps \(0,\) must be one or more hidden states, .* not all 0"),
        ("system", "taps", [], r"taps \(\) must be one or more"),
        ("system", "mbtf", None, "2 taps need mbtf"),
        ("system", "name", "identity", "system 'identity' is not one of llava, average"),
        ("system", "name", None, "system.name is None; choose one of llava, average"),
        ("text", "norm_eps", -1.0, r"TextConfig.norm_eps is -1.0; it must be above 0"),
        ("text", "rope_theta", 0.0, r"TextConfig.rope_theta is 0.0; it must be above 0"),
        ("text", "rope_theta", float("nan"), r"TextConfig.rope_theta is nan; it must be above 0"),
        ("vision", "norm_eps", 0.0, r"VisionConfig.norm_eps is 0.0; it must be above 0"),
        ("text", "rope_scaling", {"kind": "linear", "factor": 0.0}, "factor is 0.0"),
        ("text", "rope_scaling", {"kind": "linear"}, "factor"),
        (
            "text",
            "rope_scaling",
            {"kind": "llama3", "factor": 8.0, "high_frequency_factor": 1.0},
            "high_frequency_factor 1.0 must be above",
        ),
    ],
)
def test_refusals(part: str, key: str, value: object, message: str):
    tree = tiny_config().to_dict()
    tree[part][key] = value
    with pytest.raises(ValueError, match=message):
        config_from_dict(tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
    ],
)
def test_another_family_is_refused(change: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        text_from_hf(text_to_hf(TEXT) | change)


@settings(max_examples=10, deadline=None)
@given(grid=st.sampled_from([2, 4, 6]), window=st.sampled_from([1, 2, 3]))
def test_tokens_per_image(grid: int, window: int):
    vision = dataclasses.replace(VisionConfig.tiny(), image_size=14 * grid)
    system = STF(taps=(3, 1), mbtf=MBTFConfig(mlp_width=128), window=window, projector_width=512)
    if grid % window:
        with pytest.raises(ValueError, match="does not divide"):
            LlavaConfig(vision=vision, text=TextConfig.tiny(), system=system)
        return
    config = LlavaConfig(vision=vision, text=TextConfig.tiny(), system=system)
    taps = tuple(nnx.eval_shape(lambda: _features(config)) for _ in system.taps)
    model = Llava.abstract(config)
    fused = nnx.eval_shape(
        lambda model, taps: model.connector.reduce(VisionFeatures(taps=taps)), model, taps
    )
    assert fused.shape == (1, config.tokens_per_image, window**2 * vision.width)


def _features(config: LlavaConfig):
    init = Init(rngs=nnx.Rngs(0))
    return init.normal(1, config.vision.patches, config.vision.width, spec=None)[...]
