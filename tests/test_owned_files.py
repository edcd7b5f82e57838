"""Nothing of the user's is lost: a run removes and replaces only the files which it has listed as its own."""

import json
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from inspecting import wait_for, weights
from launching import TINY, finish, kill, start
from PIL import Image
from safetensors.torch import load_file, save_file

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.common.owned_files import LOCK_FILE, LOCK_OWNER_FILE, OwnedFiles
from sprite_diffusion.common.run_files import LIST_FILE, list_checkpoints
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.folder import prepare_output_dir, read_folder_state
from sprite_diffusion.runs.manifest import find_damage

MINE = (
    *("analysis.py", "samples/holiday.png", "unet/notes.txt", "logs/lab_notebook.txt", "checkpoint-notes.md"),
    *("metrics.json", "src/model.py", "data.partial", "unet/config.json", "pipeline.py", "training_config.yaml"),
)

ONE_EPOCH = f"{TINY} --num_epochs 1 --snapshot_epochs 1"


def fill(folder: Path, names=MINE) -> dict[str, bytes]:
    """Puts files of the user's into a folder. Returns what they hold."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    return read(folder, names)


def read(folder: Path, names=MINE) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_script):
    """A run of one epoch, for tests to copy."""
    output_dir = tmp_path_factory.mktemp("trained") / "run"
    run_script("train_unconditional", ONE_EPOCH, output_dir)
    return output_dir


@pytest.fixture
def run_dir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def refuses(run_script, capsys):
    """Runs a command that must end with one line and status 2. Returns the line."""

    def run(flags: str, output_dir: Path) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_script("train_unconditional", f"{TINY} {flags}", output_dir)
        assert ended.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.mark.parametrize("flags", ["", "--overwrite_output_dir", "--resume_from_checkpoint latest"])
def test_a_folder_that_never_held_a_run_is_left_as_it_is(refuses, tmp_path, flags):
    before = fill(tmp_path / "thesis")
    error = refuses(flags, tmp_path / "thesis")
    assert "is not empty and has no run_files.txt" in error
    assert "name another folder" in error
    assert read(tmp_path / "thesis") == before
    assert {str(p.relative_to(tmp_path / "thesis")) for p in (tmp_path / "thesis").rglob("*") if p.is_file()} == {
        *MINE
    }


def test_overwriting_a_run_keeps_what_is_not_the_runs(run_script, tmp_path):
    run_script("train_unconditional", f"{TINY} --snapshot_epochs 1", tmp_path)
    mine = [name for name in MINE if not (tmp_path / name).exists()]
    assert len(mine) == 8  # all but the three names that the run has
    mine += ["checkpoint-8/notes.txt", "snapshots/epoch-0001/notes.txt", "logs/sprite-diffusion/notes.txt"]
    before = fill(tmp_path, mine)
    run_script("train_unconditional", f"{TINY} --num_epochs 1 --overwrite_output_dir", tmp_path)
    assert read(tmp_path, mine) == before
    assert not (tmp_path / "checkpoint-6").exists()
    assert {p.name for p in (tmp_path / "checkpoint-8").iterdir()} == {"notes.txt"}
    assert {p.name for p in (tmp_path / "snapshots").iterdir()} == {"epoch-0001"}
    assert {p.name for p in (tmp_path / "snapshots" / "epoch-0001").iterdir()} == {"notes.txt"}


def test_a_checkpoint_with_a_file_of_the_users_is_not_removed(run_script, tmp_path, capsys):
    run_script("train_unconditional", TINY, tmp_path)
    (tmp_path / "checkpoint-3" / "notes.txt").write_text("mine")
    flags = f"{TINY} --num_epochs 3 --resume_from_checkpoint latest --checkpoints_total_limit 2"
    run_script("train_unconditional", flags, tmp_path)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-9", "checkpoint-12"}
    assert "checkpoint-3 is kept: notes.txt in it was not written by the run" in capsys.readouterr().err


def test_a_file_in_the_way_is_not_replaced(refuses, run_dir):
    (run_dir / "samples" / "step-000008.png").write_text("mine")
    error = refuses("--resume_from_checkpoint latest", run_dir)
    assert f"{run_dir}/samples/step-000008.png is in the way and was not written by this run" in error
    assert (run_dir / "samples" / "step-000008.png").read_text() == "mine"


@pytest.mark.parametrize("name", ["samples", "snapshots", "unet", "scheduler", "logs"])
def test_links_are_not_followed(refuses, run_dir, tmp_path, name):
    shutil.move(run_dir / name, tmp_path / "elsewhere")
    (run_dir / name).symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.joinpath("elsewhere").rglob("*"))
    for flags in ("--overwrite_output_dir", "--resume_from_checkpoint latest"):
        assert f"{run_dir}/{name} is a link" in refuses(flags, run_dir)
    OwnedFiles(run_dir).remove(run_dir)  # whatever the checks let through
    assert sorted(tmp_path.joinpath("elsewhere").rglob("*")) == before


@pytest.mark.parametrize("output", ["X", "X/samples", "X/samples/run"])
def test_outputs_and_training_images_are_kept_apart(refuses, tmp_path, output):
    images = tmp_path / "X" / "samples"
    images.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(images / f"{i}.png")
    before = {path: path.read_bytes() for path in images.iterdir()}
    for flags in ("", "--overwrite_output_dir"):
        error = refuses(f"--train_data_dir {images} {flags}", tmp_path / output)
        assert "one lies in the other" in error
    assert {path: path.read_bytes() for path in images.iterdir()} == before


def test_a_folder_belongs_to_one_run_at_a_time(refuses, run_script, tmp_path):
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    with FileLock(output_dir / LOCK_FILE):
        (output_dir / LOCK_OWNER_FILE).write_text(json.dumps({"process": 4711, "host": "elsewhere"}))
        assert "is in use by process 4711 on elsewhere" in refuses("", output_dir)
    run_script("train_unconditional", f"{TINY} --num_epochs 1", output_dir)  # a lock file alone is no obstacle
    owner = json.loads((output_dir / LOCK_OWNER_FILE).read_text())
    assert owner == {"process": os.getpid(), "host": socket.gethostname()}


def test_two_runs_at_once_do_not_mix(tmp_path):
    flags = f"{TINY} --num_epochs 400 --checkpointing_steps 50"
    first = start("train_unconditional", flags, tmp_path)
    assert wait_for(first, tmp_path, LOCK_OWNER_FILE)
    second = start("train_unconditional", f"{flags} --resume_from_checkpoint latest", tmp_path)
    error = finish(second, 2).stderr
    assert f"is in use by process {first.pid} on {socket.gethostname()}" in error
    kill(first)
    finish(start("train_unconditional", flags.replace("400", "2"), tmp_path / "free"))


def test_a_folder_that_another_run_has_used_since_it_was_looked_at_is_refused(tmp_path):
    """The other run may have begun and ended between the look and the lock, while the images were decoded."""
    config = TrainingConfig(output_dir=str(tmp_path))
    known = read_folder_state(tmp_path)
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(UserInputError, match="was used by another run meanwhile: give the command again"):
        prepare_output_dir(config, known)
    assert not (tmp_path / "training_config.yaml").exists()


def test_a_killed_process_leaves_nothing_unlisted(tmp_path):
    process = start("train_unconditional", f"{TINY} --num_epochs 50", tmp_path)
    assert wait_for(process, tmp_path, "checkpoint-*")
    kill(process)
    trackers = tmp_path / "logs"  # the newest of their files may have come after the last look
    others = [path for path in OwnedFiles(tmp_path).others(tmp_path) if trackers not in path.parents]
    assert others == []


def test_names_outside_of_the_folder_are_no_names(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "outside.txt").write_text("mine")
    (tmp_path / "run" / LIST_FILE).write_text(f"../outside.txt\n{tmp_path}/outside.txt\n")
    OwnedFiles(tmp_path / "run").remove(tmp_path / "run")
    assert (tmp_path / "outside.txt").read_text() == "mine"


def test_another_runs_checkpoint_is_not_taken_for_this_runs(refuses, run_script, tmp_path):
    for name in ("one", "other"):
        run_script("train_unconditional", f"{TINY} --num_epochs 1", tmp_path / name)
    error = refuses(f"--resume_from_checkpoint {tmp_path}/other/checkpoint-3", tmp_path / "one")
    assert f"is not in --output_dir {tmp_path}/one" in error


def test_weights_that_are_not_finite_are_not_sampled(run_script, run_dir, capsys):
    file = run_dir / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"][0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    for script in ("sample", "calculate_metrics"):
        with pytest.raises(SystemExit) as ended:
            run_script(script, str(run_dir))
        assert ended.value.code == 2
        assert "the weights of its network are not finite (conv_in.weight)" in capsys.readouterr().err


def test_a_presets_limit_does_not_bind_other_images(run_script, tmp_path, capsys):
    images = tmp_path / "images"
    for i in range(30):
        (images / f"class-{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i, 0, 0)).save(images / f"class-{i % 2}" / f"{i}.png")
    flags = TINY.replace("--max_train_samples 20", "")
    run_script("train_unconditional", f"{flags} --num_epochs 1 --train_data_dir {images}", tmp_path / "run")
    saved = yaml.safe_load((tmp_path / "run" / "training_config.yaml").read_text())
    assert saved["max_train_samples"] is None
    assert f"data       {images}: 30 images of 16x16" in capsys.readouterr().out
    limit = "--max_train_samples 10 --overwrite_output_dir"
    run_script("train_unconditional", f"{flags} --num_epochs 1 --train_data_dir {images} {limit}", tmp_path / "run")
    assert f"data       {images}: 10 of 30 images of 16x16" in capsys.readouterr().out


def test_a_warm_up_longer_than_the_run_is_told_before_the_first_step(run_script, tmp_path, capsys):
    run_script("train_unconditional", f"{TINY} --num_epochs 1 --lr_warmup_steps 4", tmp_path)
    err = capsys.readouterr().err
    assert "--lr_warmup_steps 4 of 4 steps" in err


def test_a_folder_that_goes_at_the_wrong_moment(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    (folder / "checkpoint-20").mkdir(parents=True)
    files = OwnedFiles(folder)
    with monkeypatch.context() as patch:  # pathlib has seen the folder, and then there is none
        patch.setattr(os, "scandir", lambda path: os.listdir(folder / "no-such"))
        assert list_checkpoints(folder) == []
        with pytest.raises(UserInputError, match="is lost"):
            files.claim_all_but(folder, earlier=set())
    shutil.rmtree(folder)
    with pytest.raises(UserInputError, match=r"checkpoint-20 can't be written.*is lost"):
        files.remove_folder(folder / "checkpoint-20")


@pytest.mark.parametrize("change", ["removed", "moved"])
def test_a_folder_that_goes_while_a_run_lasts_is_made_anew(tmp_path, change):
    """Or the run ends with a line, if it was writing a file at that moment."""
    output_dir = tmp_path / "run"
    process = start(
        "train_unconditional", f"{TINY} --num_epochs 20 --checkpointing_steps 20 --logger none", output_dir
    )
    assert wait_for(process, output_dir, "checkpoint-20/manifest.json")
    if change == "removed":
        shutil.rmtree(output_dir, ignore_errors=True)  # the run may write into it meanwhile
    else:
        output_dir.rename(tmp_path / "moved")
    error = process.communicate()[1]
    assert "Traceback" not in error
    if process.returncode == 2:
        assert f"what the run did since its last checkpoint is lost: make {output_dir} a folder" in error
        return
    assert process.returncode == 0
    assert weights(output_dir)
    assert find_damage(output_dir / "checkpoint-80") == ""
    assert (output_dir / "training_config.yaml").is_file()


def test_a_folder_that_becomes_a_file_while_a_run_lasts_ends_it_with_a_line(tmp_path):
    output_dir = tmp_path / "run"
    process = start(
        "train_unconditional", f"{TINY} --num_epochs 20 --checkpointing_steps 20 --logger none", output_dir
    )
    assert wait_for(process, output_dir, "checkpoint-20/manifest.json")
    output_dir.rename(tmp_path / "moved")
    while not output_dir.is_file():  # the run may make it anew meanwhile
        shutil.rmtree(output_dir, ignore_errors=True)
        with suppress(FileExistsError, IsADirectoryError):
            output_dir.touch(exist_ok=False)
    error = finish(process, 2).stderr
    assert f"what the run did since its last checkpoint is lost: make {output_dir} a folder" in error
    assert "Traceback" not in error
    assert output_dir.read_text() == ""


def test_a_missing_file_that_is_not_the_runs_is_no_error_of_the_users(tmp_path):
    """A fault of a library or of ours keeps its traceback, and is not put down to the folder."""
    files = OwnedFiles(tmp_path)
    with pytest.raises(FileNotFoundError), files.writing(tmp_path / "a.txt"):
        Path("/nowhere/else").read_text()
    with pytest.raises(UserInputError, match="can't be written"), files.writing(tmp_path / "a.txt") as partial:
        (partial / "below").write_text("")


@pytest.mark.parametrize(
    "name", ["model_index.json", "run_files.txt", "unet", "samples/logs", "checkpoint-5", "pipeline.py", ".run.lock"]
)
def test_trackers_do_not_take_the_names_of_a_runs_files(refuses, tmp_path, name):
    assert f"--logging_dir {name}: a run has other files of this name" in refuses(f"--logging_dir {name}", tmp_path)


@pytest.mark.parametrize(
    "summary",
    [
        "[]",
        "{}",
        "null",
        "7",
        "{",
        '{"global_step": null, "total_steps": 1}',
        '{"global_step": Infinity, "total_steps": 1}',
        3000 * "[",
        "\xff",
    ],
    ids=range(9),
)
def test_a_garbled_summary_does_not_stop_a_run_from_going_on(run_script, run_dir, summary):
    (run_dir / "training_summary.json").write_text(summary, encoding="latin-1")
    run_script("train_unconditional", ONE_EPOCH, run_dir)
    assert json.loads((run_dir / "training_summary.json").read_text())["global_step"] == 4
