"""Prefill once, then decode in one jitted loop over a preallocated cache.

Every shape is a bucket, so asking again with the same shapes compiles nothing. The loop leaves the
device only where the caller wants to look at tokens before the end: for streaming and stop strings.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from stf_jax.batch import Batch
from stf_jax.infer.prompts import Prompt, bucket, pad_prompts
from stf_jax.infer.sampling import Sampling, sample
from stf_jax.models.cache import KVCache
from stf_jax.models.layers import unstack
from stf_jax.models.llava import Llava
from stf_jax.parallel.sharding import BATCH_AXES, reshard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """What the loop carries: the tokens so far and all that the next one depends on."""

    tokens: Int[Array, "B new"]
    step: Int[Array, ""]
    last: Int[Array, "B"]
    positions: Int[Array, "B"]
    finished: Bool[Array, "B"]
    cache: KVCache


class Generator:
    """A model ready to answer, on one device or on a mesh."""

    def __init__(self, model: Llava, *, mesh: Mesh | None = None):
        self.config, self.mesh, self._rules = model.config, mesh, model.rules
        with self._on_mesh():
            # The caller's model loses its stacks: there is no room for 7B weights twice.
            model.text.layers = unstack(model.text.layers)
            model.vision.layers = unstack(model.vision.layers)
        self._graph, self._parameters = nnx.split(model)
        self._prefill = jax.jit(self._prefill_step, static_argnames=("slots", "new", "greedy"))
        # The cache is written in place.
        self._decode = jax.jit(self._decode_steps, static_argnames="greedy", donate_argnums=1)

    def stream(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, sampling: Sampling, every: int
    ) -> Iterator[list[Int[np.ndarray, "new"]]]:
        """New tokens of each prompt, `every` steps at a time, until all have finished.

        A row that ended, at an end-of-sequence id or at its last position, gets no more.

        Raises:
            ValueError: no tokens wanted, or a prompt that leaves no room for any.
        """
        whole = isinstance(max_new_tokens, int | np.integer)
        if not whole or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; give 1 or more, a whole number")
        # No row has more positions, so the cache needs no more slots.
        max_new_tokens = min(max_new_tokens, self.config.text.max_positions)
        self._check_lengths(prompts)
        devices = 1 if self.mesh is None else math.prod(self.mesh.shape[a] for a in BATCH_AXES)
        rows = -(-len(prompts) // devices) * devices
        batch = pad_prompts(prompts, rows=rows, image_size=self.config.vision.image_size)
        new = bucket(max_new_tokens)
        knobs = {
            "temperature": np.float32(sampling.temperature or 1.0),
            "top_k": np.int32(min(sampling.top_k, np.iinfo(np.int32).max)),
            "top_p": np.float32(sampling.top_p),
            "seed": np.uint32(sampling.seed),
        }
        greedy = sampling.temperature == 0
        with self._on_mesh():
            state = self._prefill(
                self._parameters,
                self._placed(batch),
                self._placed(np.arange(rows) >= len(prompts)),
                knobs,
                slots=batch.ids.shape[1] + new,
                new=new,
                greedy=greedy,
            )
        done, everyone = 0, False
        while done < max_new_tokens and not everyone:
            with self._on_mesh():
                limit = np.int32(min(max(done + every, 1), max_new_tokens))
                state = self._decode(self._parameters, state, limit, knobs, greedy=greedy)
                seen = (state.tokens, state.positions, state.step, state.finished)
                tokens, positions, step, finished = jax.device_get(seen)
            # The first new token stands at the position after the prompt.
            yield [
                tokens[row, done : positions[row] - len(prompt.ids) + 1]
                for row, prompt in enumerate(prompts)
            ]
            done, everyone = int(step), bool(finished.all())

    def _prefill_step(
        self,
        parameters: nnx.State,
        batch: Batch,
        finished: Bool[Array, "B"],
        knobs: dict[str, Array],
        *,
        slots: int,
        new: int,
        greedy: bool,
    ) -> DecodeState:
        """Prompts in, first tokens out."""
        model = nnx.merge(self._graph, parameters)
        logits, cache = model.prefill(batch, slots=slots)
        last = self._choose(logits, jnp.int32(0), knobs, greedy=greedy)
        length = (batch.segments > 0).sum(axis=1, dtype=jnp.int32)
        tokens = jnp.where(jnp.arange(new) == 0, last[:, None], self.config.text.pad_id)
        return DecodeState(
            tokens=tokens,
            step=jnp.int32(1),
            last=last,
            positions=length,
            finished=finished | self._ends(last, length),
            cache=cache,
        )

    def _decode_steps(
        self,
        parameters: nnx.State,
        state: DecodeState,
        limit: Int[Array, ""],
        knobs: dict[str, Array],
        *,
        greedy: bool,
    ) -> DecodeState:
        """Decodes until `limit` tokens are there or every row has finished."""
        model = nnx.merge(self._graph, parameters)

        def wanted(state: DecodeState) -> Bool[Array, ""]:
            return (state.step < limit) & ~state.finished.all()

        def step(state: DecodeState) -> DecodeState:
            logits, cache = model.decode(state.last, positions=state.positions, cache=state.cache)
            chosen = self._choose(logits, state.step, knobs, greedy=greedy)
            last = jnp.where(state.finished, self.config.text.pad_id, chosen)
            positions = jnp.where(state.finished, state.positions, state.positions + 1)
            return DecodeState(
                tokens=jax.lax.dynamic_update_slice(state.tokens, last[:, None], (0, state.step)),
                step=state.step + 1,
                last=last,
                positions=positions,
                finished=state.finished | self._ends(chosen, positions),
                cache=cache,
            )

        return jax.lax.while_loop(wanted, step, state)

    def _check_lengths(self, prompts: Sequence[Prompt]) -> None:
        longest, room = max(len(prompt.ids) for prompt in prompts), self.config.text.max_positions
        if longest >= room:
            raise ValueError(
                f"a prompt of {longest} tokens, images included, leaves no room for an answer in "
                f"the model's context of {room}; shorten it or give fewer images"
            )

    def _on_mesh(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _placed(self, tree: PyTree) -> PyTree:
        """Host arrays, split over the rows of the mesh."""
        if self.mesh is None:
            return tree
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec(BATCH_AXES)))

    def _choose(
        self,
        logits: Float[Array, "B V"],
        step: Int[Array, ""],
        knobs: dict[str, Array],
        *,
        greedy: bool,
    ) -> Int[Array, "B"]:
        logits = reshard(logits, self._rules.tokens)
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return sample(logits, step=step, **knobs)

    def _ends(self, token: Int[Array, "B"], position: Int[Array, "B"]) -> Bool[Array, "B"]:
        """Whether a row stops after this token: end of sequence, or no position left for it."""
        end = jnp.isin(token, jnp.asarray(self.config.text.eos_ids))
        return end | (position >= self.config.text.max_positions)
