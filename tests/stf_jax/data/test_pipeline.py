"""Batches from disk: nothing lost or doubled, the same wherever and whenever they are made."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jsonargparse
import numpy as np
import pytest

from stf_jax.data.batch import Batch
from stf_jax.data.config import DataConfig, DatasetSource
from stf_jax.data.dataset import DatasetError
from stf_jax.data.encoding import encode_conversation, expand_conversation
from stf_jax.data.images import ImageProcessor, load_image
from stf_jax.data.pipeline import TrainingStep
from stf_jax.data.templates import get_template
from stf_jax.data.tokenizer import Tokenizer
from tests.stf_jax.data.steps import K, Make, ids_of
from tests.switch import ALL


def assert_same(first: TrainingStep, second: TrainingStep) -> None:
    assert first.step == second.step
    assert first.example_ids == second.example_ids
    leaves = zip(*(jax.tree.leaves(step.batch) for step in (first, second)), strict=True)
    for one, other in leaves:
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()


def joined(parts: list[TrainingStep]) -> TrainingStep:
    """One global batch from those of all hosts."""
    batches = [part.batch for part in parts]
    batch: Batch = jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)
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


@pytest.mark.portable
@pytest.mark.parametrize("workers", [1, 3] if ALL else [2])
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
                # Each run of K placeholders points to its image's K tokens, in order.
                np.testing.assert_array_equal(
                    slots[slots >= 0],
                    slot * K + np.arange(len(files) * K),
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
