"""Looks into the folders of runs: waits for a file, reads weights and logs, and compares two runs."""

import json
import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TIMES = {"seconds", "images_per_second"}  # the only values of a run's records that differ when it is repeated


def wait_for(process: subprocess.Popen[str], output_dir: Path, pattern: str) -> bool:
    """Waits until a file or folder matches `pattern`. Returns whether it came before the end of the process."""
    while process.poll() is None:
        try:
            if any(output_dir.glob(pattern)):
                return True
        except FileNotFoundError:  # a folder was renamed while it was being read
            pass
        time.sleep(0.0005)
    return False


def weights(folder: Path, name: str = UNET_WEIGHTS) -> dict[str, torch.Tensor]:
    """Returns the tensors of a pipeline, or of another safetensors file in the folder."""
    return load_file(folder / name)


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Asserts that the tensors have the same names and are equal bit for bit."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def read_events(logging_dir: Path) -> EventAccumulator:
    """Returns all that TensorBoard has of a run."""
    return EventAccumulator(str(logging_dir / "sprite-diffusion"), size_guidance={"scalars": 0, "images": 0}).Reload()


def read_scalars(logging_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns (step, value) of each number that TensorBoard has of a run, by name."""
    events = read_events(logging_dir)
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_same_runs(first: Path, second: Path, same_python_random: bool = True) -> None:
    """Asserts that two runs left the same files, bit for bit but for times, their own paths and the trackers' logs.

    trackio's thread takes numbers from Python's `random`, which the training does not use: its state then differs.
    """
    files = [
        {name for path in run.rglob("*") if path.is_file() and (name := path.relative_to(run)).parts[0] != "logs"}
        for run in (first, second)
    ]
    assert not files[0] ^ files[1], str(files[0] ^ files[1])
    for name in sorted(files[0]):
        if name.name.startswith("random_states_") and not same_python_random:
            one, two = (torch.load(run / name, weights_only=False) for run in (first, second))
            for states in (one, two):
                del states["random_state"]
                states["numpy_random_seed"] = repr(states["numpy_random_seed"])
                states["torch_manual_seed"] = states["torch_manual_seed"].tolist()
            assert one == two, name
        else:
            assert read_repeatable(first / name) == read_repeatable(second / name), name


def read_repeatable(path: Path) -> object:
    """Returns what a file of a run has in common with that of the same run in another folder."""
    # The first has the SHA-256 of train_state.json, which holds times, the second the number of a process.
    if path.name in ("manifest.json", ".run.lock.json"):
        return None
    if path.name == "run_files.txt":
        return [line for line in path.read_text().splitlines() if not line.startswith("logs/")]
    if path.name == "report.html":  # has the seconds of the training in it, and what else is compared below
        return None
    if path.name == "training_log.jsonl":
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        return [{name: value for name, value in entry.items() if name not in TIMES} for entry in entries]
    if path.name in ("train_state.json", "training_summary.json"):
        return {name: value for name, value in json.loads(path.read_bytes()).items() if name not in TIMES}
    if path.name == "training_config.yaml":
        return [line for line in path.read_text().splitlines() if not line.startswith("output_dir")]
    return path.read_bytes()
