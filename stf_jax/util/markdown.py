"""Tables in Markdown."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, a line for each row; a bar inside a cell does not end it."""
    cells = [header, ["---"] * len(header), *rows]
    lines = ([cell.replace("|", "\\|") for cell in row] for row in cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
