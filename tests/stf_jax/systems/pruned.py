"""What the tests of systems share that drop tokens between layers: decoders, rows, greedy steps."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stf_jax.convert.mapping import text_entries
from stf_jax.models.cache import KVCache
from stf_jax.models.layers import Init
from stf_jax.models.llama import Llama
from stf_jax.models.marks import IMAGE, Marks
from stf_jax.models.pruning import PrunedLlama, Schedule
from tests.stf_jax.systems.reference import Case, fill


def decoder_of(case: Case, kind: type[PrunedLlama], schedule: Schedule) -> PrunedLlama:
    """With the folder's weights."""
    text, tokens = case.decoder_text, case.json["sizes"]["vision_tokens"]

    def make() -> PrunedLlama:
        return kind(text, tokens=tokens, schedule=schedule, init=Init(rngs=nnx.Rngs(0)))

    model = nnx.eval_shape(make)
    entries = text_entries(text, vocabulary=text.vocab_size)
    fill(model, entries, case.group("w."), at="text/")
    return model


def drops(counts: Any) -> Schedule:
    """A drop before every layer but the first, so that each layer is a stage: counts by layer."""
    return tuple((layer, int(count)) for layer, count in enumerate(counts))[1:]


def marks_of(image: Any, kind: Any = None, segment: Any = None) -> Marks:
    """Of rows in which `image` says which image a position is part of, -1 for text."""
    image = np.asarray(image)
    segment = np.ones(image.shape, np.int32) if segment is None else np.asarray(segment)
    # Positions count from 0 in each segment.
    index = np.arange(image.shape[1])
    first = [[np.flatnonzero(row == s)[0] for s in row] for row in segment]
    kind = np.zeros(image.shape) if kind is None else np.asarray(kind)
    arrays = (index - np.array(first), segment, np.where(image >= 0, IMAGE, kind), image)
    position, segment, kind, image = (jnp.asarray(array, jnp.int32) for array in arrays)
    return Marks(position=position, segment=segment, kind=kind, image=image)


def prompt_marks(length: int, *, start: int, tokens: int, rows: int = 1) -> Marks:
    """Of prompts with one image."""
    index = np.arange(length)
    image = np.where((index >= start) & (index < start + tokens), 0, -1)
    return marks_of(np.broadcast_to(image, (rows, length)))


def run_stages(model: PrunedLlama, x: Any, marks: Marks, **how: Any) -> list[dict[str, Any]]:
    """What each stage leaves, and logits of the last one."""

    @jax.jit
    def run(model: PrunedLlama, x: jax.Array, marks: Marks) -> list[dict[str, Any]]:
        stages = [
            {"x": stage.x, "marks": stage.marks, "scores": stage.scores}
            for stage in model.stages(x, marks, **how)
        ]
        stages[-1]["normed"] = model.norm(stages[-1]["x"])
        stages[-1]["logits"] = model.logits(stages[-1]["normed"])
        return stages

    return run(model, jnp.asarray(x), marks)


@partial(jax.jit, static_argnames=("images", "room"))
def prefill(
    model: Llama, x: jax.Array, marks: Marks, *, images: int | None = 1, room: int = 0
) -> tuple[jax.Array, KVCache]:
    """Logits after the last position of full rows, and the cache with room for more."""
    last = (marks.segment > 0).sum(axis=1) - 1
    hidden, cache = model.prefill(x, marks=marks, last=last, images=images)
    return model.logits(hidden[:, None])[:, 0], cache.grow(room)


@jax.jit
def extend(
    model: Llama, x: jax.Array, start: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Logits after further embeddings of full rows."""
    index = jnp.arange(x.shape[1], dtype=jnp.int32)
    position = cache.next_position(start)[:, None] + index
    marks = Marks.text(position, jnp.ones_like(position))
    hidden, cache = model.extend(x, marks=marks, slots=start[:, None] + index, cache=cache)
    return model.logits(hidden), cache


@dataclasses.dataclass(frozen=True)
class Greedy:
    """A greedy answer: its tokens, the logits that chose them, and the cache after the prompt."""

    tokens: np.ndarray
    logits: np.ndarray
    cache: KVCache


def answer(model: Llama, x: Any, marks: Marks, *, steps: int) -> Greedy:
    """Of one prompt: its layers' caches hold what the prefill left."""
    logits, cache = prefill(model, jnp.asarray(x), marks, room=steps)
    first, rows, length = cache, [logits[0]], x.shape[1]
    for step in range(steps - 1):
        token = jnp.argmax(rows[-1])[None, None].astype(jnp.int32)
        start = jnp.array([length + step], jnp.int32)
        logits, cache = extend(model, model.embed(token), start, cache)
        rows.append(logits[0, 0])
    table = np.asarray(rows)
    return Greedy(tokens=table.argmax(axis=1), logits=table, cache=first)
