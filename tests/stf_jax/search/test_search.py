"""The verb `search`, from weights and a dataset to a schedule that a model follows."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from safetensors.numpy import load_file, save_file

import stf_jax
from stf_jax.cli.main import main
from stf_jax.cli.verbs import read_fields
from stf_jax.convert.importer import import_checkpoint
from stf_jax.convert.stored_model import load_processors
from stf_jax.infer.prompts import Prompt, pad_prompts
from stf_jax.models.llava import Llava
from stf_jax.search.algorithms import Counts, Quality, Rule
from stf_jax.search.calibration import fingerprint, read_prompts
from stf_jax.search.journal import Journal
from stf_jax.search.runner import journal_path, search
from tests.stf_jax.train.conftest import build_dataset

LAYERS, SAMPLES = 4, 3


@pytest.fixture(scope="module")
def native(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-1.5 over the reference's tower and language model, with more layers."""
    folder = tmp_path_factory.mktemp("deeper")
    deep = folder / "vicuna"
    deep.mkdir()
    for file in (reference / "vicuna").iterdir():
        if file.suffix != ".safetensors":
            (deep / file.name).write_bytes(file.read_bytes())
    tensors = load_file(reference / "vicuna" / "model.safetensors")
    config = json.loads((deep / "config.json").read_text())
    (deep / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    rng = np.random.default_rng(0)
    for name in [name for name in tensors if ".layers.0." in name]:
        for layer in range(config["num_hidden_layers"], LAYERS):
            tensor = tensors[name] * (1 + 0.3 * rng.standard_normal(tensors[name].shape))
            # What is learned attends to something: a random model hardly does.
            tensors[name.replace(".layers.0.", f".layers.{layer}.")] = tensor.astype(np.float32)
    save_file(tensors, deep / "model.safetensors")
    import_checkpoint(deep, folder / "native", vision_tower=reference / "clip", system="llava")
    return folder / "native"


@pytest.fixture(scope="module")
def dataset(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_dataset(native, tmp_path_factory.mktemp("corpus"), examples=16, workers=0)


def test_from_weights_to_a_model_that_prunes(
    native: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the search says of next tokens is what the engine answers."""
    out = tmp_path / "found" / "schedule.yaml"
    arguments = ["--calibration", str(dataset), "--budget", "0.65", "--samples", str(SAMPLES)]
    assert main(["search", str(native), *arguments, "--rows", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    content = yaml.safe_load(out.read_text())
    counts = content["schedule"]
    assert 0.6 < content["share"] <= 0.65
    assert content["search"] == "P-Sigmoid, budget 0.65"
    assert "% of the tokens on average" in said
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"

    fields = read_fields([f"schedule=@{out}"])
    assert fields == {"schedule": counts}
    prompts = read_prompts(dataset, load_processors(native), template="v1", samples=SAMPLES)
    assert len(prompts) == SAMPLES

    def next_tokens(**how: Any) -> np.ndarray:
        network = stf_jax.load(native, **how).network
        size, rows = network.config.image_size, len(prompts)
        batch = pad_prompts(prompts, rows=rows, image_size=size, uniform=True)
        return np.asarray(jax.jit(Llava.prefill)(network, batch)[0]).argmax(axis=1)

    # The search hides what a prefill leaves out.
    same = next_tokens() == next_tokens(system="gsearch", fields=fields)
    assert same.mean() == content["agreement"]


def test_a_search_continues_after_a_kill(native: Path, dataset: Path, tmp_path: Path) -> None:
    """With fewer rows, as for want of memory: nothing is measured twice, and the same is found."""
    rule, out = Rule(criterion="lambda", step=2, weight=0.0), tmp_path / "a.yaml"

    def stop(done: int, total: int) -> None:
        assert total == LAYERS - 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(native, dataset, out, rule=rule, samples=2, progress=stop)
    assert not out.exists()
    journal = journal_path(out)
    before = journal.read_text()
    # As a kill leaves it.
    journal.write_text(before + '{"counts": [16, 1')
    found = search(native, dataset, out, rule=rule, samples=2, rows=1)
    assert journal.read_text().startswith(before)
    other = tmp_path / "b.yaml"
    whole = search(native, dataset, other, rule=rule, samples=2)
    schedules = [yaml.safe_load(path.read_text())["schedule"] for path in (out, other)]
    assert schedules == [list(whole.counts)] * 2
    (first, *lines), (first_whole, *lines_whole) = map(read_lines, (journal, journal_path(other)))
    assert first == first_whole
    assert len(lines) == len(lines_whole) == whole.measured
    assert found.measured == len(lines) - (before.count("\n") - 1) > 0
    for line, expected in zip(lines, lines_whole, strict=True):
        assert line["counts"] == expected["counts"]
        assert line["agreement"] == expected["agreement"]
        assert line["cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=1e-5)


def read_lines(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()]


def test_another_model_or_other_prompts_have_another_fingerprint() -> None:
    def make(weight: float, dtype: Any, token: int, pixel: float) -> str:
        weights = nnx.State({"kernel": nnx.Param(jnp.full(3, weight, dtype))})
        pixels = np.full((1, 2, 2, 3), pixel, np.float32)
        return fingerprint(weights, [Prompt(ids=np.array([1, token], np.int32), pixels=pixels)])

    first = (0.0, jnp.float32, 5, 0.5)
    changed = [(1.0, *first[1:]), (0.0, jnp.bfloat16, 5, 0.5), (0.0, jnp.float32, 6, 0.5)]
    others = [*changed, (*first[:3], 0.25)]
    assert make(*first) == make(*first)
    assert len({make(*one) for one in (first, *others)}) == 5


def test_a_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    path, quality = tmp_path / "journal", Quality(agreement=1.0, cross_entropy=0.5)

    def measure(counts: Counts) -> Quality:
        calls.append(counts)
        return quality

    calls: list[Counts] = []
    for _ in range(2):
        with Journal(path, fingerprint="a", measure=measure) as journal:
            assert journal((4, 4, 2)) == quality
    assert calls == [(4, 4, 2)]
    other = "another dtype or other calibration prompts; give another --out, or delete it"
    with pytest.raises(ValueError, match=other):
        Journal(path, fingerprint="b", measure=measure)
    path.write_text('{"fingerprint": "a"}\n{"counts": 3}\n')
    with pytest.raises(ValueError, match="no journal of a search; give another --out"):
        Journal(path, fingerprint="a", measure=measure)


def test_refusals(
    reference: Path, native: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "schedule.yaml"

    def refused(*arguments: str, model: Path = native) -> str:
        call = ["search", str(model), "--calibration", str(dataset), "--out", str(out)]
        assert main([*call, *arguments]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "a schedule is for LLaVA-1.5" in refused(model=reference / "llava-stf")
    assert "--step is for G-Search" in refused("--budget", "0.5", "--step", "8")
    assert "ends in .yaml" in refused("--out", str(tmp_path / "schedule"))
    assert "samples is 0" in refused("--samples", "0")
    assert "rows is 0" in refused("--rows", "0")
    assert "the first 2 of 4 layers keep all tokens" in refused("--budget", "0.3", "--samples", "1")
    assert "no such folder" in refused("--calibration", str(tmp_path / "nothing"))
    for text, message in (("schedule: [1", "is no YAML"), ("counts: [1]", "has no key 'schedule'")):
        out.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_fields([f"schedule=@{out}"])
