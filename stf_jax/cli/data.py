"""The verbs `stf-jax data check`, `build` and `show`."""

import argparse
import dataclasses
import json
import sys
from typing import Any

from stf_jax.cli.verbs import Verbs, add_clip_options, add_verb, path

# Other than those of a mistake, so that a script can tell.
NOT_CLEAN = 3

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"


def add_data(verbs: Verbs) -> None:
    """Adds `data` and its actions."""
    summary = "LLaVA's JSON and a folder of images, verified and made a dataset"
    data = verbs.add_parser("data", help=summary, description=summary)
    actions = data.add_subparsers(required=True, metavar="check|build|show")

    parser = add_verb(actions, "check", _check, "is this training data fit to train on?")
    parser.epilog = f"Exit status: 0 if every example is fit, {NOT_CLEAN} if not."
    _add_files(parser)
    _add_model(parser)
    _add_work(parser)

    parser = add_verb(actions, "build", _build, "write what is fit to train on as a TFDS dataset")
    parser.epilog = "A command that was stopped continues when it is called again."
    _add_files(parser)
    parser.add_argument("out", metavar="OUT", type=path, help="the folder to make")
    _add_model(parser)
    _add_work(parser)

    parser = add_verb(actions, "show", _show, "one example as the model will meet it")
    parser.add_argument(
        "dataset", metavar="DATASET", type=path, help="made by 'stf-jax data build'"
    )
    parser.add_argument("example", metavar="EXAMPLE", help="its id, or its place from 0")
    _add_model(parser)
    parser.add_argument("--strict-labels", action="store_true", help="the PyTorch reference's")
    parser.add_argument(
        "--png", metavar="FILE", type=path, help="to write what the vision tower will see"
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", type=path, help="LLaVA's JSON, or JSON lines"
    )
    parser.add_argument(
        "--images", metavar="DIR", type=path, help="where the paths of images and clips start"
    )
    add_clip_options(parser)
    parser.add_argument(
        "--timestamps", action="store_true", help="say in the question when a clip's frames are"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        type=path,
        help="a native checkpoint or a PyTorch directory, for its tokenizer and image processor",
    )
    parser.add_argument(
        "--vision-tower", metavar="DIR", type=path, help="CLIP, for a PyTorch directory"
    )
    parser.add_argument(
        "--template", default="v1", metavar="NAME", help="form of the conversations (v1)"
    )
    parser.add_argument(
        "--image-mode",
        choices=("pad", "crop"),
        help="what makes an image square (as the model's config says)",
    )
    parser.add_argument(
        "--sequence-length", type=int, default=2048, metavar="N", help="longer is cut (2048)"
    )
    parser.add_argument("--json", action="store_true", help="one object with everything found")


def _add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="processes (one a processor)")


def _check(options: argparse.Namespace) -> int:
    from stf_jax.data.validator import check
    from stf_jax.util.progress import count_progress, unwound_by_sigterm

    with unwound_by_sigterm(), count_progress("Checking") as progress:
        report = check(
            options.files,
            images=options.images,
            workers=options.workers,
            progress=progress,
            **_clips(options),
            **_model(options),
        )
    _write(report.render(), report.to_json(), options)
    return 0 if report.clean else NOT_CLEAN


def _build(options: argparse.Namespace) -> None:
    from stf_jax.data.builder import build
    from stf_jax.util.disk import explain_full_disk
    from stf_jax.util.progress import count_progress, unwound_by_sigterm

    with (
        explain_full_disk(options.out),
        unwound_by_sigterm(),
        count_progress("Building") as progress,
    ):
        report = build(
            options.files,
            options.out,
            images=options.images,
            workers=options.workers,
            progress=progress,
            **_clips(options),
            **_model(options),
        )
    _write(report.render(), report.to_json(), options)


def _show(options: argparse.Namespace) -> None:
    from stf_jax.data.show import show

    shown = show(
        options.dataset,
        options.example,
        strict_labels=options.strict_labels,
        png=options.png,
        **_model(options),
    )
    marks = {"start": _GREEN, "end": _PLAIN} if sys.stdout.isatty() else {}
    _write(shown.render(**marks), shown.to_json(), options)


def _clips(options: argparse.Namespace) -> dict[str, Any]:
    from stf_jax.data.clips import FrameSampling

    sampling = FrameSampling(frames=options.frames, rate=options.rate)
    return {"sampling": sampling, "timestamps": options.timestamps}


def _model(options: argparse.Namespace) -> dict[str, Any]:
    from stf_jax.convert.stored_model import load_processors

    processors = load_processors(options.model, vision_tower=options.vision_tower)
    image_processor = processors.image_processor
    if options.image_mode is not None:
        image_processor = dataclasses.replace(image_processor, mode=options.image_mode)
    return {
        "tokenizer": processors.tokenizer,
        "image_processor": image_processor,
        "tokens_per_image": processors.tokens_per_image,
        "template": options.template,
        "sequence_length": options.sequence_length,
    }


def _write(text: str, content: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        text = json.dumps(content, ensure_ascii=False)
    sys.stdout.write(f"{text}\n")
