"""`stf-jax eval` as a user runs it, with the small reference model and without any."""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import stf_jax
from stf_jax.cli.eval import INCOMPLETE, add_eval
from stf_jax.cli.main import main
from stf_jax.data.images import ImageError, ImageProcessor, load_image
from stf_jax.eval.generation import ModelAnswerer
from stf_jax.eval.questions import Decoding, Question
from stf_jax.eval.registry import BENCHMARKS, get_benchmark
from stf_jax.eval.runner import prepare
from stf_jax.infer import program
from stf_jax.parallel.sharding import make_mesh
from tests.stf_jax.eval.miniature import write_jsonl


def run(*arguments: str | int | Path) -> int:
    parser = argparse.ArgumentParser()
    add_eval(parser.add_subparsers(required=True))
    options = parser.parse_args(["eval", *map(str, arguments)])
    return options.run(options)


def answerer(model: stf_jax.Model, **options: Any) -> ModelAnswerer:
    return ModelAnswerer(model, model_id="tiny", dtype="float32", **options)


@pytest.mark.slow
def test_all_nine_end_to_end(
    reference: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = tmp_path / "out", tmp_path / "inference.yaml"
    config.write_text("stage: inference\nslots: 1\ncache_dtype: bfloat16\n")
    arguments = ("--data", data, "--out", out, "--config", config, "--json")
    assert run("all", reference / "llava-stf", *arguments) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["benchmark"] for one in printed] == list(BENCHMARKS)
    for one in printed:
        folder = out / one["benchmark"]
        assert json.loads((folder / "scores.json").read_text()) == one
        asked = prepare(get_benchmark(one["benchmark"]), data=data).questions
        lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        assert [line["prompt"] for line in lines] == [question.text for question in asked]
        assert {line["model_id"] for line in lines} == {"llava-stf"}
        assert one["protocol"]["model"]["image_mode"] == "pad"
        assert one["protocol"]["model"]["tokens_per_image"] == 4
        assert one["protocol"]["model"]["cache_dtype"] == "bfloat16"
    submissions = [Path(one["submission"]).name for one in printed if one["submission"]]
    assert submissions == [
        "vqav2_upload.json",
        "testdev_balanced_predictions.json",
        "vizwiz_upload.json",
        "mme_results",
        "mmbench_dev_20230712.xlsx",
        "mmbench_dev_cn_20231003.xlsx",
    ]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("slots: 0", (), "slots is 0; give 1 or more"),
        ("slots: 4", ("--slots", 0), "slots is 0; give 1 or more"),
        ("slot: 4", (), "there is no key 'slot'; the nearest is 'slots'"),
        ("cache_dtype: int4", (), "'cache_dtype'"),
        ("mesh: {tensor: 3, fsdp: 1}", (), "mesh data 1 x fsdp 1 x tensor 3 does not fit 8 dev"),
        ("mesh: {tensor: 3}", ("--mesh", "data=3"), "data 3 x fsdp 1 x tensor 1 does not fit 8"),
    ],
)
def test_the_engine_s_config(
    reference: Path,
    data: Path,
    tmp_path: Path,
    text: str,
    options: tuple[str | int, ...],
    message: str,
) -> None:
    """It is read, and the options go before it."""
    path = tmp_path / "config.yaml"
    path.write_text(f"stage: inference\n{text}\n")
    arguments = ("--data", data, "--out", tmp_path, "--config", path, *options)
    with pytest.raises(ValueError, match=re.escape(message)):
        run("pope", reference / "llava-stf", *arguments)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        # More than any process has addresses for, and more than can be counted.
        (2**31 - 1, "2147483647 slots of 256 positions do not fit into the memory of a device"),
        (10**20, "slots is 100000000000000000000; give 1 to 2147483647"),
    ],
)
def test_more_slots_than_there_is_memory_for(
    reference: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    slots: int,
    message: str,
) -> None:
    """One line, and the run continues with fewer."""
    arguments = ["eval", "pope", str(reference / "llava-stf"), "--data", str(data)]
    arguments += ["--out", str(tmp_path / "out"), "--slots"]
    assert main([*arguments, str(slots)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert main([*arguments, "2"]) == 0


def test_a_model_that_is_not_there_is_named_first(tmp_path: Path) -> None:
    """Before the files of a benchmark are looked for, which may take long."""
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/model does not exist")):
        run("pope", tmp_path / "model", "--data", tmp_path, "--out", tmp_path / "out")


def test_the_reference_s_answers(
    reference: Path, reference_answers: list[dict[str, Any]], model: stf_jax.Model
) -> None:
    """The prompt as a benchmark forms it, to the reference's own greedy text."""
    # The questions of a benchmark share a template.
    template = reference_answers[0]["template"]
    cases = [case for case in reference_answers if case["template"] == template]
    longest = max(len(case["output_ids"]) for case in cases) - 1
    questions = [
        Question(
            number=number,
            question_id=number,
            text=case["question"],
            prompt=f"<image>\n{case['question'].removeprefix('<image>').strip()}",
            images=(reference / "images" / case["image"],),
        )
        for number, case in enumerate(cases)
    ]
    decoding = Decoding(template=template, max_new_tokens=longest)
    for slots in (1, 2):
        replies = list(answerer(model, slots=slots).answer(questions, decoding))
        replies.sort(key=lambda reply: reply.number)
        assert [reply.number for reply in replies] == list(range(len(cases)))
        for reply, case in zip(replies, cases, strict=True):
            assert reply.text == model.tokenizer.decode(case["output_ids"][1:]).strip()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_images_are_taken_as_they_are_stored(
    model: stf_jax.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The reference ignores EXIF, which `Model.generate` alone would follow."""
    path, exif = tmp_path / "turned", Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(path, kind, exif=exif)
    assert load_image(path, apply_orientation=True).size == (30, 40)
    seen: list[tuple[int, int]] = []

    class Seen(ImageProcessor):
        def pixels(self, image: Image.Image) -> np.ndarray:
            seen.append(image.size)
            return super().pixels(image)

    processor = dataclasses.asdict(model.image_processor)
    monkeypatch.setattr(model, "image_processor", Seen(**processor))
    questions = [
        Question(number=n, question_id=n, text="?", prompt="<image>\nWhat is this?", images=(one,))
        for n, one in enumerate((path, path.read_bytes()))
    ]
    list(answerer(model).answer(questions, Decoding(max_new_tokens=1)))
    assert seen == [(40, 30)] * 2


def test_another_model_of_the_same_name(reference: Path, model: stf_jax.Model) -> None:
    """Its weights tell it apart, wherever they lie, so that no answers of two are mixed."""
    told = answerer(model).describe()
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    spread = stf_jax.load(reference / "llava-stf", mesh=mesh)
    assert answerer(spread).describe() == told
    other = stf_jax.load(reference / "llava-stf")
    parameters = other.engine.program._parameters
    leaves, tree = jax.tree.flatten(parameters)
    other.engine.program._parameters = jax.tree.unflatten(tree, [-leaves[0], *leaves[1:]])
    assert answerer(other).describe()["weights"] != told["weights"]


def test_the_weights_are_read_once(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again for each benchmark: 7B take their time."""
    read: list[jax.Array] = []

    def bit_sum(weights: jax.Array) -> int:
        read.append(weights)
        return 1

    monkeypatch.setattr(program, "_bit_sum", bit_sum)
    fresh = stf_jax.load(reference / "llava-stf")
    told = [answerer(fresh).describe() for _ in range(2)]
    assert told[0] == told[1]
    leaves = jax.tree.leaves(fresh.engine.program._parameters)
    assert [id(one) for one in read] == [id(one) for one in leaves]


def test_questions_longer_than_the_context(model: stf_jax.Model) -> None:
    questions = [
        Question(number=n, question_id=f"q{n}", text="", prompt="word " * words, images=())
        for n, words in enumerate((1, 5000, 2, 6000))
    ]
    replies = answerer(model).answer(questions, Decoding())
    with pytest.raises(ValueError, match=r"2 questions leave no room .* q1 \(\d+\), q3 \(\d+\)"):
        next(replies)


def test_a_damaged_image_is_named(model: stf_jax.Model) -> None:
    bad = Question(number=0, question_id=7, text="", prompt="<image>\n?", images=(b"none",))
    with pytest.raises(ImageError, match="the image of 7: no image"):
        next(answerer(model).answer([bad], Decoding()))


def test_an_image_too_thin_is_named(model: stf_jax.Model, tmp_path: Path) -> None:
    path = tmp_path / "thin.png"
    Image.new("RGB", (1, 60_000)).save(path)
    bad = Question(number=0, question_id=7, text="", prompt="<image>\n?", images=(path,))
    with pytest.raises(ImageError, match=r"thin\.png: an image of 1x60000 is too long and thin"):
        next(answerer(model).answer([bad], Decoding()))


def test_scoring_a_file_imports_no_jax(reference: Path) -> None:
    files = reference / "eval"
    arguments = ["eval", "pope", "--answers", str(files / "pope_answers.jsonl")]
    arguments += ["--path", f"questions={files / 'pope_questions.jsonl'}"]
    arguments += ["--path", f"annotations={files}", "--json"]
    code = (
        "import argparse, sys\n"
        "from stf_jax.cli.eval import add_eval\n"
        "parser = argparse.ArgumentParser()\n"
        "add_eval(parser.add_subparsers())\n"
        "options = parser.parse_args(sys.argv[1:])\n"
        "code = options.run(options)\n"
        "assert not {'jax', 'flax', 'transformers'} & set(sys.modules)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, check=True, text=True
    )
    expected = json.loads((files / "expected.json").read_text())["pope"]
    assert json.loads(done.stdout)["figures"]["random"] == expected["random"]


def test_scores_of_the_reference_beside_the_published_rows(
    reference: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = reference / "eval" / "scienceqa"
    paths = ["--path", f"problems={folder / 'problems.json'}"]
    paths += ["--path", f"splits={folder / 'pid_splits.json'}"]
    answers = folder / "answers.jsonl"
    answered = {json.loads(line)["question_id"] for line in answers.read_text().splitlines()}
    asked = json.loads((folder / "pid_splits.json").read_text())["test"]
    missing = [number for number in asked if number not in answered]
    status = run("scienceqa", "--answers", answers, *paths, "--out", tmp_path)
    assert status == (INCOMPLETE if missing else 0)
    table = capsys.readouterr().out.splitlines()
    accuracy = json.loads((reference / "eval/expected.json").read_text())["scienceqa"][
        "image_accuracy"
    ]
    # Systems whose papers have this benchmark.
    systems = {"LLaVA-1.5": 66.8, "AvgPool": 69.8, "LLaVA-STF": 70.5, "PruMerge": 68.5}
    systems |= {"QueCC": 70.6, "VoCo-LLaMA": 65.4, "p-MoD": 69.3, "PyramidDrop": 71.0}
    assert table[0].split("  ")[-len(systems) :] == [f"{title:>4}" for title in systems]
    assert table[1].split() == ["SQA-I", f"{accuracy:.1f}", *map(str, systems.values())]
    if missing:
        counts = f"{len(missing)} of {len(asked)} questions have no answer and count as wrong: "
        assert counts + ", ".join(missing) in table[3]
    assert (tmp_path / "scienceqa" / "scores.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pope",), "give MODEL and --out"),
        (("pope", "model"), "give MODEL and --out"),
        (("pope", "model", "--answers", "a.jsonl"), "leave out MODEL or --answers"),
        (("all", "--answers", "a.jsonl"), "name it in the place of 'all'"),
        (("all", "model", "--out", "o", "--path", "images=i"), "--path is for one benchmark"),
        (("pope", ".", "--out", "o", "--path", "images"), "ROLE=PATH"),
        (("pope", ".", "--out", "o"), "where are questions, images, annotations"),
        (("vqa", "model", "--out", "o"), "unknown benchmark 'vqa'"),
        (("pope", ".", "--out", __file__), "is a file; give --out a folder"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*arguments)


def test_every_benchmark_is_checked_before_the_model_is_read(data: Path, tmp_path: Path) -> None:
    (data / "gqa" / "data" / "images" / "n1.jpg").unlink()
    write_jsonl(data / "vizwiz" / "llava_test.jsonl", [{"image": "x"}])
    # A folder, and no model.
    arguments = ("all", tmp_path, "--data", data, "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="1 images are not there") as caught:
        run(*arguments)
    assert "line 1 has no question_id, text" in str(caught.value)
    assert not (tmp_path / "out").exists()
