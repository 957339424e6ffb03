"""The demo over real weights, with the small models of the other one in their place."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from stf_jax.convert import import_checkpoint
from stf_jax.demo import real
from stf_jax.demo.pictures import read_held_out
from stf_jax.demo.pretraining import LANGUAGE, TOWER
from stf_jax.demo.projector import write_projector
from stf_jax.demo.real import PICTURES, RealResults, RealSettings, run_real
from stf_jax.demo.real_report import chance, example, verdict, write_real_report
from stf_jax.eval.choices import Choice, ChoiceScorer
from stf_jax.infer.load import load
from stf_jax.infer.model import Request
from stf_jax.store.run import open_model

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.slow

SETTINGS = RealSettings(singles=6, groups=2, held_out_singles=3, held_out_groups=1, steps=1, rows=2)


@pytest.fixture(scope="module")
def demo(
    packages: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RealResults, Path]]:
    out = tmp_path_factory.mktemp("real") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(packages)
        for name, path in (("LANGUAGE", LANGUAGE), ("TOWER", TOWER)):
            patch.setattr(real, name, SimpleNamespace(path=path, credit=path.name))
        patch.setattr(real, "TEMPLATE", "v1")
        patch.setattr(real, "PROJECTOR", out / "none")
        results = run_real(SETTINGS, out)
        write_real_report(results, out)
        yield results, out


def test_report_says_what_the_run_found(demo: tuple[RealResults, Path]) -> None:
    results, out = demo
    text, written = (out / "report.md").read_text(), json.loads((out / "results.json").read_text())
    assert [model.name for model in results.models] == ["aligned", "trained"]
    kept = json.loads((out / "trained-scores.json").read_text())
    seen, blind = (np.array(kept[name], object) for name in ("seen", "blind"))
    for how, values in (
        ("seeing", seen),
        ("blind", blind),
        ("calibrated", [np.subtract(*pair) for pair in zip(seen, blind, strict=True)]),
    ):
        right = [
            question.choices[int(np.argmax(value))] == question.answer
            for question, value in zip(results.questions, values, strict=True)
        ]
        assert written["models"]["trained"][how]["all"]["right"] == sum(right)
        assert f"{100 * np.mean(right):.1f} (" in text
    assert verdict(results) in text
    metrics = (out / "trained" / "metrics.jsonl").read_text().splitlines()
    assert written["losses"] == [json.loads(line)["loss"] for line in metrics]
    for name in ("accuracy", "answers", "loss"):
        assert f"]({name}.png)" in text
        with Image.open(out / f"{name}.png") as image:
            assert min(image.size) > 300
    assert chance(results.questions, "category") == 0.25
    answers = [question.answer for question in results.questions if question.kind == "category"]
    most = max(map(answers.count, answers))
    assert written["most_common"]["category"] == most / len(answers)


def test_a_run_that_is_there_is_not_done_again(
    demo: tuple[RealResults, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, out = demo
    for name in ("import_checkpoint", "ChoiceScorer", "write_pictures"):
        monkeypatch.setattr(real, name, None)
    assert run_real(SETTINGS, out) == results
    with pytest.raises(ValueError, match="other settings"):
        run_real(RealSettings(seed=7), out)


def test_answers_are_those_of_the_trained_model(demo: tuple[RealResults, Path]) -> None:
    results, out = demo
    image, text, model = example(results, out)
    (question, *_) = read_held_out(out / PICTURES)
    assert (image.name, text) == (question.image, question.text)
    choice = Choice(request=Request(prompt=text, images=image), answers=question.choices)
    scorer = ChoiceScorer(load(model, dtype="float32"))
    (best,) = [one for one in results.models if one.name == model.name]
    assert scorer.choose([choice])[0] == best.choose("seeing")[0]


def test_the_projector_that_is_shipped_is_the_trained_one(
    demo: tuple[RealResults, Path], tmp_path: Path
) -> None:
    """To bfloat16, in the files that `convert import` reads."""
    _, out = demo
    write_projector(out / "trained", tmp_path / "projector")
    import_checkpoint(tmp_path / "projector", tmp_path / "model", base=LANGUAGE, vision_tower=TOWER)
    trained, imported = open_model(out / "trained"), open_model(tmp_path / "model")
    assert imported.config == trained.config
    for name in trained.shapes:
        if name.startswith("connector/"):
            expected = trained.read(name).astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(
                imported.read(name).astype(np.float32), expected.astype(np.float32)
            )
