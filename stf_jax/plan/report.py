"""Plans as tables for a terminal; every time and rate is an estimate."""

from collections.abc import Sequence

from stf_jax.plan.phases import InferencePlan, Phase
from stf_jax.plan.request import Cost, Plan, Traffic
from stf_jax.plan.sweep import Tried

_GIB = 2**30


def render(plan: Plan | InferencePlan) -> str:
    """A plan as a table."""
    return _inference(plan) if isinstance(plan, InferencePlan) else _training(plan)


def headline(plan: Plan | InferencePlan) -> str:
    """Peak and times, as the first lines of the shipped configs have them."""
    if not plan.fits:
        return f"{plan.topology}: {_too_large(plan)}"
    if isinstance(plan, InferencePlan):
        prefill, decode = plan.phases[0], plan.phases[-1]
        return (
            f"{plan.topology}: {plan.slots} slots, peak {_gib(plan.needed)} of "
            f"{_gib(plan.limit)} a chip; estimated prefill {1e3 * prefill.seconds:.0f} ms for "
            f"{_prompts(prefill)}, decode {1e3 * decode.seconds:.1f} ms a step at "
            f"{100 * decode.bandwidth:.0f} % of HBM's rate, {plan.tokens_per_second:.0f} tokens/s"
        )
    return (
        f"{plan.topology}: peak {_gib(plan.peak)} of {_gib(plan.limit)} a chip; estimated step "
        f"{plan.step_seconds:.2f} s, estimated MFU {100 * plan.mfu:.0f} %"
    )


def render_changes(plan: Plan | InferencePlan, changes: Sequence[Sequence[str]]) -> str:
    """Advice about a plan that does not fit."""
    if changes:
        return f"it fits with {', or with '.join(' '.join(change) for change in changes)}"
    if isinstance(plan, InferencePlan):
        return (
            f"no fewer slots would fit it: the weights take {_gib(plan.weights)} a chip; split "
            "them over more chips, with --mesh.tensor"
        )
    return "no fewer rows at a time would fit it: use a larger slice, or stage lora"


def render_sweep(chosen: Sequence[tuple[Sequence[str], Plan]]) -> str:
    """The best plans, one a line."""
    if not chosen:
        return "nothing fits; use a larger slice"
    return "\n".join(f"{headline(plan)}  {' '.join(changes)}" for changes, plan in chosen)


def progress(tried: Tried) -> str:
    """A line about one plan of a sweep."""
    changes, plan = tried
    what = "does not go together" if plan is None else headline(plan)
    return f"{what}  {' '.join(changes)}"


def _training(plan: Plan) -> str:
    lines = {"slice": _slice(plan), "batch": f"{plan.rows} rows of {plan.length} tokens"}
    total = sum(plan.model_flops.values())
    parts = ", ".join(f"{name} {_count(value)}" for name, value in plan.model_flops.items())
    lines["model FLOPs"] = f"{_count(total)} a step ({parts})"
    if not plan.fits:
        lines["memory"] = _too_large(plan)
        return _table(lines)
    lines |= {
        "memory": f"peak {_gib(plan.peak)} a chip of {_gib(plan.limit)}: arguments "
        f"{_gib(plan.arguments)}, temporaries {_gib(plan.temporaries)}",
        "hardware FLOPs": f"{_count(plan.hardware_flops * plan.chips)} a step as compiled, "
        "what is computed again included",
        "padding": ", ".join(f"{name} {100 * part:.0f} %" for name, part in plan.padding.items())
        or "none",
        "step (estimate)": f"{plan.step_seconds:.3f} s: compiler's cycles "
        f"{plan.cycles_seconds:.3f}, kernels {plan.kernel_seconds:.3f}, collectives that nothing "
        f"overlaps {plan.exposed_seconds:.3f}"
        + (f", between slices {plan.dcn_seconds:.3f}" if plan.dcn_seconds else ""),
        "MFU (estimate)": f"{100 * plan.mfu:.1f} %: model FLOPs take {plan.ideal_seconds:.3f} s at "
        "the published bf16 rate",
        "roofline": f"matmuls {plan.matmul_seconds:.3f} s, HBM {plan.memory_seconds:.3f} s, "
        f"collectives {plan.collective_seconds:.3f} s",
    }
    lines |= {
        traffic.kind: f"{traffic.count:,} a step, {_traffic(traffic)}" for traffic in plan.traffic
    }
    return "\n".join([_table(lines), *_most_expensive(plan)])


def _inference(plan: InferencePlan) -> str:
    images = {0: "no image", 1: "1 image"}.get(plan.images, f"{plan.images} images")
    lines = {
        "slice": _slice(plan),
        "slots": f"{plan.slots} of {plan.context} positions, prompts with {images}; weights in "
        f"{plan.dtype}, keys and values in {plan.cache_dtype}",
        "memory": f"peak {_gib(plan.needed)} a chip of {_gib(plan.limit)}: weights "
        f"{_gib(plan.weights)}, cache of the slots {_gib(plan.cache)}, of new prefixes "
        f"{_gib(plan.prefixes)}, the rest temporaries"
        if plan.fits
        else f"{_too_large(plan)}: weights {_gib(plan.weights)}, cache of the slots "
        f"{_gib(plan.cache)}, of new prefixes {_gib(plan.prefixes)}",
    }
    parts = [lines, *(_phase(phase) for phase in plan.phases if phase.needed <= plan.limit)]
    if not plan.fits:
        return _table(*parts)
    once, long = (plan.questions_per_second(n) for n in (1, plan.new_tokens))
    rate = (
        f"{plan.tokens_per_second:,.0f} tokens a second with all slots full; {once:,.1f} questions "
        f"a second with answers of 1 token, {long:,.1f} with {plan.new_tokens}, one an image"
    )
    table = _table(*parts, {"rate (estimate)": rate})
    return "\n".join([table, *_most_expensive(plan.phases[-1])])


def _prompts(phase: Phase) -> str:
    return f"{phase.rows} prompt{'s' * (phase.rows > 1)}"


def _phase(phase: Phase) -> dict[str, str]:
    what = {
        "prefill": f"{_prompts(phase)} of {phase.length} positions",
        "insert": f"{phase.rows} questions of {phase.length} tokens",
        "decode": f"the next token of {phase.rows} slots",
    }[phase.name]
    name = f"{phase.name} {phase.length}" if phase.name == "insert" else phase.name
    lines = {
        f"{name} (estimate)": f"{what} in {1e3 * phase.seconds:.1f} ms: compiler's cycles "
        f"{1e3 * phase.cycles_seconds:.1f}, kernels {1e3 * phase.kernel_seconds:.1f}, collectives "
        f"that nothing overlaps {1e3 * phase.exposed_seconds:.1f}",
        "  roofline": f"matmuls {1e3 * phase.matmul_seconds:.1f} ms, HBM "
        f"{1e3 * phase.memory_seconds:.1f} ms ({100 * phase.bandwidth:.0f} % of its rate is "
        f"reached), collectives {1e3 * phase.collective_seconds:.1f} ms",
        "  memory": f"{_gib(phase.needed)} a chip, {_gib(phase.temporaries)} of it temporaries",
    }
    return lines | {
        f"  {traffic.kind}": f"{traffic.count:,}, {_traffic(traffic)}" for traffic in phase.traffic
    }


def _slice(plan: Plan | InferencePlan) -> str:
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    return f"{plan.topology}, {plan.chips} {'chip' if plan.chips == 1 else 'chips'} as {axes}"


def _too_large(plan: Plan | InferencePlan) -> str:
    over = plan.needed - plan.limit
    return f"does not fit: needs {_gib(plan.needed)} a chip, {_gib(over)} more than there are"


def _traffic(traffic: Traffic) -> str:
    return (
        f"{_count(traffic.bytes)}B to a chip, {_count(traffic.exposed)}B not overlapped; the "
        f"largest {_count(traffic.largest)}B, {traffic.what}"
    )


def _most_expensive(cost: Cost) -> list[str]:
    title = "the compiler's most expensive instructions (estimate):"
    return [
        title,
        *(f"  {1e3 * time:8.2f} ms  {shape}  {where}" for time, where, shape in cost.top),
    ]


def _count(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return f"{number:,.0f} "


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"


def _table(*parts: dict[str, str]) -> str:
    lines = [line for part in parts for line in part.items()]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)
