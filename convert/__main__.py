"""`python -m convert import|export|inspect` is `stf-jax convert import|export|inspect`."""

import sys

from stf_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
