"""The compiler's process, started once: many questions, and the imports of one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

# It forks before anything has started a backend: a question finds what it finds in a new process.
_SERVER = """
import os, sys
from stf_jax.plan import worker

for line in sys.stdin:
    folder = line.strip()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(folder + "/stderr", os.O_WRONLY | os.O_CREAT), 2)
            sys.stdin, sys.stdout = open(folder + "/stdin"), open(folder + "/stdout", "w")
            worker.main()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Compiler:
    """Stands in for the module `subprocess` where the client asks."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0
        self.process: subprocess.Popen[str] | None = None
        self.environment: dict[str, str] = {}

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """The answer of a fork of the process, which the first question starts."""
        assert command == [sys.executable, "-m", "stf_jax.plan.worker"]
        # Pytest writes into it which test is running.
        environment = options["env"] | {"PYTEST_CURRENT_TEST": ""}
        if self.process is None:
            self.environment = environment
            self.process = subprocess.Popen(
                [sys.executable, "-c", _SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                text=True,
            )
        assert environment == self.environment
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        (folder / "stdin").write_text(options["input"])
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        out, err = ((folder / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(command, status, out, err)

    def close(self) -> None:
        if self.process is not None:
            with self.process:
                self.process.kill()
