"""`python -m stf_jax` is `stf-jax`."""

import sys

from stf_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
