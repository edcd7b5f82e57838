"""Makes good and bad files of every kind that users may name in a flag, for test_bad_input.py."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from inspecting import UNET_WEIGHTS
from launching import TINY
from PIL import Image
from safetensors.torch import load_file, save_file

EXTRA = {"down_blocks.0.resnets.1.conv1.weight": torch.zeros(8, 8, 3, 3)}
BAD_INDEXES = {"of_null": "null", "of_text": '"DDPMPipeline"', "of_number": "7", "of_nothing": "", "deep": "[" * 10**5}
BAD_INDEX_VALUES = {
    "class_null": {"_class_name": None},
    "class_list": {"_class_name": []},
    "class_module": {"_class_name": "utils"},
    "class_special": {"_class_name": "__doc__"},
    "class_network": {"_class_name": "UNet2DModel"},
    "by_class": {"_class_name": "ConditionalDDPMPipeline"},
    "names": {"id2label": {"0": "hero"}},
    "unet_short": {"unet": ["diffusers"]},
    "unet_process": {"unet": ["diffusers", "DDPMScheduler"]},
    "unet_other": {"unet": ["diffusers", "AutoencoderKL"]},
    "scheduler_none": {"scheduler": None},
    "scheduler_network": {"scheduler": ["diffusers", "UNet2DModel"]},
    "scheduler_other": {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]},
    "scheduler_unknown": {"scheduler": ["diffusers", "NoSuchScheduler"]},
}
BAD_UNETS = {
    "size_null": {"sample_size": None},
    "size_text": {"sample_size": "16"},
    "size_zero": {"sample_size": 0},
    "size_negative": {"sample_size": -16},
    "size_fraction": {"sample_size": 7.5},
    "size_huge": {"sample_size": 10**6},
    "size_wide": {"sample_size": [16, 10**9]},
    "size_triple": {"sample_size": [16, 16, 16]},
    "size_nan": {"sample_size": float("nan")},
    "in_none": {"in_channels": 0},
    "in_two": {"in_channels": 2},
    "in_huge": {"in_channels": 10**9},
    "in_null": {"in_channels": None},
    "out_other": {"out_channels": 6},
    "out_negative": {"out_channels": -3},
    "channels_huge": {"block_out_channels": [10**9]},
    "channels_many": {"block_out_channels": [8] * 10**4},
    "channels_null": {"block_out_channels": None},
    "channels_longer": {"block_out_channels": [8, 16]},
    "layers_huge": {"layers_per_block": 10**6},
    "layers_more": {"layers_per_block": 2},
    "layers_fewer": {"layers_per_block": 0},
    "layers_text": {"layers_per_block": "two"},
    "groups_none": {"norm_num_groups": 0},
    "groups_odd": {"norm_num_groups": 7},
    "heads_none": {"attention_head_dim": 0},
    "act_unknown": {"act_fn": "no_such_function"},
    "time_unknown": {"time_embedding_type": "no_such_type"},
    "up_types": {"up_block_types": ["NoBlock"]},
    "up_lists": {"up_block_types": []},
}
BAD_PROCESSES = {
    "steps_none": {"num_train_timesteps": 0},
    "steps_huge": {"num_train_timesteps": 10**12},
    "steps_fraction": {"num_train_timesteps": 7.5},
    "steps_text": {"num_train_timesteps": "x"},
    "steps_null": {"num_train_timesteps": None},
    "steps_nan": {"num_train_timesteps": float("nan")},
    "beta_nan": {"beta_start": float("nan")},
    "beta_infinite": {"beta_end": float("inf")},
    "beta_negative": {"beta_start": -0.1},
    "beta_null": {"beta_end": None},
    "betas_nan": {"trained_betas": [0.1, float("nan")]},
    "betas_empty": {"trained_betas": []},
    "betas_text": {"trained_betas": "x"},
    "betas_other": {"trained_betas": [0.1] * 3},
    "betas_nested": {"trained_betas": [[0.1] * 1000]},
    "type_null": {"prediction_type": None},
    "type_list": {"prediction_type": ["epsilon"]},
    "variance_learned": {"variance_type": "learned"},
    "variance_unknown": {"variance_type": "no_such_variance"},
    "clip_text": {"clip_sample_range": "x"},
    "clip_nan": {"clip_sample_range": float("nan")},
    "spacing": {"timestep_spacing": "no_such_spacing"},
    "offset_huge": {"steps_offset": 10**30},
}
BAD_TOY_PROCESSES = {
    "steps_none": {"num_train_timesteps": 0},
    "steps_huge": {"num_train_timesteps": 10**12},
    "noise_unknown": {"noise_type": "pink"},
}
BAD_LABELS = {
    "ids": ["hero", "food"],
    "fewer": {"0": "hero"},
    "more": {str(id): f"name {id}" for id in range(9)},
    "numbers": {str(id): id for id in range(5)},
    "nested": {str(id): {"name": "hero"} for id in range(5)},
    "twice": {str(id): "hero" for id in range(5)},
    "unnamed": {str(id): "" for id in range(5)},
    "other_ids": {str(id): f"name {id}" for id in range(1, 6)},
    "words": {name: name for name in "abcde"},
    "many": {str(id): f"name {id}" for id in range(10**6)},
}


def make_files(folder: Path, run_script: Callable[..., None]) -> None:
    """Makes all the files below a folder."""
    make_pictures(folder)
    make_arrays(folder)
    make_tables(folder)
    make_configs(folder)
    make_models(folder, run_script)
    make_course_checkpoints(folder)


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_pictures(folder: Path) -> None:
    for label in ("cat", "dog"):
        (folder / "pictures" / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(folder / "pictures" / label / f"{i}.png")
    shutil.copytree(folder / "pictures" / "cat", folder / "flat")
    shutil.copytree(folder / "pictures", folder / "damaged")
    (folder / "damaged/cat/1.png").write_bytes(b"\x89PNG")
    (folder / "empty").mkdir()
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "file").write_text("mine")
    (folder / "text.png").write_text("mine")
    shutil.copytree(folder / "flat", folder / "metadata")
    (folder / "metadata/metadata.jsonl").write_text("{")
    shutil.copytree(folder / "flat", folder / "archive")
    (folder / "archive/more.zip").write_bytes(b"PK")
    (folder / "csv").mkdir()
    (folder / "csv/train.csv").write_text("a,b\n1\n2,3,4\n")


def make_arrays(folder: Path) -> None:
    images = np.zeros((4, 16, 16, 3), np.uint8)
    arrays = {
        "images": images,
        "floats": images / 255,
        "flat_images": images[0],
        "two_channels": images[..., :2],
        "no_images": images[:0],
        "labels": np.array([0, 1, 1, 0]),
        "three_labels": np.array([0, 1, 1]),
        "large_label": np.array([0, 1, 7, 0]),
        "negative_label": np.array([0, 1, -1, 0]),
        "fractions": np.array([0.0, 0.5, 1, 0]),
        "two_hot": np.array([[1, 0], [1, 1], [0, 1], [0, 1]]),
        "words": np.array(["a", "b", "a", "b"]),
        "cube": np.zeros((4, 2, 2), int),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "objects.npy", np.array([0, "a", 1, 0], object), allow_pickle=True)
    np.savez(folder / "archive.npz", images)
    (folder / "archive.npz").rename(folder / "zipped.npy")
    whole = (folder / "images.npy").read_bytes()
    (folder / "cut.npy").write_bytes(whole[: len(whole) // 2])
    (folder / "text.npy").write_text("mine")
    np.save(folder / "huge_label.npy", np.array([0, 1, 2**64 - 1, 0], np.uint64))
    np.save(folder / "empty_column.npy", np.eye(3, dtype=int)[[0, 1, 1, 0]])
    for name, header in GARBLED_HEADERS.items():
        text = header.encode("latin-1").ljust(117) + b"\n"
        content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)
        (folder / f"{name}.npy").write_bytes(content)


GARBLED_HEADERS = {
    "header_of_a_list": "[1, 2]",
    "header_unfinished": "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 8, 8",
    "header_unbalanced": "{'descr': '|u1', ]",
    "header_indented": "  {'descr'\n  :\n 1}",
    "header_nested": "(" * 110,
    "header_binary": "\x00\xff\xfe" * 30,
    "header_short": "{'descr': '|u1', 'fortran_order': False}",
    "header_typeless": "{'descr': 'no', 'fortran_order': False, 'shape': (1, 8, 8, 1)}",
    "header_of_records": "{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (64,)}",
    "header_huge": "{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999, 8, 8, 1)}",
    "header_overflowing": "{'descr': '|u1', 'fortran_order': False, 'shape': (" + "9" * 40 + ", 8, 8, 1)}",
    "header_negative": "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8, 1)}",
    "header_of_words": "{'descr': '|u1', 'fortran_order': False, 'shape': ('a', 8, 8, 1)}",
    "header_of_objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1, 2, 2, 1)}",
    "header_of_no_bytes": "{'descr': '|V0', 'fortran_order': False, 'shape': (1, 8, 8, 1)}",
}


def make_tables(folder: Path) -> None:
    png = (folder / "flat/0.png").read_bytes()
    image = [{"bytes": png, "path": None}] * 3

    def save(name, features=None, **columns):
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")

    typed = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    save("typed", typed, image=image, label=[0, 1, 1])
    save("missing_label", typed, image=image, label=[0, -1, 1])
    twice = datasets.Features(left=datasets.Image(), right=datasets.Image())
    save("two_images", twice, left=image, right=image)
    save("bad_bytes", typed, image=[{"bytes": b"no", "path": None}] * 3, label=[0, 1, 1])
    save("no_bytes", image=[{"bytes": None, "path": "gone.png"}] * 3)
    save("null_image", typed, image=[image[0], None, image[0]], label=[0, 1, 1])
    save("numbers", x=[1, 2, 3], y=[0.5, 1, 2], z=["a", None, "b"], image=[{"bytes": png}] * 3)
    (folder / "text.parquet").write_text("mine")
    whole = (folder / "typed.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])


def make_configs(folder: Path) -> None:
    texts = {
        "list": "- 1\n",
        "empty": "",
        "broken": "a: [1\n",
        "tab": "a:\n\t- 1\n",
        "unknown": "learning_rat: 1\n",
        "type": "learning_rate: fast\n",
        "nested": "learning_rate: {a: 1}\n",
        "many": "seed: [1, 2]\n",
        "bool": "use_ema: maybe\n",
        "tag": "seed: !!python/object/apply:os.getpid []\n",
        "number": "1: 2\n",
        "none": "seed: [null]\n",
        "bomb": "a: &a [1]\n"
        + "".join(f"a{i}: &a{i} [*a{i - 1 if i else ''}, *a{i - 1 if i else ''}]\n" for i in range(3)),
        "date": "seed: 2020-01-01\n",
        "choice": "resize_mode: stretch\n",
        "itself": "config: own.yaml\n",
        "twice": "seed: 1\nseed: 2\n",
        "base_sixty": "seed: 16:16\n",
        "deep": f"seed: {3000 * '['}{3000 * ']'}\n",
        "large": "# as a data file that was named by mistake\n" * 10_000,
        "laughs": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{9 * f'*a{i - 1}, '}]\n" for i in range(1, 10)),
        "merged": "<<: {seed: 1}\n",
        "digits": f"seed: {5000 * '9'}\n",
        "two_documents": "seed: 1\n---\nseed: 2\n",
        "blank": "dataset_split: ' '\n",
        "nul": 'image_column: "a\\0b"\n',
        "mapping": "hub_model_id: {a: 1}\n",
        "no_items": "use_ema: []\n",
        "null_item": "class_names: [a, null]\n",
        "tagged": "seed: !!int 010\n",
        "token": "hub_token: hf_one two\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    (folder / "control.yaml").write_bytes(b"seed: \x00")
    (folder / "wide_text.yaml").write_text("seed: 1\n", encoding="utf-16")
    (folder / "circle.yaml").symlink_to("circle.yaml")
    os.mkfifo(folder / "pipe")
    (folder / "unet.json").write_text(json.dumps({"_class_name": "UNet2DModel", "in_channels": 3}))
    (folder / "broken.json").write_text("{")
    (folder / "unet_types.json").write_text(
        json.dumps({"block_out_channels": [8, 8], "down_block_types": ["No", "No"], "up_block_types": ["No", "No"]})
    )
    (folder / "unet_lengths.json").write_text(
        json.dumps({"block_out_channels": [32, 32], "down_block_types": ["DownBlock2D"]})
    )
    (folder / "unet_text.json").write_text(json.dumps({"block_out_channels": "32"}))


def make_models(folder: Path, run_script: Callable[..., None]) -> None:
    once = f"{TINY} --num_epochs 1"
    toy = "--model_class BasicUNet2DModel --noise_scheduler_class LinearCorruptionScheduler"
    run_script("train_unconditional", f"{once} --snapshot_epochs 1", folder / "run")
    run_script("train_conditional", once, folder / "by_class")
    run_script("train_unconditional", f"{once} {toy}", folder / "toy")

    def change(name, damage, source="run"):
        not_copied = shutil.ignore_patterns("checkpoint-*", "snapshots", "logs", "samples")
        damage(shutil.copytree(folder / source, folder / name, ignore=not_copied))

    change("index_broken", lambda run: (run / "model_index.json").write_text("{"))
    change("index_list", lambda run: (run / "model_index.json").write_text("[]"))
    change("index_no_class", lambda run: (run / "model_index.json").write_text("{}"))
    change("index_unknown", lambda run: change_json(run / "model_index.json", _class_name="NoSuchPipeline"))
    change("index_other", lambda run: change_json(run / "model_index.json", _class_name="StableDiffusionPipeline"))
    change("index_numbers", lambda run: change_json(run / "model_index.json", unet=3))
    change("index_null", lambda run: change_json(run / "model_index.json", unet=[None, None]))
    change("index_text", lambda run: change_json(run / "model_index.json", _class_name={"a": 1}))
    change("no_unet", lambda run: shutil.rmtree(run / "unet"))
    change("no_scheduler", lambda run: shutil.rmtree(run / "scheduler"))
    change("no_weights", lambda run: (run / UNET_WEIGHTS).unlink())
    change("unet_broken", lambda run: (run / "unet/config.json").write_text("{"))
    change("unet_empty", lambda run: (run / "unet/config.json").write_text(""))
    change("unet_list", lambda run: (run / "unet/config.json").write_text("[1]"))
    change("unet_binary", lambda run: (run / "unet/config.json").write_bytes(b"\xff\xfe"))
    change("unet_types", lambda run: change_json(run / "unet/config.json", down_block_types=["NoBlock"]))
    change("unet_number", lambda run: change_json(run / "unet/config.json", block_out_channels=8))
    change("unet_wider", lambda run: change_json(run / "unet/config.json", block_out_channels=[16]))
    change("unet_channels", lambda run: change_json(run / "unet/config.json", in_channels="three"))
    change("weights_text", lambda run: (run / UNET_WEIGHTS).write_text("mine"))
    change("weights_cut", lambda run: (run / UNET_WEIGHTS).write_bytes((run / UNET_WEIGHTS).read_bytes()[:-1000]))
    change("weights_empty", lambda run: (run / UNET_WEIGHTS).write_bytes(b""))
    change("weights_other", lambda run: save_file({"a": torch.zeros(1)}, run / UNET_WEIGHTS))
    change(
        "weights_fewer",
        lambda run: save_file(dict(list(load_file(run / UNET_WEIGHTS).items())[1:]), run / UNET_WEIGHTS),
    )
    change("scheduler_broken", lambda run: (run / "scheduler/scheduler_config.json").write_text("{"))
    change("scheduler_steps", lambda run: change_json(run / "scheduler/scheduler_config.json", num_train_timesteps=-1))
    change("scheduler_text", lambda run: change_json(run / "scheduler/scheduler_config.json", beta_start="small"))
    change("scheduler_betas", lambda run: change_json(run / "scheduler/scheduler_config.json", beta_schedule="none"))
    change("scheduler_type", lambda run: change_json(run / "scheduler/scheduler_config.json", prediction_type="none"))
    for name, value in BAD_INDEXES.items():
        change(f"index_{name}", lambda run, value=value: (run / "model_index.json").write_text(value))
    for name, changes in BAD_INDEX_VALUES.items():
        change(f"index_{name}", lambda run, changes=changes: change_json(run / "model_index.json", **changes))
    for name, changes in BAD_UNETS.items():
        change(f"unet_{name}", lambda run, changes=changes: change_json(run / "unet/config.json", **changes))
    for name, changes in BAD_PROCESSES.items():
        change(
            f"process_{name}",
            lambda run, changes=changes: change_json(run / "scheduler/scheduler_config.json", **changes),
        )
    for name, changes in BAD_TOY_PROCESSES.items():
        change(
            f"toy_{name}",
            lambda run, changes=changes: change_json(run / "scheduler/scheduler_config.json", **changes),
            "toy",
        )
    for name, labels in BAD_LABELS.items():
        change(
            f"labels_{name}",
            lambda run, labels=labels: change_json(run / "model_index.json", id2label=labels),
            "by_class",
        )
    change("classes_none", lambda run: change_json(run / "unet/config.json", num_class_embeds=None), "by_class")
    change("classes_fewer", lambda run: change_json(run / "unet/config.json", num_class_embeds=3), "by_class")
    change("classes_many", lambda run: change_json(run / "unet/config.json", num_class_embeds=10**9), "by_class")
    change("weights_nan", lambda run: change_weight(run, float("nan")))
    change("weights_infinite", lambda run: change_weight(run, float("-inf")))
    change("weights_more", lambda run: save_file({**load_file(run / UNET_WEIGHTS), **EXTRA}, run / UNET_WEIGHTS))
    change("index_gone", lambda run: (run / "model_index.json").unlink())
    (folder / "unfinished").mkdir()
    for name in ("checkpoint-3", "checkpoint-4"):
        shutil.copytree(folder / "run" / "checkpoint-4", folder / "unfinished" / name)
    shutil.copy(folder / "run/training_config.yaml", folder / "unfinished")
    shutil.copytree(folder / "run/samples", folder / "unfinished/samples")
    change("labels_list", lambda run: change_json(run / "model_index.json", id2label=[1]), "by_class")
    change("labels_text", lambda run: change_json(run / "model_index.json", id2label="cat"), "by_class")
    change("summary_broken", lambda run: (run / "training_summary.json").write_text("{"))
    change("summary_empty", lambda run: (run / "training_summary.json").write_text("{}"))
    change("summary_list", lambda run: (run / "training_summary.json").write_text("[]"))
    change("summary_null", lambda run: (run / "training_summary.json").write_text("null"))
    change("summary_step", lambda run: change_json(run / "training_summary.json", global_step=float("inf")))
    change("summary_deep", lambda run: (run / "training_summary.json").write_text("[" * 10**5))
    change("summary_types", lambda run: change_json(run / "training_summary.json", num_parameters="many"))
    change("no_summary", lambda run: (run / "training_summary.json").unlink())
    change("config_broken", lambda run: (run / "training_config.yaml").write_text("a: [1"))
    change("config_list", lambda run: (run / "training_config.yaml").write_text("[]"))
    change("config_unknown", lambda run: (run / "training_config.yaml").write_text("no_such_key: 1\n"))
    change("config_short", lambda run: (run / "training_config.yaml").write_text("seed: 1\n"))
    change("config_deep", lambda run: (run / "training_config.yaml").write_text(f"seed: {3000 * '['}"))
    change("config_twice", lambda run: (run / "training_config.yaml").write_text("seed: 1\nseed: 2\n"))
    change("config_pipe", lambda run: replace_by_pipe(run / "training_config.yaml"))
    change("metrics_broken", lambda run: (run / "metrics.json").write_text("{"))
    change("card_binary", lambda run: (run / "README.md").write_bytes(b"\xff\xfe"))
    change("card_broken", lambda run: (run / "README.md").write_text("---\na: [1\n---\n"))
    change("card_half", lambda run: (run / "README.md").write_text("<!-- from the run: begin -->\nMine.\n"))


def change_weight(run: Path, value: float) -> None:
    weights = load_file(run / UNET_WEIGHTS)
    weights["conv_in.bias"][0] = value
    save_file(weights, run / UNET_WEIGHTS)


def make_course_checkpoints(folder: Path) -> None:
    torch.save({"init_conv.conv1.0.weight": torch.zeros(1)}, folder / "few.pth")
    torch.save({"other.weight": torch.zeros(1)}, folder / "other.pth")
    torch.save([1, 2], folder / "list.pth")
    torch.save(torch.zeros(3), folder / "tensor.pth")
    torch.save({1: torch.zeros(1)}, folder / "keys.pth")
    torch.save({"init_conv.conv1.0.weight": 3}, folder / "values.pth")
    names = ("init_conv.conv1.0.weight", "up0.0.weight", "out.3.weight", "contextembed1.model.0.weight")
    torch.save({name: torch.zeros(4, 4, 1, 1) for name in names}, folder / "shapes.pth")
    torch.save({name: torch.zeros(()) for name in names}, folder / "scalars.pth")
    (folder / "text.pth").write_text("mine")
    (folder / "empty.pth").write_bytes(b"")
    (folder / "pickle.pth").write_bytes(pickle.dumps({"a": Path("b")}))
    whole = (folder / "few.pth").read_bytes()
    (folder / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "bytes.pth").write_bytes(np.random.default_rng(0).bytes(1000))
