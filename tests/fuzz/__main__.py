"""`python -m tests.fuzz --cases 10000`: more cases of the same, and what came of them."""

import argparse
import os
import resource
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.fuzz.harness import attack
from tests.fuzz.targets import TARGETS

_ROOM = 12 * 2**30  # bytes of address space beyond what is used at the start


def main() -> int:
    """Exit status 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="of all targets (10000)")
    parser.add_argument("--first", type=int, default=0, help="the number of the first (0)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--only", action="append", metavar="TARGET", help="may be given often")
    parser.add_argument("--messages", action="store_true", help="show each refusal once")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, resource.RLIM_INFINITY))
    chosen = [one for one in TARGETS if not options.only or one.name in options.only]
    each = sum(target.cases for target in chosen)
    failed = False
    sys.stdout.write("| input | cases | works | refused | slowest | more memory | failed |\n")
    sys.stdout.write("| --- | --- | --- | --- | --- | --- | --- |\n")
    left = options.cases
    for target in chosen:
        cases = left if target is chosen[-1] else round(options.cases * target.cases / each)
        left -= cases
        with tempfile.TemporaryDirectory() as folder:
            numbers = range(options.first, options.first + cases)
            tally = attack(target, Path(folder), cases=numbers, seed=options.seed, alone=True)
        sys.stdout.write(
            f"| {target.name} | {cases:,} | {tally.works:,} | {tally.refused:,} | "
            f"{tally.slowest:.1f} s | {tally.growth >> 20} MiB | {len(tally.failures)} |\n"
        )
        sys.stdout.flush()
        for failure in tally.failures:
            sys.stderr.write(f"{failure}\n")
        if options.messages:
            for message, count in tally.messages.most_common():
                sys.stderr.write(f"{count:5} {message[:300]}\n")
        failed |= bool(tally.failures)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
