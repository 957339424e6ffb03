"""Calibration prompts, and how a model does on them under any schedule.

A prompt is a conversation of a dataset up to its first answer. One compiled program serves every
schedule: the numbers of tokens are its arguments, and what is dropped is hidden.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from stf_jax.data.batch import Batch
from stf_jax.data.dataset import Dataset, Stored
from stf_jax.data.encoding import encode_conversation
from stf_jax.data.fit import fit_template
from stf_jax.data.processors import Processors
from stf_jax.data.templates import Template
from stf_jax.data.tokenizer import IGNORED_LABEL, IMAGE_TOKEN_ID, expand_images
from stf_jax.infer.program import weights_checksum
from stf_jax.infer.prompts import Prompt, pad_prompts, read_pixels
from stf_jax.models.layers import unstack
from stf_jax.models.llama import take
from stf_jax.models.llava import Llava
from stf_jax.models.marks import Marks
from stf_jax.models.pruning import PrunedLlama
from stf_jax.search.algorithms import Counts, Quality
from stf_jax.systems.gsearch import WHOLE


def read_prompts(
    path: str | os.PathLike[str], processors: Processors, *, template: str, samples: int
) -> list[Prompt]:
    """So many prompts about one image each, from examples drawn by a fixed seed.

    Raises:
        DatasetError: no dataset, or a damaged one.
        ValueError: no example has one image and an answer.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; give 1 or more")
    dataset, form = Dataset(path), fit_template(template, processors.tokenizer)
    prompts: list[Prompt] = []
    for number in np.random.default_rng(0).permutation(len(dataset)).tolist():
        prompt = _read_prompt(dataset[number], processors, form)
        if prompt is not None:
            prompts.append(prompt)
        if len(prompts) == samples:
            break
    if not prompts:
        raise ValueError(f"{os.fspath(path)}: no example has one image and an answer; use another")
    # Those of a batch are padded to the longest.
    return sorted(prompts, key=lambda prompt: len(prompt.ids))


def _read_prompt(stored: Stored, processors: Processors, template: Template) -> Prompt | None:
    if len(stored.images) != 1:
        return None
    encoded = encode_conversation(
        processors.tokenizer, stored.conversation, template=template, num_images=1
    )
    answers = np.flatnonzero(encoded.labels != IGNORED_LABEL)
    ids = encoded.ids[: answers[0]] if len(answers) else encoded.ids[:0]
    # The text behind the image ranks its tokens.
    if IMAGE_TOKEN_ID not in ids[:-1]:
        return None
    tokens = processors.tokens_per_image
    return Prompt(
        ids=expand_images(ids, tokens_per_image=tokens),
        pixels=partial(read_pixels, stored.images, processors.image_processor, upright=False),
        budget=tokens,
    )


def fingerprint(weights: nnx.State, prompts: Sequence[Prompt]) -> str:
    """Tells weights, their dtypes, texts and images apart, however many are computed at a time."""
    digest = hashlib.sha256(weights_checksum(weights).encode())
    digest.update(str([leaf.dtype.name for leaf in jax.tree.leaves(weights)]).encode())
    for prompt in prompts:
        for array in (prompt.ids, prompt.load()):
            digest.update(str(array.shape).encode() + array.tobytes())
    return digest.hexdigest()[:16]


class Calibration:
    """A model and prompts; call it with the numbers of tokens by layer.

    Args:
        model: with a decoder that prunes; taken over: its stacked layers are taken apart.
        prompts: from `read_prompts`.
        rows: prompts at a time.
    """

    def __init__(self, model: Llava, prompts: Sequence[Prompt], *, rows: int):
        model.text.layers, model.vision.layers = (
            unstack(model.text.layers),
            unstack(model.vision.layers),
        )
        assert isinstance(model.text, PrunedLlama)
        self.tokens, self.layers = model.text.tokens, model.config.text.layers
        # A drop before each layer; how many tokens stay is an argument.
        model.text.schedule = tuple((layer, 0) for layer in range(WHOLE, self.layers))
        self._graph, self._state = nnx.split(model)
        self._run = jax.jit(self._logits)
        insert = jax.jit(lambda state, batch: nnx.merge(self._graph, state).insert(batch))
        # Images are encoded once.
        size = model.config.image_size
        self._batches: list[tuple[Float[Array, "B T H"], Marks, int]] = []
        for start in range(0, len(prompts), rows):
            some = prompts[start : start + rows]
            batch: Batch = pad_prompts(some, rows=rows, image_size=size, uniform=True)
            self._batches.append((*insert(self._state, batch), len(some)))
        self._targets: list[Int[np.ndarray, B]] | None = None
        self.dense = self((self.tokens,) * self.layers)
        #: Of the model and the prompts.
        self.fingerprint = fingerprint(self._state, prompts)

    def __call__(self, counts: Counts) -> Quality:
        """The first call, with all tokens, gives the tokens that are to be predicted."""
        numbers = np.array(counts[WHOLE:], np.int32)
        logits = [
            np.asarray(self._run(self._state, x, marks, numbers), np.float64)[:count]
            for x, marks, count in self._batches
        ]
        chosen = [some.argmax(axis=1) for some in logits]
        self._targets = targets = self._targets or chosen
        same, lost = [], []
        for some, found, target in zip(logits, chosen, targets, strict=True):
            same.append(found == target)
            highest = some.max(axis=1, keepdims=True)
            total = highest[:, 0] + np.log(np.exp(some - highest).sum(axis=1))
            lost.append(total - some[np.arange(len(target)), target])
        return Quality(
            agreement=float(np.concatenate(same).mean()),
            cross_entropy=float(np.concatenate(lost).mean()),
        )

    def _logits(
        self, state: nnx.State, x: Float[Array, "B T H"], marks: Marks, counts: Int[Array, "_"]
    ) -> Float[Array, "B V"]:
        """After each prompt."""
        decoder = nnx.merge(self._graph, state).text
        assert isinstance(decoder, PrunedLlama)
        last = (marks.segment > 0).sum(axis=1) - 1
        *_, stage = decoder.stages(x, marks, counts=counts, images=1)
        return decoder.logits(decoder.norm(take(stage.x, last))[:, None])[:, 0]
