"""What the pages say to type is what the commands take."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from stf_jax.cli.main import _parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of each command in the page's code."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^ {4}stf-jax (.*)$", text, re.MULTILINE):
        yield [word for word in shlex.split(line, comments=True) if word != "..."]


def test_the_commands_of_the_pages_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    parser, count = _parser(), 0
    for page in PAGES:
        for arguments in commands(page):
            try:
                options, rest = parser.parse_known_args(arguments)
            except SystemExit:
                pytest.fail(f"{page.name}: {arguments}: {capsys.readouterr().err}")
            # Keys of a config are looked up when it is read.
            assert "overrides" in options or not rest, (page.name, arguments)
            count += 1
    assert count > 40
