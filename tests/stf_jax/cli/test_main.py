"""The command line as a user runs it: the reference's answers, and one clear line for a mistake."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stf_jax import Answer, Request, Sampling
from stf_jax.cli.main import main
from stf_jax.convert import Source
from stf_jax.data.clips import FrameSampling


@pytest.fixture(scope="module")
def native(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "native"
    assert main(["convert", "import", str(reference / "llava-stf"), str(out)]) == 0
    return out


def ask(model: Path | str, image: Path | str, question: str, *more: str) -> list[str]:
    return ["generate", str(model), "--image", str(image), "--prompt", question, *more]


@pytest.mark.portable
@pytest.mark.parametrize("layout", ["native", "pytorch"])
def test_answers_of_the_reference(
    reference: Path,
    source: Source,
    native: Path,
    capsys: pytest.CaptureFixture[str],
    reference_answers: list[dict[str, Any]],
    reference_answer: dict[str, Any],
    layout: str,
):
    case, longest = (
        reference_answer,
        max(len(answer["output_ids"]) for answer in reference_answers) - 1,
    )
    model = native if layout == "native" else reference / "llava-stf"
    more = ["--template", case["template"], "--max-new-tokens", str(longest), "--json"]
    assert main(ask(model, reference / "images" / case["image"], case["question"], *more)) == 0
    (line,) = capsys.readouterr().out.splitlines()
    answer = json.loads(line)
    # The reference's list begins with BOS.
    assert answer["token_ids"] == case["output_ids"][1:]
    assert answer["vision_tokens"] == source.config.tokens_per_image
    ended = case["output_ids"][-1] in source.config.text.eos_ids
    assert answer["finish_reason"] == ("stop" if ended else "length")


def test_an_image_is_kept_for_later(
    reference: Path, native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second question needs the file alone."""
    image, kept = reference / "images" / "0.png", str(tmp_path / "image.safetensors")
    more = ["--max-new-tokens", "4", "--json"]
    assert main(ask(native, image, "What?", *more, "--save-images", kept)) == 0
    later = ["generate", str(native), "--saved-images", kept, "--prompt", "What?", *more]
    assert main(later) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert main([*later, "--image", str(image)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("--saved-images stands for the images; leave out --image, --save-images")


def test_every_option_arrives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = Answer(
        text="two", token_ids=[3, 2], prompt_tokens=9, vision_tokens=4, finish_reason="stop"
    )
    seen: dict[str, Any] = {}

    class Model:
        def generate(self, requests: list[Request], **options: Any) -> list[Answer]:
            seen.update(options, requests=requests)
            return [answer]

    def load(path: str, **options: Any) -> Model:
        seen.update(options, path=path)
        return Model()

    monkeypatch.setattr("stf_jax.infer.load.load", load)
    options = "--temperature 0.7 --top-p 0.8 --top-k 5 --seed 6 --max-new-tokens 7 --template plain"
    more = "--stop one --stop two --dtype bfloat16 --vision-tower clip --json --image b.png"
    more += " --clip c.mp4 --frames 4 --rate 2 --timestamps"
    assert (
        main([*ask("model", "a.png", "Why?"), *options.split(), *more.split(), "--allow-urls"]) == 0
    )
    assert json.loads(capsys.readouterr().out) == dataclasses.asdict(answer)
    assert seen == {
        "path": "model",
        "dtype": "bfloat16",
        "vision_tower": "clip",
        "requests": [
            Request(
                prompt="Why?",
                images=["a.png", "b.png"],
                clips=["c.mp4"],
                sampling=FrameSampling(frames=4, rate=2.0),
                timestamps=True,
            )
        ],
        "system": None,
        "fields": {},
        "tokens": None,
        "sampling": Sampling(temperature=0.7, top_p=0.8, top_k=5, seed=6),
        "max_new_tokens": 7,
        "template": "plain",
        "stop": ["one", "two"],
        "on_text": None,
        "allow_urls": True,
    }


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_a_stdout_that_cannot_hold_every_text_is_refused_before_the_model_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    more = ["--prompt", "Why?"] if verb == "generate" else []
    assert main([verb, "no model", *more]) == 1
    assert "stdout is latin-1, which cannot hold every text; set" in capsys.readouterr().err


@pytest.mark.portable
def test_in_a_process_of_its_own(
    reference: Path, native: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing but the answer on stdout, nothing at all on stderr, the text as it streams."""
    command = ask(native, reference / "images" / "0.png", "What is the color of the bus?")
    process = subprocess.run(
        [sys.executable, "-m", "stf_jax", *command], capture_output=True, check=True
    )
    capfd.readouterr()
    assert main([*command, "--json"]) == 0
    out, err = capfd.readouterr()
    assert (process.stderr, err) == (b"", "")
    assert process.stdout.decode() == json.loads(out)["text"] + "\n"


def test_python_m_convert(
    reference: Path, native: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "convert", "inspect", str(native)]
    out = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert "native checkpoint" in out
    assert "tokens per image  4" in out
    # `stf-jax convert inspect` says the same of both.
    capsys.readouterr()
    assert main(["convert", "inspect", str(native)]) == 0
    assert capsys.readouterr().out == out
    assert main(["convert", "inspect", str(reference / "llava-stf")]) == 0
    of_published = capsys.readouterr().out
    assert "LLaVA-STF" in of_published
    assert "tokens per image  4" in of_published


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--image", "nowhere.png"], "nowhere.png: no such file"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "<image><image>\nWhich?"], "2 <image> and there is 1 image; give one for"),
        (["--top-p", "0.9"], "do nothing at temperature 0, which is greedy; add --temperature 1"),
        (["--top-k", "3"], "do nothing at temperature 0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--seed", "-1"], "seed is -1; give 0 to 4294967295"),
        (["--prompt", "word " * 5000], "leaves no room for an answer"),
        (["--template", "v2"], "v2"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--top-p", "0"], "top_p is 0"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--stop", ""], "stop string is empty"),
        (["--dtype", "float16"], "float16 does not run on CPU; choose float32 or bfloat16"),
    ],
)
def test_mistakes(
    reference: Path,
    native: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    message: str,
):
    arguments = ask(native, reference / "images" / "0.png", "What?")
    if change[0] == "--image":
        del arguments[2:4]
    assert main([*arguments, *change]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_image_mark_without_an_image(native: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", str(native), "--prompt", "<image>\nWhat?"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 <image> and there is no image; give one for each (--image FILE), or" in line


@pytest.mark.portable
def test_relative_paths(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Every verb takes them, which Orbax does not."""
    shutil.copytree(reference / "llava-stf", tmp_path / "llava-stf")
    shutil.copytree(reference / "clip", tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "import", "llava-stf", "new/model"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["convert", "inspect", "new/model"]) == 0
    assert main(ask(Path("new/model"), reference / "images" / "0.png", "What?")) == 0
    assert main(["convert", "export", "new/model", "back", "--layout", "llava-stf"]) == 0
    assert main(["convert", "export", "new/model", "copy", "--layout", "native"]) == 0
    monkeypatch.chdir("new")
    assert main(["convert", "inspect", "../copy"]) == 0
    assert main(ask(Path("../back"), reference / "images" / "0.png", "What?")) == 0
    capsys.readouterr()


def test_inspect_tells_by_its_exit_status(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["convert", "inspect", str(reference / "llava-stf")]) == 0
    assert capsys.readouterr().out.endswith("whole\n")
    assert main(["convert", "inspect", str(reference / "vicuna")]) == 1
    assert "not usable as it is" in capsys.readouterr().out


def test_import_warns_without_processors(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, out = tmp_path / "llava-stf", tmp_path / "out"
    shutil.copytree(reference / "llava-stf", source)
    shutil.copytree(reference / "clip", tmp_path / "clip")
    (source / "tokenizer.model").unlink()
    (tmp_path / "clip" / "preprocessor_config.json").unlink()
    assert main(["convert", "import", str(source), str(out)]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"warning: no answers without this: {out / 'hf'}: no tokenizer.model")
    assert f"{out / 'hf'} has no preprocessor_config.json; copy it there" in second
    assert main(ask(out, reference / "images" / "0.png", "What?")) == 1
    assert f"error: {out / 'hf'}: no tokenizer.model" in capsys.readouterr().err
    # Where it says, they are found.
    shutil.copy(reference / "llava-stf" / "tokenizer.model", out / "hf")
    shutil.copy(reference / "clip" / "preprocessor_config.json", out / "hf")
    assert main(["convert", "inspect", str(out)]) == 0


@pytest.mark.portable
def test_help_names_the_templates(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert "mistral_instruct" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["missing", "empty", "file", "images"])
def test_no_model(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no model")
    path = reference / "images" if model == "images" else tmp_path / model
    assert main(ask(path, reference / "images" / "0.png", "What?")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert str(path) in line


def test_a_photograph_is_shown_upright(
    reference: Path, native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Turned by EXIF or turned in its pixels: the same image, the same answer."""
    upright = Image.open(reference / "images" / "1.png").convert("RGB")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.save(tmp_path / "upright.png")
    turned.save(tmp_path / "turned.png", exif=exif)
    turned.save(tmp_path / "not_turned_back.png")
    answers = []
    for name in ("upright", "turned", "not_turned_back"):
        file = tmp_path / f"{name}.png"
        assert main(ask(native, file, "How many cats are in the image?")) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_gs_without_gcsfs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert main(["generate", "gs://bucket/model", "--prompt", "hi"]) == 1
    assert capsys.readouterr().err == "error: gs:// needs gcsfs: pip install 'stf-jax[gcs]'\n"
