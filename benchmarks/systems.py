"""Times prefill and decode of every system beside LLaVA-1.5: same sizes, random weights, one run.

For each system and budget: the image's tokens, FLOPs and cache, and the time of prefill (an image
and some text) and of decoding, at batch 1 and larger. Contenders take turns (A, B, A, B, ...), so
that what else the machine does falls on all of them alike; ratios are LLaVA-1.5's time over a
system's, so more is better. `--published` prints, without a run, what 7B costs by arithmetic.
`--torch` times PyTorch too, at batch 1, where what a released code computes is written in
`upstream.py`; its time is given over ours.

    python benchmarks/systems.py                 # minutes and 4 GB on two cores
    python benchmarks/systems.py --published     # the table of docs/systems.md
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from forward import make_torch
from machine import describe
from options import make_parser
from upstream import Upstream, connector_of

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.data.batch import Batch
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.prompts import Prompt, pad_prompts
from stf_jax.models import flops
from stf_jax.models.cache import KVCache
from stf_jax.models.layers import unstack
from stf_jax.models.llava import Llava
from stf_jax.systems import SYSTEMS
from stf_jax.systems.base import LlavaConfig

Row = tuple[str, LlavaConfig, int]

# Tokens of what an image is asked.
QUESTION = 8


def parse() -> argparse.Namespace:
    """The sizes and the repetitions."""
    parser = make_parser(
        __doc__, layers=6, width=768, mlp_width=2048, vision_layers=6, vision_width=256
    )
    parser.add_argument("--text", type=int, default=60, help="tokens beside the image's")
    parser.add_argument("--new", type=int, default=16, help="tokens to decode")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--torch", action="store_true", help="PyTorch beside ours, at batch 1")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of one core, where others use the machine, too"
    )
    parser.add_argument("--published", action="store_true", help="7B by arithmetic, no run")
    return parser.parse_args()


def rows_of(vision: VisionConfig, text: TextConfig, names: list[str]) -> Iterator[Row]:
    """Every variant of every system at each budget that it is trained for."""
    for name in names:
        for variant in SYSTEMS[name].variants(vision=vision, text=text).values():
            config = LlavaConfig(vision=vision, text=text, system=variant.system)
            budgets = variant.system.training_budgets(vision)
            for budget in budgets if len(budgets) > 1 else variant.system.budgets(vision):
                yield variant.title, config, budget


def show_image(config: LlavaConfig, text: np.ndarray, budget: int) -> np.ndarray:
    """Text with an image in its middle, or before it where the system puts images first."""
    image = np.full(budget, IMAGE_TOKEN_ID, np.int32)
    if config.images_first is None:
        return np.insert(text, len(text) // 2, image)
    return np.concatenate([image, config.images_first.tokens(1), text]).astype(np.int32)


def cache_bytes(config: LlavaConfig, budget: int, text: int, bytes_each: int) -> int:
    """Keys and values of an image, of every layer, beside so much text."""
    without = np.zeros(text, np.int32)
    held = (
        config.system.held(ids, config.vision)
        for ids in (show_image(config, without, budget), without)
    )
    slots = [both - alone for both, alone in zip(*held, strict=True)]
    positions = sum(slots[group] for group in Llava.abstract(config).text.layer_groups)
    return 2 * config.text.kv_heads * config.text.head_dim * positions * bytes_each


def cost(config: LlavaConfig, budget: int, text: int) -> tuple[flops.Flops, int]:
    """FLOPs of one prefill, and the cache of its image in bfloat16."""
    length = len(show_image(config, np.zeros(text, np.int32), budget))
    prefill = flops.forward(config, rows=1, length=length, images=1)
    return prefill, cache_bytes(config, budget, text, 2)


def print_published(names: list[str], text: int) -> None:
    """A table in Markdown: 7B, one image and `text` tokens."""
    vision, vicuna = VisionConfig.clip_l_336(), TextConfig.vicuna_7b()
    columns = ("tokens", "mean of layers", "tower, TFLOP", "connector", "language model")
    print(f"| system | {' | '.join(columns)} | cache, MiB |")
    print(f"|{' --- |' * (len(columns) + 2)}")
    for title, config, budget in rows_of(vision, vicuna, names):
        prefill, cache = cost(config, budget, text)
        length = len(show_image(config, np.zeros(text, np.int32), budget))
        lengths = config.system.layer_lengths(vision, vicuna, length=length, images=1)
        mean = round(statistics.mean(lengths)) - text
        parts = (prefill.vision, prefill.connector, prefill.text)
        figures = " | ".join(f"{part / 1e12:.3f}" for part in parts)
        print(f"| {title} | {budget} | {mean} | {figures} | {cache / 2**20:.1f} |")


def build(config: LlavaConfig, dtype: str) -> Llava:
    """Random weights; layers one by one, as answers are computed."""
    model = Llava.abstract(config, dtype=jnp.dtype(dtype))
    rng = np.random.default_rng(0)
    leaves = jax.tree.map(
        lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), dtype),
        nnx.state(model),
    )
    nnx.update(model, leaves)
    model.text.layers, model.vision.layers = (
        unstack(model.text.layers),
        unstack(model.vision.layers),
    )
    return model


class Contender:
    """One system at one budget and batch size."""

    def __init__(self, model: Llava, budget: int, *, text: int, new: int, batch: int):
        config = model.config
        assert isinstance(config, LlavaConfig)
        rng = np.random.default_rng(0)
        ids = show_image(config, rng.integers(3, 31000, text).astype(np.int32), budget)
        size = config.image_size
        question = ids[-QUESTION:] if config.question_length else None
        prompt = Prompt(
            ids=ids,
            pixels=rng.standard_normal((1, size, size, 3), np.float32),
            budget=budget,
            question=question,
        )
        uniform = config.system.compacts
        whole = pad_prompts([prompt] * batch, rows=batch, image_size=size, uniform=uniform)
        # Without the bucket's padding: what is compared is the systems.
        self._batch: Batch = dataclasses.replace(
            whole,
            **{
                name: getattr(whole, name)[:, : len(ids)]
                for name in ("ids", "labels", "positions", "segments", "image_slots")
            },
        )
        graph, self._state = nnx.split(model)
        start = jnp.full(batch, len(ids), jnp.int32)

        def prefill(state: nnx.State, batch: Batch) -> tuple[jax.Array, KVCache]:
            logits, cache = nnx.merge(graph, state).prefill(batch)
            return logits, cache.grow(new)

        def decode(state: nnx.State, logits: jax.Array, cache: KVCache) -> jax.Array:
            model = nnx.merge(graph, state)

            def step(_: int, carry: Any) -> Any:
                token, start, cache = carry
                logits, cache = model.extend(
                    token[:, None], start=start, lengths=jnp.ones_like(start), cache=cache
                )
                return jnp.argmax(logits, -1).astype(jnp.int32), start + 1, cache

            first = jnp.argmax(logits, -1).astype(jnp.int32)
            return jax.lax.fori_loop(0, new, step, (first, start, cache))[0]

        self._prefill, self._decode = jax.jit(prefill), jax.jit(decode, donate_argnums=2)

    def prefill(self) -> Any:
        """Image and text in, logits of the next token and the cache out."""
        return jax.block_until_ready(self._prefill(self._state, self._batch))

    def decode(self, prefilled: Any) -> Any:
        """The tokens after the first."""
        return jax.block_until_ready(self._decode(self._state, *prefilled))


class Timed(Protocol):
    """What is timed."""

    def prefill(self) -> Any:
        """Image and text in, logits of the next token and the cache out."""

    def decode(self, prefilled: Any) -> Any:
        """The tokens after the first."""


def make_torch_contenders(
    rows: list[tuple[str, Row]], args: argparse.Namespace
) -> dict[str, Timed]:
    """Those of PyTorch, which share one model, under the names of ours."""
    model, ids = make_torch(args), np.random.default_rng(0).integers(3, 31000, args.text)
    # As little as a question has here; ours are padded to its most.
    question = ids[-QUESTION:]
    connectors = {name: connector_of(model, config, budget) for name, (_, config, budget) in rows}
    torch.set_default_dtype(torch.float32)
    return {
        name: Upstream(model, connect, ids, args.text // 2, question, args.new)
        for name, connect in connectors.items()
        if connect is not None
    }


def measure(
    contenders: Mapping[str, Timed], repeats: int, now: Callable[[], float]
) -> dict[str, tuple[float, float]]:
    """The median seconds of prefill and of decoding, each once a round, after one to compile."""
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in contenders}

    def clock(run: Callable[[], Any], record: list[float], *, counts: bool) -> Any:
        # Threads of the other runtime that still spin would share the cores.
        time.sleep(0.05)
        start = now()
        result = run()
        if counts:
            record.append(now() - start)
        return result

    for round_ in range(repeats + 1):
        for name, contender in contenders.items():
            prefills, decodes = seconds[name]
            prefilled = clock(contender.prefill, prefills, counts=round_ > 0)
            clock(partial(contender.decode, prefilled), decodes, counts=round_ > 0)
    return {
        name: (statistics.median(prefills), statistics.median(decodes))
        for name, (prefills, decodes) in seconds.items()
    }


def main() -> None:
    """Builds, times, prints."""
    args = parse()
    if args.published:
        print_published(args.systems, args.text)
        return
    vision = dataclasses.replace(
        VisionConfig.clip_l_336(),
        width=args.vision_width,
        mlp_width=4 * args.vision_width,
        layers=args.vision_layers,
        heads=max(1, args.vision_width // 64),
    )
    heads = args.width // 128
    text = TextConfig(
        width=args.width,
        mlp_width=args.mlp_width,
        layers=args.layers,
        heads=heads,
        kv_heads=heads,
    )
    names = list(dict.fromkeys(["llava", *args.systems]))
    rows = [
        (f"{title} {budget}", (title, config, budget))
        for title, config, budget in rows_of(vision, text, names)
    ]
    now, clock = time.perf_counter, "seconds"
    if args.cpu_time:
        torch.set_num_threads(1)
        now, clock = time.process_time, "processor seconds"
    print(f"{describe()}, {args.dtype}, {clock}")
    for batch in args.batches:
        contenders: dict[str, Timed] = {
            name: Contender(
                build(config, args.dtype), budget, text=args.text, new=args.new, batch=batch
            )
            for name, (_, config, budget) in rows
        }
        if args.torch and batch == 1:
            theirs = make_torch_contenders(rows, args)
            contenders |= {f"{name}, PyTorch": theirs[name] for name in theirs}
        times = measure(contenders, args.repeats, now)
        base = next(iter(times.values()))
        print(f"batch {batch}: LLaVA-1.5 takes {base[0]:.3f} s and {base[1]:.3f} s; ratios to it")
        columns = ["tokens", "GFLOP", "cache", "prefill", "decode"]
        columns += ["and of PyTorch's time to ours"] if args.torch and batch == 1 else []
        print(f"{'':26}{'  '.join(f'{column:>7}' for column in columns)}")
        for name, (_, config, budget) in rows:
            prefill, decode = times[name]
            spent, cache = cost(config, budget, args.text)
            print(
                f"{name:26}{budget:7}{spent.total / 1e9:9.0f}{cache / 2**20:7.1f} M"
                f"{base[0] / prefill:9.2f}{base[1] / decode:9.2f}",
                end="",
            )
            other = times.get(f"{name}, PyTorch")
            print("" if other is None else f"{other[0] / prefill:9.2f}{other[1] / decode:9.2f}")


if __name__ == "__main__":
    main()
