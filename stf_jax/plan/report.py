"""A plan as a person reads it; every time and rate in it is an estimate."""

from collections.abc import Sequence

from stf_jax.plan.request import Plan
from stf_jax.plan.sweep import Tried

_GIB = 2**30


def render(plan: Plan) -> str:
    """Lines of a name and what it is."""
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
        f"overlaps {plan.exposed_seconds:.3f}",
        "MFU (estimate)": f"{100 * plan.mfu:.1f} %: model FLOPs take {plan.ideal_seconds:.3f} s at "
        "the published bf16 rate",
        "roofline": f"matmuls {plan.matmul_seconds:.3f} s, HBM {plan.memory_seconds:.3f} s, "
        f"collectives {plan.collective_seconds:.3f} s",
    }
    for one in plan.traffic:
        lines[one.kind] = (
            f"{one.count:,} a step, {_count(one.bytes)}B to a chip, {_count(one.exposed)}B "
            f"not overlapped; the largest {_count(one.largest)}B, {one.what}"
        )
    dearest = [f"  {1e3 * time:8.2f} ms  {shape}  {source}" for time, source, shape in plan.top]
    return "\n".join([_table(lines), "the compiler's dearest instructions (estimate):", *dearest])


def headline(plan: Plan) -> str:
    """Peak, time and MFU, as the first lines of the shipped configs have them."""
    if not plan.fits:
        return f"{plan.topology}: {_too_large(plan)}"
    return (
        f"{plan.topology}: peak {_gib(plan.peak)} of {_gib(plan.limit)} a chip; estimated step "
        f"{plan.step_seconds:.2f} s, estimated MFU {100 * plan.mfu:.0f} %"
    )


def render_change(change: Sequence[str] | None) -> str:
    """What to do about a step that does not fit."""
    if change is None:
        return "no fewer rows at a time would fit it: use a larger slice, or stage lora"
    return f"it fits with {' '.join(change)}"


def render_sweep(chosen: Sequence[tuple[Sequence[str], Plan]]) -> str:
    """The best, one a line."""
    if not chosen:
        return "nothing fits; use a larger slice"
    return "\n".join(f"{headline(plan)}  {' '.join(changes)}" for changes, plan in chosen)


def progress(tried: Tried) -> str:
    """One neighbour."""
    changes, plan = tried
    what = "does not go together" if plan is None else headline(plan)
    return f"{what}  {' '.join(changes)}"


def _slice(plan: Plan) -> str:
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    return f"{plan.topology}, {plan.chips} chips as {axes}"


def _too_large(plan: Plan) -> str:
    over = plan.needed - plan.limit
    return f"does not fit: needs {_gib(plan.needed)} a chip, {_gib(over)} more than there are"


def _count(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return f"{number:,.0f} "


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"


def _table(lines: dict[str, str]) -> str:
    width = max(len(name) for name in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())
