"""The protocol: the conditions of an evaluation, without which a score compares with nothing."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stf_jax.data.conversation import render_prompt
from stf_jax.data.templates import get_template
from stf_jax.eval.benchmark import Benchmark, Paths
from stf_jax.eval.questions import Answerer, Question
from stf_jax.util.files import read_json, sha256, write_json

NAME = "protocol.json"

# Other harnesses leave OCR tokens out, or have other system texts or limits (docs/evaluation.md).
_PACKAGES = ("stf-jax", "jax", "jaxlib", "flax", "numpy", "pillow", "sentencepiece", "transformers")


def describe(
    benchmark: Benchmark, paths: Paths, first: Question, answerer: Answerer
) -> dict[str, Any]:
    """The protocol of a run, for JSON: prompt, decoding, model, question files, versions.

    The `first` question stands in it as the model gets it, with system text and suffix.
    """
    decoding = benchmark.decoding
    prompt = render_prompt(first.prompt, template=get_template(decoding.template))
    return {
        "benchmark": benchmark.name,
        "follows": benchmark.follows,
        "template": decoding.template,
        "first_prompt": prompt.text,
        "decoding": {"method": "greedy", "max_new_tokens": decoding.max_new_tokens},
        "model": {"model_id": answerer.model_id, **answerer.describe()},
        "files": hashes({role: paths[role] for role in benchmark.to_ask if paths[role].is_file()}),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def hashes(paths: Paths) -> dict[str, dict[str, str]]:
    """Name and SHA-256 of each file, by role."""
    return {role: {"name": path.name, "sha256": sha256(path)} for role, path in paths.items()}


def settle(folder: Path, protocol: Mapping[str, Any]) -> None:
    """Stores the protocol of a folder's answers; one that is stored already must be the same.

    Raises:
      ValueError: the folder's answers were given under another protocol; says what differs. Or
        nobody knows under which.
    """
    path = folder / NAME
    if not path.exists():
        files = [file for file in sorted(folder.glob("answers*.jsonl")) if file.stat().st_size]
        if files:
            raise ValueError(
                f"{files[0]}: there is no {NAME} that says who answered, and how; score it as it "
                "is with --answers, or give another --out"
            )
        write_json(path, protocol, indent=2)
        return
    stored = read_json(path)
    if different := _differences(stored, protocol):
        raise ValueError(
            f"{path}: the answers there were given under another protocol "
            f"({'; '.join(different)}); give another --out, or delete that folder to ask again"
        )


def mark(protocol: Mapping[str, Any]) -> str:
    """A few letters that stand for a protocol."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]


def _differences(stored: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(stored, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*stored, *now])
        pairs = ((key, stored.get(key), now.get(key)) for key in keys)
        return [
            line
            for key, first, second in pairs
            for line in _differences(first, second, f"{name}.{key}" if name else key)
        ]
    return [] if stored == now else [f"{name} {stored!r:.200}, now {now!r:.200}"]


def read_protocol(answers: Path) -> dict[str, Any] | None:
    """The protocol of an answer file; None if it came without, as the reference's do."""
    path = answers.with_name(NAME)
    return read_json(path) if path.exists() else None
