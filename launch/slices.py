"""Google Cloud's names for the slices of `stf-jax plan`."""

import dataclasses

from launch.commands import LaunchError
from stf_jax.plan.chips import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Generation:
    """Names of a generation, from cloud.google.com/tpu/docs ("TPU software versions" and its page).

    Attributes:
        prefix: of accelerator types.
        cores: TensorCores a chip where the type counts those, 1 where it counts chips.
        runtime: the TPU software version for JAX.
    """

    prefix: str
    cores: int
    runtime: str


_GENERATIONS = {
    "v4": _Generation(prefix="v4", cores=2, runtime="tpu-ubuntu2204-base"),
    "v5e": _Generation(prefix="v5litepod", cores=1, runtime="v2-alpha-tpuv5-lite"),
    "v5p": _Generation(prefix="v5p", cores=2, runtime="v2-alpha-tpuv5"),
    "v6e": _Generation(prefix="v6e", cores=1, runtime="v2-alpha-tpuv6e"),
}

# Chips of a slice of v5e or v6e.
_FLAT = (1, 4, 8, 16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slices:
    """What to rent. The service picks the most compact layout of so many chips.

    Attributes:
        count: how many slices.
        accelerator: "v5litepod-16", also XPK's TPU type.
        runtime: "v2-alpha-tpuv5-lite", of TPU VMs.
    """

    count: int
    accelerator: str
    runtime: str

    @classmethod
    def parse(cls, text: str) -> "Slices":
        """Reads a topology as `plan` takes it, such as v5e:4x4, or 2xv5e:4x4.

        Raises:
            LaunchError: there is no such topology.
        """
        try:
            topology = Topology.parse(text)
        except ValueError as error:
            raise LaunchError(str(error)) from error
        if topology.chip.axes == 2 and topology.chips_per_slice not in _FLAT:
            raise LaunchError(
                f"nobody rents a slice {topology.slice}: {topology.chip.name} comes in "
                f"{', '.join(map(str, _FLAT[:-1]))} or {_FLAT[-1]} chips"
            )
        generation = _GENERATIONS[topology.chip.name]
        cores = topology.chips_per_slice * generation.cores
        return cls(
            count=topology.slices,
            accelerator=f"{generation.prefix}-{cores}",
            runtime=generation.runtime,
        )
