"""The rule that lets schedulers, models and pipelines ship as remote code: what each of their files may import."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {*sys.stdlib_module_names, "numpy", "torch", "diffusers"}
ALLOWED_IN = {"schedulers": ALLOWED, "models": ALLOWED, "pipelines": {*ALLOWED, "PIL"}}
LIBRARIES = {
    *("accelerate", "datasets", "diffusers", "evaluate", "huggingface_hub", "numpy", "PIL", "safetensors", "scipy"),
    *("tensorboard", "torch", "torchvision", "tqdm", "trackio", "transformers", "wandb", "yaml"),
}


def forbidden_imports(source: str, allowed: set[str]) -> list[str]:
    forbidden = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]  # relative: an empty first part, never allowed
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        forbidden += [name for name in names if name.split(".")[0] not in allowed]
    return forbidden


@pytest.mark.parametrize("folder", ALLOWED_IN)
def test_files_that_ship_as_remote_code_import_only_what_they_may(folder):
    files = [path for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"]
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


def test_nothing_at_the_top_hides_a_library():
    # Scripts run from the repository's root, which then comes first on the import path.
    names = {path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert {"schedulers", "models", "pipelines"} <= names
    assert not names & (LIBRARIES | sys.stdlib_module_names)
