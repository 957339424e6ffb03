"""Where every array lies on the device mesh, as one frozen dataclass of partition specs.

Mesh axes: `data` (replicas), `fsdp` (parameters and rows of the batch are split), `tensor` (heads
and hidden channels are split). The mesh is explicit: an array's type carries its sharding, and an
operation whose result is ambiguous is given one. Without a mesh every spec is None.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self, TypeAlias

import jax
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

Spec: TypeAlias = PartitionSpec | None

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """The partition spec of each kind of array; one tensor-parallel pair is `column` then `row`.

    A layer's matmuls are computed with `column` and `row` kernels gathered over `fsdp` only, so the
    one collective on activations is the sum over `tensor` after each `row` kernel.
    """

    # Parameters.
    embedding: Spec = None  # [V, H]
    column: Spec = None  # [in, F], [in, N, D]: the output is split over `tensor`
    column_bias: Spec = None  # [F], [N, D]
    row: Spec = None  # [F, out]: the input is split over `tensor`
    row_heads: Spec = None  # [N, D, out]
    vector: Spec = None  # norms, the biases of `row` kernels, patch and position embeddings

    # Activations.
    tokens: Spec = None  # anything that leads with the batch and is not split further
    hidden: Spec = None  # [B, T, F], [B, T, N, D], [B, T, V]
    cache: Spec = None  # [B, G, S, D]

    @classmethod
    def none(cls) -> Self:
        """One device, no mesh."""
        return cls()

    @classmethod
    def default(cls) -> Self:
        """For a mesh with the axes `data`, `fsdp`, `tensor`, of any size."""
        return cls(
            embedding=PartitionSpec("tensor", "fsdp"),
            column=PartitionSpec("fsdp", "tensor"),
            column_bias=PartitionSpec("tensor"),
            row=PartitionSpec("tensor", "fsdp"),
            row_heads=PartitionSpec("tensor", None, "fsdp"),
            vector=PartitionSpec(),
            tokens=PartitionSpec(BATCH_AXES),
            hidden=PartitionSpec(BATCH_AXES, None, "tensor"),
            cache=PartitionSpec(BATCH_AXES, "tensor"),
        )


def reshard(x: Array, spec: Spec) -> Array:
    """Moves an array to a spec of the mesh at hand; None means that there is no mesh."""
    return x if spec is None else jax.sharding.reshard(x, spec)


def all_gather_fsdp(parameter: Array, spec: Spec) -> Array:
    """A parameter whole along `fsdp`, as a matmul takes it; None means that there is no mesh.

    "Reduced" says that the gradients of all its uses are first added up on each device, and then
    summed over the devices and scattered, once.
    """
    if spec is None:
        return parameter
    whole = PartitionSpec(
        *(None if axis == "fsdp" else axis for axis in spec), reduced=frozenset(BATCH_AXES)
    )
    return jax.sharding.reshard(parameter, whole)


def on_mesh(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The same shape and spec on the devices of a mesh."""
    sharding = NamedSharding(mesh, leaf.sharding.spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def make_mesh(
    *, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of data * fsdp * tensor devices, to be entered with `jax.set_mesh`.

    Args:
        data: size of the axis.
        fsdp: size of the axis.
        tensor: size of the axis.
        devices: all that there are, if None. TPU slices, which have only the slower network
            between them, lie along `data`.

    Raises:
        ValueError: the product is not the number of devices there are, or `data` is no multiple of
            the slices.
    """
    devices = jax.devices() if devices is None else devices
    wanted, count = data * fsdp * tensor, len(devices)
    if wanted != count:
        raise ValueError(
            f"data {data} x fsdp {fsdp} x tensor {tensor} makes {wanted} devices; there are {count}"
        )
    types = (AxisType.Explicit,) * len(AXES)
    slices = len(
        {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    )
    if slices < 2:
        return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=types, devices=devices)
    if data % slices:
        raise ValueError(
            f"data {data} is not a multiple of the {slices} slices: only replicas may lie on "
            f"several; set mesh.data to {slices}"
        )
    inside = (data // slices, fsdp, tensor)
    grid = create_hybrid_device_mesh(inside, (slices, 1, 1), devices=devices)
    return Mesh(grid, AXES, axis_types=types)
