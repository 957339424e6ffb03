"""`stf-jax data build`: LLaVA's JSON and a folder of images become a TFDS dataset.

The examples are cut into parts of fixed size. Each part is inspected and written by one process,
first its shard, then a JSON file that says what is in it; a part with its JSON file is finished.
All this happens in `OUT.partial`, which becomes `OUT` in the end, in one step. So what was killed
leaves no `OUT`, and a second call continues with the parts that are missing.

What is kept carries the identity of what it was made from: the files' SHA-256, and of every image
that they name its size and time of change, or that it was not there. A second call with other files
is refused; where images have come or changed, the parts that they belong to are written again.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stf_jax.data.clips import UNIFORM, FrameSampling
from stf_jax.data.dataset import (
    SOURCE_FILE,
    Dataset,
    DatasetError,
    partial_path,
    shard_path,
    write_metadata,
    write_shard,
)
from stf_jax.data.fit import fit_template
from stf_jax.data.images import ImageProcessor
from stf_jax.data.index import Index, index_name
from stf_jax.data.inspection import Finding, Inspection, Inspector, Measures, measure
from stf_jax.data.pool import map_in_processes
from stf_jax.data.sources import RawExample, check_text, read_examples
from stf_jax.data.templates import Template
from stf_jax.data.tokenizer import Tokenizer
from stf_jax.data.validator import CheckReport, Progress, Tally, check_folder, default_workers
from stf_jax.util.files import expand, explain_file, read_json, sha256, write_json

_INDEX_CHUNK = 512

_read_json = functools.partial(
    read_json,
    error=DatasetError,
    fix="the folder was not made by 'stf-jax data build', so choose another one or delete it",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What `build` did.

    Attributes:
      path: the finished dataset.
      written: examples in it.
      skipped: examples left out because of `check.problems`.
      shards: files that hold them.
      kept_shards: of these, how many an earlier call had finished.
      bytes: of all examples.
      index: the file of lengths for this tokenizer and template.
      check: what inspection found; None where the dataset was finished before and has only been
        given another index.
      unfit_for_index: examples of a finished dataset that the template of the new index cannot
        take; training with it leaves them out.
    """

    path: str
    written: int
    skipped: int
    shards: int
    kept_shards: int
    bytes: int
    index: str
    check: CheckReport | None
    unfit_for_index: int = 0

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        return dataclasses.asdict(self)

    def render(self, limit: int = 20) -> str:
        """For a terminal; names at most `limit` of each kind of offender."""
        if self.check is None:
            text = f"{self.path} was finished before; it has {self.written} examples.\n"
            text += f"Its index is {self.index}."
            if self.unfit_for_index:
                text += f"\n{self.unfit_for_index} examples do not fit this template."
            return text
        return (
            f"{self.check.render(limit)}\n\n{self.path}: {self.written} examples "
            f"({self.bytes / 1e6:.1f} MB in {self.shards} shards, {self.kept_shards} of them from "
            f"an earlier call), {self.skipped} skipped"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    number: int
    examples: list[RawExample]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WritePart:
    inspector: Inspector
    folder: Path

    def __call__(self, part: _Part) -> tuple[int, int]:
        inspections = [self.inspector(raw) for raw in part.examples]
        size = write_shard(
            _shard(self.folder, part.number),
            [
                (i.id, i.conversation, i.image_bytes, i.visuals)
                for i in inspections
                if not i.problems
            ],
        )
        content = {
            "size": size,
            "images": _identify(self.inspector, part),
            "inspections": [_to_json(inspection) for inspection in inspections],
        }
        write_json(_record(self.folder, part.number), content)
        return part.number, len(part.examples)


def build(
    files: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None,
    tokenizer: Tokenizer,
    template: str = "v1",
    image_processor: ImageProcessor | None = None,
    tokens_per_image: int = 144,
    sequence_length: int = 2048,
    examples_per_shard: int = 2048,
    sampling: FrameSampling = UNIFORM,
    timestamps: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Writes the dataset `out`, without the examples in which `check` finds a problem.

    Stored are the images' own bytes and the turns as they are, so that one dataset serves any
    model; only the index of lengths is made for a tokenizer and a template. If `out` is finished,
    only the index is added. If an earlier call was stopped, this one continues. New and changed
    images are read again; a finished `out` is refused then.

    Args:
      files: JSON lists or JSON lines.
      out: the folder to make. What is unfinished lies in `out` + ".partial".
      images: the folder that the image paths start from.
      tokenizer: of the model to be trained.
      template: to be trained with; one of `templates.TEMPLATES`.
      image_processor: default CLIP's at 336 px, padding; it decides which images are too thin.
      tokens_per_image: for the report's lengths.
      sequence_length: for the report.
      examples_per_shard: 2048 of LLaVA's make about 0.3 GB.
      sampling: which frames of a clip are kept.
      timestamps: whether the question says when they are.
      workers: processes; default is the number of processors.
      progress: called with (examples done, of how many).

    Raises:
      ValueError: unreadable files, no such folder, a template that is unknown or does not fit the
        tokenizer, or no example fit to train on.
      DatasetError: `out` or its partial folder was made from something else.
    """
    fitted = fit_template(template, tokenizer)
    out = Path(expand(out))
    files = [expand(path) for path in files]
    images = None if images is None else expand(images)
    check_folder(images)
    if str(out).startswith("gs:"):
        raise DatasetError(f"{out}: build on a disk, then copy the folder to the bucket")
    if examples_per_shard < 1:
        raise DatasetError(f"examples_per_shard is {examples_per_shard}; it must be at least 1")
    workers = default_workers(workers)
    tally = Tally(tokens_per_image=tokens_per_image, sequence_length=sequence_length)
    inspector = Inspector(
        images=images,
        tokenizer=tokenizer,
        template=fitted,
        image_processor=image_processor or ImageProcessor(),
        sampling=sampling,
        timestamps=timestamps,
    )
    for path in files:
        with explain_file(path, fix="check the path"):
            check_text(Path(path))
    source: dict[str, Any] = {"files": [sha256(path) for path in files]}
    if sampling != UNIFORM or timestamps:
        source["clips"] = [sampling.frames, sampling.rate, timestamps]
    if out.is_dir():
        _compare(source, _read_json(out / SOURCE_FILE), out, keys=tuple(source))
        if images is not None:
            _refuse_other_images(out, files, inspector)
        shutil.rmtree(partial_path(out), ignore_errors=True)
        return _add_index(out, tokenizer=tokenizer, template=fitted, workers=workers)
    examples = read_examples(files)
    folder = partial_path(out)
    processor = inspector.image_processor
    source |= {
        "shard": examples_per_shard,
        "index": index_name(tokenizer, fitted),
        "processor": [processor.mode, processor.shortest_edge],
    }
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / SOURCE_FILE).is_file():
        _compare(source, _read_json(folder / SOURCE_FILE), folder, keys=(*source, "clips"))
    else:
        write_json(folder / SOURCE_FILE, source, indent=1)

    parts = _split(examples, examples_per_shard)
    missing = [part for part in parts if not _is_kept(folder, part, inspector)]
    done = len(examples) - sum(len(part.examples) for part in missing)
    write = _WritePart(inspector=inspector, folder=folder)
    if progress:
        progress(done, len(examples))
    for _, count in map_in_processes(write, missing, workers=workers):
        done += count
        if progress:
            progress(done, len(examples))

    return _finish(folder, out, len(parts), len(parts) - len(missing), tally, source)


def _finish(
    folder: Path, out: Path, parts: int, kept_parts: int, tally: Tally, source: dict[str, Any]
) -> BuildReport:
    """Numbers the shards, writes what TFDS reads, and gives the folder its name."""
    index = source["index"]
    identities: list[str] = []
    ids: list[str] = []
    measures: list[Measures] = []
    sizes: list[int] = []
    filled: dict[int, int] = {}
    for number in range(parts):
        content = _read_json(_record(folder, number))
        identities.append(content["images"])
        inspections = [_from_json(entry) for entry in content["inspections"]]
        for inspection in inspections:
            tally.add(inspection)
        fit = [inspection for inspection in inspections if not inspection.problems]
        ids += [inspection.id for inspection in fit]
        measures += [inspection.measures for inspection in fit]
        sizes.append(content["size"])
        if fit:
            filled[number] = len(fit)
    report = tally.report()
    if not ids:
        raise ValueError(
            f"{out}: none of the {report.examples} examples is fit to train on; "
            f"the first: {report.problems[0].reason}; 'stf-jax data check' names them all"
        )
    source = source | {"images": identities}
    # Links, so that a call killed here leaves every part where the next one looks for it.
    final = folder / "final"
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    for position, number in enumerate(filled):
        _link(_shard(folder, number), shard_path(final, position, len(filled)))
    write_metadata(final, shard_lengths=list(filled.values()), size=sum(sizes))
    Index.of(ids, measures).save(final / index)
    write_json(final / SOURCE_FILE, source, indent=1)
    os.replace(final, out)
    shutil.rmtree(folder)
    return BuildReport(
        path=str(out),
        written=len(ids),
        skipped=report.examples - report.fit,
        shards=len(filled),
        kept_shards=kept_parts,
        bytes=sum(sizes),
        index=index,
        check=report,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _MeasureStored:
    dataset: Dataset
    tokenizer: Tokenizer
    template: Template

    def __call__(self, numbers: range) -> list[tuple[str, Measures]]:
        results = []
        for number in numbers:
            stored = self.dataset[number]
            try:
                measures = measure(
                    stored.conversation,
                    tokenizer=self.tokenizer,
                    template=self.template,
                    num_images=len(stored.images),
                    visuals=stored.visuals,
                )
            except ValueError:
                measures = Measures()
            results.append((stored.id, measures))
        return results


def _add_index(out: Path, *, tokenizer: Tokenizer, template: Template, workers: int) -> BuildReport:
    dataset = Dataset(out)
    path = dataset.index_path(tokenizer, template)
    if not path.is_file():
        chunks = [
            range(start, min(start + _INDEX_CHUNK, len(dataset)))
            for start in range(0, len(dataset), _INDEX_CHUNK)
        ]
        work = _MeasureStored(dataset=dataset, tokenizer=tokenizer, template=template)
        measured = [
            pair for part in map_in_processes(work, chunks, workers=workers) for pair in part
        ]
        Index.of([name for name, _ in measured], [measures for _, measures in measured]).save(path)
    index = dataset.index(tokenizer, template)
    return BuildReport(
        path=str(out),
        written=len(dataset),
        skipped=0,
        shards=dataset.shards,
        kept_shards=dataset.shards,
        bytes=dataset.bytes,
        index=path.name,
        check=None,
        unfit_for_index=int((index.lengths == 0).sum()),
    )


def _identify(inspector: Inspector, part: _Part) -> str:
    """A digest of which images the examples of a part find."""
    identity = json.dumps(inspector.identify(part.examples))
    return hashlib.sha256(identity.encode()).hexdigest()


def _is_kept(folder: Path, part: _Part, inspector: Inspector) -> bool:
    """Whether an earlier call has finished a part, from the images that are there now."""
    record = _record(folder, part.number)
    if not record.is_file():
        return False
    return bool(_read_json(record).get("images") == _identify(inspector, part))


def _refuse_other_images(
    out: Path, files: Sequence[str | os.PathLike[str]], inspector: Inspector
) -> None:
    """Raises DatasetError if the images that a finished dataset was made from are others now."""
    source = _read_json(out / SOURCE_FILE)
    # Older releases have not written which they were.
    known, size = source.get("images"), source.get("shard")
    if not isinstance(known, list) or not isinstance(size, int):
        return
    identities = [_identify(inspector, part) for part in _split(read_examples(files), size)]
    if identities != known:
        raise DatasetError(
            f"{out}: built before, from images that have come, gone or changed since; delete it "
            "to build it again, or leave out --images to add an index only"
        )


def _split(examples: list[RawExample], size: int) -> list[_Part]:
    return [
        _Part(number=number, examples=examples[start : start + size])
        for number, start in enumerate(range(0, len(examples), size))
    ]


def _compare(
    wanted: dict[str, Any], stored: dict[str, Any], folder: Path, *, keys: tuple[str, ...]
) -> None:
    words = {
        "files": "the training files",
        "shard": "examples_per_shard",
        "index": "the tokenizer or the template",
        "processor": "the image processor",
        "clips": "the frames of clips",
    }
    differing = {words[key]: None for key in keys if wanted.get(key) != stored.get(key)}
    if differing:
        raise DatasetError(
            f"{folder}: begun with other values of {', '.join(differing)}; "
            "give the same ones, choose another folder, or delete this one"
        )


def _to_json(inspection: Inspection) -> dict[str, Any]:
    without_bytes = dataclasses.replace(inspection, image_bytes=(), conversation="")
    return dataclasses.asdict(without_bytes)


def _from_json(content: dict[str, Any]) -> Inspection:
    return Inspection(
        id=content["id"],
        problems=tuple(_finding(finding) for finding in content["problems"]),
        notes=tuple(_finding(finding) for finding in content["notes"]),
        measures=Measures(**content["measures"]),
        visuals=tuple(content.get("visuals", ())),
        # Older releases say "pictures".
        num_images=content[key if (key := "num_images") in content else "num_pictures"],
    )


def _finding(content: dict[str, Any]) -> Finding:
    return Finding(**content | {"kind": content["kind"].replace("picture", "image")})


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # Not every file system has links.
        shutil.copyfile(source, target)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05}.array_record"


def _record(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05}.json"
