"""`stf-jax generate`: one question to a model."""

import argparse
import dataclasses
import json
import sys

from stf_jax.cli.verbs import (
    FLOATS,
    Verbs,
    add_allow_urls,
    add_clip_options,
    add_model_options,
    add_verb,
    check_output,
    path,
    read_fields,
)


def add_generate(verbs: Verbs) -> None:
    """Adds the verb."""
    from stf_jax.data.templates import TEMPLATES

    parser = add_verb(verbs, "generate", _generate, "ask a model about images")
    parser.add_argument(
        "model",
        metavar="MODEL",
        type=path,
        help="a native checkpoint, a PyTorch directory or a run's",
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        type=path,
        help="an image; may be given several times",
    )
    parser.add_argument(
        "--clip",
        action="append",
        default=[],
        metavar="PATH",
        type=path,
        help="a video file, or a folder of its frames; may be given several times",
    )
    add_clip_options(parser)
    parser.add_argument(
        "--timestamps", action="store_true", help="say in the prompt when the frames are"
    )
    add_allow_urls(parser)
    parser.add_argument(
        "--save-images",
        metavar="FILE",
        type=path,
        help="keep there what the model has computed of the images, for --saved-images",
    )
    parser.add_argument(
        "--saved-images",
        metavar="FILE",
        type=path,
        help="the images that --save-images has kept, in place of --image",
    )
    parser.add_argument(
        "--prompt",
        required=True,
        metavar="TEXT",
        help="the question; <image> and <video> mark where images and clips stand (first)",
    )
    parser.add_argument(
        "--template",
        default="v1",
        metavar="NAME",
        help=f"form of the prompt: {', '.join(sorted(TEMPLATES))} (v1)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="(512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="(1)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is all tokens (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="a text that ends the answer; may be given several times",
    )
    parser.add_argument("--dtype", choices=FLOATS, help="(float32 on CPU, else bfloat16)")
    add_model_options(parser)
    parser.add_argument(
        "--json", action="store_true", help="one object with text, token ids, counts"
    )


def _generate(options: argparse.Namespace) -> None:
    from stf_jax.data.clips import FrameSampling
    from stf_jax.infer.load import load
    from stf_jax.infer.model import Request
    from stf_jax.infer.sampling import Sampling

    check_output()
    sampling = Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )
    if sampling.temperature == 0 and (sampling.top_p < 1 or sampling.top_k > 0):
        raise ValueError(
            "--top-p and --top-k do nothing at temperature 0, which is greedy; "
            "add --temperature 1, or leave them out"
        )
    if options.saved_images is not None and (options.image or options.save_images is not None):
        raise ValueError("--saved-images stands for the images; leave out --image, --save-images")
    model = load(
        options.model,
        dtype=options.dtype,
        vision_tower=options.vision_tower,
        system=options.system,
        fields=read_fields(options.field),
    )

    images = options.image
    if options.saved_images is not None:
        images = model.load_images(options.saved_images)
    elif options.save_images is not None:
        images = model.encode_images(
            options.image,
            template=options.template,
            allow_urls=options.allow_urls,
            tokens=options.tokens,
        )
        images.save(options.save_images)

    def show(index: int, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    (answer,) = model.generate(
        [
            Request(
                prompt=options.prompt,
                images=images,
                clips=options.clip,
                sampling=FrameSampling(frames=options.frames, rate=options.rate),
                timestamps=options.timestamps,
            )
        ],
        template=options.template,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        stop=options.stop,
        allow_urls=options.allow_urls,
        tokens=options.tokens,
        on_text=None if options.json else show,
    )
    if options.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(answer), ensure_ascii=False))
    sys.stdout.write("\n")
