"""Datasets as TFDS keeps them: ArrayRecord files with the images' own bytes. No TensorFlow.

Any TFDS user can read one: `tfds.builder_from_directory(path).as_data_source("train")`.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from stf_jax.data.forms import shorten
from stf_jax.data.index import Index, index_name
from stf_jax.data.templates import Template
from stf_jax.data.tokenizer import Tokenizer
from stf_jax.util.errors import first_line
from stf_jax.util.files import check_files, expand, read_json, write_whole

NAME = "llava"
SPLIT = "train"
SOURCE_FILE = "source.json"


class DatasetError(ValueError):
    """A dataset that cannot be used; what is wrong with it and the fix."""


def features() -> tfds.features.FeaturesDict:
    """One example: its id, its turns as a JSON list, and the bytes of its image files.

    Where it has clips, their frames are among the images.
    """
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(doc="of the entry in LLaVA's JSON"),
            "conversations": tfds.features.Text(doc='JSON list of {"from", "value"}'),
            "images": tfds.features.Sequence(tfds.features.Text(), doc="files, as they were"),
            "visuals": tfds.features.Sequence(
                tfds.features.Scalar(np.int32),
                doc="where there are clips: frames of each clip, 0 for an image beside them",
            ),
        }
    )


class Stored:
    """An example as it is stored.

    Attributes:
      id: of the entry, unique in the dataset.
      conversation: `{"from": "human" | "gpt", "value": text}` in the order spoken.
      images: bytes of the image files, and of the frames of clips.
      visuals: where there are clips: frames of each clip, 0 for an image beside them.
    """

    def __init__(self, record: dict[str, Any]):
        self.id: str = record["id"].decode()
        self.conversation: list[dict[str, str]] = json.loads(record["conversations"])
        self.images: list[bytes] = list(record["images"])
        # Older releases know no clips.
        self.visuals: tuple[int, ...] = tuple(map(int, record.get("visuals", ())))


class Dataset:
    """A finished dataset on disk; picklable, and opened anew in each process.

    Raises:
      DatasetError: there is none, or `build` has not finished it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(expand(path))
        if str(path).startswith("gs:"):
            raise DatasetError(
                f"{path}: ArrayRecord files are read from a file system; mount the bucket "
                "with gcsfuse and name the mounted folder"
            )
        if not self.path.is_dir():
            if partial_path(self.path).is_dir():
                raise DatasetError(
                    f"{path}: not finished yet; call 'stf-jax data build' again with the same "
                    "arguments, and it continues"
                )
            raise DatasetError(f"{path}: no such folder; make it with 'stf-jax data build'")
        if not (self.path / "dataset_info.json").is_file():
            raise DatasetError(f"{path}: not a dataset; make one with 'stf-jax data build'")
        check_files(self.path, error=DatasetError, fix="copy it again")

    @cached_property
    def _builder(self) -> Any:
        self._refuse_other_features()
        with self._explain_damage():
            return tfds.builder_from_directory(self.path)

    def _refuse_other_features(self) -> None:
        """TFDS imports whatever module features.json names; here that is one of these alone."""
        path = self.path / "features.json"
        known = set(_class_names(features().to_json()))
        try:
            named = set(_class_names(read_json(path)))
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{path}: missing or damaged; copy it again") from error
        if strangers := sorted(named - known):
            raise DatasetError(
                f"{path}: names {shorten(strangers[0])}, which no dataset of 'stf-jax data build' "
                "has; build it again"
            )

    @cached_property
    def _source(self) -> Any:
        builder = self._builder
        with self._explain_damage():
            return builder.as_data_source(SPLIT)

    @contextlib.contextmanager
    def _explain_damage(self) -> Iterator[None]:
        try:
            yield
        # TFDS, protobuf and ArrayRecord raise any kind for damaged files.
        except Exception as error:
            raise DatasetError(
                f"{self.path}: damaged ({shorten(first_line(error))}); copy it again, or build it "
                "again"
            ) from error

    @property
    def shards(self) -> int:
        """Files that hold the examples."""
        return int(self._builder.info.splits[SPLIT].num_shards)

    @property
    def bytes(self) -> int:
        """Of all examples together."""
        return int(self._builder.info.splits[SPLIT].num_bytes)

    @property
    def fingerprint(self) -> str:
        """The same for every copy of the dataset, another when it is built from other examples."""
        digest = hashlib.sha256((self.path / "dataset_info.json").read_bytes())
        for path in sorted(self.path.glob("*array_record*")):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, number: int) -> Stored:
        """Reads one example.

        Raises:
          DatasetError: the file is damaged there.
        """
        try:
            return Stored(self._source[number])
        # ArrayRecord and protobuf raise several kinds for damaged files; a field may be missing.
        except Exception as error:
            raise DatasetError(
                f"{self.path}: example {number} is damaged ({first_line(error)})"
            ) from error

    def ids(self) -> Sequence[str]:
        """Of all examples, in order; from an index, so that no example is read.

        Raises:
          DatasetError: there is no index.
        """
        for path in sorted(self.path.glob("index-*.npz")):
            ids: list[str] = Index.load(path).ids.tolist()
            return ids
        raise DatasetError(f"{self.path}: no index; 'stf-jax data build' adds one")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def index(self, tokenizer: Tokenizer, template: Template) -> Index:
        """The index made with this tokenizer and template.

        Raises:
          DatasetError: there is none.
        """
        path = self.index_path(tokenizer, template)
        if not path.is_file():
            others = sorted(file.name.split("-")[1] for file in self.path.glob("index-*.npz"))
            raise DatasetError(
                f"{self.path}: no index for template {template.name!r} with this tokenizer (there "
                f"is one for {', '.join(others) or 'none'}); 'stf-jax data build' with them adds it"
            )
        index = Index.load(path)
        if len(index) != len(self):
            raise DatasetError(
                f"{path}: for {len(index)} examples, but the dataset has {len(self)}; delete it "
                "and build again"
            )
        return index

    def index_path(self, tokenizer: Tokenizer, template: Template) -> Path:
        """Where the index for this tokenizer and template is, or belongs."""
        return self.path / index_name(tokenizer, template)


def _class_names(content: Any) -> Iterator[str]:
    """Every class that a features.json names, at any depth."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in ("pythonClassName", "type") and isinstance(value, str):
                yield value
            yield from _class_names(value)
    elif isinstance(content, list):
        for value in content:
            yield from _class_names(value)


def partial_path(path: Path) -> Path:
    """Where an unfinished dataset is kept; no name that a reader would look for."""
    return path.with_name(f"{path.name}.partial")


def shard_path(folder: Path, number: int, total: int) -> Path:
    """A shard's file, as TFDS names it."""
    return Path(_template(folder).sharded_filepath(shard_index=number, num_shards=total))


def write_shard(
    path: Path, examples: list[tuple[str, str, tuple[bytes, ...], tuple[int, ...]]]
) -> int:
    """Writes (id, conversation, images, visuals) of each example; returns bytes.

    The file is whole or not there.
    """
    connector = features()
    size = 0
    with write_whole(path) as unfinished:
        # Groups of one make each record readable alone.
        writer = ArrayRecordWriter(str(unfinished), "group_size:1")
        for name, conversation, images, visuals in examples:
            record = {
                "id": name,
                "conversations": conversation,
                "images": list(images),
                "visuals": list(visuals),
            }
            data = connector.serialize_example(connector.encode_example(record))
            writer.write(data)
            size += len(data)
        writer.close()
    return size


def write_metadata(folder: Path, *, shard_lengths: list[int], size: int) -> None:
    """Makes a folder of shards a TFDS dataset."""
    template = _template(folder)
    split = tfds.core.SplitInfo(
        name=SPLIT, shard_lengths=shard_lengths, num_bytes=size, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features(),
        split_infos=[split],
        filename_template=template,
        description="Conversations about images, in LLaVA's form.",
        check_data=False,
    )


def _template(folder: Path) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=NAME, split=SPLIT, filetype_suffix="array_record"
    )
