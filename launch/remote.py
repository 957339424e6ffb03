"""What is done on a worker, as shell scripts; the same ones however they get there.

A run is a process of its own, so that it outlives the connection that started it. It leaves in the
folder `launch` of the home directory: log, and those of the runs before, by the time at which they
gave way; pid, of the shell around the command, which leads a process group; status, once it has
ended; lock, which that shell holds as long as it lives.
"""

import shlex
from collections.abc import Sequence

CODE = "stf-jax"
RUN = "launch"
ARCHIVE = "stf-jax.tar.gz"

# "Try again later": `stf-jax train` was interrupted and has saved; any other status is an end.
INTERRUPTED = 75

# Seconds in which a worker ends the run that another worker has ended.
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
        # The images of TPU VMs have an older Python than is needed; uv brings one.
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
    """Runs it in the code's folder and environment, with its status."""
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
    """Starts it on a worker that is idle, and returns."""
    run = "\n".join(
        [
            # The shell has to outlive what ends the command, to write its status.
            "trap : TERM INT HUP",
            f"{foreground(command)} 9>&-",
            # 255 is what ssh says when it is cut off.
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
    """Shows the end of the log and what is added; ends with the run, and with its status."""
    return "\n".join(
        [
            f"cd ~/{RUN} 2> /dev/null && [ -e pid ] ||",
            '  { echo "$(hostname): no run has been started here" >&2; exit 1; }',
            # Of a run that is over the pid may be another process' by now.
            "if flock -n lock true; then tail -n 20 log",
            'else tail -n 20 -f --pid="$(cat pid)" log; fi',
            # Killed, or the machine has been restarted.
            "exit $(cat status 2> /dev/null || echo 137)",
        ]
    )


def check_not_killed() -> str:
    """Fails if the run is gone without a status: killed, as by a restart of the machine."""
    return "\n".join(
        [
            f"cd ~/{RUN} && {{ ! flock -n lock true || [ -e status ]; }} ||",
            '  { echo "$(hostname): the run was killed here" >&2; exit 1; }',
        ]
    )


def state() -> str:
    """One line: what has become of the run."""
    return "\n".join(
        [
            f'cd ~/{RUN} 2> /dev/null || {{ echo "$(hostname): no run"; exit; }}',
            'if ! flock -n lock true; then echo "$(hostname): running"',
            'elif [ -e status ]; then echo "$(hostname): ended with status $(cat status)"',
            'else echo "$(hostname): killed"; fi',
        ]
    )


def stop() -> str:
    """SIGTERM, at which `stf-jax train` saves and leaves; says so if nothing runs."""
    return "\n".join(
        [
            f"if {running()}; then kill -TERM -- -$(cat pid)",
            'else echo "$(hostname): nothing runs"; fi',
        ]
    )
