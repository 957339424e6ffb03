"""Batches from disk: nothing lost or doubled, the same wherever and whenever they are made."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest

from stf_jax.batch import Batch
from stf_jax.data.building import build
from stf_jax.data.config import DataConfig, DatasetSource
from stf_jax.data.conversation import get_template
from stf_jax.data.dataset import Dataset, DatasetError, write_shard
from stf_jax.data.encoding import encode_conversation, expand_conversation
from stf_jax.data.images import ImageProcessor, load_image
from stf_jax.data.pipeline import TrainingData, TrainingStep
from stf_jax.data.tokenizer import Tokenizer

Make = Callable[..., TrainingData]
K = 4


@pytest.fixture
def make(dataset: Path, tokenizer: Tokenizer, image_processor: ImageProcessor) -> Make:
    def make(**options: Any) -> TrainingData:
        arguments: dict[str, Any] = {
            "datasets": (DatasetSource(path=os.fspath(dataset)),),
            "sequence_length": 320,
            "batch_size": 4,
            "images_per_row": 4,
            "workers": 0,
        } | options
        return TrainingData(
            DataConfig(**arguments),
            tokenizer=tokenizer,
            image_processor=image_processor,
            tokens_per_image=K,
        )

    return make


def ids_of(steps: Iterable[TrainingStep]) -> list[str]:
    return [name for step in steps for row in step.example_ids for name in row]


def assert_same(first: TrainingStep, second: TrainingStep) -> None:
    assert first.step == second.step
    assert first.example_ids == second.example_ids
    for field in dataclasses.fields(Batch):
        one, other = (getattr(step.batch, field.name) for step in (first, second))
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()


def joined(parts: list[TrainingStep]) -> TrainingStep:
    """One global batch from those of all hosts."""
    batch = Batch(
        **{
            field.name: np.concatenate([getattr(part.batch, field.name) for part in parts])
            for field in dataclasses.fields(Batch)
        }
    )
    ids = tuple(row for part in parts for row in part.example_ids)
    return TrainingStep(step=parts[0].step, example_ids=ids, batch=batch, lost=())


def part_of(host: int, hosts: int) -> range:
    """The host's part of a global batch of four rows."""
    return range(host * 4 // hosts, (host + 1) * 4 // hosts)


@pytest.mark.parametrize("packing", ["packed", "grouped", "single"])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_an_epoch_has_every_example_once(make: Make, corpus: Any, packing: str, hosts: int) -> None:
    data = make(packing=packing)
    steps = data.steps_per_epoch
    for start in (0, steps):
        names = [
            name
            for host in range(hosts)
            for name in ids_of(
                data.batches(
                    start_step=start,
                    stop_step=start + data.planner.steps(start > 0),
                    rows=part_of(host, hosts),
                )
            )
        ]
        assert Counter(names) == Counter(entry["id"] for entry in corpus.entries)
    assert data.num_steps(2) == steps + data.planner.steps(1)


def test_hosts_together_have_the_same_global_batches(make: Make) -> None:
    data = make()
    alone = list(data.batches(stop_step=6))
    for hosts in (2, 4):
        parts = [
            list(data.batches(stop_step=6, rows=part_of(host, hosts))) for host in range(hosts)
        ]
        for number, step in enumerate(alone):
            assert_same(joined([part[number] for part in parts]), step)


def test_hosts_may_make_the_same_rows(make: Make) -> None:
    data = make()
    (alone,) = data.batches(stop_step=1)
    for rows in (range(0, 3), range(1, 4), range(2, 3)):
        (part,) = data.batches(stop_step=1, rows=rows)
        assert part.example_ids == alone.example_ids[rows.start : rows.stop]
        np.testing.assert_array_equal(part.batch.ids, alone.batch.ids[rows.start : rows.stop])
        np.testing.assert_array_equal(part.batch.pixels, alone.batch.pixels[rows.start : rows.stop])


def test_hosts_rows_need_not_follow_each_other(make: Make) -> None:
    data = make()
    alone = list(data.batches(stop_step=3))
    for number, step in enumerate(data.batches(stop_step=3, rows=(0, 3))):
        assert step.example_ids == (alone[number].example_ids[0], alone[number].example_ids[3])


def test_going_on_at_any_step_gives_the_same_bytes(make: Make) -> None:
    alone = list(make().batches(stop_step=12))
    assert make().steps_per_epoch < 11  # so that an epoch ends on the way
    for start in (1, 5, 11):
        again = make().batches(start_step=start, stop_step=12)
        for step, expected in zip(again, alone[start:], strict=True):
            assert_same(step, expected)


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_give_the_same_bytes(make: Make, workers: int) -> None:
    alone = list(make().batches(start_step=3, stop_step=11))
    iterator = make(workers=workers).batches(start_step=3)
    for expected in alone:
        assert_same(next(iterator), expected)
    iterator.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("strict", [False, True])
def test_rows_hold_what_each_example_is_alone(
    make: Make, corpus: Any, tokenizer: Tokenizer, image_processor: ImageProcessor, strict: bool
) -> None:
    entries = {entry["id"]: entry for entry in corpus.entries}
    data = make(strict_labels=strict)
    packed = 0
    for step in data.batches(stop_step=data.steps_per_epoch):
        batch = step.batch
        assert batch.pixels.shape == (4, 4, 28, 28, 3)
        assert batch.pixels.dtype == np.uint8
        for row, names in enumerate(step.example_ids):
            place = slot = 0
            packed += len(names) > 1
            for segment, name in enumerate(names, start=1):
                entry = entries[name]
                files = entry.get("image", [])
                files = files if isinstance(files, list) else [files]
                expected = expand_conversation(
                    encode_conversation(
                        tokenizer,
                        entry["conversations"],
                        template=get_template("v1"),
                        num_images=len(files),
                        strict=strict,
                    ),
                    tokens_per_image=K,
                )
                at = (row, slice(place, place + len(expected.ids)))
                np.testing.assert_array_equal(batch.ids[at], expected.ids)
                np.testing.assert_array_equal(batch.labels[at], expected.labels)
                assert batch.labels[row, place] == -100
                np.testing.assert_array_equal(batch.positions[at], np.arange(len(expected.ids)))
                np.testing.assert_array_equal(batch.segments[at], segment)
                slots = np.asarray(batch.image_slots[at])
                np.testing.assert_array_equal(slots >= 0, expected.ids == -200)
                # Each run of K placeholders points to its picture's K tokens, in order.
                np.testing.assert_array_equal(
                    slots[slots >= 0], slot * K + np.arange(len(files) * K)
                )
                for file in files:
                    pixels = image_processor.square(load_image(corpus.images / file))
                    np.testing.assert_array_equal(batch.pixels[row, slot], pixels)
                    slot += 1
                place += len(expected.ids)
            rest = (row, slice(place, None))
            assert not batch.ids[rest].any()
            assert not batch.segments[rest].any()
            assert not batch.positions[rest].any()
            assert (np.asarray(batch.labels[rest]) == -100).all()
            assert (np.asarray(batch.image_slots[rest]) == -1).all()
            assert not np.asarray(batch.pixels[row, slot:]).any()
    assert packed > 5


def test_the_last_batch_is_filled_with_empty_rows(make: Make) -> None:
    data = make(batch_size=7, packing="single")
    *_, last = data.batches(stop_step=data.steps_per_epoch)
    assert last.example_ids[60 % 7 :] == ((),) * (7 - 60 % 7)
    assert not last.batch.segments[60 % 7 :].any()
    assert (last.batch.labels[60 % 7 :] == -100).all()


def test_grouped_batches_are_of_one_modality(make: Make, corpus: Any) -> None:
    has_image = {entry["id"]: "image" in entry for entry in corpus.entries}
    data = make(packing="grouped")
    kinds = [
        {has_image[name] for row in step.example_ids for name in row}
        for step in data.batches(stop_step=data.steps_per_epoch)
    ]
    assert kinds.count({False}) == 3
    assert kinds.count({True}) == 12


def test_weights_are_passes_in_an_epoch(
    make: Make, dataset: Path, corpus: Any, tmp_path: Path
) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(dataset, twin)
    data = make(
        datasets=(
            DatasetSource(path=os.fspath(dataset), weight=2),
            DatasetSource(path=os.fspath(twin), weight=0.5),
        )
    )
    for epochs in (1, 2):
        names = Counter(ids_of(data.batches(stop_step=data.num_steps(epochs))))
        for entry in corpus.entries:
            assert names[f"small/{entry['id']}"] == 2 * epochs
            assert names[f"twin/{entry['id']}"] <= 1
        assert names.total() == epochs * (120 + 30)
    plan = data.plan()
    assert (plan.examples, plan.examples_per_epoch) == (120, 150)


def test_long_examples_are_cut_and_what_teaches_nothing_is_left_out(
    make: Make, corpus: Any, tokenizer: Tokenizer
) -> None:
    length = 90
    kept, cut = set(), 0
    for entry in corpus.entries:
        files = entry.get("image", [])
        count = len(files) if isinstance(files, list) else 1
        encoded = expand_conversation(
            encode_conversation(
                tokenizer,
                entry["conversations"],
                template=get_template("v1"),
                num_images=count,
                max_length=length,
            ),
            tokens_per_image=K,
            max_length=length,
        )
        if encoded.num_supervised:
            kept.add(entry["id"])
            cut += encoded.truncated
    data = make(sequence_length=length)
    assert set(ids_of(data.batches(stop_step=data.steps_per_epoch))) == kept
    plan = data.plan()
    assert 0 < plan.too_long == 60 - len(kept)
    assert 0 < plan.truncated == cut


def test_examples_with_too_many_pictures_are_left_out(make: Make, corpus: Any) -> None:
    data = make(images_per_row=1)
    expected = {e["id"] for e in corpus.entries if not isinstance(e.get("image"), list)}
    assert set(ids_of(data.batches(stop_step=data.steps_per_epoch))) == expected
    assert data.plan().too_many_images == 60 - len(expected)


def test_strict_labels_leave_out_what_the_reference_masks(
    make: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[n % 2], "value": t} for n, t in enumerate(texts)]

    entries = [
        {"id": "good", "conversations": turns("What?", "A bus.")},
        {"id": "odd", "conversations": turns("What?", "", "And?", "A bus.")},
    ]
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    out = tmp_path / "odd"
    build([path], out, images=None, tokenizer=tokenizer, workers=1)
    datasets = (DatasetSource(path=os.fspath(out)),)
    for strict, names in ((False, {"good", "odd"}), (True, {"good"})):
        data = make(datasets=datasets, strict_labels=strict)
        assert set(ids_of(data.batches(stop_step=1))) == names
        assert data.plan().masked == 2 - len(names)


@pytest.fixture
def rotten(corpus: Any, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A dataset in which the pictures of three examples have been cut short since it was built."""
    out = tmp_path / "rotten"
    build([corpus.json], out, images=corpus.images, tokenizer=tokenizer, workers=1)
    stored = Dataset(out)
    examples = []
    for number in range(len(stored)):
        one = stored[number]
        cut = 2 if number in (1, 4, 20) else 1
        pictures = tuple(data[: len(data) // cut] for data in one.pictures)
        examples.append((one.id, json.dumps(one.conversation), pictures))
    (shard,) = out.glob("*array_record*")
    write_shard(shard, examples)
    return out


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_that_rot_are_skipped_counted_and_named(
    make: Make, rotten: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    bad = {"example-1", "example-4", "example-20"}
    data = make(datasets=(DatasetSource(path=os.fspath(rotten)),), max_lost=3, workers=workers)
    with caplog.at_level(logging.WARNING):
        steps = list(data.batches(stop_step=data.num_steps(2)))
    names = Counter(ids_of(steps))
    assert set(names.values()) == {2}
    assert len(names) == 57
    assert not bad & set(names)
    assert set(data.lost) == bad
    assert [one.id for step in steps for one in step.lost].count("example-4") == 2
    for name in bad:
        # Once each, however often it comes.
        assert sum(f"{name} (" in record.message for record in caplog.records) == 1
        assert "damaged" in data.lost[name]
    # What is left moves up: segments count from 1 without a gap.
    for step in steps:
        for row, segments in zip(step.example_ids, np.asarray(step.batch.segments), strict=True):
            assert set(segments.tolist()) - {0} == set(range(1, len(row) + 1))


def test_too_much_rot_stops_the_run(make: Make, rotten: Path) -> None:
    data = make(datasets=(DatasetSource(path=os.fspath(rotten)),), max_lost=2)
    with pytest.raises(DatasetError, match=r"3 examples cannot be read .* max_lost is 2: example-"):
        list(data.batches(stop_step=data.steps_per_epoch))


def test_a_damaged_shard_is_rot_too(make: Make, dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    shard = sorted(copy.glob("*array_record*"))[0]
    data = bytearray(shard.read_bytes())
    data[5000:5008] = b"\x55" * 8
    shard.write_bytes(data)
    damaged = make(datasets=(DatasetSource(path=os.fspath(copy)),))
    names = ids_of(damaged.batches(stop_step=damaged.steps_per_epoch))
    assert len(names) + len(damaged.lost) == 60
    assert 0 < len(damaged.lost) <= 25


def test_bad_input_is_named_before_any_step(make: Make, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "half.partial").mkdir()
    paths = ("nowhere", "half")
    with pytest.raises(DatasetError) as caught:
        make(datasets=tuple(DatasetSource(path=os.fspath(tmp_path / path)) for path in paths))
    nowhere, half = str(caught.value).splitlines()
    assert "nowhere: no such folder" in nowhere
    assert "half: not finished yet" in half
    with pytest.raises(ValueError, match="datasets is empty"):
        make(datasets=())
    with pytest.raises(DatasetError, match="no index for template 'plain'"):
        make(template="plain")
    with pytest.raises(
        ValueError,
        match="none of the 60 examples can be trained on: "
        "60 have no supervised token within sequence_length 20",
    ):
        make(sequence_length=20)
    for rows in (range(2, 5), range(-1, 2), (), (3, 0), (1, 1)):
        with pytest.raises(ValueError, match=r"rows is .* ascending, from 0 to 3"):
            make().batches(rows=rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0, "workers": -1}, "batch_size is 0; .* workers is -1; it must be at"),
        ({"packing": "dense"}, "packing is 'dense'; it must be packed, grouped or single"),
        ({"image_mode": "square"}, "image_mode is 'square'"),
        ({"template": "v9"}, "unknown template 'v9'"),
    ],
)
def test_bad_configs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)
    with pytest.raises(ValueError, match="weight -1 of x must be above 0"):
        DatasetSource(path="x", weight=-1)


def test_jsonargparse_reads_the_config() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=DataConfig)
    text = '{"datasets": [{"path": "a"}, {"path": "b", "weight": 0.5}], "packing": "grouped"}'
    parsed = parser.instantiate(parser.parse_args(["--data", text, "--data.seed=3"])).data
    expected = (DatasetSource(path="a"), DatasetSource(path="b", weight=0.5))
    assert parsed == DataConfig(datasets=expected, packing="grouped", seed=3)


def test_the_config_decides_the_pixels(make: Make, dataset: Path) -> None:
    pad, crop, fast = (
        next(iter(make(**options).batches(stop_step=1))).batch.pixels
        for options in ({}, {"image_mode": "crop"}, {"fast_images": True})
    )
    assert (pad != crop).any()
    assert (pad != fast).any()


def test_workers_end_when_the_run_is_killed(dataset: Path, reference: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        from stf_jax.data.config import DataConfig, DatasetSource
        from stf_jax.data.images import ImageProcessor
        from stf_jax.data.pipeline import TrainingData
        from stf_jax.data.tokenizer import load_tokenizer
        if __name__ == "__main__":
            data = TrainingData(
                DataConfig(datasets=(DatasetSource(path={os.fspath(dataset)!r}),), workers=2,
                           sequence_length=320, batch_size=2, images_per_row=4),
                tokenizer=load_tokenizer({os.fspath(reference / "llava-stf")!r}),
                image_processor=ImageProcessor(image_size=28, shortest_edge=28),
                tokens_per_image=4)
            for step in data.batches():
                import multiprocessing
                pids = [child.pid for child in multiprocessing.active_children()]
                print(*pids, flush=True)
                time.sleep(60)
        """),
        encoding="utf-8",
    )
    run = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert run.stdout is not None
    workers = [int(pid) for pid in run.stdout.readline().split()]
    assert len(workers) == 2
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except OSError:
        return False
    # Nobody may be there to bury it.
    return status.rpartition(")")[2].split()[0] != "Z"
