"""A "~" in front of a path is the home directory, wherever the path is written."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from stf_jax.cli.eval import _paths
from stf_jax.cli.main import _parser, main
from stf_jax.data.config import DatasetSource
from stf_jax.data.images import load_image
from stf_jax.train.config import TrainConfig
from stf_jax.util.files import absolute, expand
from tests.corpus import write_corpus

Parse = Callable[..., object]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_the_rule(home: Path, tmp_path: Path) -> None:
    assert expand("~/x") == f"{home}/x"
    assert expand("~") == str(home)
    for path in ("./~/x", "x/~", "/x~", "gs://bucket/~/x"):
        assert expand(path) == path
    assert os.fspath(absolute("~/x")) == f"{home}/x"


def test_a_config_and_its_overrides(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    data = {"datasets": [{"path": "~/data"}]}
    path.write_text(yaml.safe_dump({"model": "~/model", "out": "~/runs/x", "data": data}))
    config = TrainConfig.load(path)
    assert (config.model, config.out) == (f"{home}/model", f"{home}/runs/x")
    assert config.data.datasets == (DatasetSource(path=f"{home}/data"),)
    assert TrainConfig.load(path, ["--out=~/y"]).out == f"{home}/y"


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "import", "~/x", "~/x", "--vision-tower=~/x", "--base=~/x"],
        ["convert", "export", "~/x", "~/x", "--layout=hf"],
        ["convert", "inspect", "~/x", "--vision-tower=~/x", "--base=~/x"],
        ["generate", "~/x", "--prompt=~", "--image=~/x", "--vision-tower=~/x"],
        ["chat", "~/x", "--image=~/x", "--vision-tower=~/x"],
        ["data", "check", "~/x", "~/x", "--images=~/x", "--model=~/x", "--vision-tower=~/x"],
        ["data", "build", "~/x", "~/x", "--images=~/x", "--model=~/x"],
        ["data", "show", "~/x", "0", "--model=~/x", "--png=~/x"],
        ["train", "~/x"],
        ["eval", "pope", "~/x", "--data=~/x", "--out=~/x", "--config=~/x", "--answers=~/x"],
        ["demo", "--out=~/x"],
        ["plan", "~/x", "--topology=v5e:4x4"],
    ],
)
def test_every_command(command: list[str], home: Path) -> None:
    options = vars(_parser().parse_known_args(command)[0])
    written = " ".join(str(options[name]) for name in options if name not in ("run", "prompt"))
    assert "~" not in written
    assert written.count(f"{home}/x") == sum("~/x" in argument for argument in command)


def test_roles_of_eval(home: Path) -> None:
    options = _parser().parse_args(["eval", "pope", "--path=images=~/coco", "--path", "coco=x~"])
    assert _paths(options) == {"images": home / "coco", "coco": Path("x~")}


def test_an_image_in_python(home: Path, reference: Path) -> None:
    shutil.copy(reference / "images" / "0.png", home / "cat.png")
    assert load_image("~/cat.png").mode == "RGB"


def test_a_dataset(home: Path, native: Path, tmp_path: Path) -> None:
    corpus = write_corpus(home, 10)
    arguments = ["~/train.json", "~/data", "--images=~/images", f"--model={native}"]
    assert main(["data", "build", *arguments, "--workers=1"]) == 0
    assert main(["data", "show", "~/data", "0", f"--model={native}"]) == 0
    assert (home / "data").is_dir()
    assert not list((tmp_path / "work").iterdir())
    assert corpus.json.is_file()
