"""Tests what TensorBoard, W&B and trackio have recorded of runs, read from their files."""

import json
import re
import sqlite3
import struct
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from inspecting import read_events
from launching import PYTHON, REPOSITORY, TINY, finish, run_command, start
from PIL import Image
from tiny_network import make_tiny_network
from wandb.proto import wandb_internal_pb2 as pb

from sprite_diffusion.data.sprites import CLASS_NAMES
from sprite_diffusion.sharing.trackers import Trackers


def read_wandb_file(path: Path) -> list:
    """Returns the records of an offline run: LevelDB's log format after a header of 7 bytes, in blocks of 32 KiB."""
    data, position, parts, records = path.read_bytes(), 7, [], []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no record begins in the last bytes of a block
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = pb.Record()
            record.ParseFromString(b"".join(parts))
            records.append(record)
            parts = []
    return records


def wandb_records(logging_dir: Path) -> list:
    files = sorted((logging_dir / "wandb").glob("offline-run-*/*.wandb"))
    return [record for file in files for record in read_wandb_file(file)]


def history(records: list) -> list[dict]:
    """Returns what was logged, as a dictionary for each call."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row: dict = {}
            for item in record.history.item:
                *folders, name = item.nested_key or [item.key]
                nested = row
                for folder in folders:
                    nested = nested.setdefault(folder, {})
                nested[name] = json.loads(item.value_json)
            rows.append(row)
    return rows


def artifacts(records: list) -> list:
    return [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tracked run that is stopped, resumed from an earlier step than its last, and sampled by `--compare`."""
    folder = tmp_path_factory.mktemp("tracked")
    output_dir = folder / "sprites run"
    environment = {"WANDB_MODE": "offline", "WANDB_DATA_DIR": str(folder), "TRACKIO_DIR": str(folder / "trackio")}
    flags = f"{TINY} --logger all --use_ema --save_model_epochs 1 --tracker_job_type train --lr_warmup_steps 3"
    for part in ("--max_train_steps 7", "--resume_from_checkpoint checkpoint-3"):
        finish(start("train_conditional", f"{flags} {part}", output_dir, environment=environment))
    compare = "--compare ddpm:3,ddim:2 --logger all --output".split()
    run_command([*PYTHON, "sample.py", str(output_dir), *compare, str(folder)], environment=environment)
    return folder, output_dir


def test_wandb_has_every_step_and_one_run(run):
    _, output_dir = run
    records = wandb_records(output_dir / "logs")
    ids = {r.run.run_id for r in records if r.WhichOneof("record_type") == "run"}
    assert ids == {(output_dir / "logs" / "run-id").read_text()}
    rows = [row for row in history(records) if "loss" in row]
    assert [row["global_step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 8]
    assert rows[0].keys() >= {"loss", "lr", "epoch", "grad_norm", "images_per_second", "ema_decay"}
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    # The learning rate follows a schedule of 7 steps in the first part and of 8 in the second: the ends differ.
    assert rows[3]["loss"] == rows[7]["loss"]
    axes = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
    assert any(axis.step_metric == "global_step" for axis in axes)


def test_wandb_has_the_pictures_the_table_and_the_configuration(run):
    _, output_dir = run
    records = wandb_records(output_dir / "logs")
    rows = history(records)
    grids = [row["samples"] for row in rows if "samples" in row]
    captions = [grid["caption"] for grid in grids]
    assert captions[0] == "epoch 1, step 4; 2 inference steps, guidance 1, rows: " + ", ".join(CLASS_NAMES)
    media = next((output_dir / "logs" / "wandb").glob(f"offline-run-*/files/{grids[-1]['path']}"))
    logged = np.asarray(Image.open(media).convert("RGB"))
    assert (logged == np.asarray(Image.open(output_dir / "samples" / "step-000008.png"))).all()

    assert any("comparison_table" in row for row in rows)
    [table] = [a for a in artifacts(records) if a.type == "run_table"]  # W&B keeps a table's pictures there
    files = {entry.path: entry.local_path for entry in table.manifest.contents}
    content = json.loads(Path(files["comparison_table.table.json"]).read_text())
    assert content["columns"] == ["input_noise", "ddpm:3", "ddim:2", "class"]
    assert [row[3] for row in content["data"]] == [name for name in CLASS_NAMES for _ in range(2)]
    cells = [cell["path"] for row in content["data"] for cell in row[:3]]
    assert len(set(cells)) == 30  # ten images by two samplers, and the noise of each
    assert all(Image.open(files[path]).size == (64, 64) for path in cells)
    assert any("comparison" in row for row in rows)

    updates = [u for r in records if r.WhichOneof("record_type") in ("config", "run") for u in config_updates(r)]
    values = {u.key: json.loads(u.value_json) for u in updates if u.key}
    assert (values["dataset_name"], values["train_batch_size"]) == ("sprites", 5)
    assert (values["use_ema"], values["block_out_channels"], values["snr_gamma"]) == (True, [8], None)
    assert "hub_token" not in values
    assert {r.run.project for r in records if r.WhichOneof("record_type") == "run"} == {"sprite-diffusion"}
    assert "train" in {r.run.job_type for r in records if r.WhichOneof("record_type") == "run"}


def test_wandb_has_the_samples_one_by_one_with_their_classes(run):
    _, output_dir = run
    rows = history(wandb_records(output_dir / "logs"))
    pictures = [row["samples_one_by_one"] for row in rows if "samples_one_by_one" in row]
    assert pictures[-1]["count"] == 15
    assert pictures[-1]["captions"] == [name for name in CLASS_NAMES for _ in range(3)]


def test_learning_rate_is_that_of_the_step(run):
    """Of a warm-up of 3 steps, the first takes place at a rate of 0."""
    _, output_dir = run
    rates = [row["lr"] for row in history(wandb_records(output_dir / "logs")) if "loss" in row]
    assert rates[:3] == pytest.approx([0, rates[3] / 3, rates[3] * 2 / 3])


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
def test_comparison_of_a_model_without_a_run_goes_to_each_tracker_by_itself(tracker, tmp_path):
    make_tiny_network().save_pretrained(tmp_path / "net")
    environment = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_PROJECT": "course"}
    flags = f"{tmp_path / 'net'} --compare ddpm:3,ddim:2 --num_images 2 --ddpm_num_steps 5 --logger {tracker}"
    command = [*PYTHON, str(REPOSITORY / "sample.py"), *flags.split(), "--tracker_job_type", "inference"]
    result = run_command(command, environment=environment, cwd=tmp_path)
    assert "warning" not in result.stderr
    if tracker == "wandb":
        records = wandb_records(tmp_path / "logs")
        [table] = [a for a in artifacts(records) if a.type == "run_table"]
        files = {entry.path: entry.local_path for entry in table.manifest.contents}
        content = json.loads(Path(files["comparison_table.table.json"]).read_text())
        assert content["columns"] == ["input_noise", "ddpm:3", "ddim:2", "class"]
        runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        assert {(run.project, run.job_type) for run in runs} == {("course", "inference")}
    elif tracker == "trackio":
        with closing(sqlite3.connect(tmp_path / "trackio" / "course.db")) as database:
            values = [json.loads(row) for (row,) in database.execute("SELECT metrics FROM metrics")]
        [table] = [value["comparison_table"] for value in values if "comparison_table" in value]
        assert len(table["_value"]) == 2
    else:
        assert "comparison" in read_events(tmp_path / "logs").Tags()["images"]


def config_updates(record):
    return record.config.update if record.WhichOneof("record_type") == "config" else record.run.config.update


def test_wandb_has_the_model(run):
    _, output_dir = run
    models = [a for a in artifacts(wandb_records(output_dir / "logs")) if a.type == "model"]
    assert [set(model.aliases) for model in models] == [{f"epoch_{epoch}", "latest"} for epoch in (1, 2, 1, 2)]
    for model in models:
        assert model.name == "sprites-run"
        # Files of code have a hash of their content in their names.
        assert {re.sub(r"_[0-9a-f]{8}\.py", ".py", entry.path) for entry in model.manifest.contents} == {
            "model_index.json",
            "palette.hex",
            "pipeline_ddpm.py",
            "scheduler/scheduler_config.json",
            "scheduler/scheduling_closed_form_ddpm.py",
            "training_config.yaml",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
        }


def test_tensorboard_hides_what_the_resumed_run_logs_again(run):
    _, output_dir = run
    events = read_events(output_dir / "logs")
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert events.Tags()["scalars"].count("grad_norm") == 1
    assert "samples/caption/text_summary" in events.Tags()["tensors"]
    assert {"samples", "comparison"} <= set(events.Tags()["images"])


def test_trackio_has_one_run(run):
    folder, output_dir = run
    run_id = (output_dir / "logs" / "run-id").read_text()
    with closing(sqlite3.connect(folder / "trackio" / "sprite-diffusion.db")) as database:
        rows = [
            (name, step, json.loads(values))
            for name, step, values in database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id")
        ]
    assert {name for name, _, _ in rows} == {f"sprites run-{run_id}"}
    assert [step for _, step, values in rows if "loss" in values] == [1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 8]
    assert len([values for _, _, values in rows if "samples" in values]) == 4  # of two epochs, twice
    [table] = [values["comparison_table"] for _, _, values in rows if "comparison_table" in values]
    assert [row["class"] for row in table["_value"]][::2] == list(CLASS_NAMES)


def test_failing_tracker_is_warned_of_once_and_left_out(tmp_path, capsys):
    (tmp_path / "logs").write_text("a file where the folder of the trackers is to be")
    trackers = Trackers("tensorboard", tmp_path / "logs", {"seed": 0})
    trackers.log({"loss": 1.0}, step=1)
    trackers.log_image("samples", Image.new("RGB", (4, 4)), "caption", step=1)
    trackers.finish()
    error = capsys.readouterr().err
    assert error.count("warning: tensorboard failed (") == 1
    assert error.count("\n") == 1


def test_tracker_that_fails_later_is_asked_once(tmp_path, capsys):
    class FullDisk:
        name, calls = "trackio", 0

        def log(self, values, step):
            self.calls += 1
            raise OSError(28, "No space left on device")

    trackers = Trackers("tensorboard", tmp_path / "logs", {"seed": 0})
    working = trackers._trackers[0]
    full = FullDisk()
    trackers._trackers = [full, working]
    for step in (1, 2):
        trackers.log({"loss": 1.0}, step)
    trackers.finish()
    assert full.calls == 1
    assert trackers._trackers == [working]
    assert capsys.readouterr().err.count("warning: trackio failed ([Errno 28] No space left on device)") == 1


def test_tracker_without_an_account_does_not_stop_training(tmp_path):
    """W&B has neither a key nor a terminal to ask for one."""
    output_dir = tmp_path / "run"
    environment = {"WANDB_MODE": "online", "HOME": str(tmp_path), "WANDB_API_KEY": ""}
    result = finish(start("train_unconditional", f"{TINY} --logger wandb", output_dir, environment=environment))
    assert result.stderr.count("warning: wandb failed (No API key configured") == 1
    assert (output_dir / "model_index.json").is_file()
