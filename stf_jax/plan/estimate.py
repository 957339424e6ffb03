"""The cost of a compiled program on one chip, from the compiler's own text."""

from typing import Any

from stf_jax.plan.chips import Topology
from stf_jax.plan.collectives import Collective
from stf_jax.plan.cost_analysis import CostAnalysis, analyze, largest_gather
from stf_jax.plan.kernels import kernel_flops
from stf_jax.plan.request import Traffic

# Of the published rate that a Pallas kernel's matmuls are taken to reach; see docs/tpu.md.
KERNEL_RATE = 0.5
_TOP = 12


def estimate_cost(
    text: str, memory: Any, topology: Topology, *, one_iteration: bool = False
) -> dict[str, Any]:
    """Estimates the fields of a `Cost`.

    Args:
        text: the optimized module.
        memory: `memory_analysis()` of the executable.
        topology: that it was compiled for.
        one_iteration: the times are those of one iteration of the program's only loop.

    Raises:
        UnreadableProgram: the compiler's text is not as expected.
    """
    chip = topology.chip
    totals = analyze(
        text, devices=topology.chips_per_slice, slices=topology.slices, one_iteration=one_iteration
    )
    in_kernels = sum(
        kernel_flops(kernel.name, shapes) * times
        for (kernel, shapes), times in totals.kernels.items()
    )
    hardware = totals.flops + in_kernels
    dcn = {item: times for item, times in totals.collectives.items() if item.dcn}
    links = {item: times for item, times in totals.collectives.items() if not item.dcn}
    # A chip alone has no links.
    seconds = {item: item.traffic / topology.rate for item in links}
    exposed = {item: item.exposure(seconds[item], chip.clock) for item in links}
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "hardware_flops": hardware,
        "cycles_seconds": totals.cycles.total() / chip.clock,
        "kernel_seconds": in_kernels / chip.flops / KERNEL_RATE,
        "matmul_seconds": hardware / chip.flops,
        "collective_seconds": sum(seconds[item] * times for item, times in links.items()),
        "exposed_seconds": sum(exposed[item] * times for item, times in links.items()),
        "dcn_seconds": sum(item.traffic / chip.dcn * times for item, times in dcn.items()),
        "traffic": (
            # In a group of one chip nothing is sent.
            *_traffic(links, {item: exposed[item] / (seconds[item] or 1) for item in links}),
            *_traffic(dcn, dict.fromkeys(dcn, 1.0), network="DCN "),
        ),
        "largest_gather": largest_gather(text),
        "top": tuple(_top(totals, chip.clock)),
    }


def _traffic(
    collectives: dict[Collective, int], exposed: dict[Collective, float], network: str = ""
) -> list[Traffic]:
    """The traffic of each kind; `exposed` is the part of each collective that nothing overlaps."""
    kinds = sorted({item.kind for item in collectives})
    traffic = []
    for kind in kinds:
        of_kind = {item: times for item, times in collectives.items() if item.kind == kind}
        largest = max(of_kind, key=lambda item: item.bytes)
        traffic.append(
            Traffic(
                kind=f"{network}{kind}",
                count=sum(of_kind.values()),
                bytes=sum(item.traffic * times for item, times in of_kind.items()),
                exposed=sum(
                    item.traffic * exposed[item] * times for item, times in of_kind.items()
                ),
                largest=largest.bytes,
                what=f"{largest.shape} {largest.source}",
            )
        )
    return traffic


def _top(totals: CostAnalysis, clock: float) -> list[tuple[float, str, str]]:
    return [
        (cycles / clock, source, shape)
        for (source, shape), cycles in totals.cycles.most_common(_TOP)
    ]
