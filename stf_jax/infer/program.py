"""What an engine has the devices do: prefill prefixes, keep them, insert requests, decode.

Every shape is a bucket, so calling again with the same shapes compiles nothing.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt

from stf_jax.data.batch import Batch
from stf_jax.infer.prompts import LEAST_QUESTION, bucket
from stf_jax.infer.sampling import sample
from stf_jax.infer.slots import Choice, Draws, Slots, Suffixes
from stf_jax.models.cache import CacheDType, KVCache, SlotGroup
from stf_jax.models.layers import unstack
from stf_jax.models.llava import Llava
from stf_jax.models.marks import Marks
from stf_jax.parallel.sharding import BATCH_AXES, reshard


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
            for part in (model.text, model.vision):
                part.layers = unstack(_take_layers(part))
        self._graph, self._parameters = nnx.split(model)
        self._prefixes = jax.jit(self._prefix_caches)
        self._start = jax.jit(self._empty_slots, static_argnames=("slots", "contexts", "new"))
        self._pool = jax.jit(self._empty_cache, static_argnames=("rows", "contexts"))
        # Slots and kept prefixes are written in place.
        self._keep = jax.jit(self._keep_prefixes, donate_argnums=0)
        self._insert = jax.jit(
            self._insert_requests, static_argnames=("lengths", "choice"), donate_argnums=1
        )
        self._resume = jax.jit(self._resume_requests, static_argnames="choice", donate_argnums=1)
        self._decode = jax.jit(self._decode_steps, static_argnames="choice", donate_argnums=1)
        self._clear = jax.jit(_clear_slots, donate_argnums=0)

    @functools.cached_property
    def checksum(self) -> str:
        """A checksum of all weights, the same on any mesh; it identifies the model."""
        with self._on_mesh():
            return weights_checksum(self._parameters)

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

    def join(self, caches: Sequence[KVCache], *, rows: int) -> KVCache:
        """Caches of one row each, in host memory, as `prefill` gives `rows` of them.

        Rows beyond `caches` are empty.
        """
        held = zip(*(cache.sizes for cache in caches), strict=True)
        sizes = [bucket(max(group), least=LEAST_QUESTION) for group in held]

        def stack(*arrays: Array) -> Array:
            joined = np.concatenate(arrays)
            padded = np.pad(joined, [(0, rows - len(joined))] + [(0, 0)] * (joined.ndim - 1))
            if self.mesh is None:
                return jnp.asarray(padded)
            spec = self._rules.cache if joined.ndim > 2 else self._rules.tokens
            return jax.device_put(padded, NamedSharding(self.mesh, spec or PartitionSpec()))

        joined: KVCache = jax.tree.map(stack, *(cache.resize(sizes) for cache in caches))
        return joined

    def abstract_cache(self) -> KVCache:
        """Shapes of a cache of one slot: the structure of all of them."""
        with self._on_mesh():
            groups = max(self._model(self._parameters).text.layer_groups) + 1
            make = functools.partial(
                self._empty_slots, slots=self.row_multiple, contexts=(1,) * groups, new=1
            )
            cache: KVCache = jax.eval_shape(make, self._parameters).cache
            return cache

    def start(self, *, slots: int, contexts: tuple[int, ...], new: int) -> Slots:
        """Empty slots.

        Args:
            slots: B.
            contexts: positions that there is room for, by group of layers.
            new: room for the tokens of an answer.
        """
        with self._on_mesh():
            return self._start(self._parameters, slots=slots, contexts=contexts, new=new)

    def pool(self, *, rows: int, contexts: tuple[int, ...]) -> KVCache:
        """Room for the caches of so many prefixes, of so many positions by group of layers."""
        with self._on_mesh():
            return self._pool(self._parameters, rows=rows, contexts=contexts)

    def keep(self, pool: KVCache, prefixes: KVCache, at: Int[np.ndarray, "R"]) -> KVCache:
        """Puts prefixes into rows of a pool; beyond its rows they are dropped."""
        with self._on_mesh():
            return self._keep(pool, prefixes, self._place(at))

    def insert(
        self,
        slots: Slots,
        prefixes: KVCache,
        questions: Suffixes,
        *,
        lengths: tuple[int, ...] | None = None,
        choice: Choice,
    ) -> Slots:
        """Puts questions into slots, and the first token of each answer.

        Args:
            slots: written in place.
            prefixes: whose rows the questions name.
            questions: padded to a bucket.
            lengths: of the longest prefix that is named, by group of layers; by default all.
            choice: how tokens of the answers in any slot are chosen, at most.
        """
        lengths = prefixes.sizes if lengths is None else lengths
        with self._on_mesh():
            placed = self._place(questions)
            return self._insert(
                self._parameters, slots, prefixes, placed, lengths=lengths, choice=choice
            )

    def resume(self, slots: Slots, questions: Suffixes, *, choice: Choice) -> Slots:
        """A question for every slot, whose prefix is what the cache of that slot begins with."""
        with self._on_mesh():
            return self._resume(self._parameters, slots, self._place(questions), choice=choice)

    def decode(
        self,
        slots: Slots,
        *,
        stopped: Bool[np.ndarray, "B"],
        every: int,
        enough: int,
        choice: Choice,
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
                choice=choice,
            )

    def clear(self, slots: Slots, which: Bool[np.ndarray, "B"]) -> Slots:
        """Zeroes the cache of slots that nobody has; what is not finite would reach who is next."""
        with self._on_mesh():
            return self._clear(slots, self._place(which))

    def _prefix_caches(self, parameters: nnx.State, batch: Batch) -> KVCache:
        return self._model(parameters).prefill(batch, cache_dtype=self.cache_dtype)[1]

    def _empty_cache(
        self, parameters: nnx.State, *, rows: int, contexts: tuple[int, ...]
    ) -> KVCache:
        text, decoder = self.config.text, self._model(parameters).text
        dtype = jax.tree.leaves(parameters)[0].dtype
        sizes = [(rows, context, text.kv_heads, text.head_dim) for context in contexts]
        zeros = [jnp.zeros(size, dtype, out_sharding=self._rules.hidden) for size in sizes]
        layers = [zeros[group] for group in decoder.layer_groups]
        empty = [jnp.zeros(size[:2], jnp.int32, out_sharding=self._rules.tokens) for size in sizes]
        return KVCache.of(
            layers,
            layers,
            [
                SlotGroup.whole(Marks.text(array, array), renumbered=decoder.renumbers)
                for array in empty
            ],
            layer_groups=decoder.layer_groups,
            dtype=self.cache_dtype,
        )

    def _empty_slots(
        self, parameters: nnx.State, *, slots: int, contexts: tuple[int, ...], new: int
    ) -> Slots:
        rows = self._rules.tokens
        integers = jnp.zeros(slots, jnp.int32, out_sharding=rows)
        reals = jnp.zeros(slots, jnp.float32, out_sharding=rows)
        return Slots(
            tokens=jnp.full((slots, new), self.config.text.pad_id, jnp.int32, out_sharding=rows),
            counts=integers,
            last=integers,
            positions=integers,
            finished=jnp.ones(slots, bool, out_sharding=rows),
            finite=jnp.ones(slots, bool, out_sharding=rows),
            draws=Draws(
                temperature=reals,
                top_k=integers,
                top_p=reals,
                seed=jnp.zeros(slots, jnp.uint32, out_sharding=rows),
                most=integers,
            ),
            cache=self._empty_cache(parameters, rows=slots, contexts=contexts),
        )

    def _keep_prefixes(self, pool: KVCache, prefixes: KVCache, at: Int[Array, "R"]) -> KVCache:
        return pool.insert(
            at, prefixes.resize(pool.sizes), spec=self._rules.cache, marks=self._rules.tokens
        )

    def _insert_requests(
        self,
        parameters: nnx.State,
        slots: Slots,
        prefixes: KVCache,
        questions: Suffixes,
        *,
        lengths: tuple[int, ...],
        choice: Choice,
    ) -> Slots:
        spec = self._rules.tokens
        # Copy each question's prefix out of the shared cache, without slots that would be empty.
        # Compute the question against it, and put all that results into the question's slot.
        added = questions.ids.shape[1]
        room = [
            min(size + added, most) for size, most in zip(lengths, slots.cache.sizes, strict=True)
        ]
        cache = (
            prefixes.resize(lengths)
            .rows(questions.prefixes, spec=self._rules.cache, marks=self._rules.tokens)
            .resize(room)
        )
        begun = self._first_tokens(
            parameters, questions, cache, slots.tokens.shape[1], choice=choice
        )

        def put(old: Array, new: Array) -> Array:
            return old.at[questions.slots].set(new, mode="drop", out_sharding=spec)

        return Slots(
            tokens=put(slots.tokens, begun.tokens),
            counts=put(slots.counts, begun.counts),
            last=put(slots.last, begun.last),
            positions=put(slots.positions, begun.positions),
            finished=put(slots.finished, begun.finished),
            finite=put(slots.finite, begun.finite),
            draws=jax.tree.map(put, slots.draws, begun.draws),
            cache=slots.cache.insert(
                questions.slots, begun.cache, spec=self._rules.cache, marks=self._rules.tokens
            ),
        )

    def _resume_requests(
        self, parameters: nnx.State, slots: Slots, questions: Suffixes, *, choice: Choice
    ) -> Slots:
        new = slots.tokens.shape[1]
        return self._first_tokens(parameters, questions, slots.cache, new, choice=choice)

    def _first_tokens(
        self,
        parameters: nnx.State,
        questions: Suffixes,
        cache: KVCache,
        new: int,
        *,
        choice: Choice,
    ) -> Slots:
        """Computes suffixes against their rows of the cache, and the answers' first tokens."""
        logits, cache = self._model(parameters).extend(
            questions.ids, start=questions.starts, lengths=questions.lengths, cache=cache
        )
        none, draws = jnp.zeros_like(questions.lengths), questions.draws
        first = self._choose(logits, none, draws, choice=choice)
        positions = questions.starts + questions.lengths
        return Slots(
            tokens=jnp.where(jnp.arange(new) == 0, first[:, None], self.config.text.pad_id),
            counts=none + 1,
            last=first,
            positions=positions,
            finished=self._ends(first, positions, none + 1, draws),
            finite=_are_finite(logits),
            draws=draws,
            cache=cache,
        )

    def _decode_steps(
        self,
        parameters: nnx.State,
        slots: Slots,
        stopped: Bool[Array, "B"],
        every: Int[Array, ""],
        enough: Int[Array, ""],
        *,
        choice: Choice,
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
            chosen = self._choose(logits, slots.counts, slots.draws, choice=choice)
            going = ~slots.finished
            is_next = (jnp.arange(slots.tokens.shape[1]) == slots.counts[:, None]) & going[:, None]
            counts, positions = slots.counts + going, slots.positions + going
            return step + 1, Slots(
                tokens=jnp.where(is_next, chosen[:, None], slots.tokens),
                counts=counts,
                last=jnp.where(going, chosen, slots.last),
                positions=positions,
                finished=slots.finished | self._ends(chosen, positions, counts, slots.draws),
                finite=slots.finite & _are_finite(logits),
                draws=slots.draws,
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
        draws: Draws,
        *,
        choice: Choice,
    ) -> Int[Array, "B"]:
        logits = reshard(logits, self._rules.tokens)
        if choice == "greedy":
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # To sort the vocabulary takes longer than all else here.
        likely = {"top_k": draws.top_k, "top_p": draws.top_p} if choice == "likely" else {}
        return sample(logits, step=step, temperature=draws.temperature, seed=draws.seed, **likely)

    def _ends(
        self,
        token: Int[Array, "B"],
        position: Int[Array, "B"],
        count: Int[Array, "B"],
        draws: Draws,
    ) -> Bool[Array, "B"]:
        """Whether an answer ends here: end of sequence, enough tokens, or no position left."""
        end = jnp.isin(token, jnp.asarray(self.config.text.eos_ids))
        full = position >= self.config.text.max_positions
        return end | full | (count >= draws.most)


def _are_finite(logits: Float[Array, "B V"]) -> Bool[Array, "B"]:
    """Whether all are, by row: a value of the cache that is not finite makes these NaN."""
    return jnp.isfinite(logits.max(axis=-1))


def _clear_slots(slots: Slots, which: Bool[Array, "B"]) -> Slots:
    return dataclasses.replace(slots, finite=slots.finite | which, cache=slots.cache.clear(which))


def _take_layers(part: Any) -> Any:
    """The layers, which the part itself no longer holds."""
    layers, part.layers = part.layers, nnx.List([])
    return layers


def weights_checksum(weights: nnx.State) -> str:
    """A checksum of all weights, the same on any mesh; call it on the mesh that they lie on."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        line = f"{jax.tree_util.keystr(path)} {leaf.shape} {int(_bit_sum(leaf))}\n"
        digest.update(line.encode())
    return digest.hexdigest()[:16]


@jax.jit
def _bit_sum(weights: Array) -> UInt[Array, ""]:
    """The sum of a hash of each value's bits, modulo 2**32 and so the same in any order."""
    if weights.dtype == jnp.int4:
        weights = weights.astype(jnp.int8)
    bits = jax.lax.bitcast_convert_type(weights, f"uint{8 * weights.dtype.itemsize}")
    # The multiply-and-shift of MurmurHash3.
    mixed = bits.astype(jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)


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
