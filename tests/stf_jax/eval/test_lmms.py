"""The adapter for lmms-eval, against the parts of its interface that it stands on."""

import dataclasses
import importlib
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import stf_jax


@dataclasses.dataclass
class Manifest:
    model_id: str
    simple_class_path: str


class Base:
    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imported with a stand-in for lmms-eval, which wants PyTorch and much else."""
    contents = {"api.model": {"lmms": Base}, "models.registry_v2": {"ModelManifest": Manifest}}
    for name in ("", ".api", ".models", *(f".{one}" for one in contents)):
        module = types.ModuleType(f"lmms_eval{name}")
        vars(module).update(contents.get(name[1:], {}))
        monkeypatch.setitem(sys.modules, f"lmms_eval{name}", module)
    yield importlib.import_module("stf_jax.eval.lmms")
    del sys.modules["stf_jax.eval.lmms"]


def test_entry_point(adapter: Any) -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    (entry,) = project["entry-points"]["lmms_eval.models"].values()
    module, _, name = entry.partition(":")
    manifest = getattr(importlib.import_module(module), name)()
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is adapter.StfJax
    assert issubclass(adapter.StfJax, Base)


def test_answers_are_those_of_generate(adapter: Any, reference: Path) -> None:
    images = [Image.open(reference / "images" / f"{n}.png") for n in (0, 1)]
    documents = [{"image": images[n % 2]} for n in range(3)] + [{"image": None}]
    model = adapter.StfJax(path=str(reference / "llava-stf"), batch_size="4")
    model.task_dict = {"task": {"test": documents}}

    def visuals_of(document: dict[str, Any]) -> list[Image.Image]:
        return [document["image"]] if document["image"] else []

    texts = ["What is this?", "<image>\nHow many?", "Why <image> <image>?", "And now?"]
    asked = [{"max_new_tokens": 5, "until": []}, {"max_new_tokens": 3, "do_sample": False}] * 2
    requests = [
        types.SimpleNamespace(args=(text, options, visuals_of, n, "task", "test"))
        for n, (text, options) in enumerate(zip(texts, asked, strict=True))
    ]
    actual = model.generate_until(requests)
    plain = ["What is this?", "How many?", "Why  ?", "And now?"]
    for n, text in enumerate(plain):
        request = stf_jax.Request(prompt=text, images=visuals_of(documents[n]))
        limit = asked[n]["max_new_tokens"]
        (answer,) = model._model.generate([request], max_new_tokens=limit)
        assert actual[n] == answer.text


def test_sampling(adapter: Any) -> None:
    asked = {"temperature": 0.7, "top_p": 0.9, "do_sample": True, "until": ["\n\n"]}
    options = adapter._options(asked)
    assert options["sampling"] == stf_jax.Sampling(temperature=0.7, top_p=0.9)
    assert options["stop"] == ["\n\n"]
    for greedy in ({"temperature": 0}, {"temperature": 0.7, "do_sample": False}, {}):
        assert adapter._options(greedy)["sampling"] == stf_jax.Sampling()


def test_nothing_else_imports_it() -> None:
    assert "lmms_eval" not in sys.modules
    assert "stf_jax.eval.lmms" not in sys.modules
