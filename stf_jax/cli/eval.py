"""The verb `stf-jax eval`."""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stf_jax.cli.train import add_hosts
from stf_jax.cli.verbs import (
    FLOATS,
    Verbs,
    add_clip_options,
    add_model_options,
    add_verb,
    path,
    read_fields,
)

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from stf_jax.eval.questions import Answerer
    from stf_jax.eval.runner import Result
    from stf_jax.infer.config import InferenceConfig
    from stf_jax.parallel.mesh import MeshConfig

# Other than those of a mistake, so that a script can tell.
INCOMPLETE = 3

_ALL, _LOSS = "all", "loss"


def add_eval(verbs: Verbs) -> None:
    """Adds `eval`."""
    parser = add_verb(
        verbs, "eval", _eval, "the paper's nine benchmarks, or a loss on held-out data"
    )
    parser.epilog = (
        f"Exit status: 0 if every question has an answer, {INCOMPLETE} if not. "
        "An evaluation that was stopped continues when it is called again."
    )
    parser.add_argument(
        "benchmark",
        metavar="BENCHMARK",
        help="vqav2, gqa, vizwiz, scienceqa, textvqa, pope, mme, mmbench, mmbench-cn or all; "
        "nextqa, about clips; or "
        "loss, the mean over the supervised tokens of a dataset",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        type=path,
        nargs="?",
        help="a native checkpoint or a PyTorch directory",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        type=lambda text: Path(path(text)),
        help="where LLaVA's Evaluation.md puts the benchmarks: playground/data/eval; for loss, "
        "a folder made by stf-jax data build",
    )
    parser.add_argument(
        "--path",
        metavar="ROLE=PATH",
        action="append",
        default=[],
        help="a file or folder that lies elsewhere, such as images=DIR; may be given several times",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=lambda text: Path(path(text)),
        help="results, in a folder for each benchmark",
    )
    parser.add_argument(
        "--answers",
        metavar="FILE",
        type=lambda text: Path(path(text)),
        help="score this answer file; no model is needed",
    )
    parser.add_argument(
        "--server",
        metavar="URL",
        help="ask a server with OpenAI's API, such as http://127.0.0.1:8000/v1; MODEL is then its "
        "name there (the first)",
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("STF_JAX_API_KEY"),
        metavar="KEY",
        help="for --server (STF_JAX_API_KEY, or none)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions (all)")
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=lambda text: Path(path(text)),
        help="slots, mesh and dtypes, as configs/stf-7b-inference.yaml; the options below go first",
    )
    parser.add_argument(
        "--slots", type=int, metavar="N", help="answers in the making at a time (16)"
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="devices of this host to use: data, fsdp and tensor, such as data=2,tensor=4 (one)",
    )
    parser.add_argument(
        "--cache-dtype", choices=("bfloat16", "int8"), help="of keys and values (as computed)"
    )
    parser.add_argument("--dtype", choices=FLOATS, help="(float32 on CPU, else bfloat16)")
    add_model_options(parser)
    add_clip_options(parser)
    parser.add_argument(
        "--template", metavar="NAME", help="for loss: form of the conversations (the run's, or v1)"
    )
    add_hosts(parser)
    parser.add_argument("--json", action="store_true", help="one object a benchmark")


def _eval(options: argparse.Namespace) -> int:
    from stf_jax.eval.report import render

    if options.benchmark == _LOSS:
        return _eval_loss(options)
    if options.template is not None:
        raise ValueError("--template is for loss alone: a benchmark has its own, the reference's")
    results = _score(options) if options.answers else _ask(options)
    if options.json:
        lines = [json.dumps(result.to_json(), ensure_ascii=False) for result in results]
        text = "\n".join(lines)
    else:
        text = render(results)
    if results:
        sys.stdout.write(f"{text}\n")
    return INCOMPLETE if any(result.score.missing for result in results) else 0


def _eval_loss(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from stf_jax.eval.loss import held_out_loss

    if options.model is None or options.data is None:
        raise ValueError("give MODEL and --data DIR, a folder made by 'stf-jax data build'")
    for name in (
        "path",
        "out",
        "answers",
        "server",
        "limit",
        "slots",
        "cache_dtype",
        "coordinator",
        "tokens",
    ):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} means nothing for loss; leave it out")
    config = _config(options)
    result = held_out_loss(
        options.model,
        options.data,
        template=options.template,
        mesh=_make_mesh(config.mesh),
        dtype=config.dtype,
        vision_tower=options.vision_tower,
        system=options.system,
        fields=read_fields(options.field),
    )
    sys.stdout.write(f"{json.dumps(asdict(result)) if options.json else result}\n")
    return 0


def _score(options: argparse.Namespace) -> "list[Result]":
    from stf_jax.eval.registry import get_benchmark
    from stf_jax.eval.runner import score_file

    if options.model is not None:
        raise ValueError("an answer file needs no model; leave out MODEL or --answers")
    if options.benchmark == _ALL:
        raise ValueError("an answer file is one benchmark's; name it in the place of 'all'")
    benchmark = get_benchmark(options.benchmark)
    return [
        score_file(
            benchmark,
            options.answers,
            data=options.data,
            paths=_paths(options),
            out=options.out and options.out / benchmark.name,
            limit=options.limit,
        )
    ]


def _ask(options: argparse.Namespace) -> "list[Result]":
    from etils import epath

    from stf_jax.eval.evaluate import choose, prepare_all
    from stf_jax.eval.hosts import JaxHosts
    from stf_jax.eval.runner import ask_together
    from stf_jax.parallel import hosts as distributed
    from stf_jax.util.errors import missing
    from stf_jax.util.progress import count_progress, unwound_by_sigterm

    if (options.model is None and options.server is None) or options.out is None:
        raise ValueError("give MODEL and --out to ask a model, or --answers FILE to score a file")
    chosen = choose(options.benchmark, _paths(options))
    config = _config(options)
    if options.server is None and not epath.Path(options.model).exists():
        raise missing(options.model)
    if options.out.is_file():
        raise ValueError(f"{options.out} is a file; give --out a folder")
    # All of them before the model is loaded: nobody wants to hear of a missing file after hours.
    prepared = prepare_all(chosen, data=options.data, paths=_paths(options), limit=options.limit)
    distributed.start(
        options.coordinator, options.processes, options.process, timeout=options.host_timeout
    )
    answerer, hosts = _answerer(options, config), JaxHosts()
    results = []
    for ready in prepared:
        with unwound_by_sigterm(), count_progress(ready.benchmark.title) as progress:
            out = options.out / ready.benchmark.name
            results.append(ask_together(ready, answerer, out=out, progress=progress, hosts=hosts))
    return [result for result in results if result is not None]


def _answerer(options: argparse.Namespace, config: "InferenceConfig") -> "Answerer":
    import jax

    from stf_jax.data.clips import FrameSampling
    from stf_jax.eval.generation import ModelAnswerer
    from stf_jax.eval.server import ServerAnswerer
    from stf_jax.infer.load import load

    if options.server is not None:
        given = {
            name: getattr(options, name)
            for name in ("mesh", "cache_dtype", "dtype", "vision_tower", "system", "tokens")
        }
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"--{name.replace('_', '-')} is the server's; leave it out")
        return ServerAnswerer(
            options.server, model=options.model, key=options.api_key, slots=config.slots
        )
    dtype: Any = config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    model = load(
        options.model,
        dtype=dtype,
        mesh=_make_mesh(config.mesh),
        vision_tower=options.vision_tower,
        system=options.system,
        fields=read_fields(options.field),
        cache_dtype=config.cache_dtype,
    )
    return ModelAnswerer(
        model,
        model_id=Path(options.model).name,
        slots=config.slots,
        tokens=config.tokens,
        sampling=FrameSampling(frames=options.frames, rate=options.rate),
        dtype=dtype,
    )


def _make_mesh(config: "MeshConfig | None") -> "Mesh | None":
    import jax

    from stf_jax.parallel.sharding import make_mesh

    if config is None:
        return None
    # Each host has its own.
    devices = jax.local_devices()
    return make_mesh(devices=devices, **config.sizes(len(devices)))


def _config(options: argparse.Namespace) -> "InferenceConfig":
    """The settings of the config; options win over them."""
    from stf_jax.infer.config import InferenceConfig

    config = InferenceConfig.load(options.config) if options.config else InferenceConfig()
    given = {
        "tokens": options.tokens,
        "slots": options.slots,
        "dtype": options.dtype,
        "cache_dtype": options.cache_dtype,
        "mesh": _mesh(options.mesh),
    }
    return replace(config, **{name: value for name, value in given.items() if value is not None})


def _mesh(text: str | None) -> "MeshConfig | None":
    """The mesh that `--mesh` describes."""
    if text is None:
        return None
    from stf_jax.parallel.mesh import MeshConfig
    from stf_jax.parallel.sharding import AXES

    axes = dict(part.partition("=")[::2] for part in text.split(","))
    if not set(axes) <= set(AXES) or not all(size.isdecimal() for size in axes.values()):
        raise ValueError(f"--mesh is {text!r}; write it as {AXES[0]}=2,{AXES[-1]}=4")
    return MeshConfig(**{"fsdp": 1} | {name: int(size) for name, size in axes.items()})


def _paths(options: argparse.Namespace) -> dict[str, Path]:
    paths = {}
    for text in options.path:
        role, equals, name = text.partition("=")
        if not (role and equals and name):
            raise ValueError(f"--path is {text!r}; write it as ROLE=PATH, such as images=DIR")
        paths[role] = Path(path(name))
    return paths
