"""The first thing to see work: a PyTorch LLaVA-STF checkpoint comes in, answers, and goes back out.

The checkpoint is the small random one of the tests, so its answer means nothing; what counts is
that PyTorch gives the same one, and that every tensor comes back as it went in.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

REFERENCE = Path("tests/data/reference")


def stf_jax(*arguments: str | Path) -> str:
    """Runs one stf-jax command, shown as a user would type it, and returns its standard output."""
    command = ["stf-jax", *map(str, arguments)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    sys.stdout.write(result.stdout)
    if result.returncode:
        raise SystemExit(f"error: the command above exited with {result.returncode}")
    return result.stdout


def tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The dtype, shape and bytes of each tensor in a directory's .safetensors files, by name."""
    found = {}
    for path in directory.glob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            found[name] = (entry["dtype"], tuple(entry["shape"]), content[begin:end])
    return found


def main() -> None:
    """Imports, asks, exports, compares."""
    source = REFERENCE / "llava-stf"
    expected = json.loads((REFERENCE / "generation.json").read_text())[0]
    with tempfile.TemporaryDirectory() as scratch:
        native, exported = Path(scratch, "native"), Path(scratch, "exported")
        stf_jax("convert", "inspect", source)
        stf_jax("convert", "import", source, native)
        answer = stf_jax(
            *("generate", native, "--image", REFERENCE / "images" / expected["image"]),
            *("--prompt", expected["question"], "--template", expected["template"]),
            *("--max-new-tokens", "24", "--json"),
        )
        stf_jax("convert", "export", native, exported, "--layout", "llava-stf")

        # PyTorch's list has BOS before the answer and may have EOS after it.
        ids = [token for token in json.loads(answer)["token_ids"] if token not in (1, 2)]
        if ids != [token for token in expected["output_ids"] if token not in (1, 2)]:
            raise SystemExit(f"error: PyTorch answers {expected['output_ids']}, this {ids}")
        print(f"\nThe answer is PyTorch's, token for token: {ids}")

        before, after = tensors(source), tensors(exported)
        if before != after:
            names = sorted(n for n in before | after if before.get(n) != after.get(n))
            raise SystemExit("error: these tensors came back changed: " + ", ".join(names))
        print(f"All {len(before)} tensors came back with the same bytes.")


if __name__ == "__main__":
    main()
