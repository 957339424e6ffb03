"""`stf-jax data check`: is this training data fit to train on?"""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from stf_jax.data.clips import UNIFORM, FrameSampling
from stf_jax.data.fit import fit_template
from stf_jax.data.images import ImageProcessor
from stf_jax.data.inspection import Finding, Inspection, Inspector
from stf_jax.data.pool import map_in_processes
from stf_jax.data.sources import RawExample, read_examples
from stf_jax.data.tokenizer import Tokenizer
from stf_jax.util.files import expand

# Upper bounds of the histogram's bars, in tokens.
_BOUNDS = (128, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_CHUNK = 64

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of a histogram: `count` examples of more than `above` and at most `to` tokens."""

    above: int
    to: int | None
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What `check` found.

    Attributes:
      examples: entries in the files.
      fit: of these, how many can be trained on.
      text_only: of the fit ones, how many have no image.
      images: image files and frames of clips read to their end, one for each time that an example
        names it.
      tokens: of the fit examples together, images expanded, uncut.
      sequence_length: what is longer is cut in training.
      cut: fit examples that are longer.
      cut_to_nothing: of these, how many have no supervised token left, and will be left out.
      strict_drops: fit examples that strict labels would mask whole.
      histogram: of the fit examples' tokens, images expanded.
      problems: why each unfit example is so; one may have several.
      notes: what is odd and does no harm.
    """

    examples: int
    fit: int
    text_only: int
    images: int
    tokens: int
    sequence_length: int
    cut: int
    cut_to_nothing: int
    strict_drops: int
    histogram: tuple[Bar, ...]
    problems: tuple[Finding, ...]
    notes: tuple[Finding, ...]

    @property
    def clean(self) -> bool:
        """Whether every example can be trained on."""
        return self.fit == self.examples

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        # Scripts of older releases ask for "pictures".
        return {"clean": self.clean, **dataclasses.asdict(self), "pictures": self.images}

    def render(self, limit: int = 20) -> str:
        """For a terminal; names at most `limit` of each kind of offender."""
        lines = [
            f"{self.examples} examples: {self.fit} fit to train on "
            f"({self.fit - self.text_only} with images, {self.text_only} text only), "
            f"{self.examples - self.fit} not",
            f"{self.images} images, {self.tokens} tokens; {self.cut} examples are longer than "
            f"{self.sequence_length} and will be cut, {self.cut_to_nothing} of them to nothing",
            f"{self.strict_drops} would be masked whole by strict labels",
            "",
            *_render_histogram(self.histogram),
        ]
        for title, findings in (("Problems", self.problems), ("Notes", self.notes)):
            for kind, count in Counter(finding.kind for finding in findings).most_common():
                lines += ["", f"{title}: {kind} ({count})"]
                named = [finding for finding in findings if finding.kind == kind]
                lines += [f"  {f.id} ({f.where}): {f.reason}" for f in named[:limit]]
                if count > limit:
                    lines.append(f"  and {count - limit} more")
        lines += ["", "Clean." if self.clean else "Not clean."]
        return "\n".join(lines)


def _render_histogram(bars: Sequence[Bar]) -> list[str]:
    filled = [number for number, bar in enumerate(bars) if bar.count] or [0]
    bars = bars[filled[0] : filled[-1] + 1]
    largest = max(bar.count for bar in bars) or 1
    return [
        f"{f'to {bar.to}' if bar.to else f'above {bar.above}':>12} tokens "
        f"{bar.count:>8} {'#' * round(40 * bar.count / largest)}".rstrip()
        for bar in bars
    ]


class Tally:
    """Adds up inspections into a report."""

    def __init__(self, *, tokens_per_image: int, sequence_length: int):
        if sequence_length < 2:
            raise ValueError(f"sequence_length is {sequence_length}; it must be at least 2")
        self._tokens_per_image = tokens_per_image
        self._sequence_length = sequence_length
        self._counts: Counter[str] = Counter()
        self._bars: Counter[int] = Counter()
        self._problems: list[Finding] = []
        self._notes: list[Finding] = []

    def add(self, inspection: Inspection) -> None:
        """Counts one example."""
        self._counts["examples"] += 1
        self._counts["images"] += inspection.num_images
        self._problems += inspection.problems
        self._notes += inspection.notes
        if inspection.problems:
            return
        measures = inspection.measures
        tokens = measures.tokens(self._tokens_per_image)
        self._counts["fit"] += 1
        self._counts["text_only"] += measures.images == 0
        self._counts["tokens"] += tokens
        self._counts["cut"] += tokens > self._sequence_length
        self._counts["cut_to_nothing"] += (
            measures.place(self._tokens_per_image) >= self._sequence_length
        )
        self._counts["strict_drops"] += measures.mismatch
        self._bars[next((n for n, to in enumerate(_BOUNDS) if tokens <= to), len(_BOUNDS))] += 1

    def report(self) -> CheckReport:
        """The report over all examples so far."""
        edges = (0, *_BOUNDS)
        fields = {field.name for field in dataclasses.fields(CheckReport)}
        counted = fields - {"sequence_length", "histogram", "problems", "notes"}
        return CheckReport(
            **{name: self._counts[name] for name in counted},
            sequence_length=self._sequence_length,
            histogram=tuple(
                Bar(
                    above=above,
                    to=_BOUNDS[number] if number < len(_BOUNDS) else None,
                    count=self._bars[number],
                )
                for number, above in enumerate(edges)
            ),
            problems=tuple(self._problems),
            notes=tuple(self._notes),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _InspectAll:
    inspector: Inspector

    def __call__(self, examples: Sequence[RawExample]) -> list[Inspection]:
        # The bytes are not needed, and sending them between processes would cost much.
        return [dataclasses.replace(self.inspector(raw), image_bytes=()) for raw in examples]


def check(
    files: Sequence[str | os.PathLike[str]],
    *,
    images: str | os.PathLike[str] | None,
    tokenizer: Tokenizer,
    template: str = "v1",
    image_processor: ImageProcessor | None = None,
    tokens_per_image: int = 144,
    sequence_length: int = 2048,
    sampling: FrameSampling = UNIFORM,
    timestamps: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Looks into every example of LLaVA's training files, and reads every image to its end.

    Found are: entries of another form; roles, turns and numbers of `<image>` that do not fit;
    replies without text; images that are missing, damaged, cut short, no images, too large to
    unpack or too thin to use. Only noted are: an image that is there with another extension (which
    is then used), a conversation with some empty replies, one that strict labels would mask whole.

    Args:
      files: JSON lists or JSON lines.
      images: the folder that the image paths start from.
      tokenizer: of the model to be trained.
      template: to be trained with; one of `templates.TEMPLATES`.
      image_processor: default CLIP's at 336 px, padding.
      tokens_per_image: for lengths.
      sequence_length: to count what is longer.
      sampling: which frames of a clip are kept.
      timestamps: whether the question says when they are.
      workers: processes; default is the number of processors.
      progress: called with (examples done, of how many).

    Raises:
      ValueError: files that cannot be read at all, a folder that is not there, a template that is
        unknown or does not fit the tokenizer.
    """
    images = None if images is None else expand(images)
    check_folder(images)
    inspector = Inspector(
        images=images,
        tokenizer=tokenizer,
        template=fit_template(template, tokenizer),
        image_processor=image_processor or ImageProcessor(),
        sampling=sampling,
        timestamps=timestamps,
    )
    examples = read_examples([expand(path) for path in files])
    tally = Tally(tokens_per_image=tokens_per_image, sequence_length=sequence_length)
    chunks = [examples[start : start + _CHUNK] for start in range(0, len(examples), _CHUNK)]
    done = 0
    for inspections in map_in_processes(
        _InspectAll(inspector=inspector), chunks, workers=default_workers(workers)
    ):
        for inspection in inspections:
            tally.add(inspection)
        done += len(inspections)
        if progress:
            progress(done, len(examples))
    return tally.report()


def check_folder(images: str | os.PathLike[str] | None) -> None:
    """Raises ValueError if the folder of images is not there."""
    if images is not None and not os.path.isdir(images):
        raise ValueError(f"{os.fspath(images)}: no such folder of images; check the path")


def default_workers(workers: int | None) -> int:
    """As many as there are processors, if none is said.

    Raises:
      ValueError: fewer than none.
    """
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}; it must be at least 0")
    return (os.cpu_count() or 1) if workers is None else workers
