"""Shows whether workers find each other, and their devices; run it on all of them at once."""

import argparse
import sys

from stf_jax.cli.train import add_hosts


def main() -> int:
    """Prints a line on each worker."""
    parser = argparse.ArgumentParser(prog="python -m launch.check", description=__doc__)
    add_hosts(parser)
    options = parser.parse_args()
    import jax

    from stf_jax.parallel import hosts as distributed

    distributed.start(
        options.coordinator, options.processes, options.process, timeout=options.host_timeout
    )
    mine, every = jax.local_devices(), jax.device_count()
    sys.stdout.write(
        f"worker {jax.process_index()} of {jax.process_count()}: "
        f"{len(mine)} of {every} devices, {mine[0].device_kind}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
