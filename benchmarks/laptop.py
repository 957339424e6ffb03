"""Peak memory and milliseconds a token of a 7B model on this CPU, with random weights.

    python benchmarks/laptop.py [--layers 4] [--quantization int4] [--dtype bfloat16] [--new 8]

Writes a native checkpoint of so many of the 32 layers to a temporary folder, in a process of its
own, and answers from it as `stf_jax.load` would: restored, taken apart, prefilled, decoded.
"""

import argparse
import dataclasses
import functools
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from stf_jax.infer.engine import Engine
from stf_jax.infer.prompts import Prompt
from stf_jax.infer.sampling import GREEDY
from stf_jax.models.llava import Llava
from stf_jax.store.arrays import flatten
from stf_jax.store.checkpoint import Leaf, open_native, write
from stf_jax.store.packing import INT4, PACKED, packed_shape
from stf_jax.systems import named_config


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--quantization")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--new", type=int, default=8, help="tokens of an answer (8)")
    options = parser.parse_args()
    # Of the processes below.
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model")
        steps: list[tuple[Any, tuple[Any, ...]]] = [
            (make, (path, options.layers, options.quantization, options.dtype)),
            (answer, (path, options.new)),
        ]
        for target, arguments in steps:
            worker = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
            worker.start()
            worker.join()
            if worker.exitcode:
                raise SystemExit(worker.exitcode)


def make(path: str, layers: int, quantization: str | None, dtype: str) -> None:
    """Writes the checkpoint, a leaf at a time."""
    config = named_config("llava_stf_7b", quantization=quantization)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, layers=layers))
    shapes = flatten(nnx.to_pure_dict(nnx.state(Llava.abstract(config, dtype=jnp.dtype(dtype)))))
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> np.ndarray:
        if leaf.dtype == INT4:
            return rng.integers(0, 256, packed_shape(leaf.shape), PACKED)
        if leaf.dtype == jnp.int8:
            return rng.integers(-128, 128, leaf.shape, np.int8)
        return np.full(leaf.shape, 0.001, leaf.dtype)

    def leaves() -> Iterator[Leaf]:
        for name, leaf in shapes.items():
            kind = np.dtype(leaf.dtype)
            yield Leaf(path=name, shape=leaf.shape, dtype=kind, read=functools.partial(draw, leaf))

    write(path, config=config, leaves=leaves(), extras=lambda _: None)


def answer(path: str, new: int) -> None:
    """Answers one request twice, the second time without compiling."""
    opened = open_native(path)
    scales = opened.shapes["text/embedding"].dtype
    network = Llava.abstract(opened.config, dtype=scales)
    start = time.perf_counter()
    nnx.update(network, opened.restore(nnx.to_pure_dict(nnx.state(network))))
    engine = Engine(network)
    loaded = time.perf_counter() - start
    ids = np.arange(3, 35, dtype=np.int32)
    prompt = Prompt(ids=ids, pixels=np.zeros((0, 1, 1, 3), np.float32))
    seconds = []
    for count in (1, new, 1, new):
        start = time.perf_counter()
        for _ in engine.run(
            [prompt], slots=1, max_new_tokens=count, sampling=GREEDY, every=count,
            take=lambda *_: True,
        ):  # fmt: skip
            pass
        seconds.append(time.perf_counter() - start)
    text = opened.config.text
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{text.layers} layers, {text.quantization or 'plain'} weights, {scales}: peak "
        f"{peak:.2f} GiB resident, loaded in {loaded:.1f} s, "
        f"{1000 * (seconds[3] - seconds[2]) / (new - 1):.0f} ms a token"
    )


if __name__ == "__main__":
    main()
