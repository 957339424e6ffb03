"""An engine's programs for the compiler alone: shapes in place of arrays, nothing runs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import PyTree

from stf_jax.data.batch import Batch
from stf_jax.infer.program import Program
from stf_jax.infer.room import Room
from stf_jax.infer.slots import Slots, Suffixes
from stf_jax.models.cache import CacheDType, KVCache
from stf_jax.models.layers import unstack
from stf_jax.models.llava import Llava
from stf_jax.parallel.sharding import BATCH_AXES, ShardingRules, on_mesh
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.mesh import check_divisible


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoweredEngine:
    """What the devices run, and what they hold while they do; shapes that know where they lie.

    Attributes:
        prefill: computes prefixes.
        inserts: put questions into slots; one for each length.
        decode: turns until enough slots are finished.
        parameters: of the model.
        slots: all of them, with their cache.
        prefixes: the pool of those that are kept.
    """

    prefill: Any
    inserts: list[Any]
    decode: Any
    parameters: PyTree
    slots: PyTree
    prefixes: PyTree


def abstract_program(
    config: LlavaConfig, *, mesh: Mesh, dtype: DTypeLike, cache_dtype: CacheDType | None
) -> Program:
    """A program whose model has no weights.

    Raises:
        ValueError: the mesh does not divide the model.
    """
    check_divisible(config, mesh)
    with jax.set_mesh(mesh):
        model = Llava.abstract(config, rules=ShardingRules.default(), dtype=dtype)
        for part in (model.text, model.vision):
            layers = nnx.eval_shape(unstack, part.layers)
            nnx.update(layers, _place(nnx.state(layers), mesh))
            part.layers = layers
    return Program(model, mesh=mesh, cache_dtype=cache_dtype)


def lower(
    program: Program,
    *,
    batch: Batch,
    questions: Sequence[Suffixes],
    room: Room,
) -> LoweredEngine:
    """The programs that an engine compiles for arrays of these shapes, with greedy answers.

    Args:
        program: from `abstract_program`.
        batch: of prefixes, host arrays.
        questions: host arrays, of one length or of several.
        room: what the engine holds.
    """
    mesh = program.mesh
    assert mesh is not None

    def rows(tree: PyTree) -> PyTree:
        sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        return jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), tree
        )

    parameters, batch_rows = program._parameters, rows(batch)
    state, prefixes = allocate(program, room)
    with jax.set_mesh(mesh):
        scalar = np.int32(1)
        return LoweredEngine(
            prefill=program._prefixes.lower(parameters, batch_rows),
            inserts=[
                program._insert.lower(
                    parameters,
                    state,
                    prefixes,
                    rows(suffixes),
                    lengths=prefixes.sizes,
                    choice="greedy",
                )
                for suffixes in questions
            ],
            decode=program._decode.lower(
                parameters,
                state,
                rows(np.zeros(room.slots, bool)),
                scalar,
                scalar,
                choice="greedy",
            ),
            parameters=parameters,
            slots=state,
            prefixes=prefixes,
        )


def allocate(program: Program, room: Room) -> tuple[Slots, KVCache]:
    """The slots and the pool that a scheduler begins with.

    Args:
        program: from `abstract_program`.
        room: what it holds.
    """
    mesh, parameters = program.mesh, program.weights
    assert mesh is not None
    with jax.set_mesh(mesh):
        slots: Slots = program._start.eval_shape(
            parameters, slots=room.slots, contexts=room.contexts, new=room.new
        )
        pool: KVCache = program._pool.eval_shape(parameters, rows=room.kept, contexts=room.prefixes)
        return _place(slots, mesh), _place(pool, mesh)


def _place(tree: PyTree, mesh: Mesh) -> Any:
    """Shapes that went through a trace know the abstract mesh only."""
    return jax.tree.map(lambda leaf: on_mesh(leaf, mesh), tree)
