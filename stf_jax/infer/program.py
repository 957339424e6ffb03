"""What an engine has the devices do: prefill shared prefixes, insert requests into slots, decode.

Every shape is a bucket, so calling again with the same shapes compiles nothing.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt

from stf_jax.data.batch import Batch
from stf_jax.infer.sampling import Sampling, sample
from stf_jax.models.cache import CacheDType, KVCache, SlotGroup
from stf_jax.models.layers import unstack
from stf_jax.models.llava import Llava
from stf_jax.models.marks import Marks
from stf_jax.parallel.sharding import BATCH_AXES, reshard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """B answers in the making, and all that their next tokens depend on.

    Attributes:
        tokens: of each answer so far; the first `counts` of a row mean something.
        counts: tokens so far.
        last: the newest token, which the cache does not hold yet.
        positions: where that token will stand.
        finished: the answer is complete, or the slot was never taken.
        cache: of everything before `last`.
    """

    tokens: Int[Array, "B new"]
    counts: Int[Array, "B"]
    last: Int[Array, "B"]
    positions: Int[Array, "B"]
    finished: Bool[Array, "B"]
    cache: KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Suffixes:
    """R prompts without the prefixes whose cache is there.

    Attributes:
        ids: what follows the prefix, padded.
        lengths: of that, without padding; at least 1.
        starts: length of the prefix.
        prefixes: the row of the prefix.
        slots: the slot for the answer; B and beyond is a padding row.
    """

    ids: Int[Array, "R T"]
    lengths: Int[Array, "R"]
    starts: Int[Array, "R"]
    prefixes: Int[Array, "R"]
    slots: Int[Array, "R"]

    @classmethod
    def empty(cls, rows: int, length: int, *, slots: int) -> "Suffixes":
        """Padding rows in host memory, to be filled in."""

        def full(value: int, *shape: int) -> Any:
            return np.full((rows, *shape), value, np.int32)

        return cls(
            ids=full(0, length),
            lengths=full(1),
            starts=full(0),
            prefixes=full(0),
            slots=full(slots),
        )


class Program:
    """A model's compiled functions, on one device or on a mesh.

    Args:
        model: taken over: its stacked layers are taken apart.
        mesh: that the model lies on.
        cache_dtype: how keys and values are kept.
    """

    def __init__(
        self, model: Llava, *, mesh: Mesh | None = None, cache_dtype: CacheDType | None = None
    ):
        self.config, self.mesh, self._rules = model.config, mesh, model.rules
        self.cache_dtype = cache_dtype
        with self._on_mesh():
            # The caller's model loses its stacks: there is no room for 7B weights twice.
            model.text.layers = unstack(model.text.layers)
            model.vision.layers = unstack(model.vision.layers)
        self._graph, self._parameters = nnx.split(model)
        self._prefixes = jax.jit(self._prefix_caches)
        self._start = jax.jit(self._empty_slots, static_argnames=("slots", "contexts", "new"))
        # Slots are written in place.
        self._insert = jax.jit(self._insert_requests, static_argnames="greedy", donate_argnums=1)
        self._resume = jax.jit(self._resume_requests, static_argnames="greedy", donate_argnums=1)
        self._decode = jax.jit(self._decode_steps, static_argnames="greedy", donate_argnums=1)

    @functools.cached_property
    def checksum(self) -> str:
        """A checksum of all weights, the same on any mesh; it identifies the model."""
        digest = hashlib.sha256()
        with self._on_mesh():
            for path, leaf in jax.tree_util.tree_leaves_with_path(self._parameters):
                line = f"{jax.tree_util.keystr(path)} {leaf.shape} {int(_bit_sum(leaf))}\n"
                digest.update(line.encode())
        return digest.hexdigest()[:16]

    @property
    def weights(self) -> nnx.State:
        """The parameters, as the devices have them."""
        return self._parameters

    @property
    def row_multiple(self) -> int:
        """The number of rows must be a multiple of this, since the mesh splits them."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[a] for a in BATCH_AXES)

    def prefill(self, batch: Batch) -> KVCache:
        """Encodes a batch's images and computes the cache of its rows."""
        with self._on_mesh():
            return self._prefixes(self._parameters, self._place(batch))

    def start(self, *, slots: int, contexts: tuple[int, ...], new: int) -> Slots:
        """Empty slots.

        Args:
            slots: B.
            contexts: positions that there is room for, by group of layers.
            new: room for the tokens of an answer.
        """
        with self._on_mesh():
            return self._start(self._parameters, slots=slots, contexts=contexts, new=new)

    def insert(
        self, slots: Slots, prefixes: KVCache, questions: Suffixes, limits: "Limits"
    ) -> Slots:
        """Puts questions into slots, and the first token of each answer."""
        with self._on_mesh():
            placed = self._place(questions)
            return self._insert(
                self._parameters, slots, prefixes, placed, limits.arrays, greedy=limits.greedy
            )

    def resume(self, slots: Slots, questions: Suffixes, limits: "Limits") -> Slots:
        """A question for every slot, whose prefix is what the cache of that slot begins with."""
        with self._on_mesh():
            placed = self._place(questions)
            return self._resume(
                self._parameters, slots, placed, limits.arrays, greedy=limits.greedy
            )

    def decode(
        self,
        slots: Slots,
        limits: "Limits",
        *,
        stopped: Bool[np.ndarray, "B"],
        every: int,
        enough: int,
    ) -> Slots:
        """Decodes `every` steps, or fewer: until `enough` slots are finished.

        What is `stopped` counts as finished from now on.
        """
        with self._on_mesh():
            return self._decode(
                self._parameters,
                slots,
                self._place(stopped),
                np.int32(every),
                np.int32(enough),
                limits.arrays,
                greedy=limits.greedy,
            )

    def _prefix_caches(self, parameters: nnx.State, batch: Batch) -> KVCache:
        return self._model(parameters).prefill(batch, cache_dtype=self.cache_dtype)[1]

    def _empty_slots(
        self, parameters: nnx.State, *, slots: int, contexts: tuple[int, ...], new: int
    ) -> Slots:
        text, rows = self.config.text, self._rules.tokens
        dtype = jax.tree.leaves(parameters)[0].dtype
        decoder = self._model(parameters).text
        sizes = [(slots, context, text.kv_heads, text.head_dim) for context in contexts]
        zeros = [jnp.zeros(size, dtype, out_sharding=self._rules.hidden) for size in sizes]
        layers = [zeros[group] for group in decoder.layer_groups]
        integers = jnp.zeros(slots, jnp.int32, out_sharding=rows)
        empty = [jnp.zeros(size[:2], jnp.int32, out_sharding=rows) for size in sizes]
        groups = [
            SlotGroup.whole(Marks.text(array, array), renumbered=decoder.renumbers)
            for array in empty
        ]
        return Slots(
            tokens=jnp.full((slots, new), text.pad_id, jnp.int32, out_sharding=rows),
            counts=integers,
            last=integers,
            positions=integers,
            finished=jnp.ones(slots, bool, out_sharding=rows),
            cache=KVCache.of(
                layers,
                layers,
                groups,
                layer_groups=decoder.layer_groups,
                dtype=self.cache_dtype,
            ),
        )

    def _insert_requests(
        self,
        parameters: nnx.State,
        slots: Slots,
        prefixes: KVCache,
        questions: Suffixes,
        limits: dict[str, Array],
        *,
        greedy: bool,
    ) -> Slots:
        spec = self._rules.tokens
        # Copy each question's prefix out of the shared cache, without slots that would be empty.
        # Compute the question against it, and put all that results into the question's slot.
        added = questions.ids.shape[1]
        room = [
            min(size + added, most)
            for size, most in zip(prefixes.sizes, slots.cache.sizes, strict=True)
        ]
        cache = prefixes.rows(
            questions.prefixes, spec=self._rules.cache, marks=self._rules.tokens
        ).resize(room)
        begun = self._first_tokens(
            parameters, questions, cache, limits, slots.tokens.shape[1], greedy
        )

        def put(old: Array, new: Array) -> Array:
            return old.at[questions.slots].set(new, mode="drop", out_sharding=spec)

        return Slots(
            tokens=put(slots.tokens, begun.tokens),
            counts=put(slots.counts, begun.counts),
            last=put(slots.last, begun.last),
            positions=put(slots.positions, begun.positions),
            finished=put(slots.finished, begun.finished),
            cache=slots.cache.insert(
                questions.slots, begun.cache, spec=self._rules.cache, marks=self._rules.tokens
            ),
        )

    def _resume_requests(
        self,
        parameters: nnx.State,
        slots: Slots,
        questions: Suffixes,
        limits: dict[str, Array],
        *,
        greedy: bool,
    ) -> Slots:
        new = slots.tokens.shape[1]
        return self._first_tokens(parameters, questions, slots.cache, limits, new, greedy)

    def _first_tokens(
        self,
        parameters: nnx.State,
        questions: Suffixes,
        cache: KVCache,
        limits: dict[str, Array],
        new: int,
        greedy: bool,
    ) -> Slots:
        """Computes suffixes against their rows of the cache, and the answers' first tokens."""
        logits, cache = self._model(parameters).extend(
            questions.ids, start=questions.starts, lengths=questions.lengths, cache=cache
        )
        none = jnp.zeros_like(questions.lengths)
        first = self._choose(logits, none, limits, greedy=greedy)
        positions = questions.starts + questions.lengths
        return Slots(
            tokens=jnp.where(jnp.arange(new) == 0, first[:, None], self.config.text.pad_id),
            counts=none + 1,
            last=first,
            positions=positions,
            finished=self._ends(first, positions, none + 1, limits),
            cache=cache,
        )

    def _decode_steps(
        self,
        parameters: nnx.State,
        slots: Slots,
        stopped: Bool[Array, "B"],
        every: Int[Array, ""],
        enough: Int[Array, ""],
        limits: dict[str, Array],
        *,
        greedy: bool,
    ) -> Slots:
        model = self._model(parameters)
        slots = dataclasses.replace(slots, finished=slots.finished | stopped)

        def is_unfinished(carry: tuple[Array, Slots]) -> Bool[Array, ""]:
            step, slots = carry
            return (step < every) & (slots.finished.sum() < enough)

        def step(carry: tuple[Array, Slots]) -> tuple[Array, Slots]:
            step, slots = carry
            logits, cache = model.extend(
                slots.last[:, None],
                start=slots.positions,
                lengths=jnp.ones_like(slots.counts),
                cache=slots.cache,
            )
            # Slots that are finished compute as the others do, and keep what they have.
            chosen = self._choose(logits, slots.counts, limits, greedy=greedy)
            going = ~slots.finished
            is_next = (jnp.arange(slots.tokens.shape[1]) == slots.counts[:, None]) & going[:, None]
            counts, positions = slots.counts + going, slots.positions + going
            return step + 1, Slots(
                tokens=jnp.where(is_next, chosen[:, None], slots.tokens),
                counts=counts,
                last=jnp.where(going, chosen, slots.last),
                positions=positions,
                finished=slots.finished | self._ends(chosen, positions, counts, limits),
                cache=cache,
            )

        return jax.lax.while_loop(is_unfinished, step, (jnp.int32(0), slots))[1]

    def _model(self, parameters: nnx.State) -> Llava:
        return nnx.merge(self._graph, parameters)

    def _on_mesh(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _place(self, tree: PyTree) -> PyTree:
        """Host arrays, split over the rows of the mesh."""
        if self.mesh is None:
            return tree
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec(BATCH_AXES)))

    def _choose(
        self,
        logits: Float[Array, "B V"],
        step: Int[Array, "B"],
        limits: dict[str, Array],
        *,
        greedy: bool,
    ) -> Int[Array, "B"]:
        logits = reshard(logits, self._rules.tokens)
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        knobs = {name: limits[name] for name in ("temperature", "top_k", "top_p", "seed")}
        return sample(logits, step=step, **knobs)

    def _ends(
        self,
        token: Int[Array, "B"],
        position: Int[Array, "B"],
        count: Int[Array, "B"],
        limits: dict[str, Array],
    ) -> Bool[Array, "B"]:
        """Whether an answer ends here: end of sequence, enough tokens, or no position left."""
        end = jnp.isin(token, jnp.asarray(self.config.text.eos_ids))
        full = position >= self.config.text.max_positions
        return end | full | (count >= limits["max_new_tokens"])


@jax.jit
def _bit_sum(weights: Array) -> UInt[Array, ""]:
    """The sum of a hash of each value's bits, modulo 2**32 and so the same in any order."""
    bits = jax.lax.bitcast_convert_type(weights, f"uint{8 * weights.dtype.itemsize}")
    # The multiply-and-shift of MurmurHash3.
    mixed = bits.astype(jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How tokens are chosen and how many, as the compiled functions take it.

    None of the numbers is compiled in; whether it is greedy is.
    """

    sampling: Sampling
    max_new_tokens: int

    @property
    def greedy(self) -> bool:
        """Whether no noise is drawn."""
        return self.sampling.temperature == 0

    @property
    def arrays(self) -> dict[str, Any]:
        """Scalars for the devices."""
        return {
            "temperature": np.float32(self.sampling.temperature or 1.0),
            "top_k": np.int32(min(self.sampling.top_k, np.iinfo(np.int32).max)),
            "top_p": np.float32(self.sampling.top_p),
            "seed": np.uint32(self.sampling.seed),
            "max_new_tokens": np.int32(self.max_new_tokens),
        }


def limit_new_tokens(max_new_tokens: int, *, room: int) -> int:
    """How many tokens an answer may have, no more than the context has room for.

    Raises:
        ValueError: none wanted, or no whole number.
    """
    given: object = max_new_tokens
    whole = isinstance(given, int | np.integer) and not isinstance(given, bool)
    if not whole or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; give 1 or more, a whole number")
    return min(max_new_tokens, room)
