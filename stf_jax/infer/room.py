"""What a scheduler holds, and what it is given and gives."""

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from jaxtyping import Int

from stf_jax.infer.prompts import Prompt
from stf_jax.infer.sampling import Sampling
from stf_jax.models.cache import Split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """What a scheduler has the devices hold, which is fixed as long as it lives.

    Attributes:
        slots: answers in the making at a time.
        rows: prefixes or questions that go into one call.
        contexts: positions of a slot, by group of layers.
        new: tokens of an answer.
        kept: prefixes in the pool, `rows` or more.
        prefixes: positions of a prefix, by group of layers.
        is_coarse: whether lengths double from one size to the next, so that few programs serve all.
    """

    slots: int
    rows: int
    contexts: tuple[int, ...]
    new: int
    kept: int
    prefixes: tuple[int, ...]
    is_coarse: bool = False


class Ticket:
    """A request on its way to its answer.

    Attributes:
        prompt: what is asked.
        sampling: how tokens are chosen.
        most: tokens of the answer.
        reused: positions whose cache was there already when it came in.
        ids: the answer so far.
        finished: whether nothing more comes.
        error: why there is no answer, if an image cannot be used.
    """

    def __init__(self, prompt: Prompt, split: Split, *, sampling: Sampling, most: int, key: object):
        self.prompt, self.split, self.key = prompt, split, key
        self.sampling, self.most = sampling, most
        self.reused = 0
        self.ids: list[int] = []
        self.finished = False
        self.error: Exception | None = None
        self.loading: Future[Prompt] | None = None

    def load(self, readers: ThreadPoolExecutor) -> Future[Prompt]:
        """Begins to read the images of its prefix, if that has not begun."""
        if self.loading is None:
            self.loading = readers.submit(self.prompt.until, self.split.prefilled)
        return self.loading


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a step brought to one answer."""

    ticket: Ticket
    ids: Int[np.ndarray, "new"]
