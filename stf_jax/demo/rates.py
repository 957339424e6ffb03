"""Chooses the learning rate of stage 1 for each variant.

    python -m stf_jax.demo.rates OUT [VARIANT ...]

Projectors of 96 and of 1,536 need different rates, and no variant should lose because it got the
rate of another one. All variants have the same choice. The lowest loss decides, on scenes of
another seed than the demo's.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stf_jax.demo.experiment import Settings, claim, read_metrics, train_stage
from stf_jax.demo.language import TEXT
from stf_jax.demo.tower import VISION
from stf_jax.demo.variants import DemoVariant, all_variants

RATES = (5e-4, 1.5e-3, 4e-3, 1e-2, 3e-2)
SETTINGS = Settings(seed=1)
_LAST = 50  # steps, of whose losses the mean is taken


def compare(
    variant: DemoVariant,
    out: Path,
    *,
    rates: Sequence[float] = RATES,
    settings: Settings = SETTINGS,
) -> dict[float, float]:
    """The loss at the end of stage 1, in nats a token, by the peak learning rate.

    Args:
        variant: to be trained.
        out: a folder; what is there already is not trained again.
        rates: the choice.
        settings: with a seed of their own.
    """
    claim(out, settings)
    losses = {}
    for rate in rates:
        candidate = dataclasses.replace(
            variant, name=f"{variant.name}-{rate:g}", pretrain_rate=rate
        )
        records = read_metrics(train_stage(1, candidate, settings, out))
        losses[rate] = float(np.mean([record["loss"] for record in records[-_LAST:]]))
    return losses


def main(out: Path, names: Sequence[str]) -> None:
    """Prints a table: a variant a line, a rate a column."""
    variants, lines = all_variants(VISION, TEXT), []
    for name in names or variants:
        losses = compare(variants[name], out)
        lines.append(f"{name:9}" + "".join(f"{losses[rate]:9.3f}" for rate in RATES))
    lines.insert(0, "variant  " + "".join(f"{rate:9g}" for rate in RATES))
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
