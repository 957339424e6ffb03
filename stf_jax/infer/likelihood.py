"""How likely replies are, as the devices compute it: questions once, then each of their replies.

Every shape is a bucket, so calling again with the same shapes compiles nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from stf_jax.infer.program import Program
from stf_jax.models.cache import KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuations:
    """Tokens that continue rows of a cache; those of several may continue the same row.

    Attributes:
        ids: padded on the right.
        lengths: without the padding; 1 or more.
        rows: of the cache.
        starts: the slot of the first token, in a row that holds everything.
    """

    ids: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    rows: Int[Array, "B"]
    starts: Int[Array, "B"]


class Likelihood:
    """Compiled functions over a model's program."""

    def __init__(self, program: Program):
        self._program = program
        self._ask = jax.jit(self._read_questions)
        self._score = jax.jit(self._score_replies)

    def ask(
        self, prefixes: KVCache, questions: Continuations
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Log-probabilities of a reply's first token, and the cache behind the questions."""
        return self._call(self._ask, prefixes, questions)

    def score(
        self, first: Float[Array, "_ V"], questions: KVCache, replies: Continuations
    ) -> Float[np.ndarray, "B"]:
        """The log-probability of each reply, in nats.

        Args:
            first: from `ask`.
            questions: the cache from `ask`.
            replies: to the questions whose rows they name.
        """
        return np.asarray(self._call(self._score, first, questions, replies))

    def _call(self, function: jax.stages.Wrapped, *arguments: PyTree) -> PyTree:
        *caches, rows = arguments
        program = self._program
        with program._on_mesh():
            return function(program.weights, *caches, program._place(rows))

    def _continue(
        self, parameters: PyTree, cache: KVCache, rows: Continuations
    ) -> tuple[Float[Array, "B T H"], KVCache]:
        rules = self._program._rules
        own = cache.rows(rows.rows, spec=rules.cache, marks=rules.tokens).grow(rows.ids.shape[1])
        return self._program._model(parameters).read(
            rows.ids, start=rows.starts, lengths=rows.lengths, cache=own
        )

    def _read_questions(
        self, parameters: PyTree, prefixes: KVCache, questions: Continuations
    ) -> tuple[Float[Array, "B V"], KVCache]:
        hidden, cache = self._continue(parameters, prefixes, questions)
        last = jnp.take_along_axis(hidden, (questions.lengths - 1)[:, None, None], axis=1)
        logits = self._program._model(parameters).text.logits(last)[:, 0]
        return jax.nn.log_softmax(logits), cache

    def _score_replies(
        self,
        parameters: PyTree,
        first: Float[Array, "_ V"],
        questions: KVCache,
        replies: Continuations,
    ) -> Float[Array, "B"]:
        # What a token predicts is the next one: the last token of a reply predicts nothing.
        hidden, _ = self._continue(
            parameters, questions, dataclasses.replace(replies, ids=replies.ids[:, :-1])
        )
        logits = self._program._model(parameters).text.logits(hidden)
        later = jax.nn.log_softmax(logits)
        following = jnp.take_along_axis(later, replies.ids[:, 1:, None], axis=-1)[..., 0]
        counted = jnp.arange(1, replies.ids.shape[1]) < replies.lengths[:, None]
        return first[replies.rows, replies.ids[:, 0]] + jnp.where(counted, following, 0).sum(axis=1)
