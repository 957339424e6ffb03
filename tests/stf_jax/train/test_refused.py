"""What cannot be trained is refused in words, before a step runs."""

import dataclasses
import fcntl
import gc
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stf_jax.cli.main import main
from stf_jax.train.config import TrainConfig
from stf_jax.train.loop import train

Config = Callable[..., TrainConfig]

BAD = [
    ({"model": "/nowhere"}, r"^/nowhere does not exist"),
    ({"data": {"datasets": [{"path": "/nowhere"}]}}, r"make it with 'stf-jax data build'"),
    ({"data": {"datasets": []}}, r"datasets is empty; name at least one folder"),
    (
        {"mesh": {"fsdp": 3}},
        r"data 1 x fsdp 3 x tensor 1 does not fit 8 devices; the product .* 8,",
    ),
    ({"mesh": {"tensor": 8}}, r"does not divide the model: .*text\.kv_heads 4 by tensor 8"),
    (
        {"mesh": {"fsdp": 8}, "data": {"batch_size": 12}},
        r"data\.batch_size 12 does not divide into 1 micro-batches over 8 devices .* 16 for inst",
    ),
    ({"data": {"sequence_length": 8}}, r"none of the 24 examples .* sequence_length 8"),
    ({"data": {"sequence_length": 8192}}, r"8192 is more than the 4096 positions"),
    ({"data": {"template": "plain"}}, r"no index for template 'plain'"),
    ({"architecture": "llava_stf_7b"}, r"is no llava_stf_7b(.|\n)*text\.width: 4096 there, 64 her"),
]


@pytest.mark.parametrize(("keys", "message"), BAD, ids=[str(keys) for keys, _ in BAD])
def test_before_anything_is_written(config: Config, keys: dict[str, Any], message: str) -> None:
    bad = config(**keys)
    with pytest.raises(ValueError, match=message):
        train(bad)
    assert not Path(bad.out).exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--optimizer.learning_rte=1",
            "no key 'optimizer.learning_rte'; the nearest is 'optimizer",
        ),
        ("--sequence_length=8", "no key 'sequence_length'; the nearest is 'data.sequence_length'"),
        ("--stage=finetun", "\"stage\": Expected one of ['pretrain', 'finetune', 'lora']"),
        ("--data.batch_size=many", '"data.batch_size": Expected'),
        ("--optimizer.learning_rate=-1", "learning_rate is -1.0; it must be 0 or more, and finite"),
        ("--optimizer.learning_rate=0", "every learning rate is 0, with which nothing is trained"),
        (
            "--stage=pretrain --optimizer.projector_learning_rate=0",
            "every learning rate is 0, with which nothing is trained",
        ),
        ("--optimizer.beta1=2", "beta1 is 2.0; give 0 or more, below 1"),
        ("--steps=many", "'steps': Expected int, null. Got value: many"),
        ("--data.batch_size=0", "batch_size is 0; it must be at least 1"),
        ("--micro_batches=3", "data.batch_size 128 does not divide into 3 micro-batches"),
        ("--mesh.fsdp=0", "each size is 1 or more, and one of them may be -1"),
        ("--architecture=llava", "architecture 'llava' is not one of llava_1_5_7b, "),
        ("--quantization=int4", "quantization int4 is that of a named size, which is missing"),
        ("--profile=[3,2]", "give the first step, and one after the last"),
        ("learning_rate=1", "'learning_rate=1' is no override; write --section.key=value"),
    ],
)
def test_keys_and_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: a\nout: b\n")
    assert main(["train", str(path), *override.split()]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_every_unknown_key_of_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: a\nout: b\ndatas: {}\ndata: {batchsize: 3}\n")
    with pytest.raises(ValueError, match=r"'datas'; the nearest is 'data'\n.*'data\.batch_size'"):
        TrainConfig.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a config; see configs/ for some"),
        ("- a", "not a config"),
        ("a: [", "cannot be read"),
        ("model: a", "these keys are missing: out"),
        ("model: a\nout: b\nmodel: c", "cannot be read .*'model' is there twice"),
        ("model: a\nout: b\ndata: [1]", r"data is \[1\]; it is a section of keys"),
        ("a: " + "[" * 10_000, "cannot be read .*; see configs/"),
        ("a: &a {b: 1}\nc: *a", "cannot be read .an alias .* is not read; write it out"),
        ("model: a\nout: b\nsteps: 1000000000000", "steps is .*; give 1 to 10000000, or null"),
        ("model: a\nout: b\nepochs: 1000000000000", "epochs is .*; it must be at most 10000"),
        (
            "model: a\nout: b\ndata: {sequence_length: 1000000000}",
            "sequence_length is .*at most 1048576",
        ),
        ("model: a\nout: b\nstage: " + "x" * 10_000, r".stage.{1,600}\.\.\.$"),
    ],
)
def test_no_config(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"run\.yaml: {message}"):
        TrainConfig.load(path)


def test_a_directory_of_something_else(config: Config, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("")
    with pytest.raises(
        ValueError, match=r"thesis holds something else than a run \(chapter\.tex\)"
    ):
        train(config(out=str(tmp_path / "thesis")))
    with pytest.raises(ValueError, match="is a file; choose a directory"):
        train(config(out=str(tmp_path / "thesis/chapter.tex")))
    with pytest.raises(
        ValueError, match=r"run cannot be written to \(Not a directory\); choose another"
    ):
        train(config(out=str(tmp_path / "thesis/chapter.tex/run")))


@pytest.fixture(scope="module")
def runs() -> dict[str, Path]:
    """What `finished` has made: once in each process of the tests."""
    return {}


@pytest.fixture
def finished(
    config: Config, runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> TrainConfig:
    """A copy of a run of three steps with a checkpoint after each, and its config."""
    run = config(steps=3, checkpoint={"every": 1, "keep": 3})
    if not runs:
        runs["out"] = tmp_path_factory.mktemp("finished") / "run"
        assert train(dataclasses.replace(run, out=str(runs["out"]))) == "finished"
    shutil.copytree(runs["out"], run.out)
    return run


def test_another_config_in_the_same_directory(config: Config, finished: TrainConfig) -> None:
    other = config(steps=3, out=finished.out, optimizer={"learning_rate": 0.5}, log_every=7)
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate: 0\.001 there, 0\.5 here$"):
        train(other)


def test_two_runs_in_one_directory(finished: TrainConfig) -> None:
    run = finished
    with (Path(run.out) / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 12 on a host")
        file.flush()
        with pytest.raises(
            ValueError, match=r"another process trains there \(process 12 on a host"
        ):
            train(run)
    assert train(run) == "finished"


def records(run: TrainConfig) -> list[dict[str, Any]]:
    """Of each step from the second on, apart from how long it took."""
    lines = map(json.loads, Path(run.out, "metrics.jsonl").read_text().splitlines())
    return [{**line, "seconds": None} for line in lines if line["step"] >= 1]


# Orbax drops its other readers when one has failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint(finished: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished
    expected = records(run)
    last, newest = (Path(run.out, "checkpoints", name) for name in "32")
    last.rename(last.with_name(".set-aside"))
    largest = max(newest.rglob("*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    assert train(run) == "finished"
    said = capsys.readouterr().err
    assert re.search(
        r"checkpoints/2 is damaged \(.*\); it is 2.damaged now, .* from step 1\n", said
    )
    assert records(run) == expected
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_only_checkpoint_is_damaged(finished: TrainConfig) -> None:
    run = finished
    for other in Path(run.out, "checkpoints").glob("[0-9]*"):
        if other.name != "2":
            shutil.rmtree(other)
    largest = max(
        Path(run.out, "checkpoints", "2").rglob("*"), key=lambda file: file.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"/2 is damaged \(.*\), and there is no other; delete it"):
        train(run)
    gc.collect()


def test_a_disk_that_is_full(config: Config, tmp_path: Path) -> None:
    """Found out before the first step, in one line; with room, the run begins."""
    run = config(steps=3)
    command = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "from stf_jax.cli.main import main; sys.exit(main(['train', sys.argv[1]]))"
    )
    (path,) = tmp_path.glob("*.yaml")
    full = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", command, str(path)],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert full.returncode == 1
    assert full.stderr.startswith("error: ")
    assert "no checkpoint can be written" in full.stderr
    assert full.stderr.count("\n") == 1, full.stderr
    assert not (Path(run.out) / "metrics.jsonl").exists()
    assert train(run) == "finished"
