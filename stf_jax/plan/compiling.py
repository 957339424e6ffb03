"""Compiles a config's training step for a slice that is not there, and measures what came out.

Runs in a process of its own, see `stf_jax.plan.asking`.
"""

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from stf_jax import flops
from stf_jax.config import LlavaConfig
from stf_jax.parallel.sharding import make_mesh
from stf_jax.plan.chips import Topology
from stf_jax.plan.hlo import Collective, Work, analyse, largest_gather
from stf_jax.plan.kernels import kernel_flops
from stf_jax.plan.padding import padding
from stf_jax.plan.request import Plan, Request, Traffic
from stf_jax.train.config import MeshConfig, TrainConfig
from stf_jax.train.program import make_program

# Of the published rate that a Pallas kernel's matmuls are taken to reach; see docs/tpu.md.
KERNEL_RATE = 0.5
_TOP = 12
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def make_plan(request: Request) -> Plan:
    """Compiles and measures.

    Raises:
        ValueError: the topology, the mesh or the config is wrong, in one line.
    """
    config = TrainConfig.load(request.config, request.overrides)
    topology = Topology.parse(request.topology)
    sizes = (config.mesh or MeshConfig(data=1, fsdp=1, tensor=1)).sizes(topology.chips)
    model = architecture(config)
    mesh = make_mesh(**sizes, devices=describe(topology))
    chip, data = topology.chip, config.data
    parts = flops.training(
        model,
        stage=config.stage,
        rows=data.batch_size,
        length=data.sequence_length,
        images=data.images_per_row,
    )
    known = Plan(
        topology=str(topology),
        mesh=sizes,
        rows=data.batch_size,
        length=data.sequence_length,
        model_flops=dataclasses.asdict(parts),
        peak_flops=chip.flops,
        limit=chip.memory,
        padding=padding(model, mesh),
        fits=False,
    )
    start = time.perf_counter()
    compiled = _compile(config, model, mesh)
    if isinstance(compiled, int):
        return dataclasses.replace(known, needed=compiled)
    took = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    work = analyse(text, devices=topology.chips)
    in_kernels = sum(
        kernel_flops(one.name, shapes) * times for (one, shapes), times in work.kernels.items()
    )
    hardware = work.flops + in_kernels
    rate = topology.rate
    seconds = {one: one.traffic / rate * times for one, times in work.collectives.items()}
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return dataclasses.replace(
        known,
        fits=True,
        arguments=arguments,
        temporaries=temporaries,
        peak=memory.peak_memory_in_bytes,
        hardware_flops=hardware,
        cycles_seconds=work.cycles.total() / chip.clock,
        kernel_seconds=in_kernels / chip.flops / KERNEL_RATE,
        matmul_seconds=hardware / chip.flops,
        memory_seconds=2 * (arguments + temporaries) / chip.bandwidth,
        collective_seconds=sum(seconds.values()),
        exposed_seconds=sum(time for one, time in seconds.items() if not one.overlapped),
        traffic=tuple(_traffic(work.collectives)),
        largest_gather=largest_gather(text),
        top=tuple(_top(work, chip.clock)),
        compile_seconds=took,
    )


def architecture(config: TrainConfig) -> LlavaConfig:
    """The model by the name in the config, or as its weights say.

    Raises:
        ValueError: neither is there.
    """
    if config.architecture is not None:
        return LlavaConfig.named(config.architecture)
    if not Path(config.model).exists() and "://" not in config.model:
        raise ValueError(
            f"{config.model} is not there, and the config has no architecture; "
            "add --architecture=llava_stf_7b, for instance"
        )
    from stf_jax.train.run import open_model

    return open_model(config.model).config


def describe(topology: Topology) -> Sequence[Any]:
    """The devices of a slice, as the compiler knows them.

    Raises:
        ValueError: libtpu is missing, or knows no such slice.
    """
    options: dict[str, Any] = {}
    if topology.chip.name == "v4":
        # The two cores of a chip as one device, which is how JAX runs on it.
        options["chip_config_name"] = "megacore"
    if topology.chips < 4:
        sides = (*topology.shape, 1)[:3]
        options["chips_per_host_bounds"] = sides
    try:
        found = topologies.get_topology_desc(str(topology), "tpu", **options)
    except (jax.errors.JaxRuntimeError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        if "libtpu" in reason or "INVALID_ARGUMENT" not in reason:
            raise ValueError(
                f"the TPU compiler does not start; pip install libtpu ({reason[:200]})"
            ) from error
        raise ValueError(f"there is no slice {topology}: {reason[:200]}") from error
    devices: Sequence[Any] = found.devices
    if len(devices) != topology.chips:
        raise ValueError(f"there is no slice {topology}: the compiler makes {len(devices)} of it")
    return devices


def _compile(config: TrainConfig, model: LlavaConfig, mesh: Mesh) -> Any:
    """The executable, or the bytes a chip that it would need."""
    with jax.set_mesh(mesh):
        program = make_program(config, model, steps=config.steps or 1000, mesh=mesh)
        try:
            return program.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return _needed(str(error))


def _needed(message: str) -> int:
    """Bytes that the compiler would have needed: "Used 17.2G of 15.75G hbm", or in other words."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message) or re.search(
        r"\(([\d.]+)([KMGT]?)\) exceeds", message
    )
    return int(float(found.group(1)) * _UNITS.get(found.group(2), 1)) if found else 0


def _traffic(collectives: Counter[Collective]) -> list[Traffic]:
    kinds = sorted({one.kind for one in collectives})
    made = []
    for kind in kinds:
        here = {one: times for one, times in collectives.items() if one.kind == kind}
        largest = max(here, key=lambda one: one.bytes)
        made.append(
            Traffic(
                kind=kind,
                count=sum(here.values()),
                bytes=sum(one.traffic * times for one, times in here.items()),
                exposed=sum(
                    one.traffic * times for one, times in here.items() if not one.overlapped
                ),
                largest=largest.bytes,
                what=f"{largest.shape} {largest.source}",
            )
        )
    return made


def _top(work: Work, clock: float) -> list[tuple[float, str, str]]:
    return [
        (cycles / clock, source, shape) for (source, shape), cycles in work.cycles.most_common(_TOP)
    ]
