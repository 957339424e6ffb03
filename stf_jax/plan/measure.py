"""What a compiled program costs by the compiler's own text, in one chip's view."""

from typing import Any

from stf_jax.plan.chips import Topology
from stf_jax.plan.collectives import Collective
from stf_jax.plan.kernels import kernel_flops
from stf_jax.plan.request import Traffic
from stf_jax.plan.work import Work, analyze, largest_gather

# Of the published rate that a Pallas kernel's matmuls are taken to reach; see docs/tpu.md.
KERNEL_RATE = 0.5
_TOP = 12


def measure(
    text: str, memory: Any, topology: Topology, *, one_turn: bool = False
) -> dict[str, Any]:
    """The fields of a `Cost`.

    Args:
        text: the optimized module.
        memory: `memory_analysis()` of the executable.
        topology: that it was compiled for.
        one_turn: the times are those of one turn of the program's only loop.

    Raises:
        UnreadableProgram: the compiler's text is not as expected.
    """
    chip = topology.chip
    work = analyze(
        text, devices=topology.chips_per_slice, slices=topology.slices, one_turn=one_turn
    )
    in_kernels = sum(
        kernel_flops(one.name, shapes) * times for (one, shapes), times in work.kernels.items()
    )
    hardware = work.flops + in_kernels
    dcn = {one: times for one, times in work.collectives.items() if one.dcn}
    links = {one: times for one, times in work.collectives.items() if not one.dcn}
    # A chip alone has no links.
    seconds = {one: one.traffic / topology.rate for one in links}
    exposed = {one: one.exposure(seconds[one], chip.clock) for one in links}
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "hardware_flops": hardware,
        "cycles_seconds": work.cycles.total() / chip.clock,
        "kernel_seconds": in_kernels / chip.flops / KERNEL_RATE,
        "matmul_seconds": hardware / chip.flops,
        "collective_seconds": sum(seconds[one] * times for one, times in links.items()),
        "exposed_seconds": sum(exposed[one] * times for one, times in links.items()),
        "dcn_seconds": sum(one.traffic / chip.dcn * times for one, times in dcn.items()),
        "traffic": (
            # In a group of one chip nothing is sent.
            *_traffic(links, {one: exposed[one] / (seconds[one] or 1) for one in links}),
            *_traffic(dcn, dict.fromkeys(dcn, 1.0), network="DCN "),
        ),
        "largest_gather": largest_gather(text),
        "top": tuple(_top(work, chip.clock)),
    }


def _traffic(
    collectives: dict[Collective, int], exposed: dict[Collective, float], network: str = ""
) -> list[Traffic]:
    """By kind; `exposed` is the part of each that nothing overlaps."""
    kinds = sorted({one.kind for one in collectives})
    made = []
    for kind in kinds:
        here = {one: times for one, times in collectives.items() if one.kind == kind}
        largest = max(here, key=lambda one: one.bytes)
        made.append(
            Traffic(
                kind=f"{network}{kind}",
                count=sum(here.values()),
                bytes=sum(one.traffic * times for one, times in here.items()),
                exposed=sum(one.traffic * exposed[one] * times for one, times in here.items()),
                largest=largest.bytes,
                what=f"{largest.shape} {largest.source}",
            )
        )
    return made


def _top(work: Work, clock: float) -> list[tuple[float, str, str]]:
    return [
        (cycles / clock, source, shape) for (source, shape), cycles in work.cycles.most_common(_TOP)
    ]
