"""Plans the shipped configs and writes what the compiler said into them and into docs/tpu.md.

    python scripts/plan_configs.py [configs/stf-7b-lora.yaml ...] [--topology v5e:2x4] [--forget]

A config names its slices in a line "# topologies: v5e:4x4 ..."; each gets a line "# plan: ...". One
that has its line is left alone, so that a stopped run continues where it was; after a change to the
step, --forget takes the lines out first. It takes minutes for each config and slice of 7B, without
a TPU; pip install libtpu.
"""

import argparse
import re
import sys
from pathlib import Path

from stf_jax.plan.client import plan
from stf_jax.plan.report import headline
from stf_jax.util.files import write_text

ROOT = Path(__file__).parent.parent
_SLICES, _PLAN = "# topologies: ", "# plan: "
_PEAK = r"peak (?P<peak>\S+) GiB of (?P<limit>\S+) GiB a chip; estimated "
# Each table by its marks, its columns and what its headlines look like.
_TABLES = {
    "plans": (
        "config | slice | peak, GiB | of | step, s | MFU, %",
        re.compile(rf"(\S+): {_PEAK}step (\S+) s, estimated MFU (\d+) %"),
    ),
    "inference plans": (
        "config | slice | slots | peak, GiB | of | prefill, ms | of prompts | decode step, ms | "
        "of HBM's rate, % | tokens/s",
        re.compile(
            rf"(\S+): (\d+) slots, {_PEAK}prefill (\S+) ms for (\d+) prompts, decode (\S+) ms a "
            r"step at (\d+) % of HBM's rate, (\d+) tokens/s"
        ),
    ),
}


def read_plans(text: str) -> dict[str, str]:
    """The headlines in a config, by slice."""
    lines = [line.removeprefix(_PLAN) for line in text.splitlines() if line.startswith(_PLAN)]
    return {line.partition(": ")[0]: line for line in lines}


def slices(text: str) -> list[str]:
    """The slices that a config is for."""
    lines = [line for line in text.splitlines() if line.startswith(_SLICES)]
    return lines[0].removeprefix(_SLICES).split() if lines else []


def with_plans(text: str, plans: dict[str, str]) -> str:
    """A config with just these headlines, in the order of its slices."""
    rest = [line for line in text.splitlines() if not line.startswith(_PLAN)]
    at = next(i for i, line in enumerate(rest) if line.startswith(_SLICES)) + 1
    lines = [f"{_PLAN}{plans[slice_]}" for slice_ in slices(text) if slice_ in plans]
    return "\n".join([*rest[:at], *lines, *rest[at:]]) + "\n"


def table(name: str) -> str:
    """All headlines of one kind."""
    columns, form = _TABLES[name]
    rows = [f"| {columns} |", f"|{'---|' * (columns.count('|') + 1)}"]
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        inference = path.stem.endswith("-inference")
        for slice_, line in read_plans(path.read_text()).items():
            if inference != (name == "inference plans"):
                continue
            match = form.match(line)
            cells = match.groups() if match else (slice_, line.partition(": ")[2])
            rows.append(f"| {' | '.join([path.stem, *cells])} |")
    return "\n".join(rows) + "\n"


def write_tables() -> None:
    """Brings docs/tpu.md up to the configs."""
    docs = ROOT / "docs" / "tpu.md"
    text = docs.read_text()
    for name in _TABLES:
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}{table(name)}{end}{rest.partition(end)[2]}"
    write_text(docs, text)


def main() -> None:
    """Plans what is asked for, or everything that is not planned yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", type=Path, help="all of configs/, if none is named")
    parser.add_argument("--topology", action="append", help="only this slice, of those it names")
    parser.add_argument("--forget", action="store_true", help="plan again what has been planned")
    options = parser.parse_args()
    todo = [
        (path, topology)
        for path in options.configs or sorted((ROOT / "configs").glob("*.yaml"))
        for topology in slices(path.read_text())
        if options.topology is None or topology in options.topology
    ]
    if options.forget:
        for path, topology in todo:
            text = path.read_text()
            plans = read_plans(text)
            plans.pop(topology, None)
            write_text(path, with_plans(text, plans))
    for path, topology in todo:
        if topology in read_plans(path.read_text()):
            continue
        line = headline(plan(str(path), topology=topology))
        sys.stderr.write(f"{path.name}: {line}\n")
        text = path.read_text()
        write_text(path, with_plans(text, read_plans(text) | {topology: line}))
        write_tables()
    write_tables()


if __name__ == "__main__":
    main()
