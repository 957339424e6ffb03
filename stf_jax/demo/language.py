"""The small language model of the demo, and its pretraining: the language of the questions.

It takes the place of Vicuna: a decoder that can talk about scenes, and has never seen an image. In
pretraining, codes of the cells' contents take the place of vision tokens. The tables of codes are
thrown away afterwards. Some batches have a code for each cell, others one for each window of 2x2
cells, so the model learns to read either number of tokens.
"""

import dataclasses
import functools
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece
from flax import nnx
from jaxtyping import Array, Float, Int

from stf_jax.config.text import TextConfig
from stf_jax.data.batch import Batch
from stf_jax.data.encoding import encode_conversation, expand_conversation
from stf_jax.data.templates import get_template
from stf_jax.data.tokenizer import IGNORED_LABEL, IMAGE_TOKEN_ID, Tokenizer
from stf_jax.demo import scenes
from stf_jax.demo.scenes import CAPTIONS, GRID, KINDS, MOST, NAMES, Scene
from stf_jax.models.layers import Init
from stf_jax.models.llama import Llama
from stf_jax.models.llava import marks_of
from stf_jax.store.arrays import flatten, unflatten
from stf_jax.util.files import write_json

VOCABULARY = 544

TEXT = TextConfig(
    vocab_size=VOCABULARY, width=96, mlp_width=256, layers=4, heads=4, kv_heads=4, head_dim=24,
    max_positions=1024,
)  # fmt: skip


def write_tokenizer(folder: Path, *, seed: int = 0) -> None:
    """A sentencepiece model of LLaMA's kind, made of the text that the demo speaks."""
    rng = np.random.default_rng(seed)
    template = get_template("v1")
    sentences = [template.system]
    for _ in range(800):
        scene = Scene.draw(rng)
        sentences.append(scene.caption(rng))
        for question in scenes.questions(scene, rng, of_each=1):
            sentences.append(f"USER: {question.text} ASSISTANT: {question.answer}")
    sentences += [template.system] * 100
    folder.mkdir(parents=True, exist_ok=True)
    # Not by its own file name, which it would keep inside.
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    content = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": TEXT.max_positions,
    } | special
    write_json(folder / "tokenizer_config.json", content, indent=2)
    write_json(folder / "special_tokens_map.json", special, indent=2)


_STDDEV = 0.5  # of embeddings and codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the pretraining.

    Attributes:
        steps: of the optimizer.
        rows: of a batch, a scene each.
        length: tokens of a row.
        texts: what the rows are, in turn: of `CAPTIONS`, or "questions".
        rate: the peak learning rate.
    """

    steps: int
    rows: int
    length: int
    texts: Sequence[str]
    rate: float


# Captions first, in which nearly every word must be looked up: so it is learned ten times faster
# than from questions.
PHASES = (
    Phase(steps=5000, rows=24, length=80, texts=[*CAPTIONS], rate=3e-3),
    Phase(steps=1600, rows=10, length=256, texts=[*CAPTIONS, *["questions"] * 7], rate=2e-3),
)
_EVERY = 200  # steps between two reports


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What the cells of each row's scene hold."""

    digits: Int[Array, "B rows columns"]
    colors: Int[Array, "B rows columns"]


class CellCodes(nnx.Module):
    """Stands for tower and connector: codes of what the cells of a window hold, and where.

    A code is a sum of vectors: for each cell of the window, whose place in it has tables of its
    own; and one each for the window's row and column.
    """

    def __init__(self, window: int, *, rngs: nnx.Rngs):
        make, cells, side = jax.nn.initializers.normal(_STDDEV), window**2, GRID // window

        def table(*shape: int) -> nnx.Param[Array]:
            return nnx.Param(make(rngs.params(), (*shape, TEXT.width)))

        self.window = window
        self.digits, self.colors = table(cells, 11), table(cells, len(NAMES) + 1)
        self.rows, self.columns = table(side, 1), table(1, side)

    def __call__(self, seen: Seen) -> Float[Array, "B K H"]:
        """A code for each window, in raster order, as vision tokens come."""
        held = sum(
            table[jnp.arange(self.window**2), self._windows(numbers) + 1].sum(axis=2)
            for table, numbers in ((self.digits, seen.digits), (self.colors, seen.colors))
        )
        return held + (self.rows[...] + self.columns[...]).reshape(-1, TEXT.width)

    def _windows(self, cells: Int[Array, "B rows columns"]) -> Int[Array, "B K cells"]:
        """The cells of each window."""
        side = GRID // self.window
        cut = cells.reshape(-1, side, self.window, side, self.window).swapaxes(2, 3)
        return cut.reshape(-1, side * side, self.window**2)


def _widen(path: str, leaf: Array) -> Array:
    """Scales up the initial weights: LLaMA's 0.02 is for widths of thousands."""
    if path == "embedding":
        return leaf * (_STDDEV / 0.02)
    if not path.endswith("kernel"):
        return leaf
    inputs = TEXT.mlp_width if "/down/" in path else TEXT.width
    # What is added to the residual stream, twice a layer, is to keep its size.
    share = math.sqrt(2 * TEXT.layers) if "/down/" in path or "/output/" in path else 1
    return leaf / (0.02 * math.sqrt(inputs) * share)


class Oracle(nnx.Module):
    """The language model with codes in place of an image: codes of one cell, or of four."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.text = Llama(TEXT, init=Init(rngs=rngs))
        leaves = flatten(nnx.to_pure_dict(nnx.state(self.text)))
        nnx.update(
            self.text, unflatten({path: _widen(path, leaf) for path, leaf in leaves.items()})
        )
        self.cell_codes = nnx.List([CellCodes(1, rngs=rngs), CellCodes(2, rngs=rngs)])

    def __call__(self, batch: Batch, seen: Seen, *, window: int) -> Float[Array, "B T V"]:
        """Logits at every position, with codes in place of vision tokens."""
        codes, slots = self.cell_codes[window - 1](seen), batch.image_slots[..., None]
        placed = jnp.take_along_axis(codes, jnp.maximum(slots, 0), axis=1)
        spliced = jnp.where(slots >= 0, placed, self.text.embed(batch.ids))
        return self.text.logits(
            self.text(spliced, marks=marks_of(batch, tokens_per_image=codes.shape[1]))
        )

    def loss(self, batch: Batch, seen: Seen, *, window: int) -> Array:
        """Mean cross entropy of the answers, in nats."""
        targets = batch.labels[:, 1:]
        known = targets != IGNORED_LABEL
        losses = optax.softmax_cross_entropy_with_integer_labels(
            self(batch, seen, window=window)[:, :-1], jnp.where(known, targets, 0)
        )
        return (losses * known).sum() / known.sum()

    def accuracy(self, batch: Batch, seen: Seen, *, window: int) -> Array:
        """The share of rows in which each next token of every answer is the most likely."""
        targets = batch.labels[:, 1:]
        predicted = self(batch, seen, window=window)[:, :-1].argmax(-1)
        return ((predicted == targets) | (targets == IGNORED_LABEL)).all(axis=1).mean()


def read_rows(
    tokenizer: Tokenizer,
    phase: Phase,
    rng: np.random.Generator,
    *,
    window: int,
    kinds: Sequence[str] = KINDS,
    of_each: int = MOST,
) -> tuple[Batch, Seen]:
    """Random scenes, one a row; conversations have so many questions of each of `kinds`."""
    shape = (phase.rows, phase.length)
    ids, labels = np.zeros(shape, np.int32), np.full(shape, IGNORED_LABEL, np.int32)
    segments, slots = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    drawn = [Scene.draw(rng) for _ in range(phase.rows)]
    for row, scene in enumerate(drawn):
        text = phase.texts[row % len(phase.texts)]
        if text == "questions":
            questions = scenes.questions(scene, rng, of_each=of_each)
            turns = scenes.shuffle(
                [question for question in questions if question.kind in kinds], rng
            )
        else:
            turns = [("", CAPTIONS[text](scene, rng))]
        template = get_template("v1" if text == "questions" else "plain")
        encoded = encode_conversation(
            tokenizer, list(scenes.conversation(turns)), template=template, num_images=1
        )
        encoded = expand_conversation(
            encoded, tokens_per_image=(GRID // window) ** 2, max_length=phase.length
        )
        if encoded.truncated:
            raise ValueError(f"{phase.length} tokens are too few for {text} of a scene")
        end = len(encoded.ids)
        ids[row, :end], segments[row, :end] = encoded.ids, 1
        labels[row, 1:end] = encoded.labels[1:]
        places = np.flatnonzero(encoded.ids == IMAGE_TOKEN_ID)
        slots[row, places] = np.arange(len(places))
    arrays: dict[str, Any] = {
        "ids": ids,
        "labels": labels,
        "positions": np.broadcast_to(np.arange(phase.length, dtype=np.int32), shape),
        "segments": segments,
        "image_slots": slots,
        "pixels": np.zeros((phase.rows, 0, 1, 1, 3), np.float32),
    }
    digits: Any = np.stack([scene.digits for scene in drawn])
    colors: Any = np.stack([scene.colors for scene in drawn])
    return Batch(**arrays), Seen(digits=digits, colors=colors)


def train_language(
    tokenizer: Tokenizer,
    *,
    seed: int,
    say: Callable[[str], None],
    phases: Sequence[Phase] = PHASES,
) -> dict[str, Any]:
    """Trains the decoder on random scenes; its parameters by native path, "text/..."."""
    graph, parameters = nnx.split(Oracle(rngs=nnx.Rngs(seed)))
    probe = _make_probe(tokenizer, graph, seed=seed)
    rng = np.random.default_rng(seed)
    for part, phase in enumerate(phases, 1):
        rate = optax.warmup_cosine_decay_schedule(
            0, phase.rate, min(50, phase.steps), phase.steps + 1, end_value=phase.rate / 10
        )
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))

        @functools.partial(jax.jit, static_argnames="window", donate_argnums=(0, 1))
        def step(
            parameters: nnx.State, moments: Any, batch: Batch, seen: Seen, window: int
        ) -> tuple[nnx.State, Any, Array]:
            def loss(parameters: nnx.State) -> Array:
                return nnx.merge(graph, parameters).loss(batch, seen, window=window)

            lost, slope = jax.value_and_grad(loss)(parameters)
            updates, moments = optimizer.update(slope, moments, parameters)  # noqa: B023
            return optax.apply_updates(parameters, updates), moments, lost

        moments = optimizer.init(parameters)
        for number in range(1, phase.steps + 1):
            window = 1 + number % 2
            batch, seen = read_rows(tokenizer, phase, rng, window=window)
            parameters, moments, lost = step(parameters, moments, batch, seen, window)
            if number % _EVERY == 0 or number == phase.steps:
                say(
                    f"language model, part {part}: step {number} of {phase.steps}, "
                    f"loss {float(lost):.3f}; answered in %: {probe(parameters)}"
                )
    trained = nnx.to_pure_dict(parameters)["text"]
    return flatten({"text": jax.device_get(trained)})


def _make_probe(
    tokenizer: Tokenizer, graph: nnx.GraphDef, *, seed: int
) -> Callable[[nnx.State], str]:
    """A function that says how many questions of each kind are answered, in per cent.

    Each kind has two numbers: with a code for each cell, and with a code for four cells.
    """
    rng = np.random.default_rng([seed, 1])
    single = Phase(steps=0, rows=100, length=80, texts=["questions"], rate=0)
    rows_by_kind = {
        (kind, window): read_rows(tokenizer, single, rng, window=window, kinds=[kind], of_each=1)
        for kind in KINDS
        for window in (1, 2)
    }
    accuracy = jax.jit(
        lambda parameters, batch, seen, window: nnx.merge(graph, parameters).accuracy(
            batch, seen, window=window
        ),
        static_argnames="window",
    )

    def render(parameters: nnx.State) -> str:
        shares = {
            (kind, window): 100 * float(accuracy(parameters, *rows, window))
            for (kind, window), rows in rows_by_kind.items()
        }
        return ", ".join(f"{kind} {shares[kind, 1]:.0f} {shares[kind, 2]:.0f}" for kind in KINDS)

    return render
