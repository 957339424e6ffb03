"""What a plan says that an engine's cache takes, which depends on what each layer drops."""

import jax.numpy as jnp
import pytest

from stf_jax.infer.config import InferenceConfig, Workload
from stf_jax.infer.engine import fit_room
from stf_jax.infer.lowering import abstract_program, allocate
from stf_jax.parallel.sharding import make_mesh
from stf_jax.plan.inference import bytes_of, workload_prompts
from stf_jax.systems import SYSTEMS
from tests.stf_jax.systems.conftest import cache_bytes, config_of


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_cache_of_every_system_by_arithmetic(name: str) -> None:
    """Of slots and kept prefixes, on a mesh whose chips have a quarter of rows, half of heads."""
    config = config_of(name)
    work = Workload(images=2, prompt_tokens=9, question_tokens=(70,), max_new_tokens=30)
    prompts = workload_prompts(config, InferenceConfig(workload=work))
    room = fit_room(config, prompts, slots=16, new=work.max_new_tokens, multiple=4)
    assert (room.slots, room.rows) == (16, 4)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    program = abstract_program(config, mesh=mesh, dtype=jnp.bfloat16, cache_dtype=None)
    slots, pool = allocate(program, room)
    ids = prompts[0].ids
    prefix = ids[: config.system.split(ids).prefilled]
    for planned, rows, held, new in ((slots.cache, 16, ids, 30), (pool, 4, prefix, 0)):
        groups = planned.layer_groups
        vectors, marks = cache_bytes(config, [held], groups, new=new, itemsize=2)
        assert bytes_of(planned) == rows // 4 * (vectors // 2 + marks)
