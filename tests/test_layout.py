"""Tests what files may import: only what ships with remote code, only folders above, and nothing in a circle."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from launching import REPOSITORY

PACKAGE = "sprite_diffusion"
# Each of the package's folders imports those above it in this list, and no others.
FOLDERS = ["common", "data", "sampling", "studio", "metrics", "sharing", "runs", "training"]
# What is done with a finished model needs nothing of what makes one.
REACH_OF_SCRIPTS = {
    script: FOLDERS[: FOLDERS.index("runs")] for script in ("sample.py", "studio.py", "calculate_metrics.py")
}

ALLOWED = {*sys.stdlib_module_names, "numpy", "torch", "diffusers"}
ALLOWED_IN = {"schedulers": ALLOWED, "models": ALLOWED, "pipelines": {*ALLOWED, "PIL"}}
LIBRARIES = {
    *("accelerate", "datasets", "diffusers", "evaluate", "huggingface_hub", "matplotlib", "numpy", "PIL"),
    *("safetensors", "scipy", "tensorboard", "tokenizers", "torch", "torchvision", "tqdm", "trackio", "transformers"),
    *("wandb", "yaml"),
}


def find_imports(source: str) -> Iterator[tuple[str, list[str]]]:
    """Yields each imported module, wherever the import stands, with the names that are taken from it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            # A relative import keeps its dots: its first part is empty, and never allowed.
            yield "." * node.level + (node.module or ""), [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


def find_targets(source: str) -> set[str]:
    """Returns the dotted names that may be modules: `from a import b` has the targets `a` and `a.b`."""
    return {target for module, names in find_imports(source) for target in (module, *(f"{module}.{n}" for n in names))}


def forbidden_imports(source: str, allowed: set[str]) -> list[str]:
    """Returns the imported modules of packages that are not `allowed`."""
    return [module for module, _ in find_imports(source) if module.split(".")[0] not in allowed]


def reach_of(path: str) -> list[str]:
    """Returns the folders of the package that a file may import, its own among them."""
    folder, *below = Path(path).parts
    if folder == PACKAGE:
        return FOLDERS[: FOLDERS.index(below[0]) + 1] if len(below) > 1 else []
    return [] if folder in ALLOWED_IN else REACH_OF_SCRIPTS.get(path, FOLDERS)


def out_of_reach(path: str, source: str) -> list[str]:
    """Returns the folders of the package that a file imports and may not, and all relative imports."""
    found = []
    for target in sorted(find_targets(source)):
        first, *below = target.split(".")
        if first == "" or (first == PACKAGE and below and below[0] not in reach_of(path)):
            found.append(".".join([first, *below[:1]]))
    return sorted(set(found))


def find_circle(sources: dict[str, str]) -> list[str]:
    """Returns modules that import each other in a circle, the first of them again at the end; empty without one."""
    modules = {path.removesuffix(".py").replace("/", "."): source for path, source in sources.items()}
    graph = {module: find_targets(source) & modules.keys() - {module} for module, source in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def read_sources(*patterns: str) -> dict[str, str]:
    """Returns the text of files by their path in the repository."""
    paths = sorted(path for pattern in patterns for path in REPOSITORY.glob(pattern))
    assert paths
    return {str(path.relative_to(REPOSITORY)): path.read_text() for path in paths}


@pytest.mark.parametrize("folder", ALLOWED_IN)
def test_files_that_ship_as_remote_code_import_only_what_they_may(folder):
    files = [path for path in (REPOSITORY / folder).rglob("*.py") if path.name != "__init__.py"]
    assert files
    forbidden = {path.name: forbidden_imports(path.read_text(), ALLOWED_IN[folder]) for path in files}
    assert not {name: imports for name, imports in forbidden.items() if imports}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import math, torch.nn\nfrom diffusers.utils import BaseOutput", []),
        ("import numpy, scipy.stats", ["scipy.stats"]),
        ("from training.config import Config", ["training.config"]),
        ("from . import sibling", ["."]),
        ("from .sibling import name", [".sibling"]),
        ("def f():\n    if True:\n        import PIL.Image", ["PIL.Image"]),
    ],
)
def test_the_check_of_imports_finds_them(source, expected):
    assert forbidden_imports(source, ALLOWED) == expected


def test_every_folder_of_the_package_has_its_place():
    files = (REPOSITORY / PACKAGE).rglob("*.py")
    assert {path.relative_to(REPOSITORY / PACKAGE).parts[0] for path in files} == {*FOLDERS, "__init__.py"}


def test_files_import_only_folders_above_theirs():
    """Scripts among them, and what ships as remote code, which imports nothing of the package."""
    sources = read_sources("*.py", f"{PACKAGE}/**/*.py", *(f"{folder}/**/*.py" for folder in ALLOWED_IN))
    found = {path: out_of_reach(path, source) for path, source in sources.items()}
    assert not {path: folders for path, folders in found.items() if folders}


def test_no_files_import_each_other_in_a_circle():
    assert find_circle(read_sources(f"{PACKAGE}/**/*.py")) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("sprite_diffusion/data/a.py", "from sprite_diffusion.data.b import c\nimport sprite_diffusion.common.d", []),
        ("sprite_diffusion/data/a.py", "import runs.sampling, training\nfrom torch import sprite_diffusion", []),
        ("sprite_diffusion/data/a.py", "from sprite_diffusion.sampling.b import c", ["sprite_diffusion.sampling"]),
        ("sprite_diffusion/data/a.py", "from sprite_diffusion import sampling as b", ["sprite_diffusion.sampling"]),
        ("sprite_diffusion/data/a.py", "import sprite_diffusion.runs as b", ["sprite_diffusion.runs"]),
        ("sprite_diffusion/data/a.py", "from ..runs import b", ["."]),
        ("sprite_diffusion/common/a.py", "from sprite_diffusion.data import b", ["sprite_diffusion.data"]),
        ("sprite_diffusion/metrics/a.py", "from sprite_diffusion.sharing import b", ["sprite_diffusion.sharing"]),
        ("sprite_diffusion/sharing/a.py", "from sprite_diffusion.runs import b", ["sprite_diffusion.runs"]),
        ("sprite_diffusion/runs/a.py", "from sprite_diffusion.training import b", ["sprite_diffusion.training"]),
        ("sprite_diffusion/training/a.py", "from sprite_diffusion import runs, common, sharing, training", []),
        ("sprite_diffusion/__init__.py", "from sprite_diffusion import common", ["sprite_diffusion.common"]),
        ("schedulers/a.py", "def f():\n    from sprite_diffusion import common", ["sprite_diffusion.common"]),
        ("models/__init__.py", "import sprite_diffusion.data.sprites", ["sprite_diffusion.data"]),
        ("pipelines/a.py", "from sprite_diffusion.sampling import samplers", ["sprite_diffusion.sampling"]),
        ("sample.py", "from sprite_diffusion.sharing import trackers", []),
        ("sample.py", "from sprite_diffusion.runs.config import b", ["sprite_diffusion.runs"]),
        ("sample.py", "def f():\n    with g():\n        import sprite_diffusion.runs", ["sprite_diffusion.runs"]),
        ("calculate_metrics.py", "from sprite_diffusion.training import b", ["sprite_diffusion.training"]),
        ("train_conditional.py", "from sprite_diffusion.training import b", []),
    ],
)
def test_the_check_of_folders_finds_what_is_out_of_reach(path, source, expected):
    assert out_of_reach(path, source) == expected


@pytest.mark.parametrize(
    ("sources", "circle"),
    [
        ({"a": "from sprite_diffusion.data.b import x", "b": "import sprite_diffusion.data.c", "c": ""}, set()),
        ({"a": "from sprite_diffusion.data import a", "b": "from b import a"}, set()),
        ({"a": "from sprite_diffusion.data import b", "b": "from sprite_diffusion.data.a import x"}, {"a", "b"}),
        (
            {
                "a": "import sprite_diffusion.data.b",
                "b": "def f():\n    from sprite_diffusion.data.c import x",
                "c": "from sprite_diffusion.data import a, d",
                "d": "",
            },
            {"a", "b", "c"},
        ),
    ],
)
def test_the_check_of_circles_finds_them(sources, circle):
    found = find_circle({f"sprite_diffusion/data/{name}.py": source for name, source in sources.items()})
    assert {module.rpartition(".")[2] for module in found} == circle


def test_nothing_at_the_top_hides_a_library():
    # Scripts run from the repository's root, which then comes first on the import path.
    names = {path.stem for path in REPOSITORY.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert {"schedulers", "models", "pipelines"} <= names
    assert not names & (LIBRARIES | sys.stdlib_module_names)
