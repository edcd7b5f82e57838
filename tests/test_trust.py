"""Tests that no foreign code runs, that tokens stay secret, and that names in data never become paths."""

import contextlib
import io
import json
import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hub_server import TOKEN, HubServer, listen
from launching import REPOSITORY, TINY, finish, start
from PIL import Image

from sprite_diffusion.common.errors import UserInputError, exits_on_user_error, first_line, mask_secrets
from sprite_diffusion.metrics import classifier
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.presets import parse_config
from sprite_diffusion.sharing.hub import create_repository

EVIL_NAMES = ["../../evil", "/tmp/evil/abs", "..", "a/b/c", "~/evil", "evil\n../evil", "$(touch evil)", "evil.png"]


class Evil:
    """An object whose pickle makes the file `victim` when it is loaded."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


@pytest.fixture
def victim(tmp_path):
    """Returns the path of the file that no test may let come into being."""
    return tmp_path / "victim"


def test_the_pickle_would_do_harm(victim):
    pickle.loads(pickle.dumps(Evil(victim)))
    assert victim.exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains a run, for tests to copy."""
    output_dir = tmp_path_factory.mktemp("trained") / "run"
    finish(start("train_unconditional", TINY, output_dir))
    return output_dir


@pytest.fixture
def run_dir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def with_index(run_dir, **changes):
    index = run_dir / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))


def with_pickled_weights(tmp_path, victim):
    (tmp_path / "run/unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save(Evil(victim), tmp_path / "run/unet/diffusion_pytorch_model.bin")


def own_code(script, part, **index):
    return lambda *args: with_own_code(*args, **index), script, "{0}/run", part


def with_own_code(tmp_path, victim, **index):
    code = f"from pathlib import Path\nPath({str(victim)!r}).touch()\nclass Evil: pass\n"
    for folder in ("", "unet", "scheduler"):
        (tmp_path / "run" / folder / "evil.py").write_text(code)
    with_index(tmp_path / "run", **index)


def with_dataset_script(tmp_path, victim):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/data.py").write_text(f"open({str(victim)!r}, 'w')\n")


def with_pickled_array(name):
    def make(tmp_path, victim):
        np.save(tmp_path / "images.npy", np.zeros((4, 16, 16, 3), np.uint8))
        np.save(tmp_path / name, np.array([Evil(victim)], object), allow_pickle=True)

    return make


YAML = "no_such_key: !!python/object/apply:os.mkdir [{}]\n"
# Each trap: the function that sets it, the script that meets it, the flags, and a part of the line of error.
TRAPS = {
    "pickled course checkpoint": (
        lambda tmp_path, victim: (tmp_path / "a.pth").write_bytes(pickle.dumps(Evil(victim))),
        "sprite_diffusion.sampling.convert",
        "{0}/a.pth {0}/out",
        "a.pth is not a state dict",
    ),
    "course checkpoint of torch.save": (
        lambda tmp_path, victim: torch.save({"init_conv.weight": Evil(victim)}, tmp_path / "a.pth"),
        "sprite_diffusion.sampling.convert",
        "{0}/a.pth {0}/out",
        "a.pth is not a state dict",
    ),
    "images": (
        with_pickled_array("images.npy"),
        "train_unconditional",
        TINY + " --dataset_name {0}/images.npy",
        "--dataset_name",
    ),
    "labels": (
        with_pickled_array("labels.npy"),
        "train_conditional",
        TINY + " --dataset_name {0}/images.npy --labels_file {0}/labels.npy",
        "--labels_file",
    ),
    "a pickle for an array": (
        lambda tmp_path, victim: (tmp_path / "images.npy").write_bytes(pickle.dumps(Evil(victim))),
        "train_unconditional",
        TINY + " --dataset_name {0}/images.npy",
        "--dataset_name",
    ),
    "config": (
        lambda tmp_path, victim: (tmp_path / "a.yaml").write_text(YAML.format(victim)),
        "train_unconditional",
        "--config {0}/a.yaml",
        "a.yaml is not YAML",
    ),
    "dataset script": (
        with_dataset_script,
        "train_unconditional",
        TINY + " --dataset_name {0}/data",
        "--dataset_name",
    ),
    "weights": (with_pickled_weights, "sample", "{0}/run", "that can be loaded"),
    "pipeline's code": own_code("sample", "holds a Evil", _class_name=["evil", "Evil"]),
    "network's code": own_code("calculate_metrics", "holds a Evil", unet=["evil", "Evil"]),
    "another class of diffusers": own_code(
        "sample", "holds a DiffusionPipeline", unet=["diffusers", "DiffusionPipeline"]
    ),
    "a module of diffusers": own_code("sample", "holds a utils", scheduler=["diffusers", "utils"]),
}


@pytest.mark.parametrize("name", TRAPS)
def test_foreign_code_does_not_run(name, run_script, run_dir, tmp_path, victim, capsys):
    set_trap, script, flags, fragment = TRAPS[name]
    set_trap(tmp_path, victim)
    with pytest.raises(SystemExit) as exit:
        run_script(script, flags.format(tmp_path), tmp_path / "new" if script.startswith("train_") else None)
    assert not victim.exists()
    assert exit.value.code == 2
    error = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert fragment in error


@pytest.mark.parametrize("file", ["random_states_0.pkl", "optimizer.bin", "pytorch_model.bin"])
def test_pickles_of_a_checkpoint_do_not_run(file, run_script, run_dir, victim):
    checkpoint = run_dir / "checkpoint-3"
    torch.save(Evil(victim), checkpoint / file)
    if file == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    with contextlib.suppress(SystemExit, Exception):
        run_script("train_unconditional", f"{TINY} --resume_from_checkpoint checkpoint-3", run_dir)
    assert not victim.exists()


# Tokens


@pytest.mark.parametrize(
    "given_by",
    [
        "--hub-token=",
        "another flag",
        pytest.param("HF_TOKEN", marks=pytest.mark.slow),
        pytest.param("--hub_token", marks=pytest.mark.slow),
        pytest.param("--hub_token=", marks=pytest.mark.slow),
        pytest.param("config", marks=pytest.mark.slow),
    ],
)
def test_token_is_written_nowhere(given_by, tmp_path):
    flags = f"{TINY} --num_epochs 1 --push_to_hub --hub_model_id me/sprites --logger all"
    outside = tmp_path / "outside"
    outside.mkdir()
    environment = {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "no_proxy": "*", "HF_HOME": str(outside)}
    environment |= {"WANDB_MODE": "offline", "TRACKIO_DIR": str(outside / "trackio")}
    environment |= {"HOME": str(outside), "TMPDIR": str(outside)}
    match given_by:
        case "--hub_token":
            flags += f" --hub_token {TOKEN}"
        case "--hub_token=" | "--hub-token=":
            flags += f" {given_by}{TOKEN}"
        case "HF_TOKEN":
            environment["HF_TOKEN"] = TOKEN
        case "another flag":  # in the place of another, and as a part of it
            environment["HF_TOKEN"] = TOKEN
            flags += f" --dataset_config_name {TOKEN} --image_column=my-{TOKEN}-1"
        case "config":
            preset = (REPOSITORY / "configs/smoke_cpu.yaml").read_text()
            (tmp_path / "own.yaml").write_text(f"{preset}hub_token: {TOKEN}\n")
            flags += f" --config {tmp_path / 'own.yaml'}"
    with listen() as listening, HubServer(listening).running() as server:
        environment["HF_ENDPOINT"] = server.url
        result = finish(start("train_unconditional", flags, tmp_path / "run", environment=environment))
        uploaded = server.repos["me/sprites"].files
    assert "warning" not in result.stderr
    assert TOKEN not in result.stdout + result.stderr
    assert "model_index.json" in uploaded
    assert not [name for name, content in uploaded.items() if TOKEN.encode() in content]
    written = [path for folder in (tmp_path / "run", outside) for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    assert any("tfevents" in path.name for path in written)
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


def test_training_of_python_keeps_the_token_out_of_its_configuration(tmp_path):
    config = TrainingConfig(hub_token=TOKEN, hub_model_id=f"me/{TOKEN}", class_names=[TOKEN])
    config.save(tmp_path / "saved.yaml")
    assert TOKEN not in (tmp_path / "saved.yaml").read_text()


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "TRACKIO_WRITE_TOKEN"])
def test_tokens_of_the_environment_are_masked_wherever_they_stand(variable, monkeypatch):
    secret = f"secret of {variable}\nline 2"
    monkeypatch.setenv(variable, secret)
    header = repr(f"Bearer {secret}".encode())
    text = f"{secret} in x{secret}y, {secret.strip()}, {header} and {''.join(secret.split())}"
    assert mask_secrets(text) == "*** in x***y, ***, b'Bearer ***' and ***"


def test_token_of_a_login_is_masked(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("token-of-a-login\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    assert mask_secrets("Bearer token-of-a-login") == "Bearer ***"


def test_what_looks_like_a_token_of_the_hub_is_masked_and_words_are_not():
    assert mask_secrets("unknown flag 'hf_" + 34 * "x" + "'") == "unknown flag '***'"
    assert mask_secrets("hf_transfer, hf_hub_download and hf_xet") == "hf_transfer, hf_hub_download and hf_xet"


@pytest.mark.parametrize("short", ["", "a", "no", "sprites"])
def test_words_that_are_given_for_a_token_are_not_masked(short, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", short)
    assert mask_secrets("data sprites, no classes") == "data sprites, no classes"


NO_TOKENS = [
    "hf_line\nbreak",
    "hf_bla nk",
    "hf_tab\tstop",
    "hf_ümlaut1",
    "hf_esc\x1b[1m",
    "short",
    " hf_before",
    "hf_after\n",
]


@pytest.mark.parametrize("token", NO_TOKENS)
def test_token_that_can_not_be_one_is_refused_at_once_and_not_shown(token, tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text(json.dumps({"hub_token": token}))
    for argv in (["--hub_token", token], [f"--hub-token={token}"], ["--config", str(tmp_path / "own.yaml")]):
        with pytest.raises(UserInputError, match="--hub_token is not a token: ") as error:
            parse_config(argv, default_preset="smoke_cpu.yaml")
        assert token.strip() not in str(error.value)
    monkeypatch.setenv("HF_TOKEN", token)
    if token == token.strip():  # huggingface_hub takes blanks and line breaks off its ends
        for use in (lambda: parse_config(["--push_to_hub"], "smoke_cpu.yaml"), lambda: create_repository("x", False)):
            with pytest.raises(UserInputError, match="HF_TOKEN is not a token: ") as error:
                use()
            assert token not in str(error.value)
    assert not parse_config([], default_preset="smoke_cpu.yaml").push_to_hub  # where nothing needs one


def test_line_of_error_shows_no_token(monkeypatch, capsys):
    """As of a library that puts the header which it was to send into its message."""
    token = "hf_bla\nnk"
    monkeypatch.setenv("HF_TOKEN", token)

    @exits_on_user_error
    def main() -> None:
        raise UserInputError(first_line(ValueError(f"Illegal header value {f'Bearer {token}'.encode()}")))

    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == "error: Illegal header value b'Bearer ***'\n"


def test_bad_pickle_is_not_answered_by_how_to_load_it_all_the_same(run_script, tmp_path, capsys):
    torch.save({"init_conv.weight": Evil(tmp_path)}, tmp_path / "a.pth")
    with pytest.raises(SystemExit):
        run_script("sprite_diffusion.sampling.convert", f"{tmp_path}/a.pth {tmp_path}/out")
    error = capsys.readouterr().err
    assert "a.pth is not a state dict of weights (it is damaged, or holds other objects than weights" in error
    assert "weights_only" not in error
    assert "trust" not in error


def test_misspelt_flag_does_not_show_the_token(run_script, capsys):
    with pytest.raises(SystemExit):
        run_script("train_unconditional", f"--hub_tokn={TOKEN}")
    error = capsys.readouterr().err
    assert TOKEN not in error
    assert "did you mean '--hub_token'?" in error


# Names


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_class_names_never_become_paths(run_script, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    work = tmp_path / "one" / "two" / "work"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setattr(classifier, "TRAINING_STEPS", 5)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=EVIL_NAMES))
    buffers = [io.BytesIO() for _ in range(5 * len(EVIL_NAMES))]
    for number, buffer in enumerate(buffers):
        Image.new("RGB", (16, 16), (6 * number, 0, 0)).save(buffer, "PNG")
    images = [{"bytes": buffer.getvalue(), "path": f"../{n}.png"} for n, buffer in enumerate(buffers)]
    labels = [number % len(EVIL_NAMES) for number in range(len(images))]
    table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    table.to_parquet(tmp_path / "data.parquet")
    data = TINY.replace("--max_train_samples 20", f"--dataset_name {tmp_path}/data.parquet")

    before = files_in(tmp_path)
    flags = f"{data} --snapshot_epochs 1 --max_train_steps 2 --cache_dir {tmp_path}/cache"
    run_script("train_conditional", flags, work / "run")
    run_script("sample", f"{work}/run --num_images 1 --num_inference_steps 2 --output {work}/files")
    run_script(
        "sample", f"{work}/run --num_images 1 --num_inference_steps 2 --class {EVIL_NAMES[0]} --output {work}/a.png"
    )
    run_script(
        "sample", f"{work}/run --num_images 1 --mix {EVIL_NAMES[1]}=1 --num_inference_steps 2 --output {work}/b.png"
    )
    run_script("sample", f"--snapshots {work}/run --num_images 1 --num_inference_steps 2 --output {work}/c.png")
    run_script("calculate_metrics", f"{work}/run --num_images 10 --num_inference_steps 2 --scheduler ddim")
    run_script("sprite_diffusion.sharing.hub", f"card {work}/run")
    written = files_in(tmp_path) - before
    assert {work / "a.png", work / "c.json", work / "run" / "metrics.json", work / "run" / "README.md"} <= written
    assert not [
        path for path in written if not path.is_relative_to(work) and not path.is_relative_to(tmp_path / "cache")
    ]
    assert not [path for path in written if "evil" in str(path.relative_to(tmp_path))]
    assert sorted(path.name for path in (work / "files").iterdir()) == [
        *(f"{number:05d}.png" for number in range(len(EVIL_NAMES))),
        "samples.json",
    ]
    assert not Path("/tmp/evil").exists()
