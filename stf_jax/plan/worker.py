"""The compiler's process: `python -m stf_jax.plan.worker` reads a request and writes a plan.

A process of its own, since JAX must have been told before it starts that there is no TPU, and since
the compiler writes to stderr whatever it likes.
"""

import json
import sys
from typing import Any

from stf_jax.infer.config import is_inference
from stf_jax.plan.compiler import make_plan
from stf_jax.plan.inference import make_inference_plan
from stf_jax.plan.request import Request


def main() -> None:
    """A `Request` on stdin, {"plan": ...}, {"inference": ...} or {"error": ...} on stdout."""
    request = Request(**json.load(sys.stdin))
    answer: dict[str, Any]
    try:
        if is_inference(request.config):
            answer = {"inference": make_inference_plan(request).to_json()}
        else:
            answer = {"plan": make_plan(request).to_json()}
    except ValueError as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
