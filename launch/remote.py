"""The shell scripts that run on a worker, the same for every way to reach it.

A run is a process of its own, so that it outlives the connection that started it. The folder
`launch` of the home directory holds its files:

- log, and the logs of earlier runs, with the time at which the next run replaced them;
- pid, of the shell around the command, which leads a process group;
- status, once the command has ended;
- lock, which the shell holds as long as it lives.
"""

import shlex
from collections.abc import Sequence

CODE = "stf-jax"
RUN = "launch"
ARCHIVE = "stf-jax.tar.gz"

# "Try again later": `stf-jax train` was interrupted and has saved. Any other status is final.
INTERRUPTED = 75

# Seconds until the run ends on a worker after it has ended on another.
PATIENCE = 60

_GCSFUSE = "3.6.0"


def setup(*, extras: str, bucket: str | None) -> str:
    """Unpacks the code, installs it, and mounts `bucket` on /mnt/BUCKET."""
    lines = [
        "set -e",
        f"mkdir -p ~/{CODE}",
        f"tar -xzf ~/{ARCHIVE} -C ~/{CODE}",
        f"cd ~/{CODE}",
        'export PATH="$HOME/.local/bin:$PATH"',
        # The images of TPU VMs have an older Python; uv installs a new one.
        "command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh",
        "uv venv --quiet --allow-existing --python 3.11 .venv",
        f"uv pip install --quiet --python .venv --editable {shlex.quote(f'.[{extras}]')}",
    ]
    if bucket is not None:
        name, place = shlex.quote(bucket), shlex.quote(f"/mnt/{bucket}")
        package = f"gcsfuse_{_GCSFUSE}_amd64.deb"
        releases = "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download"
        lines += [
            "command -v gcsfuse > /dev/null || {",
            f"  curl -LsSfo /tmp/{package} {releases}/v{_GCSFUSE}/{package}",
            f"  sudo apt-get install -y -qq /tmp/{package}",
            "}",
            f'sudo mkdir -p {place} && sudo chown "$(id -u)" {place}',
            f"mountpoint -q {place} || gcsfuse --implicit-dirs {name} {place}",
        ]
    return "\n".join(lines)


def foreground(command: Sequence[str]) -> str:
    """Runs a command in the code's folder and environment, and returns its status."""
    return f'cd ~/{CODE} && PATH="$PWD/.venv/bin:$PATH" {shlex.join(command)}'


def check_idle() -> str:
    """Fails if nothing is set up, or if a run is under way and does not end soon."""
    return "\n".join(
        [
            f"[ -x ~/{CODE}/.venv/bin/stf-jax ] ||",
            '  { echo "$(hostname): nothing is installed here; use setup first" >&2; exit 1; }',
            f"mkdir -p ~/{RUN} && cd ~/{RUN} || exit 1",
            f"flock -w {PATIENCE} lock true ||",
            '  { echo "$(hostname): a run is under way; see log, or stop it" >&2; exit 1; }',
        ]
    )


def start(command: Sequence[str]) -> str:
    """Starts a command on an idle worker, and returns at once."""
    run = "\n".join(
        [
            # The shell outlives the command, to write its status.
            "trap : TERM INT HUP",
            f"{foreground(command)} 9>&-",
            # 255 is the status of ssh when its connection breaks.
            f"echo $(($? == 255 ? 254 : $?)) > ~/{RUN}/status.new",
            f"mv ~/{RUN}/status.new ~/{RUN}/status",
        ]
    )
    return "\n".join(
        [
            f"cd ~/{RUN} && exec 9> lock && flock -n 9 || exit 1",
            "rm -f status",
            '[ ! -e log ] || mv log "log-$(date -u +%Y%m%dT%H%M%SZ)"',
            f"setsid bash -c {shlex.quote(run)} > log 2>&1 < /dev/null &",
            "echo $! > pid",
        ]
    )


def running() -> str:
    """Status 0 if a run is under way, else 1."""
    return f"cd ~/{RUN} 2> /dev/null && ! flock -n lock true"


def follow() -> str:
    """Shows the end of the log and every new line; ends with the run, and returns its status."""
    return "\n".join(
        [
            f"cd ~/{RUN} 2> /dev/null && [ -e pid ] ||",
            '  { echo "$(hostname): no run has been started here" >&2; exit 1; }',
            # The pid of a finished run may belong to another process by now.
            "if flock -n lock true; then tail -n 20 log",
            'else tail -n 20 -f --pid="$(cat pid)" log; fi',
            # Killed, or the machine has been restarted.
            "exit $(cat status 2> /dev/null || echo 137)",
        ]
    )


def check_not_killed() -> str:
    """Fails if the run is gone without a status: something killed it, such as a restart."""
    return "\n".join(
        [
            f"cd ~/{RUN} && {{ ! flock -n lock true || [ -e status ]; }} ||",
            '  { echo "$(hostname): the run was killed here" >&2; exit 1; }',
        ]
    )


def state() -> str:
    """One line with the state of the run."""
    return "\n".join(
        [
            f'cd ~/{RUN} 2> /dev/null || {{ echo "$(hostname): no run"; exit; }}',
            'if ! flock -n lock true; then echo "$(hostname): running"',
            'elif [ -e status ]; then echo "$(hostname): ended with status $(cat status)"',
            'else echo "$(hostname): killed"; fi',
        ]
    )


def stop() -> str:
    """Sends SIGTERM, after which `stf-jax train` saves and exits; says so if nothing runs."""
    return "\n".join(
        [
            f"if {running()}; then kill -TERM -- -$(cat pid)",
            'else echo "$(hostname): nothing runs"; fi',
        ]
    )
