"""What a frozen tower computes of a dataset's images, on disk: read in place of pixels.

    images-<dataset>.npz      which image each example shows; files with the same bytes are one
    <key>/identity.json       what decides the features; the key is its digest
    <key>/part-00000.array_record
                              a record for each image, the last of all for one that is black

A record begins with a digest of the image's file, which is compared at every read. Then come the
features as `VisionFeatures.pack` lays them out, or the reason for which there are none.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from stf_jax.data.dataset import Dataset, DatasetError, Stored
from stf_jax.data.images import ImageError, ImageProcessor
from stf_jax.util.errors import first_line
from stf_jax.util.files import read_json, write_json, write_whole

# Of a part; a run that was killed computes at most one again.
_PART_BYTES = 2**28
_DIGEST = 16
# Parts hold a multiple of it, so that every image has the same place in a batch of a power of two.
_MULTIPLE = 64


class FeaturesError(ValueError):
    """Features that cannot be computed or read; one line that names the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureIdentity:
    """What decides the features of an image.

    Attributes:
      tower: digest of the tower's config, and of its weights in `dtype`.
      taps: hidden states, in the system's order.
      captures: whether the class token's query and the keys are among them.
      image_processor: what becomes of an image before the tower.
      dtype: that the tower computes in.
      shape: N, C.
    """

    tower: str
    taps: tuple[int, ...]
    captures: bool
    image_processor: ImageProcessor
    dtype: str
    shape: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """As JSON gives it back."""
        tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return tree


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageTable:
    """The images of a dataset, each of which several examples may show.

    Attributes:
      offsets: int64 [examples + 1], where in `numbers` each example begins.
      numbers: int64 [_], the image at each place of each example.
      firsts: int64 [images, 2], an example that shows each image, and the place in it.
    """

    offsets: np.ndarray
    numbers: np.ndarray
    firsts: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset, progress: Callable[[int, int], None]) -> Self:
        """Reads every example once; one that is damaged shows nothing."""
        offsets: list[int] = [0]
        numbers: list[int] = []
        firsts: list[tuple[int, int]] = []
        known: dict[bytes, int] = {}
        for example in range(len(dataset)):
            for place, data in enumerate(_images(dataset, example)):
                number = known.setdefault(_digest(data), len(known))
                if number == len(firsts):
                    firsts.append((example, place))
                numbers.append(number)
            offsets.append(len(numbers))
            progress(example + 1, len(dataset))
        return cls(
            offsets=np.array(offsets, np.int64),
            numbers=np.array(numbers, np.int64),
            firsts=np.array(firsts, np.int64).reshape(-1, 2),
        )

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        with write_whole(path) as unfinished, unfinished.open("wb") as file:
            np.savez_compressed(file, **dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote.

        Raises:
          FeaturesError: the file is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{field.name: arrays[field.name] for field in dataclasses.fields(cls)})
        # numpy and zipfile raise any kind.
        except Exception as error:
            raise FeaturesError(
                f"{path}: damaged ({first_line(error)}); delete it and start again"
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    """The features of one dataset's images; picklable, and opened anew in each process.

    Attributes:
      dataset: whose images they are.
      table: which they are.
      identity: what decides them.
      folder: of the parts.
    """

    dataset: Dataset
    table: ImageTable
    identity: FeatureIdentity
    folder: Path

    @classmethod
    def open(
        cls,
        dataset: Dataset,
        identity: FeatureIdentity,
        directory: Path,
        *,
        progress: Callable[[int, int], None],
        lock: Callable[[Path], contextlib.AbstractContextManager[None]],
    ) -> Self:
        """The features in `directory`, of which some or all may be missing.

        Args:
          dataset: whose images they are of.
          identity: what decides them.
          directory: made if it is not there.
          progress: called with (examples looked through, of how many) if it is done the first time.
          lock: of a folder, held while the dataset is described in it.

        Raises:
          FeaturesError: what is there is damaged.
        """
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"images-{dataset.fingerprint[:16]}.npz"
        content = {"dataset": dataset.fingerprint, **identity.to_json()}
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        folder, record = directory / key, directory / key / "identity.json"
        if not (path.is_file() and record.is_file()):
            # Of several runs that begin together one writes, and the others find it.
            with lock(directory):
                if not path.is_file():
                    ImageTable.of(dataset, progress).save(path)
                folder.mkdir(exist_ok=True)
                if not record.is_file():
                    write_json(record, content, indent=2)
        if read_json(record, error=FeaturesError, fix="delete it and start again") != content:
            raise FeaturesError(f"{record}: damaged; delete the folder {folder} and start again")
        return cls(dataset=dataset, table=ImageTable.load(path), identity=identity, folder=folder)

    @property
    def shape(self) -> tuple[int, int]:
        """N, C."""
        return self.identity.shape

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the features."""
        return jnp.dtype(self.identity.dtype)

    @property
    def bits(self) -> np.dtype[Any]:
        """Unsigned integers of the same size, which every library can hand on."""
        return np.dtype(f"u{self.dtype.itemsize}")

    @property
    def image_bytes(self) -> int:
        """Of one record."""
        return _DIGEST + self._payload

    @property
    def count(self) -> int:
        """Records: one for each image, and the black one."""
        return len(self.table.firsts) + 1

    @property
    def parts(self) -> list[range]:
        """The records of each part."""
        size = max(1, _PART_BYTES // self.image_bytes // _MULTIPLE) * _MULTIPLE
        return [range(n, min(n + size, self.count)) for n in range(0, self.count, size)]

    @property
    def missing(self) -> list[int]:
        """The parts that are still to be computed."""
        return [part for part in range(len(self.parts)) if not self._path(part).is_file()]

    @cached_property
    def blank(self) -> np.ndarray:
        """What the tower computes of a black image; bits [N, C]."""
        return self._take(self._record(self.count - 1), b"")

    def read(self, example: int, place: int, data: bytes) -> np.ndarray:
        """The features of one image of an example; bits [N, C].

        Args:
          example: its number in the dataset.
          place: of the image among those of the example.
          data: its file, by which it is known.

        Raises:
          ImageError: the image cannot be read, for the reason that was found then.
          FeaturesError: damaged, or of other images.
        """
        at = int(self.table.offsets[example]) + place
        if at >= self.table.offsets[example + 1]:
            raise self._other_images()
        return self._take(self._record(int(self.table.numbers[at])), data)

    @contextlib.contextmanager
    def write(self, part: int) -> Iterator[Callable[[bytes, np.ndarray | str], None]]:
        """Takes a part's images in order, each as its file and its features, or the reason.

        The part is there when it is whole.
        """
        with write_whole(self._path(part)) as unfinished:
            # Groups of one make each record readable alone; floats hardly compress.
            writer = ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")

            def write(data: bytes, features: np.ndarray | str) -> None:
                # What is shorter than features is a reason.
                payload = (
                    features.encode()[: self._payload - 1]
                    if isinstance(features, str)
                    else np.ascontiguousarray(features).tobytes()
                )
                writer.write(_digest(data) + payload)

            try:
                yield write
            finally:
                writer.close()

    def images(self, parts: list[int]) -> "Squares":
        """The images of some parts, one part after the other."""
        numbers = [number for part in parts for number in self.parts[part]]
        return Squares(features=self, numbers=np.array(numbers, np.int64))

    @property
    def _payload(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.array_record"

    @cached_property
    def _source(self) -> ArrayRecordDataSource:
        # With their lengths no file is opened before it is read.
        return ArrayRecordDataSource(
            [f"{self._path(n)}[0:{len(part)}]" for n, part in enumerate(self.parts)]
        )

    def _record(self, number: int) -> bytes:
        try:
            record: bytes = self._source[number]
        # ArrayRecord raises several kinds for damaged files.
        except Exception as error:
            raise FeaturesError(
                f"{self.folder}: damaged ({first_line(error)}); delete it, and the features are "
                "computed again"
            ) from error
        return record

    def _take(self, record: bytes, data: bytes) -> np.ndarray:
        if record[:_DIGEST] != _digest(data):
            raise self._other_images()
        if len(record) != self.image_bytes:
            raise ImageError(record[_DIGEST:].decode(errors="replace"))
        return np.frombuffer(record, self.bits, offset=_DIGEST).reshape(self.shape)

    def _other_images(self) -> FeaturesError:
        return FeaturesError(
            f"{self.folder} has features of other images than {self.dataset.path}; delete "
            f"{self.folder.parent}, and they are computed again"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squares:
    """Images by number: the file, and the square that the tower sees or the reason for none.

    Attributes:
      features: whose images they are.
      numbers: int64 [_], which.
    """

    features: ImageFeatures
    numbers: np.ndarray
    # Of the example that was read last, since those with many images come one after the other.
    _last: dict[int, Stored] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> tuple[bytes, str, np.ndarray]:
        number, processor = int(self.numbers[place]), self.features.identity.image_processor
        black = np.zeros((processor.image_size, processor.image_size, 3), np.uint8)
        if number == len(self.features.table.firsts):
            return b"", "", black
        example, at = self.features.table.firsts[number].tolist()
        if example not in self._last:
            self._last.clear()
            self._last[example] = self.features.dataset[example]
        data = self._last[example].images[at]
        try:
            return data, "", processor.square(processor.load(data))
        except ImageError as error:
            return data, str(error), black


def _images(dataset: Dataset, example: int) -> list[bytes]:
    try:
        return dataset[example].images
    except DatasetError:
        return []


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()
