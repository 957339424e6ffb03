"""Times prefill and decode beside `transformers`' PyTorch LLaVA: same weights and inputs, one run.

Random weights of a LLaVA-1.5 are made in PyTorch and imported; the STF model shares its language
model and tower. Contenders take turns (A, B, A, B, ...), so that what else the machine does falls
on all of them alike. The default sizes are dominated by the language model and take some minutes
and 6 GB on two cores. On a GPU, at the size of 7B:

    python benchmarks/forward.py --dtype bfloat16 --layers 32 --width 4096 --mlp-width 11008 \
        --vision-layers 24 --vision-width 1024
"""

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from machine import print_ceilings
from options import make_parser

from stf_jax.convert import open_source
from stf_jax.data.batch import Batch
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.engine import Engine
from stf_jax.infer.prompts import Prompt
from stf_jax.infer.sampling import GREEDY
from stf_jax.models.cache import KVCache
from stf_jax.models.connector import Architecture
from stf_jax.models.layers import unstack
from stf_jax.models.llava import Llava, marks_of
from stf_jax.store.arrays import flatten, unflatten
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.stf import STF, MBTFConfig

HEAD = 128
IMAGE_ID = 31999
Weights = dict[str, jax.Array]


def parse() -> argparse.Namespace:
    """The sizes and the repetitions."""
    parser = make_parser(__doc__, layers=8, width=1024, mlp_width=2752)
    parser.add_argument("--text", type=int, default=60, help="tokens beside the image's")
    parser.add_argument("--new", type=int, default=16, help="tokens to decode")
    parser.add_argument("--repeats", type=int, default=9)
    return parser.parse_args()


def make_torch(args: argparse.Namespace) -> Any:
    """`transformers`' LLaVA-1.5 of these sizes, with random weights."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=args.vision_width,
        intermediate_size=4 * args.vision_width,
        num_hidden_layers=args.vision_layers,
        num_attention_heads=max(1, args.vision_width // 64),
        image_size=336,
        patch_size=14,
    )
    text = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=args.width,
        intermediate_size=args.mlp_width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // HEAD,
        num_key_value_heads=args.width // HEAD,
        head_dim=HEAD,
        max_position_embeddings=4096,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, args.dtype))
    model = transformers.LlavaForConditionalGeneration(config).eval()
    # All zero, they would be cheaper than real ones.
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "class_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def convert_model(model: Any) -> tuple[LlavaConfig, Weights]:
    """The same model here."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        source = open_source(pathlib.Path(folder))
        return source.config, {leaf.path: jnp.asarray(leaf.read()) for leaf in source.leaves()}


def build(config: LlavaConfig, weights: Weights, dtype: str) -> Llava:
    """A model over these weights; what they lack is random."""
    model = Llava.abstract(config, dtype=jnp.dtype(dtype))
    rng = np.random.default_rng(0)
    leaves = {
        path: weights[path]
        if path in weights and weights[path].shape == leaf.shape
        else jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), dtype)
        for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items()
    }
    nnx.update(model, unflatten(leaves))
    return model


def prompt_of(config: Architecture, text: int) -> Prompt:
    """One image in the midst of `text` random tokens."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 31000, text)
    place = np.full(config.tokens_per_image, text // 2)
    size = config.image_size
    return Prompt(
        ids=np.insert(ids, place, IMAGE_TOKEN_ID).astype(np.int32),
        pixels=rng.standard_normal((1, size, size, 3), dtype=np.float32),
    )


def exact_batch(prompt: Prompt) -> Batch:
    """One row without padding."""
    ids = prompt.ids[None]
    images = np.cumsum(ids == IMAGE_TOKEN_ID, axis=1) - 1
    fields: dict[str, Any] = {
        "ids": ids,
        "labels": np.full_like(ids, -100),
        "positions": np.arange(ids.shape[1], dtype=np.int32)[None],
        "segments": np.ones_like(ids),
        "image_slots": np.where(ids == IMAGE_TOKEN_ID, images, -1).astype(np.int32),
        "pixels": prompt.load()[None],
    }
    return Batch(**jax.tree.map(jnp.asarray, fields))


class Ours:
    """Jitted as `stf_jax.infer.program` does it: layers apart, weights as arguments."""

    def __init__(self, model: Llava, prompt: Prompt, *, new: int):
        # A copy of the module, since unstacking changes it.
        model = nnx.merge(*nnx.split(model))
        model.text.layers = unstack(model.text.layers)
        model.vision.layers = unstack(model.vision.layers)
        graph, self._state = nnx.split(model)
        self._batch, self._new = exact_batch(prompt), new
        length = len(prompt.ids)
        self._position = jnp.asarray([length], jnp.int32)
        hidden = (1, length, model.config.text.width)
        embeds = 0.02 * np.random.default_rng(1).standard_normal(hidden, np.float32)
        self._embeds = jnp.asarray(embeds, model.text.embedding.dtype)

        def prefill(state: nnx.State, batch: Batch) -> tuple[jax.Array, KVCache]:
            logits, cache = nnx.merge(graph, state).prefill(batch)
            return logits, cache.grow(new)

        def prefill_text(
            state: nnx.State, embeds: jax.Array, batch: Batch
        ) -> tuple[jax.Array, KVCache]:
            model = nnx.merge(graph, state)
            marks = marks_of(batch, tokens_per_image=model.config.tokens_per_image)
            last = jnp.full(1, length - 1, jnp.int32)
            hidden, cache = model.text.prefill(embeds, marks=marks, last=last)
            return model.text.logits(hidden[:, None])[:, 0], cache.grow(new)

        def decode(
            state: nnx.State, logits: jax.Array, position: jax.Array, cache: KVCache
        ) -> jax.Array:
            model = nnx.merge(graph, state)

            def step(_: int, carry: Any) -> Any:
                token, position, cache = carry
                logits, cache = model.extend(
                    token[:, None], start=position, lengths=jnp.ones_like(position), cache=cache
                )
                return jnp.argmax(logits, -1).astype(jnp.int32), position + 1, cache

            first = jnp.argmax(logits, -1).astype(jnp.int32)
            return jax.lax.fori_loop(0, new, step, (first, position, cache))

        self._prefill, self._prefill_text = jax.jit(prefill), jax.jit(prefill_text)
        self._decode = jax.jit(decode, donate_argnums=3)

    def prefill(self, _: object = None) -> Any:
        """Image and text in, logits of the next token and the cache out."""
        return jax.block_until_ready(self._prefill(self._state, self._batch))

    def prefill_text(self, _: object = None) -> Any:
        """The language model's part of it."""
        return jax.block_until_ready(self._prefill_text(self._state, self._embeds, self._batch))

    def decode(self, prefilled: Any) -> Any:
        """The tokens after the first."""
        logits, cache = prefilled
        return jax.block_until_ready(self._decode(self._state, logits, self._position, cache))


class Theirs:
    """PyTorch, eager, with its fused attention."""

    def __init__(self, model: Any, prompt: Prompt, *, new: int):
        self._model, self._new = model, new
        self._device, dtype = model.device, model.dtype
        ids = np.where(prompt.ids == IMAGE_TOKEN_ID, IMAGE_ID, prompt.ids)[None]
        pixels = torch.tensor(prompt.load().transpose(0, 3, 1, 2))
        self._inputs = {
            "input_ids": torch.tensor(ids, dtype=torch.long, device=self._device),
            "pixel_values": pixels.to(self._device, dtype),
        }
        self._embeds = torch.randn(1, len(prompt.ids), model.config.text_config.hidden_size)
        self._embeds = (0.02 * self._embeds).to(self._device, dtype)

    def _forward(self, **inputs: Any) -> tuple[Any, Any]:
        with torch.inference_mode():
            out = self._model(**inputs, use_cache=True, logits_to_keep=1)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return out.logits[:, -1], out.past_key_values

    def prefill(self, _: object = None) -> Any:
        """Image and text in, logits of the next token and the cache out."""
        return self._forward(**self._inputs)

    def prefill_text(self, _: object = None) -> Any:
        """The language model's part of it."""
        return self._forward(inputs_embeds=self._embeds)

    def decode(self, prefilled: Any) -> Any:
        """The tokens after the first."""
        logits, cache = prefilled
        for _ in range(self._new):
            logits, cache = self._forward(
                input_ids=logits.argmax(-1, keepdim=True), past_key_values=cache
            )
        return logits


@dataclasses.dataclass(frozen=True)
class Task:
    """Something to time; what it needs is prepared outside the clock."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


def interleave(tasks: Mapping[str, Task], repeats: int) -> dict[str, list[float]]:
    """Seconds of each task, each run once a round, after a round to compile and warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_ in range(repeats + 1):
        for name, task in tasks.items():
            prepared = task.prepare()
            # Threads of the other runtime that still spin would share the cores.
            time.sleep(0.05)
            start = time.perf_counter()
            task.run(prepared)
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def first_token(engine: Engine, prompt: Prompt, _: object = None) -> Any:
    """What a user waits for, padding to a bucket and all."""
    run = engine.run(
        [prompt],
        slots=1,
        max_new_tokens=1,
        sampling=GREEDY,
        every=1,
        take=lambda number, ids: True,
    )
    return list(run)


def main() -> None:
    """Builds, checks that both give the same, times, prints."""
    args = parse()
    print_ceilings(rows=576 + args.text, width=args.width, mlp_width=args.mlp_width)
    torch_model = make_torch(args)
    config, weights = convert_model(torch_model)
    if torch.cuda.is_available():
        torch_model = torch_model.cuda()
    layers = args.vision_layers
    system = STF(
        taps=tuple(range(layers - 1, 0, -1)),
        mbtf=MBTFConfig(mlp_width=4 * args.vision_width),
        projector_width=16 * args.vision_width,
    )
    stf_config = dataclasses.replace(config, system=system)
    models = {576: build(config, weights, args.dtype), 144: build(stf_config, weights, args.dtype)}
    del weights
    prompts = {k: prompt_of(model.config, args.text) for k, model in models.items()}
    ours = {k: Ours(model, prompts[k], new=args.new) for k, model in models.items()}
    theirs = {k: Theirs(torch_model, prompts[k], new=args.new) for k in prompts}

    logits, expected = ours[576].prefill()[0], theirs[576].prefill()[0].float().cpu().numpy()
    print(f"largest difference of logits: {np.abs(np.asarray(logits) - expected).max():.1e}")

    engines = {k: Engine(nnx.merge(*nnx.split(model))) for k, model in models.items()}
    tasks = {"torch prefill 576": Task(theirs[576].prefill)}
    for k in models:
        tasks |= {
            f"jax prefill {k}": Task(ours[k].prefill),
            f"torch text {k}": Task(theirs[k].prefill_text),
            f"jax text {k}": Task(ours[k].prefill_text),
            f"torch decode {k}": Task(theirs[k].decode, theirs[k].prefill_text),
            f"jax decode {k}": Task(ours[k].decode, ours[k].prefill_text),
            f"jax first {k}": Task(partial(first_token, engines[k], prompts[k])),
        }
    seconds = interleave(tasks, args.repeats)
    report(seconds, args)


def report(seconds: dict[str, list[float]], args: argparse.Namespace) -> None:
    """A table of milliseconds, and the ratios that matter."""
    steps = {name: args.new if "decode" in name else 1 for name in seconds}
    best = {name: 1000 * min(times) / steps[name] for name, times in seconds.items()}
    middle = {
        name: 1000 * statistics.median(times) / steps[name] for name, times in seconds.items()
    }
    print(f"\n{'ms (of decode: a token)':<24}{'least':>9}{'median':>9}{'most':>9}")
    for name, times in seconds.items():
        most = 1000 * max(times) / steps[name]
        print(f"{name:<24}{best[name]:9.1f}{middle[name]:9.1f}{most:9.1f}")
    ratios = (
        ("prefill 576: PyTorch / ours", "torch prefill 576", "jax prefill 576"),
        ("LLM prefill 576: PyTorch / ours", "torch text 576", "jax text 576"),
        ("LLM prefill 144: PyTorch / ours", "torch text 144", "jax text 144"),
        ("decode after 576: PyTorch / ours", "torch decode 576", "jax decode 576"),
        ("decode after 144: PyTorch / ours", "torch decode 144", "jax decode 144"),
        ("prefill: our 576 / our 144", "jax prefill 576", "jax prefill 144"),
        ("prefill: PyTorch 576 / our 144", "torch prefill 576", "jax prefill 144"),
        ("LLM prefill: our 576 / our 144", "jax text 576", "jax text 144"),
        ("LLM prefill: PyTorch 576 / 144", "torch text 576", "torch text 144"),
        ("first token: our 576 / our 144", "jax first 576", "jax first 144"),
        ("padding: first token / prefill 576", "jax first 576", "jax prefill 576"),
    )
    print(f"\n{'ratio of':<36}{'least':>9}{'median':>9}")
    for text, above, below in ratios:
        print(f"{text:<36}{best[above] / best[below]:9.2f}{middle[above] / middle[below]:9.2f}")


if __name__ == "__main__":
    main()
