"""Plans the shipped configs and writes what the compiler said into them and into docs/tpu.md.

    python scripts/plan_configs.py [configs/stf-7b-finetune.yaml ...]

A config names its slices in a line "# topologies: v5e:4x4 ..."; each gets a line "# plan: ...".
Minutes for each config and slice of 7B, without a TPU; pip install libtpu.
"""

import argparse
import re
import sys
from pathlib import Path

from stf_jax.plan.asking import plan
from stf_jax.plan.report import headline

ROOT = Path(__file__).parent.parent
_SLICES, _PLAN = "# topologies: ", "# plan: "
_TABLE = re.compile(r"(<!-- plans -->\n).*?(<!-- end of plans -->)", re.DOTALL)
_HEADLINE = re.compile(
    r"(?P<slice>\S+): peak (?P<peak>\S+) GiB of (?P<limit>\S+) GiB a chip; estimated step "
    r"(?P<step>\S+) s, estimated MFU (?P<mfu>\d+) %"
)


def planned(text: str) -> list[str]:
    """The headlines in a config."""
    return [line.removeprefix(_PLAN) for line in text.splitlines() if line.startswith(_PLAN)]


def slices(text: str) -> list[str]:
    """The slices that a config is for."""
    lines = [line for line in text.splitlines() if line.startswith(_SLICES)]
    return lines[0].removeprefix(_SLICES).split() if lines else []


def with_plan(text: str, line: str) -> str:
    """A config with this headline in place of an older one of the same slice."""
    slice_ = line.partition(": ")[0]
    kept = [one for one in planned(text) if one.partition(": ")[0] != slice_]
    order = slices(text)
    lines = sorted([*kept, line], key=lambda one: order.index(one.partition(": ")[0]))
    rest = [one for one in text.splitlines() if not one.startswith(_PLAN)]
    at = next(i for i, one in enumerate(rest) if one.startswith(_SLICES)) + 1
    return "\n".join([*rest[:at], *(f"{_PLAN}{one}" for one in lines), *rest[at:]]) + "\n"


def table() -> str:
    """All headlines of all configs."""
    rows = ["| config | slice | peak, GiB | of | step, s | MFU, % |", "|---|---|---|---|---|---|"]
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        for line in planned(path.read_text()):
            found = _HEADLINE.match(line)
            cells = found.groups() if found else (line.partition(": ")[0], *["does not fit"] * 4)
            rows.append(f"| {' | '.join([path.stem, *cells])} |")
    return "\n".join(rows) + "\n"


def write_table() -> None:
    """Brings docs/tpu.md up to the configs."""
    docs = ROOT / "docs" / "tpu.md"
    docs.write_text(_TABLE.sub(lambda found: f"{found[1]}{table()}{found[2]}", docs.read_text()))


def main() -> None:
    """Plans what is asked for, or everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="*", type=Path)
    parser.add_argument("--topology", action="append", help="only this one")
    options = parser.parse_args()
    for path in options.configs or sorted((ROOT / "configs").glob("*.yaml")):
        for topology in options.topology or slices(path.read_text()):
            line = headline(plan(str(path), topology=topology))
            sys.stderr.write(f"{path.name}: {line}\n")
            path.write_text(with_plan(path.read_text(), line))
            write_table()
    write_table()


if __name__ == "__main__":
    main()
