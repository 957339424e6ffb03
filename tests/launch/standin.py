"""A gcloud, xpk, kubectl, ssh or scp that a test can look into.

Files in $CLOUD: calls.jsonl, every call; state, of the slice, none while there is none; queue,
states that a request goes through, one a line; refuse, what the service says to a request; broken,
a worker on which every command fails, or those that contain the word behind it; outage, nothing
gets through; follower, the shell that shows a log; cuts, how many connections to a log are cut off;
workers/NAME, home directories.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

CLOUD = Path(os.environ["CLOUD"])
WORKERS = ("w-0", "w-1")


def gcloud(arguments):
    _, _, group, verb, *rest = arguments
    if (CLOUD / "outage").exists():
        return complain("there was a problem with the network")
    return GCLOUD[group, verb](rest)


def request(_):
    return rent() or note("queued")


def rent(_=()):
    if (CLOUD / "refuse").exists():
        return complain(read("refuse"))
    if (CLOUD / "state").exists():
        return complain("ALREADY_EXISTS: the resource already exists")
    for name in WORKERS:
        (CLOUD / "workers" / name).mkdir(parents=True)
    return note("state", "READY")


def request_state(_):
    if not (CLOUD / "queued").exists():
        return complain("NOT_FOUND: Resource 'q' was not found.")
    first, *later = read("queue").splitlines() or ["ACTIVE"]
    if later:
        note("queue", "\n".join(later))
    sys.stdout.write(f"{first}\n")
    return 0


def state(_):
    if not (CLOUD / "state").exists():
        return complain("NOT_FOUND: Resource 'n' was not found.")
    sys.stdout.write(f"{read('state')}\n")
    return 0


def give_up_request(_):
    if not (CLOUD / "queued").exists():
        return complain("NOT_FOUND: Resource 'q' was not found.")
    (CLOUD / "queued").unlink()
    give_back(())
    return 0


def give_back(_):
    if not (CLOUD / "state").exists():
        return complain("NOT_FOUND: Resource 'n' was not found.")
    (CLOUD / "state").unlink()
    # The machines are gone, and what was on them; kept for the test to look at.
    number = len(list(CLOUD.glob("gone-*")))
    (CLOUD / "workers").rename(CLOUD / f"gone-{number}")
    return 0


def gcloud_ssh(arguments):
    flags = dict(argument.lstrip("-").split("=", 1) for argument in arguments if "=" in argument)
    if read("state") != "READY":
        return complain(f"The TPU VM is in state {read('state')}")
    numbers = range(len(WORKERS)) if flags["worker"] == "all" else [int(flags["worker"])]
    # As the real one does on the way to ssh.
    command = " ".join(flags["command"].split(" "))
    processes = [(number, shell(WORKERS[number], command)) for number in numbers]
    if "tail" in command:
        note("follower", str(processes[0][1].pid))
    statuses = []
    for number, process in processes:
        statuses.append(process.wait())
        if statuses[-1] and len(processes) > 1:
            what = f"##### Command execution on worker {number} failed with exit status"
            sys.stderr.write(f"{what} {statuses[-1]}. Continuing.\n")
    return next((status for status in statuses if status), 0)


def gcloud_scp(arguments):
    files = [argument for argument in arguments if not argument.startswith("-")]
    names = WORKERS if "--worker=all" in arguments else WORKERS[:1]
    for name in names:
        copy(name, *files)
    return 0


def ssh(arguments):
    host, script = without_options(arguments)
    if "tail" in script and (cuts := int(read("cuts") or 0)):
        note("cuts", str(cuts - 1))
        return 255
    return shell(host, script).wait()


def scp(arguments):
    source, target = without_options(arguments)
    copy((target if target.endswith(":") else source).partition(":")[0], source, target)
    return 0


def xpk(arguments):
    flags = dict(argument.lstrip("-").split("=", 1) for argument in arguments if "=" in argument)
    if "command" in flags:
        (CLOUD / "workers" / "pod").mkdir(parents=True)
        # What is around a command in the JobSet that XPK writes.
        script = f"({flags['command']}) & PID=$!\nwait $PID\nEXIT_CODE=$?\nexit $EXIT_CODE"
        return shell("pod", script).wait()
    return int(read("xpk_status") or 0)


def shell(name, script):
    home = CLOUD / "workers" / name
    home.mkdir(parents=True, exist_ok=True)
    broken, _, part = read("broken").partition(" ")
    if broken == name and part in script:
        script = f"echo '{name}: disk full' >&2; exit 1"
    path = f"{os.environ['WORKER_TOOLS']}:{os.environ['PATH']}"
    environment = os.environ | {"HOME": str(home), "PATH": path}
    return subprocess.Popen(["bash", "-c", script], env=environment, cwd=home)


def copy(name, source, target):
    home = CLOUD / "workers" / name
    home.mkdir(parents=True, exist_ok=True)
    if target.endswith(":"):
        shutil.copy(source, home)
    else:
        actual = home / source.partition(":")[2]
        if actual.is_dir():
            shutil.copytree(actual, Path(target, actual.name))
        else:
            shutil.copy(actual, target)


def without_options(arguments):
    rest = list(arguments)
    while rest[0].startswith("-"):
        del rest[: 2 if rest[0] == "-o" else 1]
    return rest


def complain(text):
    sys.stderr.write(f"WARNING: something else\nERROR: (gcloud) {text}\n")
    return 1


def read(name):
    path = CLOUD / name
    return path.read_text().strip() if path.exists() else ""


def note(name, text=""):
    (CLOUD / name).write_text(text)
    return 0


GCLOUD = {
    ("queued-resources", "create"): request,
    ("queued-resources", "describe"): request_state,
    ("queued-resources", "delete"): give_up_request,
    ("tpu-vm", "create"): rent,
    ("tpu-vm", "describe"): state,
    ("tpu-vm", "delete"): give_back,
    ("tpu-vm", "ssh"): gcloud_ssh,
    ("tpu-vm", "scp"): gcloud_scp,
}


if __name__ == "__main__":
    program, *arguments = sys.argv[1:]
    with (CLOUD / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps([program, *arguments]) + "\n")
    act = {"gcloud": gcloud, "xpk": xpk, "kubectl": lambda _: 0, "ssh": ssh, "scp": scp}[program]
    sys.exit(act(arguments))
