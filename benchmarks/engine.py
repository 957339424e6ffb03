"""Times the engine on a workload like GQA's beside `transformers`' PyTorch LLaVA at batch 1.

Several questions about each image, short answers: a third of the vocabulary, drawn at random, ends
an answer, and so does a limit of a few tokens; every contender gives the same. PyTorch
answers one question after another, as the reference evaluates. Weights are random, the same on both
sides; contenders take turns. Behind the table stands what prefix reuse and slots bring, each with
and without the other. The default takes some minutes on two cores.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from forward import IMAGE_ID, build, convert_model, make_torch
from options import add_questions, make_parser

from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.engine import Engine
from stf_jax.infer.prompts import Prompt
from stf_jax.infer.sampling import GREEDY

# Tokens of the system text and "USER:", which come before the image.
SYSTEM = 35
Answers = list[list[int]]


def parse() -> argparse.Namespace:
    """The sizes, the workload and the repetitions."""
    parser = make_parser(__doc__, layers=4, width=512, mlp_width=1376)
    add_questions(parser, questions=32, new=4)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def make_prompts(args: argparse.Namespace, *, tokens: int, size: int) -> list[Prompt]:
    """Suffixes of 12 to 30 tokens, those about an image not together, as in GQA's file."""
    rng = np.random.default_rng(0)
    system = rng.integers(3, 31000, SYSTEM)
    pixels = rng.standard_normal((args.images, 1, size, size, 3), dtype=np.float32)
    prompts = []
    for number in range(args.images * args.questions):
        image = number % args.images
        question = rng.integers(3, 31000, rng.integers(12, 31))
        ids = np.concatenate([system, np.full(tokens, IMAGE_TOKEN_ID), question])
        prompts.append(Prompt(ids=ids.astype(np.int32), pixels=pixels[image], image_key=image))
    return prompts


def ask_torch(model: Any, ends: list[int], new: int, prompts: list[Prompt]) -> Answers:
    """One question after another."""
    answers = []
    for prompt in prompts:
        ids = np.where(prompt.ids == IMAGE_TOKEN_ID, IMAGE_ID, prompt.ids)[None]
        pixels = torch.tensor(prompt.load().transpose(0, 3, 1, 2))
        with torch.inference_mode():
            out = model.generate(
                input_ids=torch.tensor(ids, dtype=torch.long, device=model.device),
                attention_mask=torch.ones(ids.shape, dtype=torch.long, device=model.device),
                pixel_values=pixels.to(model.device, model.dtype),
                do_sample=False,
                max_new_tokens=new,
                eos_token_id=ends,
                pad_token_id=0,
            )
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def ask_engine(engine: Engine, new: int, slots: int, share: bool, prompts: list[Prompt]) -> Answers:
    """All questions at once."""
    answers: Answers = [[] for _ in prompts]

    def take(number: int, ids: np.ndarray) -> bool:
        answers[number] += ids.tolist()
        return True

    run = engine.run(
        prompts,
        slots=slots,
        max_new_tokens=new,
        sampling=GREEDY,
        every=16,
        take=take,
        share=share,
    )
    assert len(list(run)) == len(prompts)
    return answers


def gains(without: list[float], given: list[float]) -> tuple[float, float]:
    """How many times as fast: of the least times, of the medians."""
    return min(without) / min(given), statistics.median(without) / statistics.median(given)


def main() -> None:
    """Builds, asks, compares, prints."""
    args = parse()
    torch_model = make_torch(args)
    config, weights = convert_model(torch_model)
    ends = np.random.default_rng(1).choice(np.arange(3, 31000), 10000, replace=False)
    text = dataclasses.replace(config.text, eos_ids=tuple(map(int, ends)))
    config = dataclasses.replace(config, text=text)
    engine = Engine(build(config, weights, args.dtype))
    del weights
    if torch.cuda.is_available():
        torch_model = torch_model.cuda()
    prompts = make_prompts(args, tokens=config.tokens_per_image, size=config.vision.image_size)
    pytorch, alone, reuse = "PyTorch, one at a time", "ours, one at a time", "prefix reuse"
    slots, both = f"{args.slots} slots", f"{args.slots} slots, prefix reuse"
    contenders: dict[str, Callable[[list[Prompt]], Answers]] = {
        pytorch: partial(ask_torch, torch_model, ends.tolist(), args.new),
        alone: partial(ask_engine, engine, args.new, 1, False),
        reuse: partial(ask_engine, engine, args.new, 1, True),
        slots: partial(ask_engine, engine, args.new, args.slots, False),
        both: partial(ask_engine, engine, args.new, args.slots, True),
    }
    answers = {name: ask(prompts) for name, ask in contenders.items()}  # and compile
    expected = next(iter(answers.values()))
    lengths = [len(answer) for answer in expected]
    print(
        f"{len(prompts)} questions of {min(len(p.ids) for p in prompts)} to "
        f"{max(len(p.ids) for p in prompts)} tokens, answers of {statistics.mean(lengths):.1f}"
    )
    for name, generated in answers.items():
        same = sum(id_ == other for id_, other in zip(generated, expected, strict=True))
        print(f"{name:<28}{same:4} of {len(prompts)} answers as PyTorch's", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.repeats):
        for name, ask in contenders.items():
            # Threads of the other runtime that still spin would share the cores.
            time.sleep(0.05)
            start = time.perf_counter()
            ask(prompts)
            seconds[name].append(time.perf_counter() - start)
    print(f"\n{'questions/s':<28}{'best':>8}{'median':>8}{'times PyTorch, best':>21}{'median':>8}")
    for name, times in seconds.items():
        best, middle = len(prompts) / min(times), len(prompts) / statistics.median(times)
        ratio = gains(seconds[pytorch], times)
        print(f"{name:<28}{best:8.2f}{middle:8.2f}{ratio[0]:21.1f}{ratio[1]:8.1f}")
    print(f"\n{'times as fast':<44}{'best':>8}{'median':>8}")
    for title, without, given in (
        ("prefix reuse, with one slot", alone, reuse),
        (f"prefix reuse, with {args.slots} slots", slots, both),
        (f"{args.slots} slots instead of one, without reuse", alone, slots),
        (f"{args.slots} slots instead of one, with reuse", reuse, both),
    ):
        best, middle = gains(seconds[without], seconds[given])
        print(f"{title:<44}{best:8.1f}{middle:8.1f}")


if __name__ == "__main__":
    main()
