"""Models for lmms-eval, which finds them by entry point: `--model stf_jax --model_args path=DIR`.

It poses questions its own way, so that scores differ from those of `stf-jax eval`. Written for its
version 0.7; nothing else imports this file.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from stf_jax.data.templates import IMAGE_MARKER
from stf_jax.infer.load import load
from stf_jax.infer.model import Request
from stf_jax.infer.sampling import GREEDY, Sampling

# Images of so many questions are in memory at a time.
_CHUNK = 256


def manifest() -> ModelManifest:
    """What the entry point gives to lmms-eval."""
    return ModelManifest(model_id="stf_jax", simple_class_path="stf_jax.eval.lmms.StfJax")


class StfJax(lmms):
    """A model of `stf_jax.load` on one device, with the engine behind it.

    Args:
      path: as `stf_jax.load` takes it.
      dtype: likewise.
      vision_tower: likewise.
      template: the form of the prompt.
      batch_size: answers in the making at a time.
      device: ignored; JAX has chosen one.
    """

    is_simple = True

    def __init__(
        self,
        path: str,
        dtype: Any = None,
        vision_tower: str | None = None,
        template: str = "v1",
        batch_size: int | str = 16,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self._model = load(path, dtype=dtype, vision_tower=vision_tower)
        self._template, self._slots = template, int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer to each request, in their order."""
        answers: dict[int, str] = {}
        alike = defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(sorted(request.args[1].items()))].append(number)
        for numbers in alike.values():
            for start in range(0, len(numbers), _CHUNK):
                chunk = numbers[start : start + _CHUNK]
                options = _options(requests[chunk[0]].args[1])
                prompts = [self._request(requests[number]) for number in chunk]
                generated = self._model.generate(
                    prompts, template=self._template, slots=self._slots, **options
                )
                answers |= dict(zip(chunk, (answer.text for answer in generated), strict=True))
        return [answers[number] for number in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("stf_jax answers tasks of one round; leave such tasks out")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not supported."""
        raise NotImplementedError("stf_jax generates only; choose tasks of generate_until")

    def _request(self, request: Any) -> Request:
        context, _, visuals_of, document, task, split = request.args
        images = list(visuals_of(self.task_dict[task][split][document]) or ())
        # Where marks and images do not match, the images come first.
        if context.count(IMAGE_MARKER) != len(images):
            context = context.replace(IMAGE_MARKER, "")
        return Request(prompt=context, images=images)


def _options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Our options for generation arguments of `transformers`."""
    sampled = arguments.get("do_sample", True) and (arguments.get("temperature") or 0) > 0
    sampling = GREEDY
    if sampled:
        sampling = Sampling(
            temperature=arguments["temperature"],
            top_p=arguments.get("top_p") or 1.0,
            top_k=arguments.get("top_k") or 0,
        )
    return {
        "sampling": sampling,
        "max_new_tokens": arguments.get("max_new_tokens", 1024),
        "stop": arguments.get("until", ()),
    }
