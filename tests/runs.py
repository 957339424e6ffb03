"""Runs of `train`, each in a process of its own that begins at once."""

import os
import subprocess
import sys
from pathlib import Path

# A process that has imported everything forks one run after the other: a run begins within
# a fraction of a second, so that what is done to it falls into its work and not into its imports.
_SERVER = """
import os, sys
from stf_jax.train.config import TrainConfig
from stf_jax.train.loop import train
from stf_jax.train.metrics import import_summary_writer

import_summary_writer()
for line in sys.stdin:
    config = line.strip()
    child = os.fork()
    if child == 0:
        code = 1
        os.dup2(os.open(config + ".stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        try:
            code = 0 if train(TrainConfig.load(config)) == "finished" else 75
        except (OSError, ValueError) as error:
            sys.stderr.write(f"error: {error}\\n")
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    """Begins runs; what each writes to stderr is in a file beside its config."""

    def __init__(self, cache: Path):
        # Not that of all tests: a kill may cut an entry short.
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, config: Path) -> int:
        """Begins the run of a config; returns its process."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{config}\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> int:
        """Waits for the run; its exit status."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())
