"""Training programs that a process of the tests traces and compiles once."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from stf_jax.train import loop
from stf_jax.train.config import TrainConfig
from stf_jax.train.program import TrainProgram, make_program

# A step does not depend on these: where its files lie, and what the loop around it does.
_OUTSIDE = ("model", "out", "epochs", "checkpoint", "log_every", "nonfinite", "profile")


def _key(config: TrainConfig, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    tree = {name: value for name, value in config.to_dict().items() if name not in _OUTSIDE}
    tree["data"] = {name: value for name, value in tree["data"].items() if name != "datasets"}
    del tree["validation"]
    return json.dumps(tree, sort_keys=True) + repr((arguments, sorted(options.items())))


def share_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of `train` with equal steps take one program; `monkeypatch` ends that."""
    programs: dict[str, TrainProgram] = {}
    compiled: dict[tuple[str, int], Any] = {}

    def make(config: TrainConfig, *arguments: Any, **options: Any) -> TrainProgram:
        key = _key(config, arguments, options)
        if key not in programs:
            programs[key] = make_program(config, *arguments, **options)
        return programs[key]

    def once(name: str) -> Callable[[TrainProgram], Any]:
        compile_it = getattr(TrainProgram, name)

        def get(program: TrainProgram) -> Any:
            # `programs` keeps it, so that no other has its number.
            key = name, id(program)
            if key not in compiled:
                compiled[key] = compile_it(program)
            return compiled[key]

        return get

    monkeypatch.setattr(loop, "make_program", make)
    for name in ("compile", "compile_loss"):
        monkeypatch.setattr(TrainProgram, name, once(name))
