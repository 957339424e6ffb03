"""Images as pixels: opened whatever their kind, then CLIP's preprocessing in numpy and Pillow.

The result equals that of the LLaVA-1.5 recipe: resize of the shortest edge (bicubic, antialiased,
on 8-bit values), center crop, then CLIP's mean and deviation; "pad" first pads to a square.
`fast` comes close to it in about two thirds of the time.
"""

import dataclasses
import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from stf_jax.data.forms import shorten
from stf_jax.util.errors import first_line
from stf_jax.util.files import expand, read_bytes

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Pillow itself refuses files above this; padding and resizing may not go beyond it either.
MAX_PIXELS = 178_956_970
# Of a file: as many, uncompressed, and their frame.
MAX_BYTES = 3 * MAX_PIXELS + 2**20

# Formats of photographs and screenshots. Pillow knows more, and some of those run other programs:
# an EPS under any name goes to Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")

ImageSource = str | Path | bytes | Image.Image | np.ndarray
Mode = Literal["pad", "crop"]
Pixels = TypeVar("Pixels", bound=Any)  # of numpy or of JAX

_KNOWN_PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor")


class ImageError(ValueError):
    """An image that cannot be used; one line that names it and the fix."""


def load_image(
    source: ImageSource,
    *,
    name: str | None = None,
    apply_orientation: bool = False,
    min_edge: int | None = None,
    min_longest_edge: int = 1,
) -> Image.Image:
    """Opens an image and gives it as 8-bit RGB.

    Transparency is dropped, not blended (the colors stored under it show); of an animation the
    first frame is taken; 16-bit grayscale is scaled to 8 bits, where Pillow alone would clip it to
    white. CMYK, palettes and grayscale go through Pillow's own conversion.

    Args:
      source: a path, the bytes of a file, a Pillow image, or uint8 [height, width, 3] of numpy.
      name: what errors call it; default the path.
      apply_orientation: turn the image upright as its EXIF says. Off by default, because the
        LLaVA code ignores EXIF and published scores stand on that; photographs straight from a
        telephone want it on.
      min_edge: a JPEG is decoded at a half, a quarter or an eighth of its size, whichever is the
        smallest that leaves both edges at least this long; default is the whole size. The whole
        file is read in any case, so that damage is found.
      min_longest_edge: likewise, for the longer edge alone.

    Raises:
      ImageError: no such file, empty, no image, truncated, of zero size, of more than
        `MAX_PIXELS`, or of a kind that has no 8-bit RGB form.
    """
    if name is None:
        name = shorten(str(source)) if isinstance(source, str | Path) else "the image"
    if isinstance(source, str) and source.startswith(("data:", "http://", "https://")):
        raise ImageError(
            f"{name}: neither base64 nor a URL is read; give a path or the bytes of the file, or "
            "allow URLs where it may be fetched (--allow-urls; in Python allow_urls=True)"
        )
    if isinstance(source, str) and not source:
        raise ImageError("the path of an image is empty; give a path, or leave it out")
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ImageError(
                f"{name}: {source.dtype} {list(source.shape)} of numpy is no image; "
                "give uint8 [height, width, 3]"
            )
        source = Image.fromarray(source)
    if isinstance(source, Image.Image):
        return _load_rgb(source, name, apply_orientation)
    if isinstance(source, bytes):
        data = source
    elif isinstance(source, str | Path):
        data = _read(Path(expand(source)), name)
    else:
        raise ImageError(
            f"{name}: a {type(source).__name__} is no image; "
            "give a path, bytes, a Pillow image or uint8 [height, width, 3] of numpy"
        )
    if not data:
        raise ImageError(f"{name}: the file is empty; fetch it again")
    try:
        with warnings.catch_warnings():
            # Pillow warns from half of its limit on; ours is that limit.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = open_header(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        # Its text names the limit again.
        size = re.search(r"\d+ pixels", str(error))
        raise ImageError(_too_large(name, size[0] if size else str(error))) from error
    except Exception as error:  # each format's reader raises its own kinds
        raise ImageError(
            f"{name}: no image in a format that is read ({', '.join(FORMATS)}); convert it to "
            "PNG, or leave it out"
        ) from error
    with image:
        if min_edge is not None:
            _shrink(image, min_edge, min_longest_edge)
        return _load_rgb(image, name, apply_orientation)


def open_header(file: BinaryIO) -> Image.Image:
    """Opens an image of `FORMATS`, whatever its name; none of its pixels are decoded yet."""
    return Image.open(file, formats=FORMATS)


def _read(path: Path, name: str) -> bytes:
    try:
        return read_bytes(path, most=MAX_BYTES)
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file; check the path or fetch the image") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: cannot be read, a directory; give an image in it") from None
    except (OSError, ValueError) as error:  # a name with a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(
            f"{shorten(name)}: cannot be read ({reason}); check the path and who may read it"
        ) from error


def _shrink(image: Image.Image, min_edge: int, min_longest_edge: int) -> None:
    """Has a JPEG decoded small; other formats stay as they are, and so does what is too large."""
    width, height = image.size
    if not isinstance(image, JpegImageFile) or width * height > MAX_PIXELS:
        return
    for scale in (8, 4, 2):
        if min(image.size) >= scale * min_edge and max(image.size) >= scale * max(
            min_edge, min_longest_edge
        ):
            image.draft(None, (width // scale, height // scale))
            return


def _load_rgb(image: Image.Image, name: str, apply_orientation: bool) -> Image.Image:
    width, height = image.size
    if width == 0 or height == 0:
        raise ImageError(f"{name}: the image is {width}x{height}; leave it out")
    if width * height > MAX_PIXELS:
        raise ImageError(_too_large(name, f"{width}x{height} pixels"))
    try:
        image.load()
        if apply_orientation:
            image = ImageOps.exif_transpose(image)
        rgb = _to_rgb(image)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except Exception as error:  # each format's reader raises its own kinds
        reason = first_line(error)
        raise ImageError(
            f"{name}: damaged, or a kind without RGB form ({reason}); fetch it again or convert it"
        ) from error
    return rgb


def _too_large(name: str, size: str) -> str:
    return f"{name}: too large ({size}; the limit is {MAX_PIXELS} pixels); make it smaller"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "P" and "transparency" in image.info:
        # The same colors as straight to RGB, without Pillow's warning.
        return image.convert("RGBA").convert("RGB")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_deep_gray_to_8_bit(image)).convert("RGB")
    return image.convert("RGB")


def _deep_gray_to_8_bit(image: Image.Image) -> np.ndarray:
    """uint8 [height, width] of an image with more than 8 bits a pixel."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F" and 0 < high <= 1:
        raise ImageError(
            f"values from {low} to {high} would come out black, "
            "unless multiplied by 255; save it as 8-bit"
        )
    if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and 255 < high <= 65535):
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if low >= 0 and high <= 255:
        return values.astype(np.uint8)
    raise ImageError(
        f"values from {low} to {high} have no plain 8-bit form; save it as 8-bit or 16-bit"
    )


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """What becomes of an image before the vision tower sees it.

    Attributes:
      image_size: the side in pixels of what comes out.
      shortest_edge: resized to this before the crop; at least `image_size`.
      mode: "pad" to a square with the mean color first (LLaVA-1.5's second stage, evaluation), or
        "crop" the middle, losing the ends (its first stage).
      mean, std: for each of R, G, B, on the scale 0 to 1.
      fast: resize with half as many taps (Hamming), and decode a large JPEG at a half, a quarter or
        an eighth, whichever still leaves twice what is needed. The 8-bit values of photographs then
        differ from the recipe's by 0.5 to 1.5 on average.
    """

    image_size: int = 336
    shortest_edge: int = 336
    mode: Mode = "pad"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    fast: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("pad", "crop"):
            raise ValueError(f"mode is {self.mode!r}; it must be 'pad' or 'crop'")
        if not 0 < self.image_size <= self.shortest_edge:
            raise ValueError(
                f"image_size {self.image_size} must be positive and at most shortest_edge "
                f"{self.shortest_edge}"
            )
        if {len(self.mean), len(self.std)} != {3} or min(self.std) <= 0:
            raise ValueError("mean and std must have three values, and std be positive")

    def for_size(self, image_size: int) -> "ImageProcessor":
        """The same for a tower that sees images of another side, in pixels."""
        edge = self.shortest_edge * image_size // self.image_size
        return dataclasses.replace(self, image_size=image_size, shortest_edge=edge)

    @cached_property
    def pad_color(self) -> tuple[int, int, int]:
        """The mean as an 8-bit color; (122, 116, 104) for CLIP."""
        red, green, blue = (int(value * 255) for value in self.mean)
        return red, green, blue

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, mode: Mode) -> "ImageProcessor":
        """Reads the content of a `preprocessor_config.json`.

        Args:
          config: keys that are not there have CLIPImageProcessor's defaults.
          mode: not in that file; in LLaVA it is `image_aspect_ratio` of `config.json`, whose "pad"
            is "pad" here and whose null or "square" is "crop".

        Raises:
          ValueError: all that is asked for and not supported: another processor, a step switched
            off, another filter or scale, a crop that is no square.
        """
        problems = []
        kind = config.get("image_processor_type", config.get("feature_extractor_type"))
        if kind is not None and str(kind).removesuffix("Fast").removesuffix("Pil") not in (
            _KNOWN_PROCESSORS
        ):
            problems.append(f"the processor {kind} is not CLIP's")
        for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
            if config.get(step, True) is not True:
                problems.append(f"{step} is off")
        if config.get("resample", 3) != Image.Resampling.BICUBIC:
            problems.append(f"resample is {config['resample']}, not 3 (bicubic)")
        if abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            problems.append(f"rescale_factor is {config['rescale_factor']}, not 1/255")
        size, crop = config.get("size", 224), config.get("crop_size", 224)
        edge: Any = size.get("shortest_edge") if isinstance(size, Mapping) else size
        if not isinstance(edge, int):
            problems.append(f"size is {size}, not a shortest_edge")
        side: Any = crop.get("height") if isinstance(crop, Mapping) else crop
        if not isinstance(side, int) or (isinstance(crop, Mapping) and crop.get("width") != side):
            problems.append(f"crop_size is {crop}, not a square")
        if problems:
            raise ValueError(
                f"preprocessor_config.json: {'; '.join(problems)}; use the file of the CLIP tower"
            )
        return cls(
            image_size=side,
            shortest_edge=edge,
            mode=mode,
            mean=tuple(config.get("image_mean", CLIP_MEAN)),
            std=tuple(config.get("image_std", CLIP_STD)),
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of a `preprocessor_config.json` for CLIPImageProcessor (without `mode`)."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.shortest_edge},
            "resample": int(Image.Resampling.BICUBIC),
            "do_center_crop": True,
            "crop_size": {"height": self.image_size, "width": self.image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def load(self, source: ImageSource, *, name: str | None = None) -> Image.Image:
        """`load_image`, no larger than `pixels` needs where this is `fast`."""
        if not self.fast:
            return load_image(source, name=name)
        pad = self.mode == "pad"
        return load_image(
            source,
            name=name,
            min_edge=1 if pad else 2 * self.shortest_edge,
            min_longest_edge=2 * self.shortest_edge,
        )

    def pixels(self, image: Image.Image) -> np.ndarray:
        """What the tower sees of an RGB image from `load_image`: float32 [height, width, 3].

        Raises:
          ImageError: see `square`.
        """
        return self.normalize(self.square(image))

    def square(self, image: Image.Image) -> np.ndarray:
        """The same before normalization, uint8 [height, width, 3]: a quarter of the bytes.

        Raises:
          ImageError: not RGB, or so long and thin that padding or resizing it would make more than
            `MAX_PIXELS`.
        """
        if image.mode != "RGB":
            raise ImageError(f"an image of mode {image.mode}; open it with load_image")
        self.check_size(*image.size)
        return np.asarray(self._square(image), np.uint8)

    def normalize(self, squares: Pixels) -> Pixels:
        """Pixels float32 [..., height, width, 3] of uint8 values, in numpy or in JAX."""
        mean, std = np.array(self.mean), np.array(self.std)
        scale, bias = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
        # Rows of width*3 values rather than of 3: several times faster in numpy, and the same.
        scale, bias = (np.tile(values, squares.shape[-2]) for values in (scale, bias))
        rows = squares.reshape(*squares.shape[:-2], -1) * scale + bias
        return rows.reshape(squares.shape)

    def check_size(self, width: int, height: int) -> None:
        """Raises ImageError if `pixels` would refuse an image of this size as too thin."""
        longest, shortest = max(width, height), min(width, height)
        if self.mode == "pad":
            pixels = longest * longest
        else:
            pixels = self.shortest_edge * int(self.shortest_edge * longest / shortest)
        if width != height and pixels > MAX_PIXELS:
            raise ImageError(
                f"an image of {width}x{height} is too long and thin to make a square of; "
                "cut it or leave it out"
            )

    def _resize(
        self,
        image: Image.Image,
        size: tuple[int, int],
        box: tuple[float, float, float, float] | None = None,
    ) -> Image.Image:
        taps = Image.Resampling.HAMMING if self.fast else Image.Resampling.BICUBIC
        return image if image.size == size else image.resize(size, taps, box)

    def _square(self, image: Image.Image) -> Image.Image:
        """Padded if `mode` says so, resized, and cropped to a square of `image_size`."""
        width, height = image.size
        edge, longest = self.shortest_edge, max(width, height)
        if self.mode == "pad" and width != height:
            if self.fast and min(width, height) * edge > 4 * longest:
                image, size = self._place(image), (edge, edge)
            else:
                # A width is resized before there is padding to resize along with it: that is the
                # same, since Pillow resizes rows first.
                if width > height:
                    image = self._resize(image, (edge, height))
                sides = (image.width, longest) if width > height else (longest, longest)
                square = Image.new("RGB", sides, self.pad_color)
                square.paste(image, ((sides[0] - image.width) // 2, (longest - height) // 2))
                image, size = square, (edge, edge)
        elif width <= height:
            size = (edge, int(edge * height / width))
        else:
            size = (int(edge * width / height), edge)
        image = self._resize(image, size)
        left, top = ((side - self.image_size) // 2 for side in size)
        return image.crop((left, top, left + self.image_size, top + self.image_size))

    def _place(self, image: Image.Image) -> Image.Image:
        """Padded and resized, without resizing any padding.

        Pixels that the image covers in part become padding: less than one at each end.
        """
        edge, longest = self.shortest_edge, max(image.size)
        left, top = ((longest - side) // 2 for side in image.size)
        first = (-(-left * edge // longest), -(-top * edge // longest))
        last = ((left + image.width) * edge // longest, (top + image.height) * edge // longest)
        scale = longest / edge
        # Of the image, what these whole pixels cover.
        box = (
            max(first[0] * scale - left, 0),
            max(first[1] * scale - top, 0),
            min(last[0] * scale - left, image.width),
            min(last[1] * scale - top, image.height),
        )
        square = Image.new("RGB", (edge, edge), self.pad_color)
        square.paste(self._resize(image, (last[0] - first[0], last[1] - first[1]), box), first)
        return square
