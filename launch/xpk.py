"""GKE, through the `xpk` command line. A JobSet restarts the run, so it needs no supervisor."""

import shlex
from collections.abc import Sequence

from launch import remote
from launch.commands import Command, LaunchError, Runner
from launch.slices import Slices

# Each pod starts when its image has arrived.
_HOST_TIMEOUT = 600
# Seconds for the checkpoint of an interrupted run.
_GRACE = 300


class Xpk:
    """A cluster with TPU slices.

    Attributes:
        runner: runs the commands here.
        cluster: its name.
        place: flags that name the zone and the project where gcloud's configuration does not.
    """

    def __init__(self, runner: Runner, cluster: str, *, place: Sequence[str]):
        self.runner, self.cluster, self.place = runner, cluster, list(place)

    def create(self, what: Slices, *, spot: bool) -> None:
        """Makes the cluster with its slices."""
        capacity = "--spot" if spot else "--on-demand"
        self.runner.run(
            self._xpk(
                "cluster",
                "create",
                f"--tpu-type={what.accelerator}",
                f"--num-slices={what.count}",
                capacity,
            )
        )

    def run(
        self,
        workload: str,
        what: Slices,
        command: Command,
        *,
        image: str,
        storage: str | None,
        restarts: int,
    ) -> None:
        """Submits the run, which restarts after an interruption.

        Args:
            workload: a name for the run.
            what: slices of the cluster.
            command: `stf-jax train` or another verb that runs on several hosts.
            image: a container image with stf-jax, such as launch/Dockerfile makes.
            storage: an attached storage of the cluster to mount.
            restarts: how many at most.

        Raises:
            LaunchError: XPK refuses.
        """
        line = shlex.join([*command, f"--host-timeout={_HOST_TIMEOUT}"])
        if "\n" in line:
            raise LaunchError("XPK takes a command of one line; leave out the line break")
        self.runner.run(
            [
                *self._xpk("workload", "create", f"--workload={workload}"),
                f"--tpu-type={what.accelerator}",
                f"--num-slices={what.count}",
                f"--docker-image={image}",
                f"--max-restarts={restarts}",
                f"--restart-on-exit-codes={remote.INTERRUPTED}",
                f"--termination-grace-period-seconds={_GRACE}",
                *([f"--storage={storage}"] if storage else []),
                # XPK runs it in a subshell, which gets the signals.
                f"--command=exec {line}",
            ]
        )

    def log(self, workload: str) -> int:
        """Shows the log of worker 0 until its pod ends."""
        pod = (
            f"jobset.sigs.k8s.io/jobset-name={workload},jobset.sigs.k8s.io/job-index=0,"
            "batch.kubernetes.io/job-completion-index=0"
        )
        return self.runner.call(
            ["kubectl", "logs", "--follow", "--tail=20", f"--selector={pod}", "--container=jax-tpu"]
        )

    def watch(self, workload: str) -> int:
        """Waits for the end of the run: 0 if it is finished, 125 if it failed."""
        return self.runner.call(
            self._xpk("workload", "list", f"--wait-for-job-completion={workload}")
        )

    def stop(self, workload: str) -> None:
        """Ends the run, which saves first."""
        self.runner.run(self._xpk("workload", "delete", f"--workload={workload}"))

    def delete(self) -> None:
        """Gives the cluster back."""
        self.runner.run(self._xpk("cluster", "delete"))

    def _xpk(self, group: str, verb: str, *flags: str) -> list[str]:
        return ["xpk", group, verb, f"--cluster={self.cluster}", *self.place, *flags]
