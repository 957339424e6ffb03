"""Compiles a config's training step for a slice that this machine does not have.

Runs in a process of its own, see `stf_jax.plan.client`.
"""

import dataclasses
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from stf_jax.models import flops
from stf_jax.parallel.mesh import MeshConfig
from stf_jax.parallel.sharding import make_mesh
from stf_jax.plan.chips import Topology
from stf_jax.plan.estimate import estimate_cost
from stf_jax.plan.padding import padding
from stf_jax.plan.request import Plan, Request
from stf_jax.systems import named_config
from stf_jax.systems.base import LlavaConfig
from stf_jax.train.config import TrainConfig
from stf_jax.train.program import make_program
from stf_jax.util.errors import DeviceMemoryError, explain_memory

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def make_plan(request: Request) -> Plan:
    """Compiles a training step and estimates its cost.

    Raises:
        ValueError: the topology, the mesh or the config is wrong, in one line.
    """
    config = TrainConfig.load(request.config, request.overrides)
    topology = Topology.parse(request.topology)
    model = architecture(config)
    mesh = mesh_of(config.mesh, topology)
    chip, data = topology.chip, config.data
    parts = flops.training(
        model,
        stage=config.stage,
        rows=data.batch_size,
        length=data.sequence_length,
        images=data.images_per_row,
        tower=data.features == "computed",
    )
    known = Plan(
        topology=str(topology),
        mesh=dict(mesh.shape),
        rows=data.batch_size,
        length=data.sequence_length,
        model_flops=dataclasses.asdict(parts),
        peak_flops=chip.flops,
        limit=chip.memory,
        padding=padding(model, mesh),
        fits=False,
    )
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        program = make_program(config, model, steps=config.steps or 1000, mesh=mesh)
        compiled, text = compile_and_read(program.compile)
    if isinstance(compiled, int):
        return dataclasses.replace(known, needed=compiled)
    took = time.perf_counter() - start
    cost = estimate_cost(text, compiled.memory_analysis(), topology)
    moved = 2 * (cost["arguments"] + cost["temporaries"])
    return dataclasses.replace(
        known, fits=True, memory_seconds=moved / chip.bandwidth, compile_seconds=took, **cost
    )


def architecture(config: TrainConfig) -> LlavaConfig:
    """The model's sizes, by the name in the config or from its weights.

    Raises:
        ValueError: neither is there.
    """
    if config.architecture is not None:
        return named_config(config.architecture, quantization=config.quantization)
    if not Path(config.model).exists() and "://" not in config.model:
        raise ValueError(
            f"{config.model} is not there, and the config has no architecture; "
            "add --architecture=llava_stf_7b, for instance"
        )
    from stf_jax.store.run import open_model

    return open_model(config.model).config


def mesh_of(config: MeshConfig | None, topology: Topology) -> Mesh:
    """A config's mesh on chips that are described; None for one chip, all axes being 1.

    Raises:
        ValueError: they do not go together, or `describe`'s.
    """
    if config is None and topology.chips > 1:
        raise ValueError(
            f"the config has no mesh, which is for one device; for the {topology.chips} chips of "
            f"{topology} add --mesh.fsdp=-1, for instance"
        )
    sizes = (config or MeshConfig()).sizes(topology.chips)
    return make_mesh(**sizes, devices=describe(topology))


def describe(topology: Topology) -> Sequence[Any]:
    """The devices of a slice or of several, as the compiler knows them.

    Raises:
        ValueError: libtpu does not start, or knows no such slice.
    """
    options: dict[str, Any] = {}
    if topology.chip.name == "v4":
        # The two cores of a chip as one device, which is how JAX runs on it.
        options["chip_config_name"] = "megacore"
    if topology.chips_per_slice < 4:
        options["chips_per_host_bounds"] = (*topology.shape, 1)[:3]
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        description = topologies.get_topology_desc(topology.slice, "tpu", **options)
    except (jax.errors.JaxRuntimeError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        if "libtpu" in reason or "INVALID_ARGUMENT" not in reason:
            raise ValueError(
                f"the TPU compiler does not start; pip install libtpu ({reason[:200]})"
            ) from error
        raise ValueError(f"there is no slice {topology.slice}: {reason[:200]}") from error
    devices: Sequence[Any] = description.devices
    if len(devices) != topology.chips:
        raise ValueError(f"there is no slice {topology}: the compiler makes {len(devices)} of it")
    return devices


def compile_and_read(compile: Callable[[dict[str, Any]], Any]) -> tuple[Any, str]:
    """The executable and the optimized module, or the bytes a chip that it would need, and "".

    Args:
        compile: takes options of the compiler's.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The text is the compiler's own: JAX cannot read back all that it makes of a long program.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            with explain_memory("the program does not fit into the memory of a device"):
                compiled = compile(options)
        except DeviceMemoryError as error:
            return parse_needed(str(error.__cause__)), ""
        (text,) = (path.read_text() for path in Path(folder).glob("*.after_codegen.txt"))
    return compiled, text


def parse_needed(message: str) -> int:
    """Bytes that the compiler would have needed: "Used 17.2G of 15.75G hbm", or in other words."""
    match = re.search(r"Used ([\d.]+)([KMGT]?) of", message) or re.search(
        r"\(([\d.]+)([KMGT]?)\) exceeds", message
    )
    return int(float(match.group(1)) * _UNITS.get(match.group(2), 1)) if match else 0
