"""Tests that the files, functions and links which the README and the docs name are there."""

import re

import pytest
from launching import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
TREE = re.search(r"## The files\n\n```\n(.*?)```", README, re.DOTALL)[1].splitlines()
LISTED_FOLDERS = ["schedulers", "models", "pipelines", "sprite_diffusion/*", "configs", "benchmarks", "docs"]


def listed_files() -> set[str]:
    """Returns the files of the README's tree, in which those of a folder are indented below it."""
    files, folder = set(), ""
    for line in TREE:
        name, description = re.fullmatch(r"( *\S+) +(\S.*)", line).groups()
        assert description
        if name.endswith("/"):
            folder = name
        else:
            files.add(folder + name.strip() if name.startswith("  ") else name)
    return files


def test_tree_lists_every_file():
    patterns = ["*.py", *(f"{folder}/*.{ending}" for folder in LISTED_FOLDERS for ending in ("py", "yaml", "md"))]
    there = {str(p.relative_to(REPOSITORY)) for pattern in patterns for p in REPOSITORY.glob(pattern)}
    assert listed_files() == {name for name in there if not name.endswith("__init__.py")}


def test_files_and_functions_of_the_tours_exist():
    tours = README[README.index("## Two tours") : README.index("## The files")]
    stops = re.findall(r"`([\w/]+\.py)`, `([\w.]+)`", tours)
    assert len(stops) >= 8
    for file, function in stops:
        source = (REPOSITORY / file).read_text()
        for name in function.split("."):
            assert re.search(rf"(def|class) {name}\b", source), (file, function)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (REPOSITORY / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    path = REPOSITORY / page
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_entry_scripts_stay_thin():
    for script, limit in [("train_unconditional.py", 80), ("train_conditional.py", 100)]:
        assert len((REPOSITORY / script).read_text().splitlines()) <= limit
