"""The numbers of PyTorch's `transformers`, at random small sizes and with random weights.

Weights always take the way of a user's: `save_pretrained`, then `stf_jax.convert.open_source`.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stf_jax.convert import open_source
from stf_jax.data.batch import Batch
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.engine import Engine
from stf_jax.infer.prompts import Prompt, pad_prompts
from stf_jax.infer.sampling import GREEDY
from stf_jax.models.clip import VisionTower
from stf_jax.models.layers import Init
from stf_jax.models.llava import Llava
from stf_jax.store.arrays import unflatten
from tests.switch import ALL

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

# The same examples at every run: what one change breaks is not found by chance in another. No
# shrinking, since every example compiles a model.
FEW: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "phases": (Phase.generate,),
}

# Long enough for the slowest of the rotary frequencies to turn, and not a bucket's length.
LONG = 500

IMAGE_ID = 7  # of HF's placeholder; any id of the vocabulary would do.

NewFolder = Callable[[], Path]


@pytest.fixture(scope="session")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> NewFolder:
    """A folder for each example; `tmp_path` would be one for all of a test."""
    return lambda: tmp_path_factory.mktemp("model")


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights with which every part matters: attention is not flat, and no norm is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            noise *= parameter[0].numel() ** -0.5
        else:
            noise = 0.1 * noise + ("norm" in name and name.endswith("weight"))
        parameter.data.copy_(noise)


def import_model(source: Any) -> Llava:
    """Our model with the weights of an opened checkpoint, in float32."""
    model = Llava.abstract(source.config)
    leaves = {leaf.path: jnp.asarray(leaf.read()) for leaf in source.leaves()}
    nnx.update(model, unflatten(leaves))
    return model


def ours(model: Llava, method: Callable[..., Any], *args: Any) -> Any:
    """A method of the model under jit, with the weights as arguments as everywhere."""
    graph, state = nnx.split(model)
    return jax.jit(lambda state, *args: method(nnx.merge(graph, state), *args))(state, *args)


@st.composite
def vision_sizes(draw: st.DrawFn) -> dict[str, Any]:
    patch = draw(st.sampled_from([2, 7, 14]))
    heads = draw(st.sampled_from([1, 2, 3, 4]))
    return {
        "hidden_size": heads * draw(st.sampled_from([4, 8, 16])),
        "intermediate_size": draw(st.sampled_from([20, 48])),
        "num_hidden_layers": draw(st.integers(2, 5)),
        "num_attention_heads": heads,
        "image_size": patch * draw(st.integers(2, 6)),
        "patch_size": patch,
        "hidden_act": draw(st.sampled_from(["quick_gelu", "gelu"])),
    }


THETA = st.sampled_from([10000.0, 500000.0])
ROPES = {
    "default": st.fixed_dictionaries({"rope_theta": THETA}),
    "linear": st.fixed_dictionaries({"rope_theta": THETA, "factor": st.sampled_from([1.5, 4.0])}),
    "llama3": st.fixed_dictionaries(
        {
            "rope_theta": THETA,
            "factor": st.sampled_from([2.0, 8.0]),
            "low_freq_factor": st.just(1.0),
            "high_freq_factor": st.sampled_from([2.0, 4.0]),
            # So short that wavelengths lie on both sides and between.
            "original_max_position_embeddings": st.sampled_from([64, 256]),
        }
    ),
}


@st.composite
def text_sizes(draw: st.DrawFn) -> dict[str, Any]:
    rope = draw(st.sampled_from(sorted(ROPES)))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    return {
        "vocab_size": draw(st.sampled_from([64, 101])),
        "hidden_size": draw(st.sampled_from([24, 48])),
        "intermediate_size": draw(st.sampled_from([40, 88])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": kv_heads * draw(st.sampled_from([1, 2, 4])),
        "num_key_value_heads": kv_heads,
        # Not always width / heads, as in Llama 3.2 and later.
        "head_dim": draw(st.sampled_from([8, 16])),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "rope_parameters": {"rope_type": rope, **draw(ROPES[rope])},
        "tie_word_embeddings": draw(st.booleans()),
        "max_position_embeddings": 1024,
    }


def small_text(**changes: Any) -> transformers.LlamaConfig:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    return transformers.LlamaConfig(**sizes | changes, attn_implementation="eager")


def small_vision(**changes: Any) -> transformers.CLIPVisionConfig:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 2,
    }
    return transformers.CLIPVisionConfig(**sizes | changes, attn_implementation="eager")


def save_parts(
    folder: Path, vision: transformers.CLIPVisionConfig, text: transformers.LlamaConfig, seed: int
) -> tuple[transformers.CLIPVisionModel, transformers.LlamaForCausalLM]:
    """A LLaMA in `folder`, with the tower in `folder/vision_tower`."""
    tower, language = transformers.CLIPVisionModel(vision), transformers.LlamaForCausalLM(text)
    for index, (model, place) in enumerate(((tower, folder / "vision_tower"), (language, folder))):
        randomize(model, seed + index)
        model.eval().save_pretrained(place)
    return tower, language


def save_llava(
    folder: Path,
    vision: transformers.CLIPVisionConfig,
    text: transformers.LlamaConfig,
    *,
    layer: int,
    seed: int,
) -> transformers.LlavaForConditionalGeneration:
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        vision_feature_layer=layer,
        tie_word_embeddings=text.tie_word_embeddings,
        attn_implementation="eager",
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    randomize(model, seed)
    model.save_pretrained(folder)
    return model


def make_prompts(
    seed: int, *, lengths: Sequence[int], images: Sequence[int], config: Any
) -> list[Prompt]:
    """Random ids, each image's placeholders together at a random place among them."""
    rng, size, prompts = np.random.default_rng(seed), config.vision.image_size, []
    for length, count in zip(lengths, images, strict=True):
        text = length - count * config.tokens_per_image
        ids = rng.integers(IMAGE_ID + 1, config.text.vocab_size, text)
        places = np.repeat(rng.integers(1, text, count), config.tokens_per_image)
        prompts.append(
            Prompt(
                ids=np.insert(ids, places, IMAGE_TOKEN_ID).astype(np.int32),
                pixels=rng.standard_normal((count, size, size, 3), dtype=np.float32),
            )
        )
    return prompts


def theirs(prompt: Prompt) -> dict[str, torch.Tensor]:
    """A prompt as the keyword arguments of HF's LLaVA."""
    ids = np.where(prompt.ids == IMAGE_TOKEN_ID, IMAGE_ID, prompt.ids)
    inputs = {"input_ids": torch.tensor(ids[None], dtype=torch.long)}
    if len(prompt.pixels):
        inputs["pixel_values"] = torch.tensor(prompt.pixels).permute(0, 3, 1, 2)
    return inputs


@settings(**FEW, max_examples=6 if ALL else 4)
@given(sizes=vision_sizes(), seed=st.integers(0, 99))
def test_every_hidden_state_of_clip(
    new_folder: NewFolder, sizes: dict[str, Any], seed: int
) -> None:
    folder, vision = new_folder(), small_vision(**sizes)
    save_parts(folder, vision, small_text(), seed)
    # From the file, too: what is compared is what a user of it would get.
    tower = transformers.CLIPVisionModel.from_pretrained(
        folder / "vision_tower", attn_implementation="eager"
    )
    torch.manual_seed(seed)
    pixels = torch.randn(2, 3, vision.image_size, vision.image_size)
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states
    source = open_source(folder, system="llava")
    last = max(source.config.system.taps)
    assert last == vision.num_hidden_layers - 1
    weights = nnx.state(import_model(source).vision)
    # The same weights, read at every tap and out of order.
    taps = tuple(range(last, -1, -1))
    every = nnx.eval_shape(
        lambda: VisionTower(source.config.vision, taps=taps, init=Init(rngs=nnx.Rngs(0)))
    )
    nnx.update(every, weights)
    actual = ours(every, VisionTower.__call__, pixels.permute(0, 2, 3, 1).numpy())
    for tap, state in zip(taps, actual.taps, strict=True):
        np.testing.assert_allclose(state, expected[tap][:, 1:], rtol=0, atol=1e-5, err_msg=str(tap))


def encode_images(model: Llava, pixels: jax.Array) -> jax.Array:
    none = jnp.zeros((len(pixels), 0), jnp.int32)
    batch = Batch(
        ids=none, labels=none, positions=none, segments=none, image_slots=none, pixels=pixels
    )
    return model.encode(batch).values


@pytest.mark.parametrize("rope", ROPES)
@settings(**FEW, max_examples=4 if ALL else 2)
@given(data=st.data(), sizes=text_sizes(), seed=st.integers(0, 99))
def test_llama_logits(
    new_folder: NewFolder, rope: str, data: st.DataObject, sizes: dict[str, Any], seed: int
) -> None:
    sizes["rope_parameters"] = {"rope_type": rope, **data.draw(ROPES[rope])}
    folder, text = new_folder(), small_text(**sizes)
    _, language = save_parts(folder, small_vision(), text, seed)
    source = open_source(folder, system="llava")
    assert source.config.text.tie_embeddings == text.tie_word_embeddings
    prompts = make_prompts(seed, lengths=(LONG, 77), images=(0, 0), config=source.config)
    batch = pad_prompts(prompts, rows=2, image_size=source.config.vision.image_size)
    actual = ours(import_model(source), Llava.__call__, batch)
    for row, prompt in zip(actual, prompts, strict=True):
        with torch.no_grad():
            expected = language(torch.tensor(prompt.ids[None], dtype=torch.long)).logits[0]
        np.testing.assert_allclose(row[: len(prompt.ids)], expected, rtol=0, atol=1e-4)


@settings(**FEW, max_examples=6 if ALL else 4)
@given(
    vision=vision_sizes(),
    text=text_sizes(),
    # -1 is the last layer, which LLaVA-1.5 does not read but other checkpoints do.
    layer=st.sampled_from([-1, -2, 1, 2]),
    seed=st.integers(0, 99),
)
def test_llava_logits(
    new_folder: NewFolder,
    vision: dict[str, Any],
    text: dict[str, Any],
    layer: int,
    seed: int,
) -> None:
    folder = new_folder()
    model = save_llava(folder, small_vision(**vision), small_text(**text), layer=layer, seed=seed)
    source = open_source(folder)
    prompts = make_prompts(seed, lengths=(LONG, 130, 61), images=(1, 2, 0), config=source.config)
    batch = pad_prompts(prompts, rows=3, image_size=source.config.vision.image_size)
    actual = ours(import_model(source), Llava.__call__, batch)
    for row, prompt in zip(actual, prompts, strict=True):
        with torch.no_grad():
            expected = model(**theirs(prompt)).logits[0]
        np.testing.assert_allclose(row[: len(prompt.ids)], expected, rtol=0, atol=1e-4)


def fused_by_definition(
    features: torch.Tensor, *, reduction: str, window: int, side: int
) -> torch.Tensor:
    """Token by token, from the definition, in the published order of channels."""
    batch, _, channels = features.shape
    tokens = []
    for top in range(0, side, window):
        for left in range(0, side, window):
            token = torch.zeros(batch, channels * window**2)
            for row in range(window):
                for column in range(window):
                    patch = features[:, (top + row) * side + left + column]
                    for channel in range(channels):
                        index = window**2 * channel + window * row + column
                        token[:, index] = patch[:, channel]
            if reduction == "average":
                token = token.reshape(batch, channels, window**2).mean(-1)
            tokens.append(token)
    return torch.stack(tokens, 1)


def mlp(inputs: int, width: int, outputs: int, seed: int) -> torch.nn.Sequential:
    layers = torch.nn.Sequential(
        torch.nn.Linear(inputs, width), torch.nn.GELU(), torch.nn.Linear(width, outputs)
    )
    randomize(layers, seed)
    return layers


@pytest.mark.parametrize(
    ("reduction", "window", "taps", "last_activation"),
    [
        ("stf", 2, (3, 1), False),
        ("stf", 3, (0, 2, 4, 1), True),
        ("stf", 2, (2,), True),
        ("stf", 1, (4, 3), False),
        ("average", 2, (3,), False),
        ("average", 3, (1, 4), False),
    ],
)
def test_stf_and_average(
    reduction: str, window: int, taps: tuple[int, ...], last_activation: bool, tmp_path: Path
) -> None:
    vision, text = small_vision(image_size=12, num_hidden_layers=4), small_text()
    tower, language = save_parts(tmp_path, vision, text, seed=window)
    width, side = vision.hidden_size, 6
    mixer = mlp(len(taps) * width, 40, width, seed=11)
    fused = width * window**2 if reduction == "stf" else width
    projector = mlp(fused, 72, text.hidden_size, seed=12)
    names = ((mixer, "model.mm_projector_crosslayer"), (projector, "model.mm_projector"))
    added = {f"{name}.{key}": t for part, name in names for key, t in part.state_dict().items()}
    tensors = {name: t.contiguous().numpy() for name, t in (language.state_dict() | added).items()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    system = {"name": reduction, "taps": taps, "window": window}
    system["mbtf"] = {"last_activation": last_activation}
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "llava_llama", "mm_system": system}
    (tmp_path / "config.json").write_text(json.dumps(config))

    pixels = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        mixed = mixer(torch.cat([states[tap][:, 1:] for tap in taps], -1))
        if last_activation:
            mixed = torch.nn.functional.gelu(mixed)
        tokens = fused_by_definition(mixed, reduction=reduction, window=window, side=side)
        expected = projector(tokens)
    model = import_model(open_source(tmp_path))
    assert model.config.tokens_per_image == (side // window) ** 2
    # One image a row, then both in one row.
    for rows, images in ((2, 1), (1, 2)):
        shaped = pixels.permute(0, 2, 3, 1).numpy().reshape(rows, images, 12, 12, 3)
        actual = ours(model, encode_images, shaped)
        expected_rows = expected.reshape(rows, -1, text.hidden_size)
        np.testing.assert_allclose(actual, expected_rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "num_hidden_layers": 3,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        },
    ],
    ids=["grouped", "tied"],
)
def test_greedy_tokens(changes: dict[str, Any], tmp_path: Path) -> None:
    model = save_llava(tmp_path, small_vision(), small_text(**changes), layer=-2, seed=5)
    source = open_source(tmp_path)
    prompts = make_prompts(
        5, lengths=(90, 21, 40, 57, 3), images=(2, 1, 0, 1, 0), config=source.config
    )
    actual: list[list[int]] = [[] for _ in prompts]

    def take(number: int, ids: np.ndarray) -> bool:
        actual[number] += ids.tolist()
        return True

    engine = Engine(import_model(source))
    list(engine.run(prompts, slots=3, max_new_tokens=40, sampling=GREEDY, every=40, take=take))
    for row, prompt in zip(actual, prompts, strict=True):
        expected = model.generate(**theirs(prompt), do_sample=False, max_new_tokens=40)[0]
        expected = expected[len(prompt.ids) :].tolist()
        assert len(expected) == 40 or expected[-1] == 2
        assert row == expected
