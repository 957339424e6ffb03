"""How a config lays out the devices."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are laid out; one of the sizes may be -1, for all the devices that are left.

    Attributes:
        data: replicas of the parameters.
        fsdp: parts into which parameters, optimizer and rows of the batch are split.
        tensor: parts into which heads and hidden channels are split.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh {sizes}: each size is 1 or more, and one of them may be -1")

    def sizes(self, devices: int) -> dict[str, int]:
        """The axes with -1 filled in.

        Raises:
            ValueError: the mesh does not fit the devices.
        """
        sizes = dataclasses.asdict(self)
        known = 1
        for size in sizes.values():
            known *= max(size, 1)
        if -1 in sizes.values() and devices % known == 0:
            sizes = {name: devices // known if n == -1 else n for name, n in sizes.items()}
            known = devices
        if known != devices:
            axes = " x ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(
                f"the mesh {axes} does not fit {devices} devices; the product of its sizes has to "
                f"be {devices}, and one of them may be -1, for what is left"
            )
        return sizes
