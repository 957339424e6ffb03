"""The whole demo in miniature: deterministic, resumable, its report true, its export PyTorch's."""

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stf_jax.cli.main import main
from stf_jax.convert.stored_model import load_processors
from stf_jax.data.pipeline import TrainingData, TrainingStep
from stf_jax.demo.corpus import IMAGES, HeldOut, read_held_out
from stf_jax.demo.evaluation import scores
from stf_jax.demo.experiment import DemoError, Interrupted, Settings, run
from stf_jax.demo.language import TEXT
from stf_jax.demo.rates import compare
from stf_jax.demo.report import show_table, write_report
from stf_jax.demo.results import Results
from stf_jax.demo.tower import VISION
from stf_jax.demo.variants import all_variants
from stf_jax.train import loop
from stf_jax.train.config import TrainConfig
from tests.programs import share_programs

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.slow

SETTINGS = Settings(train_scenes=32, held_out_scenes=4, steps=(2, 2), rows=4)


@pytest.fixture(scope="module")
def programs() -> Iterator[None]:
    """The second run traces and compiles nothing that the first has."""
    with pytest.MonkeyPatch.context() as patched:
        share_programs(patched)
        yield


@pytest.fixture(scope="module")
def demo(programs: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    out = tmp_path_factory.mktemp("demo") / "out"
    results = run(SETTINGS, out)
    write_report(results, read_held_out(out / "scenes"), out)
    return results, out


def losses(results: Results, variant: str) -> list[float]:
    return [record["loss"] for stage in results.variant(variant).stages for record in stage]


class Interrupting(TrainingData):
    """SIGTERM in the middle of a stage: in the first step of the fourth, once."""

    stages = 0

    def batches(self, **arguments: Any) -> Iterator[TrainingStep]:
        Interrupting.stages += 1
        for step in super().batches(**arguments):
            if (self.stages, step.step) == (4, 0):
                os.kill(os.getpid(), signal.SIGTERM)
            yield step


def test_interrupted_or_not_one_seed_gives_one_result(
    demo: tuple[Results, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results, _ = demo
    monkeypatch.setattr(loop, "TrainingData", Interrupting)
    out = tmp_path / "again"
    with pytest.raises(Interrupted):
        run(SETTINGS, out)
    assert not (out / "stf_mbtf" / "answers.json").exists()
    again = run(SETTINGS, out)
    assert Interrupting.stages == 5
    for variant in SETTINGS.variants:
        assert losses(again, variant) == losses(results, variant)
        assert again.variant(variant).answers == results.variant(variant).answers


@pytest.mark.parametrize("stage", [1, 2])
def test_all_variants_see_the_same_rows(demo: tuple[Results, Path], stage: int) -> None:
    """Uncut, and with 16 vision tokens an image the same as with 4."""
    _, out = demo
    config = TrainConfig.load(out / "average" / f"stage{stage}.yaml").data
    processors = load_processors(out / "average" / "start")
    rows = []
    for tokens_per_image in (4, 16):
        data = TrainingData(
            config,
            tokenizer=processors.tokenizer,
            image_processor=processors.image_processor,
            tokens_per_image=tokens_per_image,
        )
        plan = data.plan()
        assert (plan.examples, plan.truncated) == (SETTINGS.train_scenes * (3, 1)[stage - 1], 0)
        rows.append(data.planner.rows(0))
    few, many = rows
    np.testing.assert_array_equal(few.examples, many.examples)
    np.testing.assert_array_equal(few.offsets, many.offsets)


def test_a_rate_is_judged_by_the_loss_of_stage_1(
    demo: tuple[Results, Path], tmp_path: Path
) -> None:
    results, _ = demo
    variant = all_variants(VISION, TEXT)["average"]
    actual = compare(variant, tmp_path, rates=[variant.pretrain_rate], settings=SETTINGS)
    steps = results.variant("average").stages[0]
    assert actual == {variant.pretrain_rate: np.mean([record["loss"] for record in steps])}


def test_a_folder_holds_one_run(demo: tuple[Results, Path]) -> None:
    _, out = demo
    with pytest.raises(DemoError, match="other settings"):
        run(Settings(seed=7), out)
    with pytest.raises(DemoError, match="something else"):
        run(SETTINGS, out / "scenes")


def test_report_says_what_the_run_found(demo: tuple[Results, Path]) -> None:
    results, out = demo
    questions, text = read_held_out(out / "scenes"), (out / "report.md").read_text()
    actual = json.loads((out / "results.json").read_text())
    for variant in results.variants:
        answers = json.loads((out / variant.name / "answers.json").read_text())["answers"]
        metrics = (out / variant.name / "stage2" / "metrics.jsonl").read_text().splitlines()
        score = scores(questions, answers)["all"]
        written = actual["variants"][variant.name]
        assert written["scores"]["all"]["right"] == score.right
        assert written["last_losses"][1] == json.loads(metrics[-1])["loss"]
        low, high = score.interval
        cell = f"{100 * score.accuracy:.1f} ({100 * low:.1f}-{100 * high:.1f})"
        assert any(variant.title in line and cell in line for line in text.splitlines())
    assert results.verdict in text
    for name in ("accuracy", "loss", "prefill", "scene"):
        assert f"]({name}.png)" in text
        with Image.open(out / f"{name}.png") as image:
            assert min(image.size) > 300


def test_the_table_has_a_line_for_each_variant(
    demo: tuple[Results, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    results, _ = demo
    claim = results.variant("stf_mbtf")
    right = {
        kind: dataclasses.replace(score, right=score.questions)
        for kind, score in claim.scores.items()
    }
    longest = dataclasses.replace(claim, scores=right)
    show_table(dataclasses.replace(results, variants=[longest] * 4))
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.split()[:3] == ["STF", "+", "MBTF"]]) == 4
    # Heading of two lines, a rule, and space above and below.
    assert len(lines) == 9
    assert max(map(len, lines)) < 130


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("stf_jax.cli.demo._is_installed", lambda module: module != "sklearn")
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the demo needs scikit-learn: pip install")
    assert error.count("\n") == 1


@pytest.mark.torch
def test_pytorch_gives_the_same_answers(demo: tuple[Results, Path]) -> None:
    pytest.importorskip("torch")
    results, out = demo
    from stf_jax.convert import export_checkpoint

    export_checkpoint(out / "stf_mbtf" / "stage2", out.parent / "torch", layout="llava-stf")
    questions = read_held_out(out / "scenes")
    answers = torch_answers(out.parent / "torch", questions, out / "scenes" / IMAGES)
    assert answers == list(results.variant("stf_mbtf").answers)


def torch_answers(folder: Path, questions: list[HeldOut], folder_of_images: Path) -> list[str]:
    """LLaVA-STF in PyTorch: CLIP and LLaMA of transformers, between them fifteen lines."""
    import torch
    from safetensors.torch import load_file
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from stf_jax.data.conversation import render_prompt
    from stf_jax.data.templates import get_template
    from stf_jax.data.tokenizer import IMAGE_TOKEN_ID, encode_prompt, load_tokenizer
    from stf_jax.demo.evaluation import LONGEST_ANSWER

    tensors = {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    config = json.loads((folder / "config.json").read_text())
    vision = json.loads((folder / "vision_tower" / "config.json").read_text())
    tower: Any = CLIPVisionModel(CLIPVisionConfig(**vision)).eval()
    prefix = "model.vision_tower.vision_tower."
    known = set(tower.state_dict())
    inside = {
        name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)
    }
    if not known & set(inside):
        # transformers 5 has the tower without the name in front.
        inside = {name.removeprefix("vision_model."): t for name, t in inside.items()}
    missing, _ = tower.load_state_dict(inside, strict=False)
    assert not [name for name in missing if "position_ids" not in name]
    llama: Any = LlamaForCausalLM(LlamaConfig(**{**config, "model_type": "llama"})).eval()
    missing, _ = llama.load_state_dict(tensors, strict=False)
    assert not missing

    def mlp(x: Any, name: str) -> Any:
        for part, activation in ((0, torch.nn.functional.gelu), (2, lambda y: y)):
            weight, bias = (tensors[f"model.{name}.{part}.{kind}"] for kind in ("weight", "bias"))
            x = activation(torch.nn.functional.linear(x, weight, bias))
        return x

    def vision_tokens(name: str) -> Any:
        with Image.open(folder_of_images / name) as image:
            pixels = torch.tensor(np.asarray(image.convert("RGB")) / 255, dtype=torch.float32)
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
        deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
        pixels = ((pixels - mean) / deviation).permute(2, 0, 1)[None]
        states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        taps = [states[tap][:, 1:] for tap in config["mm_system"]["taps"]]
        mixed = mlp(torch.cat(taps, dim=-1), "mm_projector_crosslayer")
        side = round(mixed.shape[1] ** 0.5) // 2
        windows = mixed.reshape(side, 2, side, 2, -1).permute(0, 2, 4, 1, 3)
        return mlp(windows.reshape(1, side * side, -1), "mm_projector")

    tokenizer, template, answers = load_tokenizer(folder), get_template("v1"), []
    for item in questions:
        text = render_prompt(f"<image>\n{item.question.text}", template=template)
        before, after = np.split(ids := encode_prompt(tokenizer, text), np.flatnonzero(ids < 0))
        assert after[0] == IMAGE_TOKEN_ID
        with torch.no_grad():
            table = llama.get_input_embeddings()
            parts = [table(torch.tensor(part)[None].long()) for part in (before, after[1:])]
            embedded = torch.cat([parts[0], vision_tokens(item.image), parts[1]], dim=1)
            said = llama.generate(
                inputs_embeds=embedded,
                attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long),
                max_new_tokens=LONGEST_ANSWER,
                do_sample=False,
            )[0]
        answers.append(tokenizer.decode(said.tolist()).strip())
    return answers
