"""`.bin` files that must not, or cannot, be read."""

import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from etils import epath

from stf_jax.convert import open_source
from stf_jax.convert.torch_file import TorchFile
from stf_jax.util.errors import CheckpointError

pytestmark = pytest.mark.torch


class Evil:
    """Makes a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused(zipped: bool, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    state = {"model.embed_tokens.weight": torch.zeros(2, 2), "x": Evil(tmp_path / "ran")}
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match="would run code when loaded: refused; ask its author"
    ):
        open_source(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0.2, 0.6, 0.99])
def test_truncated(zipped: bool, keep: float, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    state = OrderedDict(a=torch.zeros(500, 2), b=torch.zeros(100))
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(CheckpointError, match=r"is truncated; download or copy it again$"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "content", [b"root:x:0:0:root:/root:/bin/bash\n", b"(", b".", b"(lp0\n", b"\x80\x02}q\x01u."]
)
def test_what_is_no_pickle(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "passwd").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"passwd is not a PyTorch file, or is truncated;"):
        open_source(tmp_path / "passwd")


def test_empty_and_pointer(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is empty"):
        open_source(tmp_path)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_source(tmp_path)


@pytest.mark.parametrize("content", [{"step": 3}, [1, 2], {"state_dict": {"a": torch.zeros(1)}}])
def test_no_state_dict(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"is no state dict.*save model\.state_dict"):
        open_source(tmp_path)


def test_strided_and_quantized(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "a.bin")
    read = TorchFile(epath.Path(tmp_path / "a.bin")).read("a")
    assert read.tolist() == [[0, 3], [1, 4], [2, 5]]
    torch.save({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "b.bin")
    with pytest.raises(CheckpointError, match="has dtype complex64, which stf_jax does not read"):
        _ = TorchFile(epath.Path(tmp_path / "b.bin")).infos


@pytest.mark.parametrize("kind", ["meta", "sparse_coo"])
def test_tensors_without_values_in_place(kind: str, tmp_path: Path) -> None:
    tensor = torch.zeros(2, 2, device="meta") if kind == "meta" else torch.eye(2).to_sparse()
    torch.save({"a": tensor}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=f"^a in .* is a {kind} tensor, .*; save the model"):
        _ = TorchFile(epath.Path(tmp_path / "a.bin")).infos
