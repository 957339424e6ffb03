"""Pixels against the reference's and CLIPImageProcessor's; every kind of image; bad images."""

import contextlib
import io
import json
import struct
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from stf_jax.data import images
from stf_jax.data.images import ImageError, ImageProcessor, Mode, load_image

SMALL = ImageProcessor(image_size=56, shortest_edge=56)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_pixels_match_the_reference(reference: Path, mode: Mode) -> None:
    config = json.loads((reference / "clip/preprocessor_config.json").read_text(encoding="utf-8"))
    processor = ImageProcessor.from_hf(config, mode=mode)
    expected = load_file(reference / "tensors.safetensors")[f"pixel_values.{mode}"]
    for index, channels_first in enumerate(expected):
        pixels = processor.pixels(load_image(reference / "images" / f"{index}.png"))
        assert pixels.dtype == np.float32
        assert pixels.shape == (processor.image_size, processor.image_size, 3)
        np.testing.assert_allclose(pixels, channels_first.transpose(1, 2, 0), rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 150),
    height=st.integers(1, 150),
    size=st.sampled_from([14, 56]),
    extra=st.sampled_from([0, 1, 9]),
    seed=st.integers(0, 99),
)
def test_cropped_pixels_are_those_of_clip_image_processor(
    width: int, height: int, size: int, extra: int, seed: int
) -> None:
    ours = ImageProcessor(image_size=size, shortest_edge=size + extra, mode="crop")
    theirs = transformers.CLIPImageProcessorPil(**ours.to_hf())
    image = noise(width, height, seed)
    expected = theirs(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(ours.pixels(image), expected, rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90))
def test_padding_centers_the_image_on_the_mean_color(width: int, height: int) -> None:
    side = max(width, height)
    processor = ImageProcessor(image_size=side, shortest_edge=side, mean=(0, 0, 0), std=(1, 1, 1))
    canvas = np.zeros((side, side, 3), np.uint8)
    image = noise(width, height)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = array(image)
    np.testing.assert_allclose(processor.pixels(image), canvas / 255, rtol=0, atol=1e-6)
    assert ImageProcessor().pad_color == (122, 116, 104)


def test_the_hf_file_goes_round() -> None:
    processor = ImageProcessor(
        image_size=224, shortest_edge=240, mode="crop", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
    )
    assert ImageProcessor.from_hf(json.loads(json.dumps(processor.to_hf())), mode="crop") == (
        processor
    )


def test_older_hf_files_are_read() -> None:
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 336}
    assert ImageProcessor.from_hf(old, mode="pad") == ImageProcessor()
    assert ImageProcessor.from_hf({}, mode="pad").image_size == 224


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_processor_type": "SiglipImageProcessor"}, "SiglipImageProcessor is not CLIP's"),
        ({"do_resize": False, "do_normalize": False}, "do_resize is off; do_normalize is off"),
        ({"resample": 2}, "resample is 2, not 3"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"size": {"height": 336, "width": 336}}, "not a shortest_edge"),
        ({"crop_size": {"height": 336, "width": 224}}, "not a square"),
        ({"crop_size": 400}, "image_size 400 .* at most shortest_edge 336"),
        ({"image_mean": [0.5]}, "three values"),
        ({"image_std": [0.5, 0.0, 0.5]}, "std be positive"),
    ],
)
def test_unsupported_hf_files_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageProcessor.from_hf(ImageProcessor().to_hf() | changes, mode="pad")


def test_a_mistyped_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode is 'square'; it must be 'pad' or 'crop'"):
        ImageProcessor(mode="square")  # type: ignore[arg-type]


def test_a_path_its_bytes_and_the_image_give_the_same(reference: Path) -> None:
    path = reference / "images/1.png"
    expected = array(Image.open(path).convert("RGB"))
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(array(image), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_kinds_that_pillow_converts(mode: str) -> None:
    source = noise(20, 10).convert(mode)
    image = load_image(source)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(array(image), array(source.convert("RGB")))


def test_transparency_is_dropped_not_blended() -> None:
    rgb = noise(8, 8)
    rgba = rgb.copy()
    rgba.putalpha(0)
    np.testing.assert_array_equal(array(load_image(saved(rgba))), array(rgb))


def test_a_palette_with_transparency_keeps_its_colors_without_a_warning() -> None:
    palette = noise(8, 8).convert("P")
    data = saved(palette, transparency=bytes(range(256)))
    assert "transparency" in Image.open(io.BytesIO(data)).info
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image(data)
    np.testing.assert_array_equal(array(image), array(palette.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 257, 300, 32896, 65535]], np.uint16)
    image = load_image(saved(Image.fromarray(values), kind))
    assert array(image)[0, :, 0].tolist() == [0, 1, 1, 128, 255]
    assert (array(image) == array(image)[:, :, :1]).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 7, 255]], np.int32), [0, 7, 255]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[0.0, 7.9, 255.0]], np.float32), [0, 7, 255]),
    ],
)
def test_32_bit_images_that_fit(values: np.ndarray, expected: list[int]) -> None:
    image = load_image(saved(Image.fromarray(values), "TIFF"))
    assert array(image)[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    "values",
    [
        np.array([[-1, 5]], np.int32),
        np.array([[0, 70000]], np.int32),
        np.array([[0.0, 300.0]], np.float32),
        np.array([[0.0, np.nan]], np.float32),
        np.array([[0.0, 0.5, 1.0]], np.float32),
    ],
)
def test_32_bit_images_that_do_not_fit_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"the image: values from .*; save it as 8-bit"):
        load_image(saved(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    options = {} if kind == "GIF" else {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert array(load_image(data))[0, 0].tolist() == [255, 0, 0]


def test_exif_rotation_is_left_alone_unless_asked_for() -> None:
    image = noise(20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: turn by 90 degrees clockwise
    data = saved(image, exif=exif)
    np.testing.assert_array_equal(array(load_image(data)), array(image))
    upright = load_image(data, apply_orientation=True)
    np.testing.assert_array_equal(array(upright), np.rot90(array(image), -1))


def test_bad_files_get_one_line_that_names_them(tmp_path: Path) -> None:
    whole = saved(noise(64, 64))
    gif_of_no_size = b"GIF89a" + struct.pack("<HHBBB", 0, 0, 0, 0, 0) + b";"
    cases: list[tuple[bytes | None, str]] = [
        (None, "no such file"),
        (b"", "empty"),
        (b"<html>404</html>", "no image"),
        (whole[: len(whole) // 2], "damaged"),
        (whole[:20], "no image|damaged"),
        (saved(noise(64, 64), "JPEG")[:-1000], "damaged"),
        (saved(noise(64, 64), "JPEG")[:300], "no image|damaged"),
        (gif_of_no_size, "no image|damaged|0x0"),
    ]
    for number, (data, message) in enumerate(cases):
        path = tmp_path / f"image{number}"
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ImageError, match=message) as error:
            load_image(path)
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)
    with pytest.raises(ImageError, match="cannot be read, a directory; give an image in it"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match=r"^sample 7: the file is empty"):
        load_image(b"", name="sample 7")


@settings(deadline=None)
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
def test_damage_never_gives_another_error(data: st.DataObject, kind: str) -> None:
    content = bytearray(saved(noise(24, 16), kind))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ImageError):
            assert load_image(bytes(content)).mode == "RGB"


def test_a_large_image_is_read_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(saved(noise(60, 40))).size == (60, 40)


def test_images_of_numpy() -> None:
    values = array(noise(6, 4))
    np.testing.assert_array_equal(array(load_image(values)), values)
    for wrong in (values / 255, values[:, :, 0], np.zeros((4, 6, 4), np.uint8), values[None]):
        with pytest.raises(ImageError, match=r"no image; give uint8 \[height, width, 3\]$"):
            load_image(wrong)
    with pytest.raises(ImageError, match=r"a int is no image; give a path, bytes"):
        load_image(3)  # type: ignore[arg-type]


def test_an_image_of_no_size_is_refused() -> None:
    with pytest.raises(ImageError, match="0x5; leave it out"):
        load_image(Image.new("RGB", (0, 5)))


def test_a_kind_without_rgb_form_is_refused() -> None:
    with pytest.raises(ImageError, match=r"without RGB form .*convert it"):
        load_image(Image.new("La", (4, 4)))


def test_decompression_bombs_are_refused_before_they_are_unpacked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = saved(Image.new("1", (20_000, 10_000)))
    assert len(data) < 100_000
    message = r"too large \(200000000 pixels; the limit is 178956970 pixels\); make it smaller$"
    with pytest.raises(ImageError, match=message):
        load_image(data)
    # Also where a program has switched Pillow's own limit off.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match=r"too large \(20000x10000 pixels"):
        load_image(data)


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_long_and_thin_images(monkeypatch: pytest.MonkeyPatch, mode: Mode) -> None:
    processor = ImageProcessor(image_size=28, shortest_edge=28, mode=mode)
    assert processor.pixels(noise(1, 1000)).shape == (28, 28, 3)
    assert processor.pixels(noise(1000, 1)).shape == (28, 28, 3)
    with pytest.raises(ImageError, match="1x1000000 is too long and thin"):
        processor.pixels(Image.new("RGB", (1, 1_000_000)))
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(ImageError, match="40x20 is too long and thin"):
        processor.pixels(noise(40, 20))


def test_pixels_want_rgb() -> None:
    with pytest.raises(ImageError, match="mode L; open it with load_image"):
        SMALL.pixels(Image.new("L", (4, 4)))


def test_fast_pixels_stay_close_to_the_exact_ones() -> None:
    exact, fast = ImageProcessor(), ImageProcessor(fast=True)
    for size, seed in (((640, 480), 0), ((427, 640), 1), ((1600, 1200), 2), ((900, 1400), 3)):
        file = io.BytesIO()
        photograph(*size, seed).save(file, "JPEG", quality=90)
        data = file.getvalue()
        one, other = (p.square(p.load(data)).astype(np.int16) for p in (exact, fast))
        assert 0 < np.abs(one - other).mean() < 2
        np.testing.assert_array_equal(
            exact.pixels(exact.load(data)), exact.pixels(load_image(data))
        )


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Noise with the amplitude spectrum of photographs, 1/f."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    values = []
    for _ in range(3):
        spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**1.2
        values.append(np.fft.irfft2(spectrum, s=(height, width)))
    noise = np.stack([values[0] + 0.3 * values[n] for n in range(3)], axis=-1)
    scaled = 115 + 45 * (noise - noise.mean()) / noise.std()
    return Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("size", [(90, 40), (40, 90), (56, 20), (20, 56), (57, 56), (400, 391)])
def test_resizing_before_padding_changes_no_pixel(mode: Mode, size: tuple[int, int]) -> None:
    """Against the steps in the recipe's own order."""
    processor = ImageProcessor(image_size=56, shortest_edge=56, mode=mode)
    image = noise(*size)
    side, edge = max(size), 56
    if mode == "pad":
        square = Image.new("RGB", (side, side), (122, 116, 104))
        square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
        expected = square.resize((edge, edge), Image.Resampling.BICUBIC)
    else:
        ends = tuple(edge if s == min(size) else int(edge * side / min(size)) for s in size)
        left, top = ((end - edge) // 2 for end in ends)
        resized = image.resize(ends, Image.Resampling.BICUBIC)
        expected = resized.crop((left, top, left + edge, top + edge))
    np.testing.assert_array_equal(processor.square(image), array(expected))


def test_a_jpeg_is_decoded_small_only_as_far_as_asked() -> None:
    data = saved(noise(800, 600), "JPEG")
    assert load_image(data).size == (800, 600)
    assert load_image(data, min_edge=301).size == (800, 600)
    assert load_image(data, min_edge=300).size == (400, 300)
    assert load_image(data, min_edge=1, min_longest_edge=200).size == (200, 150)
    assert load_image(data, min_edge=1).size == (100, 75)
    assert load_image(saved(noise(800, 600)), min_edge=1).size == (800, 600)
    with pytest.raises(ImageError, match="damaged"):
        load_image(data[:-2000], min_edge=1)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("kind", "data"),
    [("EPS", EPS), ("EPS", None), ("TGA", None), ("ICO", None), ("PCX", None)],
)
def test_formats_come_from_a_list(
    kind: str, data: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An EPS called .jpg would be handed to Ghostscript, and others to code that few have read."""
    if data is None:
        file = io.BytesIO()
        Image.new("RGB", (10, 10)).save(file, kind)
        data = file.getvalue()
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    (tmp_path / "photo.jpg").write_bytes(data)
    with pytest.raises(ImageError, match=r"photo.jpg: no image in a format that is read \(JPEG"):
        load_image(tmp_path / "photo.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_formats_that_are_read(kind: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (10, 10), (9, 9, 9)).save(file, kind)
    assert load_image(file.getvalue()).size == (10, 10)


@pytest.mark.parametrize("source", ["data:image/png;base64,iVBORw0K", "https://example.org/a.png"])
def test_neither_base64_nor_a_url_is_read(source: str) -> None:
    with pytest.raises(ImageError, match="path of an image is empty; give a path, or leave it"):
        load_image("")
    with pytest.raises(ImageError, match="neither base64 nor a URL is read; give a path"):
        load_image(source)


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b.png"])
def test_a_name_that_is_none(source: str) -> None:
    with pytest.raises(ImageError, match="cannot be read") as caught:
        load_image(source)
    assert len(str(caught.value)) < 250
