"""One file that holds what a directory of Hugging Face holds: weights, config and tokenizer."""

import atexit
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from etils import epath

from stf_jax.convert.dtypes import Array
from stf_jax.convert.safetensors_file import TensorInfo


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Tensors under the names of `transformers`, and the small files that lie beside them there."""

    infos: Mapping[str, TensorInfo]
    readers: Mapping[str, Callable[[], Array]]  # by the same names
    files: Mapping[str, bytes]  # config.json, and those of the tokenizer or the image processor

    def read(self, name: str) -> Array:
        """One tensor."""
        return self.readers[name]()

    @functools.cached_property
    def folder(self) -> epath.Path:
        """A directory with the small files; it is there until Python ends."""
        folder = tempfile.mkdtemp(prefix="stf-jax-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for name, content in self.files.items():
            Path(folder, name).write_bytes(content)
        return epath.Path(folder)
