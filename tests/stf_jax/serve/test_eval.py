"""A benchmark asked over HTTP has the answers that the model gives itself."""

import json
from pathlib import Path

import pytest

from stf_jax.cli.main import main
from tests.stf_jax.eval.miniature import make_all
from tests.stf_jax.serve.conftest import Running


def test_the_same_answers_through_a_server(
    serving: Running, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_all(tmp_path / "data")
    options = ["--data", str(tmp_path / "data"), "--json", "--out"]
    server = ["--server", f"{serving.url}/v1", "--slots", "3"]
    assert main(["eval", "pope", *server, *options, str(tmp_path / "http")]) == 0
    asked = json.loads(capsys.readouterr().out)
    model = str(reference / "llava-stf")
    assert main(["eval", "pope", model, *options, str(tmp_path / "own")]) == 0
    own = json.loads(capsys.readouterr().out)
    assert asked["figures"] == own["figures"]

    def answers(which: str) -> dict[str, str]:
        lines = (tmp_path / which / "pope" / "answers.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return {f"{line['question_id']} {line['prompt']}": line["text"] for line in found}

    assert answers("http") == answers("own")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--server", "localhost"], "give a URL such as"),
        (["--server", "http://127.0.0.1:9/v1"], "cannot be reached"),
        (["other", "--server", "URL"], "has no model 'other'; it has tiny"),
        (["--server", "URL", "--dtype", "bfloat16"], "--dtype is the server's; leave it out"),
    ],
)
def test_refusals(
    serving: Running,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_all(tmp_path / "data")
    given = [f"{serving.url}/v1" if option == "URL" else option for option in options]
    folders = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main(["eval", "pope", *given, *folders]) == 1
    assert message in capsys.readouterr().err
