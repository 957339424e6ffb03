"""Imports a checkpoint of LLaVA-STF-7B's size: peak memory and speed, beside a plain `cp`.

Random float16 weights in the published layout (5 GB shards, vision tower inside) are written to
DIR, copied with `cp`, and imported by a child process whose memory is sampled; then all is
deleted. Needs about 45 GB of disk. Not part of the tests.

    python benchmarks/convert_7b.py [DIR]
"""

import argparse
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

import numpy as np
from etils import epath

from stf_jax.convert import import_checkpoint
from stf_jax.convert.dtypes import FLOATS
from stf_jax.convert.exporter import SHARD_BYTES, split
from stf_jax.convert.layouts import published_name
from stf_jax.convert.mapping import carried_shapes, table
from stf_jax.convert.safetensors_file import SafetensorsWriter, TensorInfo
from stf_jax.convert.sidecars import llava_sidecars
from stf_jax.systems import named_config

LIMIT = 6 * 2**30


def make(directory: pathlib.Path) -> int:
    """Writes the checkpoint; returns its size in bytes."""
    config = named_config("llava_stf_7b")
    shapes = {name: entry.shape for entry in table(config) for name in entry.tensors}
    shapes |= carried_shapes(config)
    float16 = FLOATS["float16"]
    infos = {
        published_name(name, "llava-stf"): TensorInfo(shape, float16)
        for name, shape in shapes.items()
    }
    infos = dict(sorted(infos.items()))
    shards = split(infos, SHARD_BYTES)
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(2**26, dtype=np.float32) * 0.02).astype(float16)
    weight_map = {}
    directory.mkdir()
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        writer = SafetensorsWriter(directory / file, {name: infos[name] for name in shard})
        for name in shard:
            shape = infos[name].shape
            start = int(rng.integers(2**26))
            values = np.resize(np.roll(noise, start), math.prod(shape)).reshape(shape)
            writer.write(name, values)
            weight_map[name] = file
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    empty = directory / "empty"
    empty.mkdir()
    sidecars = llava_sidecars(epath.Path(empty), config, rows=config.text.vocab_size, dtype=None)
    empty.rmdir()
    (directory / "config.json").write_bytes(sidecars["config.json"])
    return sum(info.nbytes for info in infos.values())


def resident(pid: int) -> int:
    """Bytes of a process in memory that are not file cache."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status)
    return 1024 * sum(int(fields[key].split()[0]) for key in ("RssAnon", "RssShmem"))


def measure_import(source: pathlib.Path, out: pathlib.Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of an import in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(
        target=import_checkpoint, args=(source, out)
    )
    start = time.perf_counter()
    process.start()
    assert process.pid is not None
    peak = 0
    while process.is_alive():
        try:
            peak = max(peak, resident(process.pid))
        except (KeyError, ProcessLookupError, FileNotFoundError):
            break  # It has just ended.
        time.sleep(0.02)
    process.join()
    if process.exitcode:
        raise SystemExit("the import failed")
    return time.perf_counter() - start, peak


def copy(source: pathlib.Path, out: pathlib.Path) -> float:
    """Seconds of `cp -r`, with what it wrote on disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, out], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=pathlib.Path, default=tempfile.gettempdir())
    with tempfile.TemporaryDirectory(dir=parser.parse_args().directory) as folder:
        work = pathlib.Path(folder)
        size = make(work / "source")
        print(f"source          {size / 1e9:6.2f} GB")
        os.sync()
        seconds = copy(work / "source", work / "copy")
        print(f"cp              {seconds:6.1f} s  {size / seconds / 1e9:5.2f} GB/s")
        shutil.rmtree(work / "copy")
        os.sync()
        seconds, peak = measure_import(work / "source", work / "native")
        print(f"import          {seconds:6.1f} s  {size / seconds / 1e9:5.2f} GB/s")
        print(f"peak resident   {peak / 2**30:6.2f} GiB, limit {LIMIT / 2**30:.0f} GiB")
    if peak >= LIMIT:
        raise SystemExit("too much memory")


if __name__ == "__main__":
    main()
