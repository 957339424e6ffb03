"""The demo over real weights, with the small models of the other one in their place."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from stf_jax.demo import real
from stf_jax.demo.pictures import read_held_out
from stf_jax.demo.pretraining import LANGUAGE, TOWER
from stf_jax.demo.real import PICTURES, RealResults, RealSettings, run_real
from stf_jax.demo.real_report import chance, example, verdict, write_real_report
from stf_jax.eval.choices import Choice, ChoiceScorer
from stf_jax.infer.load import load
from stf_jax.infer.model import Request

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
    (model,) = results.models
    kept = json.loads((out / "trained-scores.json").read_text())
    for name, chosen in (("seeing", kept["chosen"]), ("blind", kept["blind"])):
        right = [
            question.choices[number] == question.answer
            for question, number in zip(results.questions, chosen, strict=True)
        ]
        assert written["models"]["trained"][name]["all"]["right"] == sum(right)
        assert f"{100 * np.mean(right):.1f} (" in text
    assert verdict(results) in text
    metrics = (out / "trained" / "metrics.jsonl").read_text().splitlines()
    assert written["losses"] == [json.loads(line)["loss"] for line in metrics]
    for name in ("accuracy", "answers", "loss"):
        assert f"]({name}.png)" in text
        with Image.open(out / f"{name}.png") as image:
            assert min(image.size) > 300
    assert chance(results.questions, "category") == 0.25
    assert model.scores(results.questions).keys() <= {*real.KINDS, "all"}


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
    assert scorer.choose([choice])[0] == results.models[0].chosen[0]
