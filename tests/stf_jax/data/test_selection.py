"""Which examples a run trains on: how often each comes, and what is left out."""

import json
import logging
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stf_jax.data.builder import build
from stf_jax.data.config import DatasetSource
from stf_jax.data.dataset import Dataset, DatasetError, write_shard
from stf_jax.data.encoding import encode_conversation, expand_conversation
from stf_jax.data.templates import get_template
from stf_jax.data.tokenizer import Tokenizer
from tests.stf_jax.data.steps import K, Make, ids_of


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


def test_examples_with_too_many_images_are_left_out(make: Make, corpus: Any) -> None:
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
    """A dataset in which the images of three examples have been cut short since it was built."""
    out = tmp_path / "rotten"
    build([corpus.json], out, images=corpus.images, tokenizer=tokenizer, workers=1)
    stored = Dataset(out)
    examples = []
    for number in range(len(stored)):
        one = stored[number]
        cut = 2 if number in (1, 4, 20) else 1
        images = tuple(data[: len(data) // cut] for data in one.images)
        examples.append((one.id, json.dumps(one.conversation), images, one.visuals))
    (shard,) = out.glob("*array_record*")
    write_shard(shard, examples)
    return out


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_rot_are_skipped_counted_and_named(
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
