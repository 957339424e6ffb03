"""What may import what: every package only those below it, and no two one another."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import stf_jax

ROOT = Path(stf_jax.__file__).parent

# From the bottom to the top; packages of one tier do not import each other.
TIERS = (
    ("util",),
    ("config",),
    ("data",),
    ("parallel",),
    ("models",),
    ("systems",),
    ("store",),
    ("convert",),
    ("train", "infer"),
    ("eval", "plan", "search", "serve"),
    ("demo",),
    ("cli",),
)
TIER = {package: number for number, packages in enumerate(TIERS) for package in packages}


def imports_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of each import of ours: inside functions and for types alone, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            # `from stf_jax import data`, `from stf_jax.data import batch`
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "stf_jax":
                yield node.lineno, name


def all_imports() -> Iterator[tuple[Path, int, str]]:
    """File, line and module of each import in a package; the root may import anything."""
    for file in sorted(ROOT.glob("*/**/*.py")):
        for line, name in imports_of(ast.parse(file.read_text(encoding="utf-8"))):
            yield file.relative_to(ROOT), line, name


def is_allowed(package: str, name: str) -> bool:
    """Whether a module of `package` may import what is called `name`."""
    target = name.partition(".")[2].partition(".")[0]
    # The root itself, which leads everywhere, is in no tier.
    return target == package or TIER.get(target, len(TIERS)) < TIER[package]


def home(name: str) -> str:
    """The module that an imported name lies in: "stf_jax.data.batch.Batch" -> "data/batch.py"."""
    parts = name.split(".")[1:]
    while parts:
        for file in (
            ROOT.joinpath(*parts).with_suffix(".py"),
            ROOT.joinpath(*parts, "__init__.py"),
        ):
            if file.is_file():
                return file.relative_to(ROOT).as_posix()
        parts.pop()
    return "__init__.py"


def check_no_circle(edges: Iterator[tuple[str, str]]) -> None:
    """Fails with the names on a circle if there is one."""
    graph: dict[str, set[str]] = {}
    for source, target in edges:
        if source != target:
            graph.setdefault(source, set()).add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_packages_import_only_those_below_them() -> None:
    wrong = [
        f"stf_jax/{file}:{line} imports {name}"
        for file, line, name in all_imports()
        if not is_allowed(file.parts[0], name)
    ]
    assert not wrong, "\n".join(wrong)


def test_packages_import_one_another_in_no_circle() -> None:
    check_no_circle((file.parts[0], home(name).split("/")[0]) for file, _, name in all_imports())


def test_modules_import_one_another_in_no_circle() -> None:
    check_no_circle((file.as_posix(), home(name)) for file, _, name in all_imports())


def test_every_package_has_a_tier() -> None:
    assert sorted(file.parent.name for file in ROOT.glob("*/__init__.py")) == sorted(TIER)


def test_the_root_holds_nothing_else() -> None:
    files = {file.name for file in ROOT.iterdir() if file.is_file()}
    assert files == {"__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize(
    ("package", "line", "fits"),
    [
        ("data", "from stf_jax.util.files import read_json", True),
        ("data", "from stf_jax.data import batch", True),
        ("data", "def f():\n    from stf_jax.models.llava import Llava", False),
        ("data", "if TYPE_CHECKING:\n    from stf_jax import models", False),
        ("train", "import stf_jax.infer.load", False),
        ("infer", "import stf_jax.train.loop", False),
        ("eval", "import stf_jax.plan.client as client", False),
        ("demo", "import stf_jax", False),
        ("util", "import jax, numpy", True),
        ("util", "from stf_jax.elsewhere import thing", False),
    ],
)
def test_the_rule_itself(package: str, line: str, fits: bool) -> None:
    assert all(is_allowed(package, name) for _, name in imports_of(ast.parse(line))) == fits
