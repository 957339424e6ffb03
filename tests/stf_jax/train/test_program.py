"""What the compiler is asked for, by the chip and by what a chip gets to do."""

import numpy as np
import pytest

from stf_jax.parallel.hosts import BatchLayout
from stf_jax.parallel.sharding import make_mesh
from stf_jax.train.program import compiler_options

MEMORY = "xla_tpu_scoped_vmem_limit_kib"


@pytest.mark.parametrize(
    ("axes", "micro_batches"),
    [({"fsdp": 8}, 1), ({"fsdp": 2, "tensor": 4}, 2), ({"data": 2, "fsdp": 2, "tensor": 2}, 4)],
)
def test_rows_per_device(axes: dict[str, int], micro_batches: int) -> None:
    """As many as JAX puts there."""
    layout = BatchLayout(mesh=make_mesh(**axes), rows=32, micro_batches=micro_batches)
    ids = layout.like(np.zeros((1, 7)))
    assert ids.sharding.shard_shape(ids.shape) == (micro_batches, layout.rows_per_device, 7)
    assert BatchLayout(mesh=None, rows=32, micro_batches=2).rows_per_device == 16


def test_more_vector_memory_where_there_are_many_tokens() -> None:
    for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite"):
        few, many = (compiler_options(kind, tokens=tokens) for tokens in (2048, 4096))
        assert many.keys() - few.keys() == {MEMORY}
    assert compiler_options("TPU v4", tokens=4096) == compiler_options("cpu", tokens=4096) == {}
