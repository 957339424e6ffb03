"""A plan as a person reads it; every time and rate in it is an estimate."""

from stf_jax.plan.request import Plan

_GIB = 2**30


def render(plan: Plan) -> str:
    """Lines of a name and what it is."""
    lines = {"slice": _slice(plan), "batch": f"{plan.rows} rows of {plan.length} tokens"}
    total = sum(plan.model_flops.values())
    parts = ", ".join(f"{name} {value / 1e12:.1f}" for name, value in plan.model_flops.items())
    lines["model FLOPs"] = f"{total / 1e12:,.1f} T a step ({parts})"
    if not plan.fits:
        lines["memory"] = _too_large(plan)
        return _table(lines)
    lines |= {
        "memory": f"peak {_gib(plan.peak)} a chip of {_gib(plan.limit)}: arguments "
        f"{_gib(plan.arguments)}, temporaries {_gib(plan.temporaries)}",
        "hardware FLOPs": f"{plan.hardware_flops * plan.chips / 1e12:,.1f} T a step as compiled, "
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
            f"{one.count:,} a step, {one.bytes / 1e9:.2f} GB to a chip, {one.exposed / 1e9:.2f} "
            f"not overlapped; the largest {one.largest / 1e6:.1f} MB, {one.what}"
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


def _slice(plan: Plan) -> str:
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    return f"{plan.topology}, {plan.chips} chips as {axes}"


def _too_large(plan: Plan) -> str:
    over = plan.needed - plan.limit
    return f"does not fit: needs {_gib(plan.needed)} a chip, {_gib(over)} more than there are"


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"


def _table(lines: dict[str, str]) -> str:
    width = max(len(name) for name in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())
