"""Tests training on captions: from the texts of every source to a pipeline that is asked by prompt."""

import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from inspecting import assert_same_weights, weights
from launching import LAUNCH_TWO, TINY, finish, start
from PIL import Image
from safetensors.torch import load_file
from tiny_network import make_tiny_network
from transformers import BertConfig, BertModel, CLIPTextModel, PreTrainedTokenizerFast

from pipelines import ConditionalDDPMPipeline, UnconditionalDDPMPipeline, find_unknown_words
from schedulers import ClosedFormDDPMScheduler
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data import sources
from sprite_diffusion.data.config import DataConfig
from sprite_diffusion.data.dataset import _cache_key, load_image_data, load_tensor, open_images
from sprite_diffusion.data.sources import find_captions
from sprite_diffusion.data.sprites import draw_sprites
from sprite_diffusion.metrics import evaluation
from sprite_diffusion.metrics.evaluation import generate, match_conditions
from sprite_diffusion.metrics.real_images import RealImages
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.presets import load_preset, parse_config
from sprite_diffusion.sampling.conditions import Condition
from sprite_diffusion.sampling.figures import find_snapshots, show_learning
from sprite_diffusion.sampling.generation import Request, sample_images
from sprite_diffusion.sampling.pipeline_loading import load_pipeline
from sprite_diffusion.sampling.samplers import make_sampler
from sprite_diffusion.sampling.text_encoders import load_text_encoder
from sprite_diffusion.sharing.card import make_card
from sprite_diffusion.sharing.hub import copy_uploaded
from sprite_diffusion.training import text_encoder as embedding
from sprite_diffusion.training.build import build_model
from sprite_diffusion.training.captioned import train
from sprite_diffusion.training.steps import make_dataloader
from sprite_diffusion.training.text_encoder import (
    MAX_TOKENS,
    add_words,
    build_text_encoder,
    build_tokenizer,
    embed_once,
    fit_length,
    tokenize,
)

CAPTIONS = ["A red cat, asleep", "a blue dog", "", "a blue dog", "two dogs and a cat"]
WORDS_FLAGS = f"{TINY} --caption_column caption"
TEXT_WEIGHTS = "text_encoder/model.safetensors"
WORD_ROWS = "text_model.embeddings.token_embedding.weight"


@pytest.fixture
def pictures(tmp_path):
    """Makes a folder of five pictures whose red says which caption they have."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(len(CAPTIONS)):
        Image.new("RGB", (8, 8), (40 * i, 0, 255)).save(folder / f"{i}.png")
    return folder


def add_metadata(folder: Path, column: str = "text", **others) -> None:
    """Writes the file by which `datasets` knows the captions of images."""
    rows = [{"file_name": f"{i}.png", column: caption or None, **others} for i, caption in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def add_texts(folder: Path) -> None:
    for i, caption in enumerate(CAPTIONS):
        if caption:
            (folder / f"{i}.txt").write_text(f"{caption}\n", encoding="utf-8")


def make_parquet(folder: Path) -> Path:
    images = [{"path": None, "bytes": (folder / f"{i}.png").read_bytes()} for i in range(len(CAPTIONS))]
    features = datasets.Features(picture=datasets.Image(), text=datasets.Value("string"))
    table = datasets.Dataset.from_dict({"picture": images, "text": CAPTIONS}, features=features)
    table.to_parquet(folder.parent / "pictures.parquet")
    return folder.parent / "pictures.parquet"


def config_of(folder: Path, **flags) -> DataConfig:
    name = {"dataset_name": str(folder)} if folder.suffix else {"train_data_dir": str(folder)}
    return DataConfig(**name, resolution="8", **flags)


def read_pairs(config: DataConfig, streaming: bool = False) -> dict[int, str]:
    """Returns the caption of each picture by its number, which its red tells, from the batches of a training."""
    data = load_image_data(config, with_labels=None, streaming=streaming)
    pairs = {}
    for batch in make_dataloader(data, batch_size=2):
        reds = batch["images"][:, 0, 0, 0]
        reds = (reds / 2 + 0.5) * 255 if streaming else reds
        for red, caption_id in zip(reds.tolist(), batch["caption_ids"].tolist(), strict=True):
            pairs[round(red / 40)] = data.captions[caption_id]
    return pairs


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", ["metadata", "texts", "parquet"])
def test_every_source_gives_each_image_its_caption(source, streaming, pictures):
    column = "text"
    if source == "metadata":
        add_metadata(pictures)
        rows = datasets.load_dataset("imagefolder", data_dir=str(pictures), split="train")
        expected = {round(row["image"].getpixel((0, 0))[0] / 40): row["text"] or "" for row in rows}
    else:
        expected = dict(enumerate(CAPTIONS))
    if source == "texts":
        add_texts(pictures)
        column = "txt"
    config = config_of(make_parquet(pictures) if source == "parquet" else pictures)
    assert find_captions(config, streaming)[0] == column
    config.caption_column = column
    assert read_pairs(config, streaming) == expected
    captions = load_image_data(config, with_labels=None, streaming=streaming).captions
    assert captions[0] == ""
    assert sorted(captions) == sorted(set(CAPTIONS))


def test_the_built_in_sprites_have_the_captions_of_their_artist():
    data = load_image_data(DataConfig(max_train_samples=20, resolution="16", caption_column="caption"), None)
    images, _, captions = draw_sprites(20)
    batch = data.dataset.__getitems__(list(range(20)))
    assert [data.captions[i] for i in batch["caption_ids"]] == captions
    assert torch.equal(batch["images"], torch.from_numpy(images).permute(0, 3, 1, 2))


def test_images_in_memory_have_captions():
    config = DataConfig(resolution="8")
    data = load_tensor(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), config, captions=CAPTIONS)
    assert [data.captions[i] for i in data.dataset.__getitems__([0, 1, 2, 3, 4])["caption_ids"]] == CAPTIONS
    with pytest.raises(UserInputError, match="4 captions for 5 images"):
        load_tensor(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), config, captions=CAPTIONS[:4])
    untidy = load_tensor(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), config, captions=[" ", " a ghost\n", None])
    assert untidy.captions == ["", "a ghost"]
    assert untidy.dataset.captions.ids.tolist() == [0, 1, 0]


def test_captions_are_no_part_of_the_decoded_images(pictures):
    """Other captions do not decode the images again, but are told from the earlier ones when a run goes on."""

    def look(**flags) -> tuple[str, str | None]:
        config = config_of(pictures, **flags)
        return _cache_key(open_images(config, None), config), load_image_data(config, None).identity

    key, without = look()
    add_texts(pictures)
    assert look() == (key, without)
    same_key, before = look(caption_column="txt")
    (pictures / "1.txt").write_text("a green dog")
    changed_key, after = look(caption_column="txt")
    assert {key, same_key, changed_key} == {key}
    assert len({without, before, after}) == 3


def test_captions_are_looked_for_where_there_are_no_classes(pictures):
    assert find_captions(config_of(pictures), streaming=False)[0] is None
    add_metadata(pictures, "Prompt", note="no caption by its name")
    assert find_captions(config_of(pictures), streaming=False)[0] == "Prompt"
    assert find_captions(config_of(pictures, label_column="note"), streaming=False)[0] is None
    add_metadata(pictures, "caption", description="another")
    with pytest.raises(UserInputError, match="the columns caption, description: name one of them by --caption_column"):
        find_captions(config_of(pictures), streaming=False)
    assert find_captions(config_of(pictures, caption_column="caption"), streaming=False)[0] == "caption"
    assert find_captions(DataConfig(), streaming=False)[0] is None


@pytest.mark.parametrize("in_classes", [False, True])
@pytest.mark.parametrize("from_python", [False, True])
def test_the_preset_of_captions_takes_those_of_other_images(from_python, in_classes, pictures, tmp_path):
    if in_classes:
        for i in range(len(CAPTIONS)):
            (pictures / f"class {i % 2}").mkdir(exist_ok=True)
            (pictures / f"{i}.png").rename(pictures / f"class {i % 2}" / f"{i}.png")

    def load(**images):
        argv = [f"--{name}={value}" for name, value in images.items()]
        preset = "sprites_captions.yaml"
        config = load_preset(preset, **images) if from_python else parse_config(["--config", preset, *argv], "")
        assert not config.leave_out_pairs
        return load_image_data(config, None)

    with pytest.raises(UserInputError, match=r"pictures has no captions .*: name their --caption_column, or"):
        load(train_data_dir=str(pictures))
    (pictures / "class 1" if in_classes else pictures).joinpath("1.txt").write_text("a cat")
    assert load(train_data_dir=str(pictures)).captions == ["", "a cat"]
    if not in_classes:
        add_metadata(pictures)
        assert sorted(load(train_data_dir=str(pictures)).captions) == sorted(set(CAPTIONS))
        assert sorted(load(dataset_name=str(make_parquet(pictures))).captions) == sorted(set(CAPTIONS))
    np.save(tmp_path / "a.npy", np.zeros((4, 16, 16, 3), np.uint8))
    with pytest.raises(UserInputError, match=r"--caption_column auto: .*a.npy have no captions, give another"):
        load(dataset_name=str(tmp_path / "a.npy"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"caption_column": "words"}, "--caption_column words: .* has the columns image, text, number; 'txt' is for"),
        ({"caption_column": "number"}, "column 'number': the caption is 3, which is no text: name another"),
    ],
)
def test_columns_that_hold_no_captions(pictures, flags, message):
    add_metadata(pictures, number=3)
    with pytest.raises(UserInputError, match=message):
        load_image_data(config_of(pictures, **flags), None)


def test_each_word_is_a_token():
    _, _, captions = draw_sprites(200)
    tokenizer = build_tokenizer(captions)
    words = [re.findall(r"\w+|[^\w\s]+", caption.lower()) for caption in captions]
    special = {"<|startoftext|>", "<|endoftext|>", "<|unknown|>"}
    assert tokenizer.get_vocab().keys() - special == set().union(*words)
    for caption, expected in zip(captions[:20], words, strict=False):
        ids = tokenizer(caption.upper()).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == ["<|startoftext|>", *expected, "<|endoftext|>"]
    assert tokenizer.model_max_length == max(map(len, words)) + 2
    read = tokenize(tokenizer, ["", "a hero with a zebra"])
    assert read["input_ids"].shape == (2, tokenizer.model_max_length)
    assert read["attention_mask"].sum(dim=1).tolist() == [2, 7]
    assert read["input_ids"][1, 5] == tokenizer.unk_token_id
    long = build_tokenizer([" ".join(["word"] * 200)])
    assert long.model_max_length == MAX_TOKENS
    assert build_text_encoder(long).config.max_position_embeddings == MAX_TOKENS


def test_a_new_text_encoder_tells_words_apart():
    captions = draw_sprites(200)[2][:100]
    tokenizer = build_tokenizer(captions)
    text_encoder = build_text_encoder(tokenizer)
    changed = [caption.replace(caption.split()[1], "helmet", 1) for caption in captions]
    with torch.no_grad():
        first, second = (text_encoder(**tokenize(tokenizer, texts))[0][:, 2] for texts in (captions, changed))
    # Vectors that have nothing in common are sqrt(2) of their length apart; those of which half is, 1.
    assert ((first - second).norm(dim=1) / first.norm(dim=1)).mean() > 1


def test_heads_of_the_attention_to_words_have_the_channels_that_the_flag_says():
    config = TrainingConfig(
        model_class="UNet2DConditionModel", block_out_channels=[32, 64], attention_levels=[2], attention_head_dim=16
    )
    with torch.device("meta"):
        unet = build_model(config, 3, cross_attention_dim=24)
    assert isinstance(unet, UNet2DConditionModel)
    assert tuple(unet.config.down_block_types) == ("DownBlock2D", "CrossAttnDownBlock2D")
    assert tuple(unet.config.up_block_types) == ("CrossAttnUpBlock2D", "UpBlock2D")
    for block in (unet.down_blocks[1], unet.mid_block, unet.up_blocks[0]):
        attention = block.attentions[0].transformer_blocks[0].attn2
        assert (attention.heads, attention.to_k.in_features, attention.inner_dim) == (4, 24, 64)


@pytest.mark.parametrize("flags", ["", "--streaming --max_train_steps 3"])
def test_captions_beside_pictures_are_found_and_trained_on(flags, pictures, run_script, tmp_path, monkeypatch):
    add_texts(pictures)
    opened = []
    open_dataset = sources._open_dataset
    monkeypatch.setattr(sources, "_open_dataset", lambda *args: opened.append(args) or open_dataset(*args))
    run_script("train_conditional", f"{TINY} --train_data_dir {pictures} --resolution 8 {flags}", tmp_path / "run")
    assert len(opened) == 1
    pipeline = load_pipeline(str(tmp_path / "run"))
    assert sorted(pipeline.example_prompts) == sorted(set(CAPTIONS) - {""})
    assert yaml.safe_load((tmp_path / "run" / "training_config.yaml").read_text())["caption_column"] == "txt"


@pytest.fixture(scope="module")
def run(run_script, tmp_path_factory):
    """Trains a tiny network on the captions of sprites."""
    output_dir = tmp_path_factory.mktemp("captioned") / "run"
    run_script("train_conditional", f"{WORDS_FLAGS} --use_ema --snapshot_epochs 1", output_dir)
    return output_dir


def test_a_run_leaves_stock_parts(run):
    unet = UNet2DConditionModel.from_pretrained(run, subfolder="unet")
    text_encoder = CLIPTextModel.from_pretrained(run, subfolder="text_encoder")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run, subfolder="tokenizer")
    assert unet.config.cross_attention_dim == text_encoder.config.hidden_size
    assert len(tokenizer) == text_encoder.config.vocab_size
    pipeline = load_pipeline(str(run))
    captions = draw_sprites(20)[2]
    assert set(pipeline.example_prompts) <= set(captions)
    assert len(pipeline.example_prompts) == 8
    grid = Image.open(sorted((run / "samples").glob("step-*.png"))[-1])
    assert grid.size == (3 * 68 + 4, 8 * 68 + 4)  # sprites of 64 pixels, 4 apart: three of each caption


def test_the_text_encoder_is_trained_and_averaged(run):
    first, last = (load_file(run / "snapshots" / f"epoch-000{epoch}" / TEXT_WEIGHTS) for epoch in (1, 2))
    assert all(not torch.equal(first[name], last[name]) for name in first if "layer_norm" not in name)
    trained = load_file(run / "checkpoint-8" / "model.safetensors")
    pipeline = load_pipeline(str(run / "checkpoint-8"))
    for name, averaged in pipeline.text_encoder.state_dict().items():
        assert not torch.equal(trained[f"text_encoder.{name}"], averaged), name
    # The names that transformers 4 knows, of which 5 has none.
    assert all(name.startswith("text_model.") for name in last)


def test_a_resumed_run_equals_the_uninterrupted_one(run, run_script, tmp_path):
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(run / "checkpoint-3", resumed / "checkpoint-3")
    flags = f"{WORDS_FLAGS} --use_ema --snapshot_epochs 1 --resume_from_checkpoint checkpoint-3"
    run_script("train_conditional", flags, resumed)
    for name in ("unet/diffusion_pytorch_model.safetensors", TEXT_WEIGHTS, "checkpoint-8/model.safetensors"):
        assert_same_weights(weights(run, name), weights(resumed, name))
    tokens = [(folder / "tokenizer" / "tokenizer.json").read_text() for folder in (run, resumed)]
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_two_processes_train_what_one_trains(run_script, tmp_path):
    run_script("train_conditional", f"{WORDS_FLAGS} --train_batch_size 4", tmp_path / "one")
    finish(start("train_conditional", f"{WORDS_FLAGS} --train_batch_size 2", tmp_path / "two", LAUNCH_TWO))
    for name in ("unet/diffusion_pytorch_model.safetensors", TEXT_WEIGHTS):
        one, two = (weights(tmp_path / folder, name) for folder in ("one", "two"))
        assert one.keys() == two.keys()
        flat = [torch.cat([part[key].flatten() for key in one]) for part in (one, two)]
        # The order of sums differs, which grows over ten steps. Where a gradient is next to 0, AdamW makes steps of it
        # whose sign is that of the rounding: so a few weights differ by more, and those by less than a step of 1e-3.
        far = ~torch.isclose(*flat, rtol=1e-3, atol=1e-5)
        assert far.float().mean() < 1e-3
        torch.testing.assert_close(*flat, rtol=0, atol=1e-3)


def test_new_words_are_added_as_they_are_read():
    tokenizer = build_tokenizer(["a red hero", "a blue dragon, with fire"])
    text_encoder = build_text_encoder(tokenizer)
    known = tokenizer.get_vocab()
    captions = ["a Gr\u00fcn zebra!", "a gru\u0308n hero", "zebra"]  # the same letter, written in two ways
    add_words(tokenizer, text_encoder, captions)
    words = tokenizer.get_vocab()
    assert words.keys() - known.keys() == {"gr\u00fcn", "zebra", "!"}
    assert known.items() < words.items()
    assert sorted(words.values()) == list(range(len(words)))
    assert text_encoder.config.vocab_size == len(text_encoder.get_input_embeddings().weight) == len(words)
    assert not find_unknown_words(tokenizer, " ".join(captions))
    before = {name: value.clone() for name, value in text_encoder.state_dict().items()}
    add_words(tokenizer, text_encoder, ["a zebra"])  # nothing is new
    assert tokenizer.get_vocab() == words
    assert_same_weights(before, text_encoder.state_dict())


def test_a_model_that_is_begun_from_keeps_its_words_and_gets_new_ones(run, run_script, tmp_path, capsys):
    flags = f"--config {tmp_path / 'tuned.yaml'} --init_from {run}"
    (tmp_path / "tuned.yaml").write_text(
        "dataset_name: sprites\ncaption_column: caption\nmax_train_samples: 200\nmax_train_steps: 1\n"
        "train_batch_size: 2\neval_batch_size: 1\nlearning_rate: 1e-30\n"
    )
    run_script("train_conditional", f"{flags} --ddpm_num_inference_steps 2", tmp_path / "tuned")
    printed = capsys.readouterr()
    assert "begun from" in printed.out
    assert "unknown to the text encoder" not in printed.err
    known, words = (
        PreTrainedTokenizerFast.from_pretrained(folder, subfolder="tokenizer").get_vocab()
        for folder in (run, tmp_path / "tuned")
    )
    assert known.items() < words.items()
    assert re.search(rf"new words, {len(words) - len(known)}, begin at random: \w+, \w+", printed.out)
    before, after = (weights(folder, TEXT_WEIGHTS) for folder in (run, tmp_path / "tuned"))
    old_rows, rows = before.pop(WORD_ROWS), after.pop(WORD_ROWS)
    assert torch.equal(rows[: len(known)], old_rows)
    apart = torch.cdist(rows, rows) + 16 * torch.eye(len(rows))
    assert (apart[len(known) :] > 8).all()  # two of 128 standard normal numbers are 16 apart, give or take 1
    assert_same_weights(before, after)
    name = "unet/diffusion_pytorch_model.safetensors"
    assert_same_weights(weights(run, name), weights(tmp_path / "tuned", name))
    pipeline = load_pipeline(str(tmp_path / "tuned"))
    assert not find_unknown_words(pipeline.tokenizer, " ".join(draw_sprites(200)[2]))


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    """Saves a text encoder of another kind with its tokenizer, as the Hub has them."""
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    torch.manual_seed(0)
    tokenizer = build_tokenizer(draw_sprites(20)[2])
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def frozen_flags(text_encoder):
    return f"{WORDS_FLAGS} --use_ema --text_encoder {text_encoder}"


@pytest.fixture(scope="module")
def frozen_run(frozen_flags, run_script, tmp_path_factory):
    """Trains a tiny network on the captions of sprites as another text encoder reads them."""
    output_dir = tmp_path_factory.mktemp("frozen") / "run"
    run_script("train_conditional", frozen_flags, output_dir)
    return output_dir


def test_a_trained_text_encoder_stays_as_it_is(frozen_run, text_encoder):
    pipeline = load_pipeline(str(frozen_run))
    assert isinstance(pipeline.text_encoder, BertModel)
    assert pipeline.unet.config.cross_attention_dim == 16
    before, after = BertModel.from_pretrained(text_encoder).state_dict(), pipeline.text_encoder.state_dict()
    assert_same_weights(dict(before), dict(after))
    trained = weights(frozen_run / "checkpoint-8", "model.safetensors")
    assert trained.keys() == pipeline.unet.state_dict().keys()


def test_checkpoints_do_without_a_text_encoder_that_is_not_trained(frozen_run, text_encoder, tmp_path):
    assert not list((frozen_run / "checkpoint-8").rglob("text_encoder*"))
    expected = load_pipeline(str(frozen_run)).encode_prompt("a hero")
    copy = shutil.copytree(frozen_run / "checkpoint-8", tmp_path / "run" / "checkpoint-8")
    with pytest.raises(UserInputError, match="checkpoint-8, the text encoder of its run: it is not in the checkpoint"):
        load_pipeline(str(copy))
    shutil.copy(frozen_run / "training_config.yaml", tmp_path / "run")
    for checkpoint in (frozen_run / "checkpoint-8", copy):  # the second has it from where the run has it
        assert torch.equal(load_pipeline(str(checkpoint)).encode_prompt("a hero"), expected)
    config = (tmp_path / "run" / "training_config.yaml").read_text().replace(str(text_encoder), "no/such")
    (tmp_path / "run" / "training_config.yaml").write_text(config)
    with pytest.raises(UserInputError, match=r"checkpoint-8, .*: --text_encoder no/such can't be loaded"):
        load_pipeline(str(copy))


def test_a_run_that_is_resumed_has_its_text_encoder_from_the_flag(
    frozen_run, frozen_flags, run_script, tmp_path, capsys
):
    resumed = tmp_path / "resumed"
    shutil.copytree(frozen_run / "checkpoint-3", resumed / "checkpoint-3")
    flags = f"{frozen_flags} --resume_from_checkpoint checkpoint-3"
    with pytest.raises(SystemExit):
        run_script("train_conditional", re.sub("--text_encoder [^ ]+", "", flags), resumed)
    assert "--text_encoder None: " in capsys.readouterr().err.splitlines()[-1]
    run_script("train_conditional", flags, resumed)
    names = ("unet/diffusion_pytorch_model.safetensors", TEXT_WEIGHTS, "checkpoint-8/model.safetensors")
    for name in (*names, "checkpoint-8/unet/diffusion_pytorch_model.safetensors"):
        assert_same_weights(weights(frozen_run, name), weights(resumed, name))


def test_captions_are_read_once_into_a_file_that_is_mapped(text_encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenizer, encoder = load_text_encoder(str(text_encoder))
    fit_length(tokenizer, captions := draw_sprites(300)[2])
    tokens = tokenize(tokenizer, captions)
    with torch.no_grad():
        expected = encoder(**tokens)[0]
    read = []
    embed = embedding.embed
    monkeypatch.setattr(embedding, "embed", lambda *args: read.append(args) or embed(*args))

    def find_files() -> list[Path]:
        return [*(tmp_path / "sprite-diffusion" / "embeddings").rglob("embeddings.bin")]

    for _ in range(2):
        torch.testing.assert_close(embed_once(encoder, tokens), expected)
    assert len(read) == 1
    embeddings = embed_once(encoder, tokens)
    (file,) = find_files()
    assert str(file) in Path("/proc/self/maps").read_text()
    del embeddings
    file.write_bytes(bytes(file.stat().st_size))
    torch.testing.assert_close(embed_once(encoder, tokens), expected)
    assert len(read) == 2
    with torch.no_grad():
        encoder.encoder.layer[0].output.dense.bias += 1
    assert not torch.allclose(embed_once(encoder, tokens), expected)
    assert len(find_files()) == 2
    # They count with the images for the limit of the cache.
    (images := tmp_path / "sprite-diffusion" / "images" / "0").mkdir(parents=True)
    (images / "pixels.bin").write_bytes(b"1")
    monkeypatch.setenv("SPRITE_DIFFUSION_CACHE_GB", "0")
    assert len(embed_once(encoder, {name: ids[:2] for name, ids in tokens.items()})) == 2
    assert len(find_files()) == 1
    assert not images.exists()


def test_a_text_encoder_is_written_once(run, tmp_path, monkeypatch):
    pipeline = load_pipeline(str(run))
    names = {*pipeline.text_encoder.state_dict()}
    written = []
    save = CLIPTextModel.save_pretrained
    monkeypatch.setattr(
        CLIPTextModel, "save_pretrained", lambda *args, **kwargs: written.append(save(*args, **kwargs))
    )
    pipeline.save_pretrained(tmp_path / "copy")
    assert len(written) == 1
    assert_same_weights(weights(run, TEXT_WEIGHTS), weights(tmp_path / "copy", TEXT_WEIGHTS))
    assert {*pipeline.text_encoder.state_dict()} == names


def test_the_loss_reads_the_caption_of_each_image(monkeypatch, tmp_path):
    """Of each micro-batch the network is given the tokens of the captions, and the empty one for a share of them."""
    config = TrainingConfig(
        resolution="8",
        block_out_channels=[8],
        attention_levels=[0],
        attention_head_dim=8,
        max_train_steps=20,
        train_batch_size=5,
        label_dropout=0.5,
        eval_batch_size=1,
        ddpm_num_inference_steps=1,
        output_dir=str(tmp_path / "run"),
        logger="none",
    )
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 8, 8) * 40
    seen = []
    forward = CLIPTextModel.forward

    def record(self, input_ids, **kwargs):
        if self.training:
            seen.append(input_ids.clone())
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(CLIPTextModel, "forward", record)
    pipeline = train(config, load_tensor(images, config, captions=CAPTIONS))
    texts = [pipeline.tokenizer.decode(ids, skip_special_tokens=True) for batch in seen for ids in batch]
    assert set(texts) == {"", *(re.sub(r"(\w),", r"\1 ,", caption.lower()) for caption in CAPTIONS)}
    # Half of the captions are dropped, and a fifth of the others are empty; 100 draws, four standard deviations
    assert abs(texts.count("") / len(texts) - 0.6) < 4 * (0.6 * 0.4 / 100) ** 0.5


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("train_unconditional", "--caption_column caption", "--caption_column caption: captions are for"),
        ("train_conditional", "--caption_column word", "--caption_column word: that of 'sprites' is caption"),
        ("train_conditional", "--model_class UNet2DConditionModel", "reads captions: name their --caption_column"),
        ("train_conditional", "--text_encoder nowhere", "--text_encoder nowhere: there are no captions"),
        (
            "train_conditional",
            "--caption_column caption --text_encoder no/such",
            "--text_encoder no/such can't be loaded",
        ),
        (
            "train_conditional",
            "--caption_column caption --model_class ContextUNet2DModel",
            "--model_class ContextUNet2DModel takes no captions",
        ),
    ],
)
def test_one_line_says_what_does_not_go_with_captions(
    script, flags, message, run_script, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no/such is asked for again and again else
    with pytest.raises(SystemExit) as exit:
        run_script(script, f"{TINY} {flags}", tmp_path / "run")
    assert exit.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_runs_with_and_without_captions_do_not_go_on_with_each_other(run, run_script, tmp_path, capsys):
    shutil.copytree(run / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    for flags, message in (
        (TINY, "was trained on captions: name their --caption_column"),
        (f"{TINY} --init_from {run} --model_class UNet2DModel", "the network is that of --init_from"),
    ):
        with pytest.raises(SystemExit):
            run_script("train_conditional", f"{flags} --use_ema --resume_from_checkpoint latest", tmp_path / "resumed")
        assert message in capsys.readouterr().err.splitlines()[-1]


def sample(run: Path, flags: str, run_script) -> dict:
    """Runs sample.py in the current folder, and returns the record of what it wrote."""
    run_script("sample", f"{run} --num_inference_steps 2 --output out.png {flags}")
    return json.loads(Path("out.json").read_text())


@pytest.mark.parametrize(
    ("flags", "prompts"),
    [
        ("--num_images 1", None),
        ("--prompt hero --prompt ghost --num_images 2 --guidance_scale 2 --negative_prompt cape", ["hero", "ghost"]),
        ("--prompts prompts.txt --prompt hero --num_images 1", ["hero", "a red apple", "an apple, red"]),
        ("--prompt hero --num_images 1 --compare ddim:2,ddpm:2", ["hero"]),
        ("--prompt hero --num_images 1 --steps_shown 1", ["hero"]),
        ("--prompt hero --num_images 1 --no-noise", ["hero"]),
        ("--no_class --num_images 1", [""]),
        ("--snapshots {run} --prompt hero --num_images 1", ["hero"]),
    ],
)
def test_views_are_of_the_prompts(flags, prompts, run, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red apple\n\nan apple, red\n")
    model = "" if "--snapshots" in flags else run
    # Split as a shell would: the prompts of these flags are one word each.
    record = sample(model, flags.format(run=run), run_script)
    expected = load_pipeline(str(run)).example_prompts if prompts is None else prompts
    assert list(dict.fromkeys(image["prompt"] for image in record["images"])) == expected
    assert record.get("negative_prompt") == ("cape" if "negative" in flags else None)


def test_interpolation_and_prediction_by_prompt(run, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = sample(run, "--prompt hero --prompt ghost --interpolate 1 2 --num_images 3", run_script)
    assert record["conditions"] == ["hero", "50%", "ghost"]
    run_script("sample", f"{run} --predict sprites --prompt hero --output one.png")
    run_script("sample", f"{run} --predict sprites --output none.png")
    one, none = (json.loads(Path(name).read_text()) for name in ("one.json", "none.json"))
    assert (one["prompt"], none["prompt"]) == ("hero", "")
    assert one["mean_squared_errors"] != none["mean_squared_errors"]


def test_a_sheet_and_an_animation_by_prompt(run, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = f"{run} --num_inference_steps 2 --num_images 2 --prompt hero --prompt ghost"
    run_script("sample", f"{flags} --sheet sheet.png")
    sheet = json.loads(Path("sheet.json").read_text())
    assert [(tag["name"], tag["from"], tag["to"]) for tag in sheet["meta"]["frameTags"]] == [
        ("hero", 0, 1),
        ("ghost", 2, 3),
    ]
    assert [frame["prompt"] for frame in sheet["frames"]] == ["hero", "hero", "ghost", "ghost"]
    run_script("sample", f"{flags} --animate out.gif --output out.png")
    assert Image.open("out.gif").n_frames == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("{run} --class hero", "--class hero: this model has no classes, it takes a --prompt"),
        ("{run} --mix hero=1", "--mix hero=1: this model has no classes"),
        ("{run} --prompt a --negative_prompt b", "--negative_prompt needs --guidance_scale above 1"),
        ("{run} --prompt a --no_class", "--no_class does not go with --class, --mix and --prompt"),
        ("{run} --prompts no.txt", "--prompts no.txt can't be read"),
        ("{run} --prompts empty.txt", "--prompts empty.txt holds no prompt"),
        ("{by_class} --prompt hero", "--prompt hero: this model takes no prompts, it has classes"),
        ("{by_class} --negative_prompt a --guidance_scale 2", "takes no prompts"),
        ("{unconditional} --prompt hero", "--prompt hero: this is an unconditional model"),
    ],
)
def test_models_are_asked_for_what_they_know(flags, message, run, run_script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    scheduler = ClosedFormDDPMScheduler()
    ConditionalDDPMPipeline(make_tiny_network(num_class_embeds=3), scheduler).save_pretrained("by_class")
    UnconditionalDDPMPipeline(make_tiny_network(), scheduler).save_pretrained("unconditional")
    with pytest.raises(SystemExit) as exit:
        run_script("sample", flags.format(run=run, by_class="by_class", unconditional="unconditional"))
    assert exit.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_snapshots_are_drawn_with_the_text_encoders_of_their_own(run):
    pipeline = load_pipeline(str(run))
    snapshots = find_snapshots(run)
    sampler = make_sampler("--scheduler", pipeline, "ddim", 2)
    figure = show_learning(pipeline, snapshots, sampler, Request([0], [Condition.of_prompt("a hero")]))
    for folder, row in zip(snapshots, figure.rows, strict=True):
        alone = load_pipeline(str(folder))
        expected = sample_images(alone, sampler, Request([0], [Condition.of_prompt("a hero")]))
        assert torch.equal(row, expected)


def test_the_card_has_a_picture_of_each_prompt(run):
    card = make_card(run, "me/words", None)
    metadata = yaml.safe_load(card.split("---")[1])
    prompts = load_pipeline(str(run)).example_prompts
    assert metadata["pipeline_tag"] == "text-to-image"
    assert [entry["text"] for entry in metadata["widget"]] == prompts
    grid = np.asarray(Image.open(sorted((run / "samples").glob("step-*.png"))[-1]))
    for row, entry in enumerate(metadata["widget"]):
        picture = np.asarray(Image.open(run / entry["output"]["url"]))
        assert np.array_equal(picture, grid[4 + 68 * row : 68 + 68 * row, 4:68])
    assert "<Gallery />" in card
    assert f'pipeline("{prompts[0]}", guidance_scale=2.0, num_inference_steps=50)' in card


def test_what_is_uploaded_is_a_whole_model(run):
    copy = copy_uploaded(run)
    there, here = (load_pipeline(str(folder)).encode_prompt("a hero") for folder in (copy, run))
    assert torch.equal(there, here)
    assert len(list((copy / "samples").glob("prompt-*.png"))) == 8
    shutil.rmtree(copy)


def test_metrics_are_of_images_for_the_captions_of_the_data(run, monkeypatch):
    monkeypatch.setattr(evaluation, "sample_images", asked := RecordConditions())
    pipeline = load_pipeline(str(run))
    sampler = make_sampler("--scheduler", pipeline, "ddim", 2)
    without, real = (
        RealImages(load_image_data(DataConfig(max_train_samples=100, resolution="16", caption_column=column), None))
        for column in (None, "caption")
    )
    list(generate(pipeline, sampler, match_conditions(pipeline, real, 30), 8, 2.0, 0))
    captions = draw_sprites(100)[2]
    assert asked.names == [captions[i] for i in real.reference[:30]]
    with pytest.raises(UserInputError, match="has no captions, which this model reads: name their --caption_column"):
        match_conditions(pipeline, without, 30)


class RecordConditions:
    """Stands in for `sample_images`: keeps what is asked for, and gives black images."""

    def __init__(self) -> None:
        self.names: list[str | None] = []

    def __call__(self, pipeline, sampler, request, **options) -> torch.Tensor:
        self.names += [condition.name for condition in request.conditions]
        return torch.zeros(len(request.seeds), *pipeline.sample_shape)
