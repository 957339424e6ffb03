"""What a scheme costs and saves: bytes, KL and agreement against float32, milliseconds a token.

    python benchmarks/quantization.py MODEL [--schemes int8 int4] [--new 32]

MODEL is a native checkpoint of plain weights; docs/quantization.md holds what came out. The prompts
are text: the language model is all that a scheme changes. Each is continued greedily in float32,
and every variant reads prompts and continuations, so that all are asked for the same next tokens.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import stf_jax
from stf_jax.convert import export_checkpoint
from stf_jax.data.tokenizer import encode_prompt
from stf_jax.models.cache import KVCache
from stf_jax.models.llama import Llama, take
from stf_jax.models.marks import Marks
from stf_jax.models.quantization import bytes_per_value
from stf_jax.util.errors import CheckpointError

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "Water boils at a lower temperature on a mountain because",
    "def fibonacci(n):\n    ",
    "The three primary colors are",
    "Dear Sir or Madam,\n\nI am writing to you about the invoice that I received",
    "To make bread you need flour, water, salt and",
    "In 1969, Neil Armstrong",
    "A triangle with sides of 3, 4 and 5 has an area of",
    "The photograph shows a red car in front of a house. On the left side of the street",
)
_REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Measured:
    """One variant of the model."""

    name: str
    bytes: int
    logits: np.ndarray
    answers: np.ndarray
    milliseconds: float


def main() -> None:
    """Prints a table, one row a variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--schemes", nargs="*", default=["int8", "int4-128", "int4"])
    parser.add_argument("--new", type=int, default=32, help="tokens of a continuation (32)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        variants = [("float32", options.model, "float32"), ("bfloat16", options.model, "bfloat16")]
        for scheme in options.schemes:
            path = Path(folder) / scheme
            try:
                export_checkpoint(options.model, path, layout="native", quantize=scheme)
            except CheckpointError as error:
                print(error)
                continue
            variants += [(scheme, path, "float32")]
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        print("| weights | MB | KL, nats | same next token, % | same answers | ms a token |")
        print("| --- " * 6 + "|")
        truth: Measured | None = None
        for name, path, dtype in variants:
            found = measure(name, path, dtype, new=options.new, truth=truth)
            truth = truth or found
            print(row(found, truth), flush=True)


def measure(name: str, path: Path, dtype: Any, *, new: int, truth: Measured | None) -> Measured:
    """Runs one variant over all prompts, together, padded at their ends."""
    model = stf_jax.load(path, dtype=dtype)
    graph, state = nnx.split(model.network.text)
    del model.network.text
    rows = [encode_prompt(model.tokenizer, prompt) for prompt in PROMPTS]
    lengths = np.array([len(ids) for ids in rows], np.int32)
    ids = np.zeros((len(rows), lengths.max()), np.int32)
    for number, tokens in enumerate(rows):
        ids[number, : len(tokens)] = tokens
    answers = np.asarray(answer(graph, state, ids, lengths, new)[0])
    continued = answers if truth is None else truth.answers
    whole = np.pad(ids, ((0, 0), (0, new)))
    for number, length in enumerate(lengths):
        whole[number, length : length + new] = continued[number]
    logits = np.asarray(read(graph, state, whole))
    # Of the prompts and what follows, without padding.
    logits = np.concatenate([row[: n + new] for row, n in zip(logits, lengths, strict=True)])
    leaves = jax.tree.leaves(state)
    size = int(sum(leaf.size * bytes_per_value(leaf.dtype) for leaf in leaves))
    return Measured(name, size, logits, answers, time_token(graph, state, ids[:1], lengths[:1]))


def read(graph: Any, state: Any, ids: np.ndarray) -> jax.Array:
    """Logits at every position of whole rows."""

    @jax.jit
    def run(state: Any, ids: jax.Array) -> jax.Array:
        text: Llama = nnx.merge(graph, state)
        places = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        marks = Marks.text(places, jnp.ones_like(ids))
        return text.logits(text(text.embed(ids), marks=marks))

    return run(state, ids)


def answer(graph: Any, state: Any, ids: np.ndarray, lengths: np.ndarray, new: int) -> Any:
    """The next `new` greedy tokens of each row, and the program that made them."""

    @jax.jit
    def begin(state: Any, ids: jax.Array, lengths: jax.Array) -> tuple[jax.Array, KVCache]:
        text: Llama = nnx.merge(graph, state)
        index = jnp.arange(ids.shape[1], dtype=jnp.int32)
        places = jnp.broadcast_to(index, ids.shape)
        marks = Marks.text(places, (index < lengths[:, None]).astype(jnp.int32))
        hidden, cache = text.prefill(text.embed(ids), marks=marks, last=lengths - 1)
        first = jnp.argmax(text.logits(hidden[:, None])[:, 0], axis=-1)
        return first.astype(jnp.int32), cache.grow(new)

    @jax.jit
    def step(
        state: Any, token: jax.Array, place: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, jax.Array, KVCache]:
        text: Llama = nnx.merge(graph, state)
        marks = Marks.text(place[:, None], jnp.ones_like(token)[:, None])
        hidden, cache = text.extend(
            text.embed(token[:, None]), marks=marks, slots=place[:, None], cache=cache
        )
        logits = text.logits(take(hidden, jnp.zeros_like(place))[:, None])[:, 0]
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), place + 1, cache

    token, cache = begin(state, ids, lengths)
    place, tokens = jnp.asarray(lengths), [token]
    for _ in range(new - 1):
        token, place, cache = step(state, token, place, cache)
        tokens.append(token)
    return jnp.stack(tokens, axis=1), (step, token, place, cache)


def time_token(graph: Any, state: Any, ids: np.ndarray, lengths: np.ndarray) -> float:
    """Milliseconds of one decoding step of one row, the best of several runs of eight."""
    _, (step, token, place, cache) = answer(graph, state, ids, lengths, 64)
    best = float("inf")
    place = place - 32
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for _ in range(8):
            token, place, cache = step(state, token, place, cache)
        token.block_until_ready()
        best = min(best, (time.perf_counter() - start) / 8)
    return 1000 * best


def row(found: Measured, truth: Measured) -> str:
    """Of the table."""
    log = jax.nn.log_softmax(truth.logits), jax.nn.log_softmax(found.logits)
    divergence = float((jnp.exp(log[0]) * (log[0] - log[1])).sum(axis=-1).mean())
    same = (truth.logits.argmax(axis=-1) == found.logits.argmax(axis=-1)).mean()
    answers = (truth.answers == found.answers).all(axis=1).sum()
    return (
        f"| {found.name} | {found.bytes / 1e6:,.1f} | {divergence:.5f} | {100 * same:.1f} | "
        f"{answers} of {len(found.answers)} | {found.milliseconds:.1f} |"
    )


if __name__ == "__main__":
    main()
