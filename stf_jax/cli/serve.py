"""The verb `stf-jax serve`."""

import argparse
import os
from pathlib import Path

from stf_jax.cli.verbs import FLOATS, Verbs, add_field, add_verb, path, read_fields


def add_serve(verbs: Verbs) -> None:
    """Adds `serve`."""
    parser = add_verb(verbs, "serve", _serve, "answer over HTTP, as OpenAI's API does")
    parser.add_argument("model", metavar="MODEL", type=path, help="as for generate")
    parser.add_argument("--name", help="of the model, for clients (its directory's)")
    parser.add_argument("--host", default="127.0.0.1", help="to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 is any free one (8000)")
    parser.add_argument("--template", default="v1", metavar="NAME", help="(v1)")
    parser.add_argument("--slots", type=int, default=16, metavar="N", help="answers at a time (16)")
    parser.add_argument(
        "--context", type=int, metavar="N", help="positions of a request and its answer (2048)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="(512)")
    parser.add_argument(
        "--prefixes", type=int, default=32, metavar="N", help="whose cache is kept (32)"
    )
    parser.add_argument(
        "--prefix-context",
        type=int,
        metavar="N",
        help="positions of a prefix, which is the system text and all images (two images and 128)",
    )
    parser.add_argument(
        "--queue", type=int, default=256, metavar="N", help="requests that may wait (256)"
    )
    parser.add_argument(
        "--allow-domain",
        action="append",
        default=[],
        metavar="HOST",
        help="from which images may be fetched; may be given several times (none)",
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("STF_JAX_API_KEY"),
        metavar="KEY",
        help="that clients must send (STF_JAX_API_KEY, or none)",
    )
    parser.add_argument(
        "--images", type=int, default=16, metavar="N", help="of a request at most (16)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=(),
        metavar="K",
        help="of an image, that requests may ask for; each is a model of its own, NAME@K (all)",
    )
    parser.add_argument(
        "--warm-question",
        type=int,
        metavar="N",
        help="the most tokens behind the last image that the warm-up compiles for (--context)",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that answers have to end in when the server stops (30)",
    )
    parser.add_argument("--dtype", choices=FLOATS, help="(float32 on CPU, else bfloat16)")
    parser.add_argument("--cache-dtype", choices=("bfloat16", "int8"), help="(as --dtype)")
    parser.add_argument(
        "--vision-tower", metavar="DIR", type=path, help="CLIP, for a PyTorch directory"
    )
    parser.add_argument("--system", metavar="NAME", help="another system over the same weights")
    add_field(parser)


def _serve(options: argparse.Namespace) -> None:
    try:
        from stf_jax.serve.server import ServeConfig, serve
    except ImportError as error:
        raise ValueError(f"serve needs {error.name}: pip install 'stf-jax[serve]'") from error
    from stf_jax.infer.load import load

    config = ServeConfig(
        name=options.name or Path(options.model).name or "model",
        host=options.host,
        port=options.port,
        template=options.template,
        slots=options.slots,
        context=options.context,
        max_new_tokens=options.max_new_tokens,
        prefixes=options.prefixes,
        prefix_context=options.prefix_context,
        queue=options.queue,
        domains=tuple(options.allow_domain),
        api_key=options.api_key,
        images=options.images,
        tokens=tuple(options.tokens),
        warm_question=options.warm_question,
        grace=options.grace,
    )
    serve(
        lambda: load(
            options.model,
            dtype=options.dtype,
            vision_tower=options.vision_tower,
            cache_dtype=options.cache_dtype,
            system=options.system,
            fields=read_fields(options.field),
        ),
        config,
    )
