"""Models that were written before a system was one file: their configs and paths of today.

config     {"fusion": {"reduction": "stf", "taps": [...], "mbtf": {...}, "window": 2, ...}}
paths      "fusion/mbtf/linear_1/kernel", "projector/linear_1/kernel"
"""

from collections.abc import Mapping
from typing import Any

_SYSTEMS = {"identity": "llava", "average": "average", "stf": "stf"}
# (older, today's); no path begins with both.
_PATHS = (("fusion/", "connector/"), ("projector/", "connector/projector/"))


def upgrade_fusion(fusion: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a system from those of a fusion, as many of them as there are.

    What is no key of a fusion stays, so that it is refused by its name.
    """
    system = dict(fusion)
    reduction = system.pop("reduction", None)
    if reduction is not None:
        # A strange one is refused by the list of systems.
        strange = not isinstance(reduction, str)
        system["name"] = reduction if strange else _SYSTEMS.get(reduction, reduction)
    # Keys of a PyTorch checkpoint, whose weights tell whether there is a mixer.
    if activation := system.pop("last_activation", False):
        system["mbtf"] = {"last_activation": activation}
    if system.get("name") == "llava":
        mixes = system.pop("mbtf", None)
        # Every fusion had a window; here one of a single patch belongs to STF.
        system.pop("window", None)
        if mixes:
            return system | {"name": "stf", "window": 1, "mbtf": mixes}
        if "mbtf" not in fusion:
            del system["name"]
    return system


def upgrade_config(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a whole model."""
    model = dict(tree)
    fusion = model.pop("fusion", None)
    if isinstance(fusion, Mapping):
        model["system"] = upgrade_fusion(fusion)
    return model


def upgrade_path(path: str) -> str:
    """Where a parameter lies today."""
    for older, today in _PATHS:
        if path.startswith(older):
            return today + path.removeprefix(older)
    return path


def older_path(path: str) -> str:
    """Where a parameter of today lay."""
    for older, today in reversed(_PATHS):
        if path.startswith(today):
            return older + path.removeprefix(today)
    return path


def is_older(paths: Mapping[str, Any]) -> bool:
    """Whether parameters lie where they did before."""
    return any(path.startswith(older) for path in paths for older, _ in _PATHS)
