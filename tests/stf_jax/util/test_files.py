"""Files: read with one line for what is wrong, written whole or not at all."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from stf_jax.util.errors import CheckpointError
from stf_jax.util.files import (
    check_files,
    decode_json,
    parse_json,
    read_bytes,
    read_json,
    read_jsonl,
    read_text,
    sha256,
    write_json,
    write_text,
    write_whole,
)

BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "cut": (b'{"a": [1', "not valid JSON"),
    "a list": (b"[1]", "holds a list where a dict is expected"),
    "a number": (b"1", "holds a int where a dict is expected"),
    "nested": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "a huge number": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "latin-1": (b'{"a": "\xe9"}', "not UTF-8"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "half a pair": (rb'{"a": [{"b": "\ud83d"}]}', "stands in a, entry 1, b"),
    "half a pair in a name": (rb'{"\ud83d": 1}', "stands in a name"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_stands_in_one_line(name: str, tmp_path: Path) -> None:
    data, message = BROKEN[name]
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(path, error=CheckpointError, fix="copy it")
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert text.endswith("copy it")
    assert "\n" not in text
    with pytest.raises(ValueError, match=message) as bytes_caught:
        decode_json(data)
    assert text == f"{path}: {bytes_caught.value}; copy it"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no.json: cannot be read \(No such file .*; fix it"):
        read_json(tmp_path / "no.json")
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\)"):
        read_json(tmp_path)


@pytest.mark.parametrize("read", [read_bytes, read_text, read_json, read_jsonl, sha256])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_has_no_end_is_not_read(kind: str, read: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="a pipe or a device where a file is expected"):
        read(path)
    with pytest.raises(CheckpointError, match=r"config.json: a pipe or a device .*; copy it again"):
        check_files(tmp_path, error=CheckpointError, fix="copy it again")


def test_what_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    for read in (read_json, read_jsonl, read_text):
        with pytest.raises(ValueError, match=r"json: 1,099,511,627,776 bytes, where .* at most"):
            read(path)
    with pytest.raises(ValueError, match=r"json: 1,099,511,627,776 bytes"):
        check_files(tmp_path)


def test_a_folder_of_files_links_and_folders_passes(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.json").write_text("{}")
    (tmp_path / "d").symlink_to(tmp_path / "a")
    check_files(tmp_path)
    (tmp_path / "e").symlink_to("e")
    with pytest.raises(ValueError, match=r"e: cannot be read \(Too many levels"):
        check_files(tmp_path)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_part_of_it(mark: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(mark + rb'{"a": "\ud83d\ude00"}')
    assert read_json(path) == decode_json(path.read_bytes()) == {"a": "\N{GRINNING FACE}"}
    assert read_jsonl(path) == {1: {"a": "\N{GRINNING FACE}"}}


def test_lines_have_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "x\xe2\x80\xa8y"}\r\n\n[2]\n \n')
    assert read_jsonl(path) == {1: {"a": "x\u2028y"}, 3: [2]}
    path.write_bytes(b'{"a": 1}\n\n{"a":\n')
    with pytest.raises(
        ValueError, match=r"a.jsonl: line 3 is not valid JSON \(.*; fix it or fetch"
    ):
        read_jsonl(path)
    path.write_bytes(b'1\n{"a": ["\\udc00"]}\n')
    with pytest.raises(ValueError, match=r"stands in line 2, a, entry 1; fix it or fetch it"):
        read_jsonl(path)


def test_nesting_is_no_crash() -> None:
    with pytest.raises(ValueError, match=r"^not valid JSON \(nested too deeply\)$"):
        parse_json("[" * 200_000)


@pytest.mark.parametrize("content", [{"é": [1, None]}, ["\ud800"]])
def test_what_is_written_is_read_again(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, content)
    assert path.read_bytes() == json.dumps(content).encode()
    if isinstance(content, dict):
        write_json(path, content, indent=2)
        assert path.read_text(encoding="utf-8") == '{\n  "é": [\n    1,\n    null\n  ]\n}\n'
        assert read_json(path) == content
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_nothing_is_half_written(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def stop() -> None:
        with write_whole(path) as unfinished:
            unfinished.write_text("half")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_digests_of_a_file_and_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.json").write_bytes(b"{}")
    (tmp_path / "c.txt").write_bytes(b"text")
    before = sha256(tmp_path)
    assert sha256(tmp_path / "c.txt") == hashlib.sha256(b"text").hexdigest()
    (tmp_path / "image.png").write_bytes(b"image")
    assert sha256(tmp_path) == before
    (tmp_path / "c.txt").rename(tmp_path / "d.txt")
    assert sha256(tmp_path) != before
