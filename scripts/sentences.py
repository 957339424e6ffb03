"""Lists the long sentences of README.md, CONTRIBUTING.md, CHANGELOG.md and docs/.

    python scripts/sentences.py [--longest 35] [PAGE ...]

Code blocks and headings are left out; a table's cell and a list's item each end a sentence. Every
word between blanks counts, those of inline code too. Exit status: 1 if there is a long sentence.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
_FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s+")
_END = re.compile(r"(?<=[.!?])[\"')*`]*\s+(?=\S)")


def read_blocks(text: str) -> Iterator[str]:
    """The pieces of a page's prose that no sentence crosses: paragraphs, items, cells."""
    text = _LINK.sub(r"\1", _COMMENT.sub("", _FENCE.sub("", text)))
    block: list[str] = []
    after_blank, in_list = True, False
    for line in [*text.splitlines(), ""]:
        item, cells = _ITEM.match(line), line.lstrip().startswith("|")
        starts = not line.strip() or line.startswith("#") or item or cells
        if starts and block:
            yield " ".join(block)
            block = []
        if cells:
            yield from line.strip().strip("|").split("|")
        elif line.strip() and not line.startswith("#"):
            code = line.startswith("    ") and after_blank and not in_list
            if not code:
                block.append(_ITEM.sub("", line).strip())
            else:
                continue
        in_list = bool(item) or (in_list and (line.startswith(" ") or not line.strip()))
        after_blank = not line.strip()


def long_sentences(text: str, *, longest: int) -> list[tuple[int, str]]:
    """Words and wording of each sentence of a page that has more than `longest` words."""
    sentences = (sentence for block in read_blocks(text) for sentence in _END.split(block))
    counted = ((len(sentence.split()), sentence.strip()) for sentence in sentences)
    return [(words, sentence) for words, sentence in counted if words > longest]


def main() -> int:
    """Prints the long sentences, and the count of each page on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--longest", type=int, default=35, help="words (%(default)s)")
    options = parser.parse_args()
    pages = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
    pages += sorted((ROOT / "docs").glob("*.md"))
    total = 0
    for page in options.pages or pages:
        sentences = long_sentences(page.read_text(), longest=options.longest)
        total += len(sentences)
        sys.stderr.write(f"{page.name}: {len(sentences)}\n")
        for words, sentence in sentences:
            sys.stdout.write(f"{page.name}: {words}: {sentence}\n")
    sys.stderr.write(f"{total} sentences of more than {options.longest} words\n")
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
