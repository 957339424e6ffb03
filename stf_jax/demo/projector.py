"""Makes `data/projector` again: the projector that the demo answers with at once.

    python -m stf_jax.demo.projector OUT [STEPS]

It runs the experiment of `stf_jax.demo.real` in OUT on all images, and writes OUT/projector. It
continues where it was stopped. With 0 steps the projector is that of `stf_jax.demo.alignment`.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from stf_jax.demo.alignment import write_adapter
from stf_jax.demo.experiment import claim
from stf_jax.demo.pretraining import native_tensors
from stf_jax.demo.real import RealSettings, align_projector, draw, train_projector
from stf_jax.store.run import open_model

# More images than there are: all.
SETTINGS = RealSettings(singles=1000, groups=300, steps=40)


def make(out: Path, settings: RealSettings) -> Path:
    """Trains a projector and writes it in bfloat16; its folder.

    Raises:
        DemoError: `out` holds a run of other settings.
        Interrupted: and it can be called again.
        ValueError: a package is not installed.
    """
    claim(out, settings)
    draw(settings, out)
    model = align_projector(settings, out)
    if settings.steps:
        model = train_projector(model, settings, out)
    write_projector(model, out / "projector")
    return out / "projector"


def write_projector(model: Path, out: Path) -> None:
    """The projector of a model or run in the new folder `out`, as an adapter in bfloat16."""
    opened = open_model(model)
    config = opened.config
    entries = config.system.weights(config.vision, config.text)
    leaves = {entry.native: opened.read(entry.native) for entry in entries}
    tensors = {
        name: np.asarray(array).astype(ml_dtypes.bfloat16)
        for name, array in native_tensors(entries, leaves).items()
    }
    write_adapter(out, tensors, system=config.system.to_dict())


def main(arguments: Sequence[str]) -> None:
    """Makes it in the folder that is named, by so many steps."""
    parser = argparse.ArgumentParser(prog="python -m stf_jax.demo.projector")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("steps", metavar="STEPS", type=int, nargs="?", default=SETTINGS.steps)
    options = parser.parse_args(arguments)
    make(options.out, dataclasses.replace(SETTINGS, steps=options.steps))


if __name__ == "__main__":
    main(sys.argv[1:])
