"""`build`: what goes in comes out, whether it was stopped or not; `show` reads it back."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from stf_jax.data.builder import BuildReport, build
from stf_jax.data.dataset import Dataset, DatasetError, Stored
from stf_jax.data.encoding import encode_conversation
from stf_jax.data.images import ImageProcessor, load_image
from stf_jax.data.show import show
from stf_jax.data.templates import get_template
from stf_jax.data.tokenizer import Tokenizer

Build = Callable[..., BuildReport]


@pytest.fixture
def run(corpus: Any, tokenizer: Tokenizer, tmp_path: Path) -> Build:
    def run(**options: Any) -> BuildReport:
        arguments: dict[str, Any] = {
            "files": [corpus.json],
            "out": tmp_path / "out",
            "images": corpus.images,
            "tokenizer": tokenizer,
            "examples_per_shard": 7,
            "workers": 1,
        } | options
        files, out = arguments.pop("files"), arguments.pop("out")
        return build(files, out, **arguments)

    return run


def content(path: Path) -> list[tuple[str, list[dict[str, str]], list[bytes]]]:
    dataset = Dataset(path)
    examples = [dataset[number] for number in range(len(dataset))]
    return [(one.id, one.conversation, one.images) for one in examples]


def expected(corpus: Any) -> list[tuple[str, list[dict[str, str]], list[bytes]]]:
    found = []
    for entry in corpus.entries:
        names = entry.get("image", [])
        names = names if isinstance(names, list) else [names]
        images = [(corpus.images / name).read_bytes() for name in names]
        found.append((entry["id"], entry["conversations"], images))
    return found


def test_what_goes_in_comes_out(corpus: Any, run: Build, tmp_path: Path) -> None:
    report = run()
    assert content(tmp_path / "out") == expected(corpus)
    assert (report.written, report.skipped, report.kept_shards) == (60, 0, 0)
    assert report.shards == 9
    assert report.check is not None
    assert report.check.clean
    assert not (tmp_path / "out.partial").exists()
    assert json.loads(json.dumps(report.to_json()))["written"] == 60
    assert "60 examples" in report.render()


def test_tfds_reads_it_without_tensorflow(dataset: Path) -> None:
    source = tfds.builder_from_directory(dataset).as_data_source("train")
    assert len(source) == 60
    assert source[0]["id"] == b"example-0"
    assert json.loads(source[0]["conversations"])[0]["from"] == "human"
    assert "tensorflow" not in sys.modules


def test_processes_write_the_same(corpus: Any, run: Build, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    run(workers=2, progress=lambda *at: done.append(at))
    assert content(tmp_path / "out") == expected(corpus)
    assert done[-1] == (60, 60)


def test_the_index_holds_the_lengths_of_training(
    corpus: Any, dataset: Path, tokenizer: Tokenizer
) -> None:
    index = Dataset(dataset).index(tokenizer, get_template("v1"))
    assert index.ids.tolist() == [entry["id"] for entry in corpus.entries]
    for number, entry in enumerate(corpus.entries):
        count = "".join(turn["value"] for turn in entry["conversations"]).count("<image>")
        encoded = encode_conversation(
            tokenizer, entry["conversations"], template=get_template("v1"), num_images=count
        )
        assert index.lengths[number] == len(encoded.ids)
        assert index.images[number] == count
        assert index.first_supervised[number] == np.flatnonzero(encoded.labels != -100)[0]
        assert index.images_before[number] == count
    assert index.tokens(4).tolist() == (index.lengths + 3 * index.images).tolist()


def test_unfit_examples_are_skipped_and_counted(
    corpus: Any, run: Build, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    entries = list(corpus.entries)
    entries[3] = {"id": "no turns"}
    # A whole shard without anything to keep.
    entries[14:21] = [{"id": f"gone-{n}", "image": "no.jpg", **entries[n]} for n in range(7)]
    for entry in entries[14:21]:
        entry["image"] = "no.jpg"
    path = tmp_path / "some.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    report = run(files=[path])
    assert (report.written, report.skipped, report.shards) == (52, 8, 8)
    kept = expected(corpus)
    del kept[14:21], kept[3]
    assert content(tmp_path / "out") == kept
    assert len(Dataset(tmp_path / "out").index(tokenizer, get_template("v1"))) == 52
    assert "8 skipped" in report.render()


def test_parts_that_an_older_release_wrote_are_kept(
    corpus: Any, run: Build, tmp_path: Path
) -> None:
    file = tmp_path / "train.json"
    file.write_text(json.dumps([corpus.entries[0] | {"image": "none.jpg"}, *corpus.entries[1:]]))

    def stop(done: int, total: int) -> None:
        if done >= 21:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(files=[file], progress=stop)
    records = list((tmp_path / "out.partial").glob("part-*.json"))
    for record in records:
        text = record.read_text()
        assert '"num_images"' in text
        text = text.replace('"num_images"', '"num_pictures"')
        record.write_text(text.replace('"missing image"', '"missing picture"'))
    report = run(files=[file])
    assert report.kept_shards == len(records) > 0
    assert report.check == run(files=[file], out=tmp_path / "whole").check
    assert report.check is not None
    assert [problem.kind for problem in report.check.problems] == ["missing image"]


def test_a_kill_leaves_nothing_that_looks_finished_and_a_second_call_goes_on(
    corpus: Any, run: Build, reference: Path, tmp_path: Path
) -> None:
    script = f"""
        import os, signal
        from stf_jax.data.builder import build
        from stf_jax.data.tokenizer import load_tokenizer
        def kill(done, total):
            if done >= 21:
                os.kill(os.getpid(), signal.SIGKILL)
        build([{os.fspath(corpus.json)!r}], {os.fspath(tmp_path / "out")!r},
            images={os.fspath(corpus.images)!r},
            tokenizer=load_tokenizer({os.fspath(reference / "llava-stf")!r}),
            examples_per_shard=7, workers=1, progress=kill)
        """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert killed.returncode == -signal.SIGKILL
    out = tmp_path / "out"
    assert not out.exists()
    with pytest.raises(DatasetError, match=r"out: not finished yet; call .* build' again"):
        Dataset(out)
    # What a kill in the middle of a shard leaves behind.
    (tmp_path / "out.partial/.part-00003.array_record.unfinished").write_bytes(b"half")
    (tmp_path / "out.partial/part-00004.array_record").write_bytes(b"no record of it yet")
    report = run()
    assert report.kept_shards == 3
    assert content(out) == expected(corpus)
    assert report.check is not None
    assert report.check.examples == 60
    assert not (tmp_path / "out.partial").exists()


def test_a_kill_at_the_very_end_costs_nothing(
    corpus: Any, run: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def stop(source: Any, target: Any) -> None:
        if Path(target).name == "out":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not (tmp_path / "out").exists()
    assert run().kept_shards == 9
    assert content(tmp_path / "out") == expected(corpus)


def test_going_on_with_other_input_is_refused(corpus: Any, run: Build, tmp_path: Path) -> None:
    run()
    other = tmp_path / "other.json"
    other.write_text(json.dumps(corpus.entries[:5]), encoding="utf-8")
    with pytest.raises(DatasetError, match=r"out: begun with other values of the training files"):
        run(files=[other])
    # And likewise an unfinished one.
    (tmp_path / "out2.partial").mkdir()
    shutil.copy(tmp_path / "out/source.json", tmp_path / "out2.partial/source.json")
    both = r"the training files, examples_per_shard, the tokenizer or the template"
    with pytest.raises(DatasetError, match=both):
        run(files=[other], out=tmp_path / "out2", examples_per_shard=5, template="llava_v1")


def test_a_folder_of_something_else_is_left_alone(run: Build, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("x")
    with pytest.raises(DatasetError, match=r"not made by 'stf-jax data build'"):
        run()
    assert (tmp_path / "out/thesis.tex").exists()


def read(dataset: Dataset, number: int) -> Stored | DatasetError:
    try:
        return dataset[number]
    except DatasetError as error:
        return error


def test_damage_in_a_shard_is_found_and_named(corpus: Any, run: Build, tmp_path: Path) -> None:
    run(examples_per_shard=60)
    (shard,) = (tmp_path / "out").glob("*array_record*")
    whole = shard.read_bytes()
    kept = expected(corpus)
    # Up to the records' end there is something of an example at each place.
    end = sum(len(image) for _, _, images in kept for image in images)
    named = set()
    for place in range(1000, end, end // 20):
        damage = bytes(byte ^ 0x55 for byte in whole[place : place + 8])
        shard.write_bytes(whole[:place] + damage + whole[place + 8 :])
        dataset = Dataset(tmp_path / "out")
        lost = []
        for number in range(60):
            one = read(dataset, number)
            if isinstance(one, DatasetError):
                assert f"example {number} is damaged" in str(one)
                lost.append(number)
            else:
                assert (one.id, one.conversation, one.images) == kept[number]
        # Damage across a border takes both sides.
        assert 1 <= len(lost) <= 2
        named |= set(lost)
    assert len(named) > 10


def test_another_template_only_adds_an_index(
    corpus: Any, run: Build, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    run()
    out = tmp_path / "out"
    with pytest.raises(DatasetError, match=r"no index for template 'plain' .* one for v1"):
        Dataset(out).index(tokenizer, get_template("plain"))
    shards = {path: path.stat().st_mtime_ns for path in out.glob("*array_record*")}
    report = run(template="plain")
    assert {path: path.stat().st_mtime_ns for path in out.glob("*array_record*")} == shards
    assert report.check is None
    index = Dataset(out).index(tokenizer, get_template("plain"))
    captions = [
        isinstance(entry.get("image"), str) and len(entry["conversations"]) == 2
        for entry in corpus.entries
    ]
    assert (index.first_supervised >= 0).tolist() == captions
    assert report.unfit_for_index == captions.count(False)
    assert f"{captions.count(False)} examples do not fit" in report.render()
    # Under its other name a template is the same.
    assert (
        run(template="vicuna_v1").index
        == Dataset(out).index_path(tokenizer, get_template("v1")).name
    )


def test_nothing_fit_is_an_error(run: Build, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('[{"id": 1}]', encoding="utf-8")
    with pytest.raises(ValueError, match="none of the 1 examples is fit to train on; the first"):
        run(files=[path])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "nowhere: no such folder; make it with 'stf-jax data build'"),
        (".", "not a dataset; make one with 'stf-jax data build'"),
        ("gs://bucket/data", "mount the bucket"),
    ],
)
def test_what_is_no_dataset(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        Dataset(path if ":" in path else tmp_path / path)


def test_show_decodes_an_example_back(
    corpus: Any,
    dataset: Path,
    tokenizer: Tokenizer,
    image_processor: ImageProcessor,
    tmp_path: Path,
) -> None:
    number, entry = next(
        (n, e)
        for n, e in enumerate(corpus.entries)
        if len(e["conversations"]) == 4 and "image" in e
    )
    png = tmp_path / "seen.png"
    shown = show(
        dataset,
        entry["id"],
        tokenizer=tokenizer,
        image_processor=image_processor,
        tokens_per_image=4,
        png=png,
    )
    replies = [turn["value"] for turn in entry["conversations"] if turn["from"] == "gpt"]
    assert [s.text for s in shown.spans if s.supervised] == [f" {reply}</s>" for reply in replies]
    names = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
    assert [s.text for s in shown.spans].count("<image>") == shown.images == len(names)
    question = entry["conversations"][2]["value"]
    assert f"[[ {replies[0]}</s>]]USER: {question} ASSISTANT:[[" in shown.render()
    assert shown.number == number
    index = Dataset(dataset).index(tokenizer, get_template("v1"))
    assert shown.tokens == index.tokens(4)[number]
    # The first image, as the tower sees it.
    pixels = image_processor.pixels(load_image(corpus.images / names[0]))
    left = np.asarray(Image.open(png))[:, :28]
    np.testing.assert_allclose(
        (left / 255 - image_processor.mean) / image_processor.std, pixels, atol=1e-5
    )
    by_number = show(dataset, number, tokenizer=tokenizer, tokens_per_image=4, sequence_length=60)
    assert by_number.truncated
    assert by_number.tokens <= 60
    assert by_number.png is None
    for unknown, message in ((60, "no example 60; it has 0 to 59"), ("x", "with the id 'x'")):
        with pytest.raises(DatasetError, match=message):
            show(dataset, unknown, tokenizer=tokenizer)


@pytest.fixture
def late(corpus: Any, tmp_path: Path) -> Path:
    """The folder of images, with one of them not there yet."""
    folder = Path(shutil.copytree(corpus.images, tmp_path / "late"))
    (folder / "3.jpg").rename(tmp_path / "3.jpg")
    return folder


def test_images_that_came_late_are_not_left_out(
    corpus: Any, run: Build, late: Path, tmp_path: Path
) -> None:
    first = run(images=late)
    assert first.skipped > 0
    # The same again is the same.
    assert run(images=late).check is None
    (tmp_path / "3.jpg").rename(late / "3.jpg")
    with pytest.raises(DatasetError, match="out: built before, from images that have come, gone"):
        run(images=late)
    # An index alone needs no images.
    assert run(images=None).check is None
    shutil.rmtree(tmp_path / "out")
    assert run(images=late).skipped == 0
    assert content(tmp_path / "out") == expected(corpus)


@pytest.mark.parametrize("change", ["came", "changed", "other folder"])
def test_an_unfinished_build_reads_again_what_has_changed(
    change: str,
    corpus: Any,
    run: Build,
    late: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if change == "changed":
        (late / "3.jpg").write_bytes((late / "4.jpg").read_bytes())

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("stf_jax.data.builder._finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run(images=late)
    if change == "other folder":
        late = corpus.images
    else:
        (tmp_path / "3.jpg").replace(late / "3.jpg")
    report = run(images=late)
    assert report.skipped == 0
    assert content(tmp_path / "out") == expected(corpus)
    if change == "came":
        assert 0 < report.kept_shards < report.shards


def test_another_image_processor_is_refused(
    run: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("stf_jax.data.builder._finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run()
    with pytest.raises(DatasetError, match="begun with other values of the image processor"):
        run(image_processor=ImageProcessor(mode="crop"))


@pytest.mark.parametrize("inside", ["text_feature.Text", "features_dict.FeaturesDict", None])
def test_features_import_no_module_of_a_strangers(
    inside: str | None, dataset: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    text = (copy / "features.json").read_text()
    name = f"tensorflow_datasets.core.features.{inside}"
    # TFDS's older form has other keys.
    old = json.dumps({"type": "stranger.Module", "content": {}})
    (copy / "features.json").write_text(text.replace(name, "stranger.Module") if inside else old)
    with pytest.raises(DatasetError, match=r"features.json: names stranger.Module, which no"):
        Dataset(copy)[0]


def test_features_that_are_damaged(dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    (copy / "features.json").write_text("[" * 100_000)
    with pytest.raises(DatasetError, match=r"features.json: missing or damaged; copy it again"):
        Dataset(copy)[0]


@pytest.mark.parametrize("name", ["conversations", "id", "images"])
def test_a_feature_under_another_name_is_a_damaged_example(
    name: str, dataset: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    features = copy / "features.json"
    features.write_text(features.read_text().replace(f'"{name}"', f'"{name}x"'))
    with pytest.raises(DatasetError, match="copy: example 0 is damaged "):
        Dataset(copy)[0]
