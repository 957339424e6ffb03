"""What `stf_jax` itself exports, as docs/api.md shows it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import stf_jax
from stf_jax.cli.main import main
from tests.stf_jax.eval.miniature import make_all

API = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", stf_jax.__all__)
def test_every_name_is_there_and_has_a_page(name: str) -> None:
    assert callable(getattr(stf_jax, name))
    assert f"[`{name}`]" in API


def test_a_package_does_not_hide_the_function_of_its_name() -> None:
    """Whatever was imported before: `stf_jax.train` is a package, and is called."""
    code = (
        "from stf_jax.train.config import TrainConfig\n"
        "import stf_jax\n"
        "try:\n"
        "    stf_jax.train(TrainConfig(model='none', out='nowhere'))\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert "none does not exist" in done.stdout


def test_evaluate_is_the_verb(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_all(tmp_path / "data")
    path = str(reference / "llava-stf")
    (result,) = stf_jax.evaluate(
        "pope", stf_jax.load(path), data=tmp_path / "data", out=tmp_path / "ours"
    )
    folders = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "verb")]
    assert main(["eval", "pope", path, *folders, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"] == result.score.figures
    with pytest.raises(ValueError, match="cope"):
        stf_jax.evaluate("cope", stf_jax.load(path), out=tmp_path)
