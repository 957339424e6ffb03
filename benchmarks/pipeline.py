"""Images from JPEG files to normalized pixels in batches, beside PIL in a PyTorch DataLoader.

JPEGs of COCO's sizes with the spectrum of photographs are written to a temporary folder. Each side
then reads them with the same number of worker processes: this project's own way (a TFDS dataset
through Grain, as in training: one conversation a row, tokenized, with its image), and the
recipe's steps in PyTorch, which knows only images: open, pad to a square, then either a plain
bicubic resize and normalization, or CLIPImageProcessor as the recipe itself has it.

A rate per core is that of images a second of processor time, of all the side's processes
together, so that other work on the machine counts little. It is taken between two batches in the
middle of a stream that continues, so that neither starting workers nor what they have made ahead
counts. Sides take turns; the median round of each counts. Then the fill of packed rows and the
time to plan them, on lengths like those of LLaVA's mix665k. Needs the test extra (PyTorch) and
Linux. Not part of the tests.

    python benchmarks/pipeline.py [--images N] [--workers N] [--rounds N]
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import mix665k
import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from stf_jax.data.builder import build
from stf_jax.data.config import DataConfig, DatasetSource
from stf_jax.data.images import CLIP_MEAN, CLIP_STD, ImageProcessor
from stf_jax.data.packing import group, pack, permutation
from stf_jax.data.pipeline import TrainingData, TrainingStep
from stf_jax.data.tokenizer import load_tokenizer

# Widths and heights, and how often, roughly as in COCO's train2017.
SIZES = (((640, 480), 0.42), ((480, 640), 0.14), ((640, 427), 0.32), ((427, 640), 0.12))
BATCH = 32
ROWS = 4
# Batches before the clock starts: more than any side makes ahead.
WARM = 8
Side = Callable[[], AbstractContextManager[Iterator[int]]]
REFERENCE = pathlib.Path(__file__).parent.parent / "tests/data/reference"


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG of noise whose amplitude falls as 1/f^1.2, like that of photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    values = []
    for _ in range(3):
        spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**1.2
        values.append(np.fft.irfft2(spectrum, s=(height, width)))
    noise = np.stack([values[0] + 0.3 * values[n] for n in range(3)], axis=-1)
    scaled = 115 + 45 * (noise - noise.mean()) / noise.std()
    file = io.BytesIO()
    Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def make(folder: pathlib.Path, count: int) -> list[pathlib.Path]:
    """Writes the images, LLaVA's JSON for them, and the dataset."""
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    sizes = rng.choice(len(SIZES), size=count, p=[share for _, share in SIZES])
    names = [f"{number}.jpg" for number in range(count)]
    different = {}
    for number, name in enumerate(names):
        # Making noise takes longer than reading it, so each size has only a few images.
        key = (int(sizes[number]), number % 16)
        if key not in different:
            different[key] = photograph(*SIZES[key[0]][0], seed=key[1])
        (images / name).write_bytes(different[key])
    question = {"from": "human", "value": "<image>\nWhat is in this photo?"}
    turns = [question, {"from": "gpt", "value": "A table on the street."}]
    entries = [{"id": name, "image": name, "conversations": turns} for name in names]
    (folder / "train.json").write_text(json.dumps(entries), encoding="utf-8")
    build(
        [folder / "train.json"],
        folder / "dataset",
        images=images,
        tokenizer=load_tokenizer(REFERENCE / "llava-stf"),
    )
    return [images / name for name in names]


class Recipe(torch.utils.data.Dataset[torch.Tensor]):
    """The recipe's steps on an endless stream of images."""

    def __init__(self, paths: list[pathlib.Path], *, clip: CLIPImageProcessorPil | None):
        self.paths = paths
        self.clip = clip
        self.mean = torch.tensor(CLIP_MEAN).view(3, 1, 1)
        self.std = torch.tensor(CLIP_STD).view(3, 1, 1)

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, number: int) -> torch.Tensor:
        """Pixels float32 [3, 336, 336]."""
        image = Image.open(self.paths[number % len(self.paths)]).convert("RGB")
        width, height = image.size
        side = max(width, height)
        square = Image.new("RGB", (side, side), (122, 116, 104))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        if self.clip is not None:
            pixels: torch.Tensor = self.clip(square, return_tensors="pt")["pixel_values"][0]
            return pixels
        square = square.resize((336, 336), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.std


@contextlib.contextmanager
def recipe(
    paths: list[pathlib.Path], workers: int, *, clip: CLIPImageProcessorPil | None
) -> Iterator[Iterator[int]]:
    """Batches of pixels float32 [B, 3, 336, 336] from PyTorch's DataLoader, by their images."""
    loader = torch.utils.data.DataLoader(
        Recipe(paths, clip=clip), batch_size=BATCH, num_workers=workers
    )
    yield (len(batch.numpy()) for batch in loader)


@contextlib.contextmanager
def ours(folder: pathlib.Path, workers: int, *, fast: bool) -> Iterator[Iterator[int]]:
    """Batches of pixels float32 [R, 8, 336, 336, 3] from packed rows, by their images."""
    config = DataConfig(
        datasets=(DatasetSource(path=os.fspath(folder / "dataset")),),
        batch_size=ROWS,
        images_per_row=8,
        workers=workers,
        fast_images=fast,
    )
    data = TrainingData(
        config,
        tokenizer=load_tokenizer(REFERENCE / "llava-stf"),
        image_processor=ImageProcessor(),
        tokens_per_image=144,
    )
    # A training step begins with this.
    normalize = jax.jit(ImageProcessor().normalize)
    with contextlib.closing(data.batches()) as steps:
        yield (_normalize(step, normalize) for step in steps)


def _normalize(step: TrainingStep, normalize: Callable[[Any], Any]) -> int:
    jax.block_until_ready(normalize(step.batch.pixels))
    return sum(len(row) for row in step.example_ids)


def rates(side: Side, count: int) -> tuple[float, float]:
    """Images a second of processor time, and a second by the clock, over `count` images."""
    with side() as batches:
        for _ in range(WARM):
            next(batches)
        processor, clock = processor_time(), time.perf_counter()
        done = 0
        while done < count:
            done += next(batches)
        processor, clock = processor_time() - processor, time.perf_counter() - clock
    return done / processor, done / clock


def processor_time() -> float:
    """Seconds that this process and its workers have used so far."""
    ticks = 0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def difference(paths: list[pathlib.Path]) -> float:
    """Mean difference of fast pixels from the recipe's, in 8-bit values."""
    exact, fast = ImageProcessor(), ImageProcessor(fast=True)
    differences = []
    for path in paths:
        exact_pixels, fast_pixels = (p.square(p.load(path)).astype(np.int16) for p in (exact, fast))
        differences.append(np.abs(exact_pixels - fast_pixels).mean())
    return float(np.mean(differences))


def compare_images(count: int, workers: int, rounds: int) -> None:
    """Compares the sides, the first of which is the measure."""
    clip = CLIPImageProcessorPil(**ImageProcessor().to_hf())
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        paths = make(folder, 512)
        sides: dict[str, Side] = {
            "PIL, DataLoader": lambda: recipe(paths, workers, clip=None),
            "CLIPImageProcessor, DataLoader": lambda: recipe(paths, workers, clip=clip),
            "stf_jax": lambda: ours(folder, workers, fast=False),
            "stf_jax, fast_images": lambda: ours(folder, workers, fast=True),
        }
        rates_by_side: dict[str, list[tuple[float, float]]] = {key: [] for key in sides}
        for _ in range(rounds):
            for key, side in sides.items():
                rates_by_side[key].append(rates(side, count))
        print(f"JPEGs of COCO's sizes to 336 px, padded; {workers} worker processes, {rounds} "
              f"rounds of {count}; {os.cpu_count()} cores")  # fmt: skip
        print(f"{'':32} images/s per core   ratio   (least)   images/s by the clock")
        first = np.array(next(iter(rates_by_side.values())))
        for key, values in rates_by_side.items():
            processor, clock = np.median(values, axis=0)
            ratios = np.array(values)[:, 0] / first[:, 0]
            print(f"{key:32} {processor:19.1f} {np.median(ratios):7.2f} {ratios.min():9.2f} "
                  f"{clock:25.1f}")  # fmt: skip
        print(f"fast_images differs by {difference(paths[:128]):.2f} of 255 on average\n")


def packing() -> None:
    """Prints how full packed rows are, beside the reference's padded batches."""
    lengths, images = mix665k.lengths()
    start = time.perf_counter()
    order = permutation(len(lengths), key=(0, 0))
    rows = pack(order, lengths=lengths, images=images, row_length=2048, row_images=8)
    seconds = time.perf_counter() - start
    grouped = group(order, lengths=lengths, images=images, batch_size=128)
    print(f"{len(lengths)} examples like mix665k's, 144 tokens an image, rows of 2048")
    print(f"  packed                       {lengths.sum() / len(rows) / 2048:7.1%} full, "
          f"{len(rows)} rows, planned in {seconds:.1f} s")  # fmt: skip
    for name, members in (("grouped by length", grouped), ("at random", order)):
        micro = lengths[members][: len(members) // 16 * 16].reshape(-1, 16)
        fill = micro.sum() / (micro.max(axis=1).sum() * 16)
        print(f"  {name + ', padded, 16 a device':<36} {fill:.1%} full")


def main() -> None:
    """Runs both parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1024, help="a round (1024)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    compare_images(options.images, options.workers, options.rounds)
    packing()


if __name__ == "__main__":
    main()
