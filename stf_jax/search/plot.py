"""A schedule as a figure; needs matplotlib (the extra `demo`)."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from stf_jax.search.runner import Schedule
from stf_jax.systems.gsearch import sigmoid_rates


def draw_schedule(schedule: Schedule, path: Path) -> None:
    """The share of tokens in each layer, beside the sigmoid."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    layers = len(schedule.counts)
    shares = 100 * np.array(schedule.counts) / schedule.counts[0]
    sigmoid = schedule.sigmoid
    rates = 100 * sigmoid_rates(sigmoid.slope, sigmoid.midpoint, layers=layers)
    # Wong 2011: the color-blind can distinguish them.
    axes.bar(range(layers), shares, 0.8, color="#56B4E9", label="tokens that stay")
    name = "nearest sigmoid" if schedule.fitted else "sigmoid"
    axes.plot(range(layers), rates, color="#D55E00", marker=".", label=name)
    axes.axhline(100 * schedule.share, color="#999999", linestyle=":", label="mean over layers")
    axes.set(
        title=schedule.how,
        xlabel="layer",
        ylabel=f"tokens of an image (% of {schedule.counts[0]})",
        ylim=(0, 105),
    )
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
