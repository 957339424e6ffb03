"""Draws docs/fusion.svg: how LLaVA-STF makes 144 tokens of 576.

    python scripts/draw_fusion.py [OUT.svg|OUT.png]

Needs matplotlib (the `demo` extra).
"""

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

OUT = Path(__file__).parent.parent / "docs" / "fusion.svg"

# Wong 2011: colors that the color-blind can tell apart.
WINDOW = ("#0072B2", "#56B4E9", "#E69F00", "#CC79A7")
PAPER, LINE, INK, TINT = "#FFFFFF", "#9AA5B1", "#1F2933", "#EEF2F6"
PATCHES, WINDOWS, TAPS = 24, 12, 8
ROW, COLUMN = 5, 7  # of the window that the drawing follows, from the top left


def draw_grid(axes: Axes, left: float, bottom: float, side: float, cells: int) -> None:
    """A square of cells."""
    axes.add_patch(Rectangle((left, bottom), side, side, facecolor=TINT, edgecolor=INK, lw=1))
    for number in range(1, cells):
        at = side * number / cells
        axes.plot([left + at] * 2, [bottom, bottom + side], color=LINE, lw=0.4)
        axes.plot([left, left + side], [bottom + at] * 2, color=LINE, lw=0.4)


def draw_window(axes: Axes, left: float, top: float, cell: float) -> None:
    """Four patches of a window, in their colors."""
    for number, color in enumerate(WINDOW):
        row, column = divmod(number, 2)
        corner = (left + column * cell, top - (row + 1) * cell)
        axes.add_patch(Rectangle(corner, cell, cell, facecolor=color, edgecolor=INK, lw=0.6))


def draw_arrow(axes: Axes, start: float, stop: float, y: float, label: str = "") -> None:
    """An arrow to the right, with its label above it."""
    arrow = FancyArrowPatch(
        (start, y), (stop, y), arrowstyle="-|>", mutation_scale=12, color=INK, lw=1.2
    )
    axes.add_patch(arrow)
    if label:
        write(axes, (start + stop) / 2, y + 0.22, label, weight="bold", va="bottom")


def write(axes: Axes, x: float, y: float, text: str, **options: object) -> None:
    """Centered text."""
    style: dict[str, object] = {"ha": "center", "va": "top", "fontsize": 9, "color": INK}
    axes.text(x, y, text, **{**style, **options})  # type: ignore[arg-type]


def draw() -> Figure:
    """The whole drawing, from the tower's taps to the language model."""
    figure = Figure(figsize=(11, 3.1), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 22), ylim=(0.4, 6.6))
    axes.axis("off")
    middle, base, side = 3.7, 2.1, 3.2

    # The taps, the last one in front.
    for number in reversed(range(TAPS)):
        shift = 0.14 * number
        corner = (0.6 + shift, base + shift)
        axes.add_patch(Rectangle(corner, side, side, facecolor=TINT, edgecolor=LINE, lw=0.8))
    draw_grid(axes, 0.6, base, side, PATCHES)
    write(axes, 2.3, base - 0.2, "CLIP ViT-L/14-336\nread at 8 blocks:\n8 x 576 patches, 1024 wide")

    draw_arrow(axes, 5.0, 6.9, middle, "MBTF")
    write(axes, 5.95, middle - 0.2, "a two-layer\nMLP mixes the\n8 blocks", fontsize=8)

    left = 7.1
    draw_grid(axes, left, base, side, PATCHES)
    cell = side / PATCHES
    top = base + side
    draw_window(axes, left + 2 * COLUMN * cell, top - 2 * ROW * cell, cell)
    write(axes, left + side / 2, base - 0.2, "24 x 24 = 576 patches,\n1024 wide")

    # The window, enlarged, and its channels in a row.
    zoom, large = 11.1, 0.62
    corner_x = left + (2 * COLUMN + 2) * cell
    corner_y = top - 2 * ROW * cell
    for start, stop in ((corner_y, middle + large), (corner_y - 2 * cell, middle - large)):
        axes.plot([corner_x, zoom], [start, stop], color=LINE, lw=0.8, ls="--")
    draw_window(axes, zoom, middle + large, large)
    write(axes, zoom + large, middle + large + 0.16, "2x2 window", fontsize=8, va="bottom")
    draw_arrow(axes, zoom + 2 * large + 0.15, 13.95, middle, "STF")
    bar, width, height = 14.1, 0.55, 0.42
    for number, color in enumerate(WINDOW):
        axes.add_patch(
            Rectangle(
                (bar + number * width, middle - height / 2), width, height,
                facecolor=color, edgecolor=INK, lw=0.6,
            )
        )  # fmt: skip
    write(axes, bar + 2 * width, middle + 0.4, "one token", fontsize=8, va="bottom")
    text = "4 x 1024 channels,\nside by side:\nnothing is averaged"
    write(axes, bar + 2 * width, middle - 0.4, text, fontsize=8)

    # The tokens.
    small = side / 2
    last = 17.6
    draw_arrow(axes, bar + 4 * width + 0.1, last - 0.1, middle)
    draw_grid(axes, last, middle - small / 2, small, WINDOWS)
    step = small / WINDOWS
    axes.add_patch(
        Rectangle(
            (last + COLUMN * step, middle + small / 2 - (ROW + 1) * step), step, step,
            facecolor=INK, edgecolor=INK, lw=0.6,
        )
    )  # fmt: skip
    write(axes, last + small / 2, middle - small / 2 - 0.2, "12 x 12 = 144\ntokens")
    draw_arrow(axes, last + small + 0.1, 20.2, middle)
    box = Rectangle((20.3, middle - 1.2), 1.3, 2.4, facecolor=TINT, edgecolor=INK, lw=1)
    axes.add_patch(box)
    write(axes, 20.95, middle, "projector,\nlanguage\nmodel", va="center", fontsize=8)
    return figure


def main() -> None:
    """Writes the drawing; the bytes are the same each time."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    with mpl.rc_context({"svg.hashsalt": "fusion", "svg.fonttype": "path"}):
        metadata = {"Date": None} if out.suffix == ".svg" else None
        draw().savefig(out, dpi=110, metadata=metadata)


if __name__ == "__main__":
    main()
