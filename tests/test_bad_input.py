"""Tests that what users get wrong ends in one line on standard error and exit status 2, with no file touched."""

import hashlib
import os
import re
import resource
import time
from pathlib import Path

import pytest
from bad_files import (
    BAD_INDEX_VALUES,
    BAD_INDEXES,
    BAD_LABELS,
    BAD_PROCESSES,
    BAD_TOY_PROCESSES,
    BAD_UNETS,
    GARBLED_HEADERS,
    make_files,
)
from launching import TINY, finish, start
from tqdm.auto import tqdm

from sprite_diffusion.common.errors import UserInputError, exits_on_user_error
from sprite_diffusion.sampling.pipeline_loading import load_pipeline

PROGRESS_BAR = re.compile(r"\d+/\d+ \[")


def fingerprint(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file below a folder, and '' for each folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def times_of_change(folder: Path) -> dict[str, int]:
    """Returns when each file and folder below a folder was changed; `Path.rglob` would take half of all the time."""
    names = (os.path.join(root, name) for root, folders, files in os.walk(folder) for name in (*folders, *files))
    return {name: os.lstat(name).st_mtime_ns for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_script):
    """Makes the good and bad files once, in the folder that {0} stands for in the flags of the cases."""
    folder = tmp_path_factory.mktemp("bad-input")
    make_files(folder, run_script)
    before = fingerprint(folder)
    yield folder
    assert fingerprint(folder) == before


# Each case has flags and the fragments that the line of error must have; {1} is a folder of the test.
TRAIN_UNCONDITIONAL = [
    ("--rescale_betas_zero_snr true", "--rescale_betas_zero_snr needs --prediction_type"),
    ("--snr_floor 1 --prediction_type epsilon", "--snr_floor needs --prediction_type"),
    ("--snr_floor 6 --snr_gamma 5 --prediction_type sample", "--snr_floor is 6", "--snr_gamma, 5"),
    ("--snr_floor=-1", "--snr_floor is -1"),
    (
        "--train_data_dir {0}/pictures --streaming --max_train_steps 1 --lr_scheduler_interval epoch",
        "--lr_scheduler_inte",
    ),
    ("--lr_scheduler_interval day", "--lr_scheduler_interval"),
    # flags
    ("--learning_rat 3", "unknown flag '--learning_rat'", "did you mean '--learning_rate'"),
    ("--xyzzy", "unknown flag '--xyzzy'", "--help"),
    ("--pretrained_model_name_or_path {0}/run", "begins with the weights of --init_from"),
    ("--pretrained-model-name-or-path={0}/run", "begins with the weights of --init_from"),
    ("extra", "unknown flag 'extra'"),
    ("--learning_rate", "--learning_rate", "expected one argument"),
    ("--learning_rate fast", "--learning_rate", "'fast'"),
    ("--learning_rate 0", "--learning_rate is 0.0: it must be above 0"),
    ("--learning_rate nan", "--learning_rate is nan"),
    ("--learning_rate inf", "--learning_rate is inf"),
    ("--learning_rate -1", "--learning_rate is -1.0"),
    ("--num_epochs 0", "--num_epochs is 0: it must be at least 1"),
    ("--num_epochs 1.5", "--num_epochs", "'1.5'"),
    ("--max_train_steps 0", "--max_train_steps is 0"),
    ("--train_batch_size -4", "--train_batch_size is -4"),
    ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps is 0"),
    ("--seed -1", "--seed is -1"),
    ("--seed 99999999999999999999999", "--seed"),
    ("--adam_beta1 1", "--adam_beta1 is 1.0"),
    ("--adam_beta2 -0.1", "--adam_beta2 is -0.1"),
    ("--adam_weight_decay nan", "--adam_weight_decay is nan"),
    ("--adam_weight_decay inf", "--adam_weight_decay is inf"),
    ("--max_grad_norm 0", "--max_grad_norm is 0.0"),
    ("--snr_gamma 0", "--snr_gamma is 0.0"),
    ("--label_dropout 1", "--label_dropout is 1.0"),
    ("--ema_max_decay 1", "--ema_max_decay is 1.0"),
    ("--ema_inv_gamma 0", "--ema_inv_gamma is 0.0"),
    ("--ema_power nan", "--ema_power is nan"),
    ("--ema_power -1", "--ema_power is -1.0"),
    ("--beta_start 0", "--beta_start is 0.0"),
    ("--beta_end 1", "--beta_end is 1.0"),
    ("--beta_start 0.5 --beta_end 0.1", "--beta_end is 0.1"),
    ("--ddpm_num_inference_steps 1001", "--ddpm_num_inference_steps is 1001", "--ddpm_num_steps, 1000"),
    ("--ddpm_beta_schedule cosine", "--ddpm_beta_schedule", "squaredcos_cap_v2"),
    ("--prediction_type noise", "--prediction_type", "epsilon"),
    ("--lr_scheduler fast", "--lr_scheduler", "cosine"),
    ("--mixed_precision fp64", "--mixed_precision", "bf16"),
    ("--resolution big", "--resolution is 'big'", "24x16"),
    ("--resolution 0", "--resolution is '0'"),
    ("--resolution 16x", "--resolution is '16x'"),
    ("--resolution -16", "--resolution"),
    ("--block_out_channels 8 8 --resolution 17", "--resolution 17", "multiples of 2"),
    ("--block_out_channels 0", "--block_out_channels holds 0"),
    ("--block_out_channels", "--block_out_channels"),
    ("--block_out_channels 8 x", "--block_out_channels", "'x'"),
    ("--attention_levels 3", "--attention_levels [3]", "1 to 1"),
    ("--attention_levels 1 --attention_head_dim 3", "--attention_head_dim 3"),
    ("--attention_head_dim 0", "--attention_head_dim is 0"),
    ("--layers_per_block 0", "--layers_per_block is 0"),
    ("--model_class UNet", "--model_class", "UNet2DModel"),
    ("--model_class ContextUNet2DModel --block_out_channels 8 8", "--block_out_channels"),
    ("--model_class ContextUNet2DModel --resolution 18", "--resolution 18"),
    ("--model_config_name_or_path {0}/missing", "--model_config_name_or_path {0}/missing"),
    ("--model_config_name_or_path {0}/broken.json", "--model_config_name_or_path {0}/broken.json"),
    ("--model_config_name_or_path {0}/unet.json", "--model_config_name_or_path {0}/unet.json"),
    ("--model_config_name_or_path {0}/unet_types.json", "--model_config_name_or_path {0}/unet_types.json"),
    ("--model_config_name_or_path {0}/unet_lengths.json", "--model_config_name_or_path {0}/unet_lengths.json"),
    ("--model_config_name_or_path {0}/unet_text.json", "--model_config_name_or_path {0}/unet_text.json"),
    ("--model_config_name_or_path {0}/text.png", "--model_config_name_or_path {0}/text.png"),
    ("--logger mlflow", "--logger", "tensorboard"),
    ("--logging_dir ..", "--logging_dir .."),
    ("--logging_dir /tmp/logs", "--logging_dir /tmp/logs"),
    ("--background whit", "--background whit"),
    ("--use_ema maybe", "--use_ema", "maybe"),
    ("--max_train_samples 0", "--max_train_samples is 0"),
    ("--dataset_name sprites --max_train_samples 2000000000", "--max_train_samples 2000000000", "1,000,000 at most"),
    ("--class_names", "--class_names"),
    ("--guidance_scale nan", "--guidance_scale is nan"),
    ("--guidance_scale inf", "--guidance_scale is inf"),
    ("--guidance_scale 0.5", "--guidance_scale is 0.5"),
    *(
        (f"--{name} {10**30}", f"--{name} is 1{30 * '0'}: it must be at ")
        for name in (
            "max_train_samples dataloader_num_workers layers_per_block attention_head_dim ddpm_num_steps "
            "train_batch_size num_epochs max_train_steps gradient_accumulation_steps lr_warmup_steps "
            "max_skipped_steps local_rank save_images_epochs save_images_steps eval_batch_size save_model_epochs "
            "evaluate_every snapshot_epochs checkpointing_steps checkpoints_total_limit logging_steps"
        ).split()
    ),
    *(
        (f"--{name}=", f"--{name} is empty: give a value, or leave the flag out")
        for name in (
            "config resolution class_names background dataset_name dataset_config_name dataset_split train_data_dir "
            "cache_dir image_column label_column labels_file model_config_name_or_path resume_from_checkpoint "
            "logging_dir hub_token hub_model_id"
        ).split()
    ),
    ("--output_dir= --seed 1", "--output_dir is empty"),
    ("--block_out_channels 1000000000000000000000 8", "--block_out_channels is 1000000000000000000000: it must be at"),
    ("--resolution 1000000000000", "--resolution is '1000000000000'", "1 to 16384"),
    ("--resolution 99999x8", "--resolution is '99999x8'"),
    ("--shutdown_grace 1e300", "--shutdown_grace is 1e+300"),
    ("--train_batch_size 100000 --gradient_accumulation_steps 100000", "--gradient_accumulation_steps 100000"),
    ("--hub_token short", "--hub_token is not a token"),
    ("--hub-token=hf_ümlaut_token", "--hub_token is not a token"),
    # folders
    ("--output_dir {0}/run", "--output_dir {0}/run holds a finished run", "--overwrite_output_dir"),
    ("--output_dir {0}/file", "--output_dir {0}/file is a file"),
    ("--output_dir {0}/file/below", "--output_dir {0}/file/below", "{0}/file is"),
    (
        "--output_dir {0}/run --resume_from_checkpoint checkpoint-77",
        "checkpoint-77 is not a checkpoint",
        "checkpoint-3",
    ),
    ("--output_dir {0}/run --overwrite_output_dir --train_data_dir {0}/missing", "--train_data_dir {0}/missing"),
    ("--output_dir {0}/run --overwrite_output_dir --logging_dir ..", "--logging_dir .."),
    ("--output_dir {0}/run --overwrite_output_dir --logging_dir *", "--logging_dir *"),
    ("--output_dir {0}/run --overwrite_output_dir --train_data_dir {0}/damaged", "1.png"),
    # configs
    ("--config {0}/missing.yaml", "--config {0}/missing.yaml"),
    ("--config {0}/empty", "--config {0}/empty"),
    ("--config {0}/list.yaml", "--config {0}/list.yaml", "name: value"),
    ("--config {0}/empty.yaml", "--config {0}/empty.yaml", "name: value"),
    ("--config {0}/broken.yaml", "--config {0}/broken.yaml is not YAML"),
    ("--config {0}/tab.yaml", "--config {0}/tab.yaml is not YAML"),
    ("--config {0}/unknown.yaml", "unknown key 'learning_rat'", "'learning_rate'"),
    ("--config {0}/type.yaml", "--config {0}/type.yaml", "learning_rate", "fast"),
    ("--config {0}/nested.yaml", "--config {0}/nested.yaml", "learning_rate"),
    ("--config {0}/many.yaml", "--config {0}/many.yaml", "seed"),
    ("--config {0}/bool.yaml", "--config {0}/bool.yaml", "use_ema"),
    ("--config {0}/tag.yaml", "--config {0}/tag.yaml is not YAML"),
    ("--config {0}/number.yaml", "unknown key '1'"),
    ("--config {0}/none.yaml", "--config {0}/none.yaml", "seed"),
    ("--config {0}/bomb.yaml", "--config {0}/bomb.yaml", "line 1: anchors and aliases are not taken"),
    ("--config {0}/date.yaml", "--config {0}/date.yaml", "seed"),
    ("--config {0}/choice.yaml", "--config {0}/choice.yaml", "resize_mode", "crop"),
    ("--config {0}/itself.yaml", "--config {0}/itself.yaml", "'config'"),
    ("--config {0}/binary.yaml", "--config {0}/binary.yaml"),
    ("--config {0}/control.yaml", "--config {0}/control.yaml"),
    ("--config {0}/twice.yaml", "--config {0}/twice.yaml", "line 2: the key 'seed' stands there twice"),
    ("--config {0}/base_sixty.yaml", "--config {0}/base_sixty.yaml", "'16:16'"),
    ("--config {0}/deep.yaml", "--config {0}/deep.yaml", "nested too deeply"),
    ("--config {0}/large.yaml", "--config {0}/large.yaml", "at most 262,144 bytes"),
    ("--config {0}/laughs.yaml", "--config {0}/laughs.yaml", "aliases are not taken"),
    ("--config {0}/merged.yaml", "--config {0}/merged.yaml", "unknown key '<<'"),
    ("--config {0}/digits.yaml", "--config {0}/digits.yaml", "seed"),
    ("--config {0}/two_documents.yaml", "--config {0}/two_documents.yaml", "line 2"),
    ("--config {0}/wide_text.yaml", "--config {0}/wide_text.yaml can't be read", "utf-8"),
    ("--config {0}/pipe", "--config {0}/pipe can't be read: it is not a regular file"),
    ("--config /dev/zero", "--config /dev/zero can't be read: it is not a regular file"),
    ("--config {0}/pictures", "--config {0}/pictures can't be read: it is not a regular file"),
    ("--config {0}/circle.yaml", "--config {0}/circle.yaml"),
    ("--config {0}/blank.yaml", "--dataset_split is empty"),
    ("--config {0}/nul.yaml", "--image_column", "NUL"),
    ("--config {0}/mapping.yaml", "--config {0}/mapping.yaml", "'hub_model_id' takes a value"),
    ("--config {0}/no_items.yaml", "--config {0}/no_items.yaml", "'use_ema' takes one value, not 0"),
    ("--config {0}/null_item.yaml", "--config {0}/null_item.yaml", "'class_names' takes a value"),
    ("--config {0}/tagged.yaml", "--config {0}/tagged.yaml", "'seed' takes a value", "without tags"),
    ("--config {0}/token.yaml", "--hub_token is not a token"),
    # data
    ("--train_data_dir {0}/missing", "--train_data_dir {0}/missing: no such folder"),
    ("--train_data_dir {0}/file", "--train_data_dir {0}/file: no such folder"),
    ("--train_data_dir {0}/empty", "--train_data_dir {0}/empty: no image"),
    ("--train_data_dir {0}/damaged", "{0}/damaged/cat/1.png", "--on_bad_image skip"),
    ("--train_data_dir {0}/pictures --dataset_split test", "--dataset_split test"),
    ("--train_data_dir {0}/pictures --resolution 8 --resize_mode none", "16x16", "--resize_mode crop or pad"),
    ("--train_data_dir {0}/pictures --labels_file a.npy", "--labels_file"),
    ("--train_data_dir {0}/pictures --streaming", "--streaming needs --max_train_steps"),
    ("--train_data_dir {0}/pictures --streaming --max_train_steps 1 --evaluate_every 1", "--evaluate_every"),
    ("--train_data_dir {0}/pictures --image_column picture", "--image_column picture"),
    ("--train_data_dir {0}/metadata", "--train_data_dir {0}/metadata"),
    ("--train_data_dir {0}/archive", "--train_data_dir {0}/archive"),
    ("--dataset_name {0}/missing", "--dataset_name {0}/missing: no such folder"),
    ("--dataset_name {0}/empty", "--dataset_name {0}/empty"),
    ("--dataset_name {0}/csv", "--dataset_name {0}/csv"),
    ("--dataset_name {0}/run", "--dataset_name {0}/run"),
    ("--dataset_name {0}/file", "--dataset_name {0}/file"),
    ("--dataset_name a/b/c/d", "--dataset_name a/b/c/d"),
    ("--dataset_name {0}/missing.npy", "--dataset_name {0}/missing.npy: no such file"),
    ("--dataset_name {0}/text.npy", "--dataset_name {0}/text.npy"),
    ("--dataset_name {0}/cut.npy", "--dataset_name {0}/cut.npy"),
    ("--dataset_name {0}/zipped.npy", "--dataset_name {0}/zipped.npy", ".npz"),
    ("--dataset_name {0}/objects.npy", "--dataset_name {0}/objects.npy"),
    ("--dataset_name {0}/floats.npy", "float64", "uint8"),
    ("--dataset_name {0}/flat_images.npy", "(16, 16, 3)", "(N, H, W, C)"),
    ("--dataset_name {0}/two_channels.npy", "1, 3 or 4 channels"),
    ("--dataset_name {0}/no_images.npy", "(0, 16, 16, 3)"),
    ("--dataset_name {0}/images.npy --streaming --max_train_steps 1", "--streaming"),
    ("--dataset_name {0}/missing.parquet", "--dataset_name {0}/missing.parquet"),
    (
        "--dataset_name {0}/flat/0.png",
        "--dataset_name {0}/flat/0.png is neither a .npy nor a .parquet",
        "--cell 16x16",
    ),
    ("--dataset_name {0}/text.parquet", "--dataset_name {0}/text.parquet"),
    ("--dataset_name {0}/cut.parquet", "--dataset_name {0}/cut.parquet"),
    ("--dataset_name {0}/typed.parquet --dataset_split test", "--dataset_split test"),
    ("--dataset_name {0}/two_images.parquet", "left, right", "--image_column"),
    ("--dataset_name {0}/numbers.parquet", "--image_column"),
    ("--dataset_name {0}/numbers.parquet --image_column x", "row 0 of {0}/numbers.parquet", "is not an image"),
    ("--dataset_name {0}/bad_bytes.parquet", "row 0 of {0}/bad_bytes.parquet"),
    ("--dataset_name {0}/no_bytes.parquet --image_column image", "gone.png can't be read"),
    ("--dataset_name {0}/null_image.parquet", "row 1 of {0}/null_image.parquet"),
    ("--train_data_dir {0}/pictures --dataset_split ../flat", "--dataset_split '../flat': name a subfolder"),
    ("--train_data_dir {0}/pictures --dataset_split ..", "--dataset_split '..': name a subfolder"),
    ("--train_data_dir {0}/pictures --dataset_split .", "--dataset_split '.': name a subfolder"),
    ("--train_data_dir {0}/pictures --dataset_split /etc", "--dataset_split '/etc': name a subfolder"),
    ("--train_data_dir {0}/dangling", "--train_data_dir {0}/dangling: no such folder"),
    ("--train_data_dir {0}/loop", "--train_data_dir {0}/loop: no such folder"),
    *((f"--dataset_name {{0}}/{name}.npy", f"--dataset_name {{0}}/{name}.npy") for name in GARBLED_HEADERS),
    # what is wrong without the images is found before these are decoded, of which one is damaged
    ("--train_data_dir {0}/damaged --block_out_channels 8 8 --resolution 17", "--resolution 17", "multiples of 2"),
    ("--train_data_dir {0}/damaged --block_out_channels 8 8 --attention_levels 3", "--attention_levels [3]"),
    ("--train_data_dir {0}/damaged --attention_levels 1 --attention_head_dim 3", "--attention_head_dim 3"),
    ("--train_data_dir {0}/damaged --model_class ContextUNet2DModel --resolution 10", "--resolution 10"),
    ("--train_data_dir {0}/damaged --model_config_name_or_path {0}/empty", "--model_config_name_or_path {0}/empty"),
    # output folder
    (f"--output_dir {{1}}/{'x' * 300}", "File name too long", "give another name"),
    (f"--output_dir {{1}}/{'x/' * 3000}", "File name too long", "give another name"),
    ("--output_dir {1}/a\0b", "--output_dir {1}/a", "take the NUL character out"),
    ("--output_dir {0}/dangling", "{0}/dangling is a link that leads nowhere"),
    ("--output_dir {0}/dangling/below", "{0}/dangling is a link that leads nowhere"),
    ("--output_dir {0}/loop", "{0}/loop is a link that leads nowhere"),
    ("--output_dir {0}/loop/below", "--output_dir {0}/loop/below"),
    ("--output_dir /dev/null", "--output_dir /dev/null is a file"),
    ("--output_dir /proc/run", "/proc has 0.0 MB free", "--output_dir"),
    *(
        (f"--output_dir {{1}}/run --logging_dir {name}", f"--logging_dir {name}: a run has other files of this name")
        for name in (
            "model_index.json",
            "training_config.yaml",
            "unet",
            "scheduler/logs",
            "checkpoint-9",
            "pipeline.py",
        )
    ),
    ("--output_dir {1}/run --logging_dir /tmp", "--logging_dir /tmp"),
    ("--output_dir {1}/run --logging_dir a\0b", "--logging_dir a"),
    ("--output_dir {0}/run --resume_from_checkpoint {1}/checkpoint-1", "is not in --output_dir {0}/run"),
]
TRAIN_CONDITIONAL = [
    ("--noise_scheduler_class LinearCorruptionScheduler", "use train_unconditional.py"),
    ("--model_class BasicUNet2DModel", "BasicUNet2DModel"),
    ("--class_names a b", "--class_names gives 2 names"),
    ("--class_names a a a a a", "--class_names", "twice"),
    ("--train_data_dir {0}/flat", "{0}/flat has no label column", "folder of its own"),
    ("--train_data_dir {0}/pictures --class_names a", "--class_names gives 1 names"),
    ("--train_data_dir {0}/pictures --label_column y", "--label_column y"),
    ("--dataset_name {0}/images.npy", "--labels_file"),
    ("--dataset_name {0}/images.npy --labels_file {0}/missing.npy", "--labels_file {0}/missing.npy: no such file"),
    ("--dataset_name {0}/images.npy --labels_file {0}/text.npy", "--labels_file {0}/text.npy"),
    ("--dataset_name {0}/images.npy --labels_file {0}/empty", "--labels_file {0}/empty"),
    ("--dataset_name {0}/images.npy --labels_file {0}/three_labels.npy", "3 labels", "4 images"),
    ("--dataset_name {0}/images.npy --labels_file {0}/large_label.npy", "of the class 2, 3, 4, 5, 6", "without gaps"),
    ("--dataset_name {0}/images.npy --labels_file {0}/huge_label.npy", "class 18446744073709551615", "number the"),
    ("--dataset_name {0}/images.npy --labels_file {0}/empty_column.npy", "no image is of the class 2"),
    ("--dataset_name {0}/images.npy --labels_file {0}/labels.npy --class_names a b c", "no image is of the class c"),
    ("--train_data_dir {0}/pictures --max_train_samples 1", "no image is of the class dog", "--max_train_samples"),
    *((f"--dataset_name {{0}}/images.npy --labels_file {{0}}/{name}.npy", name) for name in list(GARBLED_HEADERS)[:9]),
    ("--dataset_name {0}/images.npy --labels_file {0}/negative_label.npy", "row 2", "label -1"),
    ("--dataset_name {0}/images.npy --labels_file {0}/large_label.npy --class_names a b", "row 2", "label 7"),
    ("--dataset_name {0}/images.npy --labels_file {0}/fractions.npy", "{0}/fractions.npy", "integers"),
    ("--dataset_name {0}/images.npy --labels_file {0}/two_hot.npy", "row 1", "one-hot"),
    ("--dataset_name {0}/images.npy --labels_file {0}/words.npy", "{0}/words.npy"),
    ("--dataset_name {0}/images.npy --labels_file {0}/cube.npy", "{0}/cube.npy", "(4, 2, 2)"),
    ("--dataset_name {0}/images.npy --labels_file {0}/objects.npy", "{0}/objects.npy"),
    ("--dataset_name {0}/missing_label.parquet", "column 'label'", "row 1", "label -1"),
    ("--dataset_name {0}/numbers.parquet --image_column image", "--label_column"),
    ("--dataset_name {0}/numbers.parquet --image_column image --label_column y", "'y'", "integers or strings"),
    ("--dataset_name {0}/numbers.parquet --image_column image --label_column z", "'z'", "row 1"),
    ("--dataset_name {0}/numbers.parquet --image_column image --label_column x --class_names a", "label 1"),
    ("--dataset_name {0}/numbers.parquet --image_column image --label_column image", "'image'"),
]
SAMPLE = [
    ("{0}/missing", "{0}/missing is not a model that can be loaded"),
    ("{0}/file", "{0}/file is not a model that can be loaded"),
    ("{0}/empty", "{0}/empty is not a model that can be loaded"),
    ("no/such/model", "no/such/model"),
    *(
        (f"{{0}}/{name}", f"{{0}}/{name}")
        for name in (
            "index_broken index_list index_no_class index_unknown index_other index_numbers index_null index_text "
            "no_unet no_scheduler no_weights unet_broken unet_empty unet_list unet_binary unet_types unet_number "
            "unet_wider unet_channels weights_text weights_cut weights_empty weights_other weights_fewer "
            "scheduler_broken scheduler_steps scheduler_text scheduler_betas scheduler_type labels_list labels_text"
        ).split()
    ),
    *((f"{{0}}/index_{name}", f"{{0}}/index_{name}") for name in (*BAD_INDEXES, *BAD_INDEX_VALUES)),
    *((f"{{0}}/unet_{name}", f"{{0}}/unet_{name}") for name in BAD_UNETS),
    *((f"{{0}}/process_{name}", f"{{0}}/process_{name}") for name in BAD_PROCESSES),
    *((f"{{0}}/toy_{name}", f"{{0}}/toy_{name}", "scheduler_config.json") for name in BAD_TOY_PROCESSES),
    *((f"{{0}}/labels_{name}", f"{{0}}/labels_{name}", "id2label") for name in BAD_LABELS),
    ("{0}/classes_none", "{0}/classes_none", "takes no classes"),
    ("{0}/classes_fewer", "{0}/classes_fewer"),
    ("{0}/classes_many", "num_class_embeds is 1000000000"),
    ("{0}/weights_nan", "the weights of its network are not finite (conv_in.bias)"),
    ("{0}/weights_infinite", "the weights of its network are not finite (conv_in.bias)"),
    ("{0}/weights_more", "no place for: down_blocks.0.resnets.1.conv1.weight"),
    ("{0}/index_gone", "{0}/index_gone is not a model that can be loaded"),
    (
        "{0}/unfinished",
        "{0}/unfinished holds no pipeline yet: name its newest checkpoint, {0}/unfinished/checkpoint-4",
    ),
    ("{0}/run --prediction_type sample", "--prediction_type: {0}/run says itself how it was trained"),
    ("{0}/run --noise_scheduler_class LinearCorruptionScheduler", "says itself how it was trained"),
    ("{0}/run --ddpm_num_steps 0", "--ddpm_num_steps"),
    ("{0}/run --clip_sample maybe", "--clip_sample"),
    ("{0}/run --variance_type learned", "--variance_type"),
    ("{0}/run --timestep_spacing x", "--timestep_spacing"),
    ("{0}/run --rescale_betas_zero_snr true", "--rescale_betas_zero_snr"),
    ("{0}/run --no_class", "--no_class: this is an unconditional model"),
    ("{0}/by_class --no_class --class hero", "--no_class does not go with --class"),
    ("{0}/run --steps_shown 0", "--steps_shown"),
    ("{0}/run --steps_shown 1 --forward sprites", "--forward"),
    ("{0}/run --steps_shown 1 --num_inference_steps 2 --scheduler unipc", "--steps_shown: UniPC"),
    ("--predict sprites", "name a model"),
    ("{0}/run --predict {0}/missing", "--predict"),
    ("{0}/by_class --predict sprites --class hero --class food", "--predict takes one --class"),
    ("{0}/run --resolution 8", "--resolution belongs to --forward"),
    ("--forward sprites --resolution x", "--resolution is 'x'"),
    ("--forward sprites --prediction_type x", "--prediction_type"),
    ("--forward sprites --rescale_betas_zero_snr true", "--rescale_betas_zero_snr"),
    ("--forward sprites --noise_scheduler_class LinearCorruptionScheduler --clip_sample true", "--clip_sample"),
    ("--num_images 2", "name a model"),
    ("", "name a model"),
    ("{0}/by_class --snapshots {0}/by_class", "one of them"),
    ("--snapshots {0}/by_class", "train with --snapshot_epochs"),
    ("--snapshots {0}/missing", "{0}/missing"),
    ("{0}/run --class hero", "--class hero"),
    ("{0}/run --mix hero=1", "--mix hero=1"),
    ("{0}/run --guidance_scale 2", "--guidance_scale", "it needs a --guide"),
    ("{0}/run --guide {0}/missing", "{0}/missing is not a model that can be loaded"),
    ("{0}/run --guide {0}/by_class", "--guide {0}/by_class", "it has classes or prompts"),
    ("{0}/by_class --guide {0}/run", "--guide: {0}/by_class is guided by its classes or prompts"),
    ("{0}/run --guide {0}/toy", "--guide {0}/toy"),
    ("{0}/run --predict sprites --guide {0}/run", "--guidance_scale and --guide are for samples, not for --predict"),
    ("{0}/by_class --forward sprites --guidance_scale 2", "are for samples, not for --forward"),
    ("{0}/by_class --guidance_scale nan", "--guidance_scale"),
    ("{0}/by_class --guidance_scale inf", "--guidance_scale"),
    ("{0}/by_class --class dragon", "unknown class 'dragon': this model's classes are hero, non-hero"),
    ("{0}/by_class --class 5", "unknown class 5"),
    ("{0}/by_class --class -1", "--class"),
    ("{0}/by_class --class=-1", "--class: unknown class '-1'"),
    ("{0}/by_class --class=", "--class"),
    ("{0}/by_class --mix hero=1,dragon=1", "--mix: unknown class 'dragon'"),
    ("{0}/by_class --mix hero", "--mix hero: 'hero' is not NAME=WEIGHT, as in hero=1,food=0.6"),
    ("{0}/by_class --mix hero=1,food=lots", "'food=lots' is not NAME=WEIGHT"),
    ("{0}/by_class --mix hero=nan", "'hero=nan' is not NAME=WEIGHT"),
    ("{0}/by_class --mix hero=1,0=1", "'0' stands there twice"),
    ("{0}/by_class --mix ²=1", "--mix"),
    ("{0}/by_class --class ²", "--class"),
    ("{0}/by_class --num_images 0", "--num_images is 0"),
    ("{0}/by_class --num_images many", "--num_images", "'many'"),
    ("{0}/by_class --num_images 1000000000000", "--num_images is 1000000000000: it must be at least 1 and at most"),
    ("{0}/by_class --num_images nan", "--num_images", "'nan'"),
    ("{0}/by_class --num_images -1", "--num_images is -1"),
    ("{0}/by_class --num_images 100000", "samples.png would have 1 x 6,400,000 x 320 pixels"),
    ("{0}/by_class --num_images 300 --animate {0}/a.webp", "a.webp would have"),
    ("{0}/run --num_images 900000 --scale 1 --scheduler ddim --animate {0}/a.gif", "a.gif would have"),
    ("{0}/by_class --batch_size 1000000000000", "--batch_size is 1000000000000"),
    ("{0}/by_class --batch_size nan", "--batch_size", "'nan'"),
    ("{0}/by_class --num_inference_steps 0", "--num_inference_steps is 0"),
    ("{0}/by_class --num_inference_steps -1", "--num_inference_steps is -1"),
    ("{0}/by_class --num_inference_steps nan", "--num_inference_steps", "'nan'"),
    ("{0}/by_class --num_inference_steps 1000000000000000000000000000000", "--num_inference_steps is 1000"),
    ("{0}/by_class --num-inference-steps 0", "--num_inference_steps is 0"),
    ("{0}/by_class --num-images 0", "--num_images is 0"),
    ("{0}/by_class --seed nan", "--seed", "'nan'"),
    ("{0}/by_class --seed 4294967296", "--seed is 4294967296"),
    ("{0}/by_class --guidance_scale 1e30", "--guidance_scale is 1e+30"),
    ("{0}/by_class --guidance_scale many", "--guidance_scale", "'many'"),
    ("{0}/by_class --guidance_scale=-1e30", "--guidance_scale is -1e+30"),
    ("{0}/by_class --mix hero=1e39 --num_images 1 --num_inference_steps 2", "are not finite"),
    ("{0}/by_class --mix hero=inf", "'hero=inf' is not NAME=WEIGHT"),
    ("{0}/by_class --mix=", "--mix : '' is not NAME=WEIGHT"),
    ("{0}/by_class --scheduler=", "--scheduler: unknown sampler ''"),
    ("{0}/by_class --scheduler DDIM", "unknown sampler 'DDIM'"),
    ("{0}/missing --scheduler ddmp", "unknown sampler 'ddmp'"),
    ("{0}/run --scheduler pndm --num_inference_steps 3", "3 steps are out of the 4 to 500", "by pndm"),
    ("{0}/run --scheduler unipc --num_inference_steps 1000", "1000 steps are out of the 1 to 999"),
    ("{0}/by_class --columns 3", "--columns"),
    ("{0}/by_class --fps 0", "--fps"),
    ("{0}/by_class --every -1", "--every"),
    ("{0}/by_class --batch_size 0", "--batch_size is 0"),
    ("{0}/by_class --seed -1", "--seed is -1"),
    ("{0}/by_class --seed 99999999999999999999", "--seed"),
    ("{0}/by_class --num_inference_steps 1001", "--num_inference_steps: 1001 steps are out of the 1 to 1000"),
    ("{0}/by_class --scheduler ddmp", "unknown sampler 'ddmp'; known are ddpm, ddim"),
    ("{0}/toy --scheduler ddim", "LinearCorruptionScheduler, has no sampler but its own"),
    ("{0}/toy --no-noise", "LinearCorruptionScheduler adds no noise"),
    ("{0}/by_class --compare ddpm:500,ddmp:2", "unknown sampler 'ddmp'"),
    ("{0}/by_class --compare ddim:many", "'ddim:many' is not NAME:STEPS"),
    ("{0}/by_class --compare ddim:²", "'ddim:²' is not NAME:STEPS"),
    ("{0}/by_class --compare ddim:0", "--compare, ddim: 0 steps"),
    ("{0}/by_class --compare ,", "--compare"),
    ("{0}/by_class --compare=", "--compare: unknown sampler ''"),
    ("{0}/by_class --compare ddim:2,", "--compare: unknown sampler ''"),
    ("{0}/by_class --compare ddim:", "'ddim:' is not NAME:STEPS"),
    ("{0}/by_class --compare ddim:-1", "'ddim:-1' is not NAME:STEPS"),
    ("{0}/by_class --compare ddim:2,ddim:1000000000000000000000000000000", "is not NAME:STEPS"),
    ("{0}/by_class --compare ddim:2,ddim:1001", "--compare, ddim: 1001 steps are out of the 1 to 1000"),
    ("{0}/by_class --compare ddim:2,pndm:3", "--compare, pndm: 3 steps are out of the 4 to 500"),
    ("{0}/toy --compare ddpm:2", "LinearCorruptionScheduler, has no sampler but its own"),
    ("{0}/missing --compare ddim:2,ddmp:2", "--compare: unknown sampler 'ddmp'"),
    ("{0}/by_class --forward=", "--forward"),
    ("{0}/by_class --compare ddim:2 --no-noise", "not allowed with"),
    ("{0}/by_class --compare ddim:2 --scheduler ddim", "does not go with --compare"),
    ("{0}/by_class --interpolate 1 2 --scheduler euler", "does not go with --interpolate"),
    ("{0}/by_class --interpolate 1 2 --class 0 --class 1 --class 2", "mixes or prompts: 3 are given"),
    ("{0}/by_class --interpolate 1", "--interpolate"),
    ("{0}/by_class --interpolate 1 -2", "--interpolate"),
    ("{0}/by_class --interpolate 1 2 --num_images 1", "--num_images from 2 on"),
    ("{0}/by_class --interpolate 1 4294967296", "--interpolate takes two seeds, 0 to 4294967295"),
    ("{0}/by_class --interpolate 1 nan", "--interpolate", "'nan'"),
    ("{0}/by_class --interpolate 1 2 --num_images 100000", "interpolate.png would have"),
    ("{0}/by_class --forward sprites --num_images 1000000", "forward.png would have"),
    ("{0}/by_class --no_noise --num_images 1000000", "no_noise.png would have"),
    ("{0}/by_class --eta 0.5", "--eta is for --scheduler ddim"),
    ("{0}/by_class --scheduler ddim --eta 2", "--eta is 2.0"),
    ("{0}/by_class --scheduler ddim --eta nan", "--eta is nan"),
    ("{0}/by_class --animate frames.mp4", "frames.mp4: name a .gif or .webp"),
    ("{0}/by_class --animate_prediction", "belongs to --animate"),
    (
        "{0}/by_class --animate {0}/a.gif --animate_prediction --scheduler unipc --num_inference_steps 2",
        "UniPCMultistepScheduler does not tell its prediction",
    ),
    ("{0}/by_class --forward {0}/missing.png", "--forward {0}/missing.png"),
    ("{0}/by_class --forward {0}/text.png", "{0}/text.png is not an image"),
    ("{0}/by_class --forward {0}/empty", "--forward {0}/empty"),
    ("{0}/by_class --forward {0}/text.npy", "--forward {0}/text.npy"),
    ("{0}/by_class --forward {0}/text.parquet", "--forward {0}/text.parquet"),
    ("{0}/by_class --forward {0}/damaged", "1.png"),
    ("{0}/by_class --scale 0", "--scale 0"),
    ("{0}/by_class --scale ²", "--scale ²"),
    ("{0}/by_class --scale -1", "--scale"),
    ("{0}/by_class --scale nan", "--scale nan"),
    ("{0}/by_class --scale 1000000000", "--scale 1000000000: give 'auto' or a whole number from 1 to 1024"),
    ("{0}/by_class --scale 1024 --output {0}/new.png", "new.png would have 1 x 262,144 x 81,920 pixels"),
    ("{0}/by_class --scale 1024 --output {0}/new", "{0}/new would have 1 x 16,384 x 16,384 pixels"),
    ("{0}/by_class --eta nan", "--eta is nan"),
    ("{0}/by_class --eta -1", "--eta is -1.0"),
    ("{0}/by_class --eta 1e30", "--eta is 1e+30"),
    ("{0}/by_class --dtype float16", "--dtype"),
    ("{0}/by_class --logger tensorboard", "--logger belongs to --compare"),
    ("{0}/by_class --output {0}/samples.jpg", "samples.jpg: name a .png file or a folder"),
    ("{0}/by_class --output {0}/file", "--output {0}/file is there already, as a file"),
    ("{0}/by_class --output {0}/by_class/model_index.json/x.png", "is not a folder that can be written to"),
    ("{0}/by_class --animate {0}/by_class/model_index.json/x.gif", "is not a folder that can be written to"),
    (
        "{0}/config_broken --compare ddim:2 --logger tensorboard --num_images 1",
        "{0}/config_broken/training_config.yaml",
    ),
    ("wandb:me/sprites/model:latest", "wandb:me/sprites/model:latest"),
]
CALCULATE_METRICS = [
    ("", "model"),
    ("{0}/missing", "--dataset_name or --train_data_dir"),
    ("{0}/missing --dataset_name sprites", "{0}/missing"),
    ("{0}/file --dataset_name sprites", "{0}/file"),
    ("{0}/empty --dataset_name sprites", "{0}/empty holds neither a pipeline"),
    ("{0}/flat", "--dataset_name or --train_data_dir"),
    ("{0}/flat --train_data_dir {0}/pictures", "at least 20 images"),
    ("{0}/flat --train_data_dir {0}/missing", "--train_data_dir {0}/missing"),
    ("{0}/damaged/cat/1.png --train_data_dir {0}/flat", "{0}/damaged/cat/1.png"),
    ("{0}/archive --dataset_name {0}/text.parquet", "{0}/text.parquet"),
    ("{0}/run --num_images 5", "--num_images is 5: it must be at least 10"),
    ("{0}/run --num_images x", "--num_images"),
    ("{0}/run --num_images 1000000000000000000000000000000", "--num_images is 1000"),
    ("{0}/run --num_images -1", "--num_images is -1"),
    ("{0}/run --num_images nan", "--num_images", "'nan'"),
    ("{0}/run --num-images 5", "--num_images is 5: it must be at least 10"),
    ("{0}/run --train-data-dir {0}/missing", "--train_data_dir {0}/missing"),
    ("{0}/run --dataset-nam x", "unknown flag '--dataset_nam'; did you mean '--dataset_name'?"),
    ("{0}/run --batch_size -1", "--batch_size is -1"),
    ("{0}/run --batch_size 1000000000000000000000000000000", "--batch_size is 1000"),
    ("{0}/run --seed 4294967296", "--seed is 4294967296"),
    ("{0}/run --seed nan", "--seed", "'nan'"),
    ("{0}/run --num_inference_steps -1", "--num_inference_steps is -1"),
    ("{0}/run --num_inference_steps 1000000000000000000000000000000", "--num_inference_steps is 1000"),
    ("{0}/by_class --guidance_scale 1e30", "--guidance_scale is 1e+30"),
    ("{0}/run --scheduler=", "--scheduler: unknown sampler ''"),
    ("{0}/missing --scheduler ddmp --dataset_name sprites", "unknown sampler 'ddmp'"),
    (
        "{0}/unfinished",
        "{0}/unfinished holds no pipeline yet: name its newest checkpoint, {0}/unfinished/checkpoint-4",
    ),
    ("{0}/weights_nan", "{0}/weights_nan: the weights of its network are not finite"),
    ("{0}/weights_more", "{0}/weights_more"),
    ("{0}/process_beta_nan", "{0}/process_beta_nan", "beta_start is nan"),
    ("{0}/process_steps_huge", "num_train_timesteps is 1000000000000"),
    ("{0}/unet_size_huge", "sample_size is 1000000"),
    ("{0}/labels_twice", "id2label"),
    ("{0}/index_of_null", "{0}/index_of_null"),
    ("{0}/summary_empty", "{0}/summary_empty"),
    ("{0}/summary_list", "{0}/summary_list"),
    ("{0}/summary_null", "{0}/summary_null"),
    ("{0}/summary_step", "{0}/summary_step"),
    ("{0}/summary_deep", "{0}/summary_deep"),
    ("{0}/run --batch_size 0", "--batch_size is 0"),
    ("{0}/run --seed -1", "--seed is -1"),
    ("{0}/run --num_inference_steps 0", "--num_inference_steps is 0"),
    ("{0}/run --num_inference_steps 5000", "5000"),
    ("{0}/run --scheduler ddmp", "unknown sampler 'ddmp'"),
    ("{0}/run --guidance_scale 2", "--guidance_scale", "it needs a --guide"),
    ("{0}/run --guide {0}/by_class", "--guide {0}/by_class", "it has classes or prompts"),
    ("{0}/by_class --guidance_scale nan", "--guidance_scale"),
    ("{0}/run --extractor vgg", "--extractor"),
    ("{0}/run --extractor clip --clip_model {0}/empty", "--clip_model {0}/empty"),
    ("{0}/run --learning_rate 1", "unknown flag '--learning_rate'"),
    ("{0}/run --hub_token x", "unknown flag '--hub_token'; --help"),
    ("{0}/run extra", "extra"),
    ("{0}/run --output_dir {0}/file", "--output_dir {0}/file"),
    ("{0}/run --output_dir {0}/file/below", "--output_dir {0}/file/below"),
    ("{0}/toy --scheduler ddim", "LinearCorruptionScheduler"),
    ("{0}/config_broken", "{0}/config_broken/training_config.yaml"),
    ("{0}/config_list", "{0}/config_list/training_config.yaml"),
    ("{0}/config_unknown", "no_such_key"),
    ("{0}/weights_cut", "{0}/weights_cut"),
    ("{0}/index_broken", "{0}/index_broken"),
    ("{0}/summary_broken", "{0}/summary_broken"),
]
HUB = [
    ("", "command"),
    ("pull {0}/run", "'pull'"),
    ("push {0}/run", "repo_id"),
    ("push {0}/missing me/x", "{0}/missing holds no pipeline"),
    ("push {0}/file me/x", "{0}/file holds no pipeline"),
    ("push {0}/empty me/x", "{0}/empty holds no pipeline"),
    ("push {0}/run me/x/y", "me/x/y"),
    ("push {0}/run ../x", "../x"),
    ("push {0}/run", "repo_id"),
    ("card {0}/missing", "{0}/missing holds no pipeline"),
    ("card", "run_dir"),
    ("card {0}/run extra", "extra"),
    ("card {0}/no_summary", "{0}/no_summary is not the output folder of a run"),
    ("card {0}/summary_broken", "{0}/summary_broken is not the output folder of a run"),
    ("card {0}/summary_empty", "{0}/summary_empty is not the output folder of a run"),
    ("card {0}/summary_list", "{0}/summary_list is not the output folder of a run"),
    ("card {0}/summary_types", "{0}/summary_types is not the output folder of a run"),
    ("card {0}/config_broken", "{0}/config_broken is not the output folder of a run"),
    ("card {0}/config_list", "{0}/config_list is not the output folder of a run"),
    ("card {0}/config_short", "{0}/config_short is not the output folder of a run"),
    ("card {0}/metrics_broken", "{0}/metrics_broken is not the output folder of a run"),
    ("card {0}/index_broken", "{0}/index_broken is not the output folder of a run"),
    ("card {0}/index_list", "{0}/index_list is not the output folder of a run"),
    ("card {0}/card_binary", "{0}/card_binary"),
    ("card {0}/card_broken", "{0}/card_broken"),
    ("card {0}/card_half", "README.md has the line '<!-- from the run: begin -->', but no"),
    ("card {0}/config_pipe", "{0}/config_pipe/training_config.yaml can't be read: it is not a regular file"),
    ("card {0}/config_deep", "{0}/config_deep is not the output folder of a run", "nested too deeply"),
    ("card {0}/config_twice", "{0}/config_twice/training_config.yaml", "the key 'seed' stands there twice"),
]
REPORT = [
    ("", "run"),
    ("{0}/missing", "{0}/missing is not the folder of a run"),
    ("{0}/empty", "{0}/empty is not the folder of a run"),
    ("{0}/file", "{0}/file is not the folder of a run"),
]
CONVERT = [
    ("{0}/few.pth {1}/new --shortcut_seed -1", "--shortcut_seed"),
    ("{0}/run {1}/new --shortcut_seed 1", "--shortcut_seed 1: the model has a UNet2DModel"),
    ("", "model"),
    ("{0}/few.pth", "output_dir"),
    ("{0}/missing.pth {1}/new", "{0}/missing.pth: no such file"),
    ("{0}/empty {1}/new", "{0}/empty is not a model that can be loaded"),
    ("{0}/few.pth {0}/run", "{0}/run is there already"),
    ("{0}/few.pth {0}/file", "{0}/file is there already"),
    *(
        (f"{{0}}/{name}.pth {{1}}/new", f"{{0}}/{name}.pth is not a")
        for name in ("few other list tensor keys values shapes scalars text empty pickle cut bytes").split()
    ),
    ("{0}/pickle.pth {1}/new", "it is damaged, or holds other objects than weights, which are not loaded"),
]
CASES = [
    *(("train_unconditional", f"{TINY} {flags}", *rest) for flags, *rest in TRAIN_UNCONDITIONAL),
    *(("train_conditional", f"{TINY} {flags}", *rest) for flags, *rest in TRAIN_CONDITIONAL),
    *(("sample", *case) for case in SAMPLE),
    *(("calculate_metrics", *case) for case in CALCULATE_METRICS),
    *(("sprite_diffusion.sharing.hub", *case) for case in HUB),
    *(("sprite_diffusion.sampling.convert", *case) for case in CONVERT),
    *(("sprite_diffusion.sharing.report", *case) for case in REPORT),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1].removeprefix(TINY).strip()}")
def test_one_line_names_what_to_change(case, run_script, folder, tmp_path, monkeypatch, capfd):
    script, flags, *fragments = case
    output_dir = tmp_path / "new" if script.startswith("train_") and "--output_dir" not in flags else None
    monkeypatch.chdir(folder)
    before = times_of_change(folder)
    with pytest.raises(SystemExit) as exit:
        run_script(script, flags.format(folder, tmp_path), output_dir)
    assert exit.value.code == 2
    *before_it, error = capfd.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert error.startswith("error: ")
    for fragment in fragments:
        assert fragment.format(folder, tmp_path) in error
    assert not [line for line in before_it if line.strip() and not PROGRESS_BAR.search(line)]
    assert times_of_change(folder) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("leave", [True, False])
def test_error_begins_on_a_line_of_its_own(leave, capfd):
    """While a progress bar stands on the last line."""

    @exits_on_user_error
    def main() -> None:
        bar = tqdm(total=2, desc="reading", leave=leave)
        bar.update()
        bar.refresh()
        raise UserInputError(f"1.png is damaged, after {bar.n} of 2")

    with pytest.raises(SystemExit):
        main()
    error = capfd.readouterr().err
    assert "reading:  50%" in error
    before, _, message = error.partition("error: ")
    assert before[-1] in "\n\r"
    assert before.endswith("\n" if leave else " \r")  # a bar that does not stay is wiped
    assert message == "1.png is damaged, after 1 of 2\n"


HUGE = (
    "unet_size_huge unet_size_wide unet_in_huge unet_channels_huge unet_channels_many unet_layers_huge "
    "process_steps_huge toy_steps_huge classes_many labels_many"
)


@pytest.mark.parametrize("name", HUGE.split())
def test_a_damaged_size_costs_neither_memory_nor_time(name, folder):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KB
    start = time.monotonic()
    with pytest.raises(UserInputError):
        load_pipeline(str(folder / name))
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6


def test_no_traceback_from_the_program_itself(tmp_path):
    flags = f"--train_data_dir {tmp_path / 'missing'}"
    # An interpreter of its own, as what the imports print, and how it ends, belong to it.
    result = finish(start("train_unconditional", flags, tmp_path / "run", fork=False), 2)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: --train_data_dir")
