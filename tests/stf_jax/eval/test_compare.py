"""Tables of models: intervals, costs, and that nothing is asked twice."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from stf_jax.cli.main import main
from stf_jax.convert import import_checkpoint
from stf_jax.eval.answers import read_answers
from stf_jax.eval.choice_file import ChoiceAnswerer
from stf_jax.eval.compare import Comparison, Cost, Line, Row, measure, open_benchmark
from stf_jax.eval.comparison import draw, markdown, spread
from stf_jax.eval.intervals import clustered, wilson
from stf_jax.eval.registry import get_benchmark
from stf_jax.eval.runner import ask, prepare
from stf_jax.infer.load import load
from stf_jax.util.markdown import markdown_table
from tests.stf_jax.eval.miniature import Echo, png

CHOICES = {"color": ["red", "blue"], "what": ["a cat", "a dog", "a bus"]}


def test_wilson_s_interval_is_that_of_his_paper() -> None:
    np.testing.assert_allclose(wilson(0, 10), (0, 0.2775), atol=1e-4)
    np.testing.assert_allclose(wilson(81, 263), (0.2553, 0.3662), atol=1e-4)


def test_a_clustered_interval_is_that_of_the_clusters_means() -> None:
    """The standard error of 200 means, and not of 800 answers that say the same."""
    rng = np.random.default_rng(0)
    values, images = rng.random(200), [*range(200)]
    low, high = clustered(np.repeat(values, 4), np.repeat(images, 4).tolist())
    error = values.std() / np.sqrt(200)
    normal = values.mean() - 1.96 * error, values.mean() + 1.96 * error
    np.testing.assert_allclose((low, high), normal, atol=6e-3)
    assert clustered(values, images) == pytest.approx((low, high), abs=1e-12)
    # Answers of one image are one observation, of which nothing is known to vary.
    assert clustered(values, ["one"] * 200) == pytest.approx((values.mean(),) * 2)
    # A constant gain has no width, however much the values vary.
    assert clustered((values + 0.25) - values, images) == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize("name", ["gqa", "textvqa", "pope"])
def test_what_answers_count_adds_up_to_the_score(data: Path, tmp_path: Path, name: str) -> None:
    prepared = prepare(get_benchmark(name), data=data)
    result = ask(prepared, Echo({"a": "nike"}), out=tmp_path / "out")
    assert prepared.benchmark.credit is not None
    credits = prepared.benchmark.credit(prepared.paths, read_answers(result.answers))
    if name == "pope":
        for kind in ("random", "popular", "adversarial"):
            right = [credit.right for credit in credits if credit.kind == kind]
            assert np.mean(right) == result.score.figures[kind]["accuracy"]
    else:
        unit = 100 if name == "gqa" else 1
        mean = unit * np.mean([credit.right for credit in credits])
        assert mean == pytest.approx(result.score.figures["accuracy"])
        assert mean > 0


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve closed choices about three images."""
    folder = tmp_path_factory.mktemp("choices")
    (folder / "images").mkdir()
    rng, entries = np.random.default_rng(0), []
    for number in range(3):
        (folder / "images" / f"{number}.png").write_bytes(png(number))
        for kind, choices in CHOICES.items():
            for n in range(2):
                answer = choices[int(rng.integers(len(choices)))]
                entries.append(
                    {
                        "image": f"{number}.png", "kind": kind, "text": f"Which {kind} {n}?",
                        "choices": choices, "answer": answer,
                    }
                )  # fmt: skip
    (folder / "q.json").write_text(json.dumps(entries))
    return folder / "q.json"


def import_llava(reference: Path, out: Path, *, seed: int) -> Path:
    tower = reference / "clip"
    import_checkpoint(reference / "vicuna", out, vision_tower=tower, system="llava", seed=seed)
    return out


@pytest.fixture(scope="module")
def llava(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_llava(reference, tmp_path_factory.mktemp("llava") / "llava", seed=0)


def test_two_models_end_to_end(
    reference: Path,
    llava: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows, out = tmp_path / "rows.yaml", tmp_path / "out"
    other = import_llava(reference, tmp_path / "other", seed=1)
    rows.write_text(f"- model: {other}\n  title: the other\n")
    call = ["compare", str(llava), "--rows", str(rows), "--out", str(out)]
    call += ["--benchmark", f"mine={questions}"]
    assert main(call) == 0
    shown = capsys.readouterr().out
    assert shown == (out / "comparison.md").read_text()
    with Image.open(out / "comparison.png") as image:
        assert image.width > 1000
    lines = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))
    truth = json.loads(questions.read_text())
    right = {}
    for folder, title in (("llava", "llava"), ("the-other", "the other")):
        answers = (out / folder / "mine" / "answers.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in answers]
        hits = [text == entry["answer"] for text, entry in zip(texts, truth, strict=True)]
        right[title] = np.array(hits)
        for kind in ("all", *CHOICES):
            (line,) = [each for each in lines if (each["model"], each["kind"]) == (title, kind)]
            at = np.array([kind in ("all", entry["kind"]) for entry in truth])
            assert float(line["accuracy"]) == pytest.approx(right[title][at].mean())
            assert (line["questions"], line["images"]) == (str(at.sum()), "3")
    gap = right["the other"].mean() - right["llava"].mean()
    (line,) = [each for each in lines if (each["model"], each["kind"]) == ("the other", "all")]
    assert float(line["difference"]) == pytest.approx(gap)
    # Again: nothing is asked, and the table is the same.
    monkeypatch.setattr(ChoiceAnswerer, "answer", None)
    assert main(call) == 0
    assert capsys.readouterr().out == shown
    # Another model under the same title is not taken for it.
    rows.write_text(f"- {{model: {llava}, title: the other}}\n- {{model: {llava}, title: more}}\n")
    assert main(["compare", *call[2:]]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "the answers there were given under another protocol" in error


def test_the_cost_is_that_of_what_each_layer_computes(llava: Path, questions: Path) -> None:
    """FastV drops half of the tower's 16 patches after its second layer, here the first of two."""
    prepared = open_benchmark("mine", questions, template="v1", limit=None)
    row = Row(model=str(llava), title="fast", system="fastv")
    whole, fast = (
        measure(load(llava, dtype="float32", system=system), row, prepared, is_timed=False)
        for system in (None, "fastv")
    )
    assert whole.layer_tokens == (16, 16)
    assert fast.layer_tokens == (16, 8)
    assert (whole.layers, fast.layers) == ("16 x 2", "16 x 1, 8 x 1")
    # Keys and values in float32.
    text = json.loads((llava / "config.json").read_text())["model"]["text"]
    slot = 2 * text["kv_heads"] * text["head_dim"] * 4
    assert whole.cache_bytes == 2 * whole.prompt_tokens * slot
    assert fast.cache_bytes == whole.cache_bytes - 8 * slot
    assert fast.language_flops < whole.language_flops


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ("", [], "give two or more models"),
        ("- model: {0}", [], "two models are called llava; give each a title"),
        ("- {{model: {0}, title: ..}}", [], "/llava has no title; give it one, with --rows FILE"),
        ("- {{model: {0}, title: b}}", ["--baseline", "c"], "the baseline 'c' is none of llava, b"),
        ("- {{model: {0}, titel: b}}", [], "entry 1: .*titel"),
        ("- {{title: b}}", [], "entry 1 names no model"),
        ("- {{model: /nowhere, title: b}}", [], "/nowhere does not exist"),
        ("- {{model: {0}, title: b}}", ["--benchmark", "mme={1}"], "mme has no score by question"),
        ("- {{model: {0}, title: b}}", ["--benchmark", "mine"], "write it as NAME=PATH"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    llava: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: str,
    arguments: list[str],
    message: str,
) -> None:
    file = tmp_path / "rows.yaml"
    file.write_text(rows.format(llava) or "[]")
    arguments = [text.format(llava, tmp_path) for text in arguments]
    call = ["compare", str(llava), "--rows", str(file), "--out", str(tmp_path / "out")]
    assert main([*call, *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "green"}, "the answer of entry 4 is not among its choices"),
        ({"choices": ["red", 2], "answer": "red"}, "a choice of entry 4 is no text"),
        ({"choices": []}, "a choice of entry 4 is no text, or there is none"),
        ({"image": "no.png"}, r"1 images are not there \(.*no.png\); fetch them$"),
    ],
)
def test_choices_that_cannot_be_asked_are_refused(
    questions: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    entries = json.loads(questions.read_text())
    entries[3] |= change
    (tmp_path / "images").symlink_to(questions.parent / "images")
    (tmp_path / "q.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=message):
        open_benchmark("mine", tmp_path / "q.json", template="v1", limit=None)


def test_seventeen_models_fit_into_the_figure() -> None:
    """No label stands over another, beside a legend or below an axis."""
    titles = [f"a system of number {n}" for n in range(17)]
    costs = {
        title: Cost(
            prompt_tokens=90, layer_tokens=(196,) * 8 if n == 0 else (49,) * 8,
            language_flops=1e9 * (1 + n // 4), total_flops=2e9 * (1 + n // 4),
            cache_bytes=10**6, seconds=None,
        )
        for n, title in enumerate(titles)
    }  # fmt: skip
    lines = [
        Line(
            title=title, benchmark="mine", kind="all", questions=10, images=5, accuracy=0.5,
            interval=(0.4, 0.6), difference=None, difference_interval=None,
        )
        for title in titles
    ]  # fmt: skip
    comparison = Comparison(lines=lines, costs=costs, baseline=titles[0])
    assert markdown(comparison).count("| a system of number") == 34
    assert markdown_table(["a"], [["b|c"]]).splitlines()[2] == r"| b\|c |"
    figure = draw(comparison)
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    boxes = [text.get_window_extent() for text in legend.get_texts()]
    assert len(boxes) == 17
    boxes += [text.get_window_extent() for text in figure.axes[0].get_xticklabels()]
    assert len(boxes) == 19
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_points_at_the_same_place_stand_side_by_side() -> None:
    values = np.array([3.0, 1.0, 1.0, 3.05, 1.0])
    places = spread(values, gap=0.1)
    np.testing.assert_allclose(np.sort(places[[1, 2, 4]]), [0.9, 1.0, 1.1])
    np.testing.assert_allclose(places[[0, 3]], [2.975, 3.075])
    np.testing.assert_allclose(spread(np.array([5.0, 1.0]), gap=0.1), [5.0, 1.0])
