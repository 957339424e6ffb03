"""A disk that is full, from every verb that writes much: one line, and nothing half-written."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stf_jax.util.disk import FullDiskError, explain_full_disk, is_full
from tests.corpus import write_corpus

# A limit on the size of a file stands for a full disk: the system's words are others, the way that
# they take through the libraries is the same.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))
from stf_jax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""

Refusal = Callable[..., str]


@pytest.fixture
def refusal() -> Refusal:
    def refusal(*arguments: str | Path) -> str:
        ended = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", LIMITED, *map(str, arguments)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            # The cache of compiled programs has no room either.
            env={key: os.environ[key] for key in os.environ if "COMPILATION_CACHE" not in key},
            check=False,
        )
        assert ended.returncode == 1, ended.stderr
        (line,) = ended.stderr.splitlines()
        return line

    return refusal


def test_import(refusal: Refusal, reference: Path, tmp_path: Path) -> None:
    line = refusal("convert", "import", reference / "llava-stf", tmp_path / "native")
    assert line.startswith(f"error: {tmp_path}/native cannot be written: there is no room (")
    assert line.endswith(" GB are free); make room, or choose another place")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["native", "llava-stf", "adapter"])
def test_export(layout: str, refusal: Refusal, native: Path, tmp_path: Path) -> None:
    line = refusal("convert", "export", native, tmp_path / "out", "--layout", layout)
    assert line.startswith(f"error: {tmp_path}/out cannot be written: there is no room (")
    assert not list(tmp_path.iterdir())


def test_build(refusal: Refusal, native: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, 40)
    out = tmp_path / "data"
    arguments = ["data", "build", corpus.json, out, "--images", corpus.images, "--model", native]
    line = refusal(*arguments, "--workers", "2")
    assert line.startswith(f"error: {out} cannot be written: there is no room (")
    assert not out.exists()


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(27, "File too large"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (RuntimeError("write() failed: No space left on device; writing x"), True),
        (OSError(13, "Permission denied"), False),
        (ValueError("too large"), False),
    ],
)
def test_what_says_so(error: Exception, full: bool, tmp_path: Path) -> None:
    assert is_full(error) is full
    outer = RuntimeError("saving failed")
    outer.__cause__ = error
    assert is_full(outer) is full
    expected = FullDiskError if full else RuntimeError
    with pytest.raises(expected), explain_full_disk(tmp_path / "not" / "made"):
        raise outer


def test_the_words_of_what_writes_a_file_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a score or a saved chat: the system's error names the file."""
    from stf_jax.cli import main as module

    def run(options: object) -> int:
        raise OSError(28, "No space left on device", str(tmp_path / "score.json"))

    monkeypatch.setattr("stf_jax.cli.plan._plan", run)
    assert module.main(["plan", str(tmp_path / "config.yaml"), "--topology", "v5e:4x4"]) == 1
    assert str(tmp_path / "score.json") in capsys.readouterr().err
