"""What `pip install .` leaves behind, scripts started from any folder, and the README's notebook cell."""

import ast
import re
import shutil
from pathlib import Path

import pytest
from launching import PYTHON, REPOSITORY, TINY, run_command
from PIL import Image

SHORTER = {
    "max_train_steps=500": "max_train_steps=2, block_out_channels=[8], attention_levels=[0], attention_head_dim=8, "
    "ddpm_num_inference_steps=2, eval_batch_size=1",
    "batch_size=16, num_inference_steps=50": "batch_size=16, num_inference_steps=2",
}  # of the notebook cell: a network and a run of seconds
SCRIPTS = ("train_unconditional.py", "train_conditional.py", "sample.py", "calculate_metrics.py")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that `pip install .` has installed into, not editable and without dependencies."""
    source, target = tmp_path_factory.mktemp("source") / "clone", tmp_path_factory.mktemp("site-packages")
    listed = run_command(["git", "ls-files", "-co", "--exclude-standard"]).stdout.splitlines()
    for name in listed:
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, source / name)
    pip = [*PYTHON, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", str(target)]
    run_command([*pip, str(source)], cwd=source, fork=False)
    return target


def test_only_the_package_and_what_ships_is_installed(installed):
    """schedulers, models and pipelines are imported under these names by the files that ship to the Hub as well."""
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"sprite_diffusion", "schedulers", "models", "pipelines"}


def test_an_installed_package_has_its_presets_and_drawings(installed, tmp_path):
    code = (
        "import sprite_diffusion, sys\n"
        "from sprite_diffusion.runs.presets import load_preset\n"
        "from sprite_diffusion.data.sprites import draw_sprites\n"
        "preset = load_preset('sprites_conditional.yaml')\n"
        "print(sprite_diffusion.__file__, preset.max_train_steps, len(draw_sprites(5)[0]))"
    )
    result = run_command([*PYTHON, "-c", code], environment={"PYTHONPATH": str(installed)}, cwd=tmp_path)
    file, max_train_steps, num_sprites = result.stdout.split()
    assert Path(file).is_relative_to(installed)
    preset = (REPOSITORY / "configs" / "sprites_conditional.yaml").read_text()
    assert int(max_train_steps) == int(re.search(r"max_train_steps: (\d+)", preset)[1])
    assert num_sprites == "5"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_by_their_path_from_any_folder(script, tmp_path):
    result = run_command([*PYTHON, str(REPOSITORY / script), "--help"], environment={"PYTHONPATH": ""}, cwd=tmp_path)
    assert "usage:" in result.stdout


def test_a_preset_is_found_from_any_folder(tmp_path):
    flags = TINY.split()
    flags[flags.index("--config") + 1] = (
        "configs/smoke_cpu.yaml"  # as in the README, whose reader stands elsewhere here
    )
    command = [*PYTHON, str(REPOSITORY / "train_unconditional.py"), *flags, "--num_epochs", "1"]
    run_command([*command, "--output_dir", "run"], environment={"PYTHONPATH": ""}, cwd=tmp_path)
    assert (tmp_path / "run" / "model_index.json").is_file()


def test_the_notebook_cell_of_the_readme_trains_from_a_tensor_and_shows_a_grid(tmp_path):
    readme = (REPOSITORY / "README.md").read_text()
    cell = re.search(r"## In a notebook\n.*?```python\n(.*?)```", readme, re.DOTALL)[1]
    assert len([line for line in cell.splitlines() if line]) == 10
    shorter = cell
    for long, short in SHORTER.items():
        assert long in shorter
        shorter = shorter.replace(long, short)
    *statements, last = ast.parse(shorter).body
    assert isinstance(last, ast.Expr)  # which a notebook shows
    program = "\n".join(map(ast.unparse, statements)) + f"\n{ast.unparse(last)}.save('grid.png')\n"
    printed = run_command([*PYTHON, "-c", program], cwd=tmp_path).stdout
    assert re.search(r"^data       images in memory: [\d,]+ images of 16x16, ", printed, re.MULTILINE)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (4 * 68 + 4, 4 * 68 + 4)  # sixteen sprites of 64 pixels, 4 apart
    assert (tmp_path / "runs" / "notebook" / "model_index.json").is_file()
