"""Tests that a damaged model with captions is refused in a line that names the file, before anything large is made."""

import json
import resource
import shutil
import time
from pathlib import Path

import pytest
from bad_files import change_json
from inspecting import UNET_WEIGHTS
from launching import TINY
from safetensors.torch import load_file, save_file

ENCODER, ENCODER_WEIGHTS = "text_encoder/config.json", "text_encoder/model.safetensors"
TOKENIZER, WORDS = "tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json"
UNET, INDEX = "unet/config.json", "model_index.json"

CONTENTS = {"empty": "", "list": "[]", "null": "null", "number": "7", "nothing": "{}", "deep": "[" * 10**5}
WHOLE_FILES = [
    (name, content)
    for name in (INDEX, ENCODER, ENCODER_WEIGHTS, TOKENIZER, WORDS, UNET, UNET_WEIGHTS)
    for content in ("missing", "cut", *CONTENTS)
    # A tokenizer has a default for each option, and transformers for each of its tokens.
    if (name, content) not in ((TOKENIZER, "missing"), (TOKENIZER, "nothing"))
]
NUMBERS = [
    *((ENCODER, "hidden_size", value) for value in (10**12, 10**6, "nan", -1, 0, 64, "x")),
    *((ENCODER, "vocab_size", value) for value in (10**12, 10**6, "nan", -1, 0, 10, "x")),
    *((ENCODER, "max_position_embeddings", value) for value in (10**12, 10**6, "nan", 3, 58)),
    *((ENCODER, "num_hidden_layers", value) for value in (10**6, 64, "nan", -1, 3)),
    *((ENCODER, "intermediate_size", value) for value in (10**6, 10**5, -1, 0, 513)),
    *((ENCODER, "num_attention_heads", value) for value in (10**6, -1, 0, 3)),
    *((ENCODER, "eos_token_id", value) for value in (10**12, "nan", None, [1])),
    *((ENCODER, name, value) for name, value in (("hidden_act", "none"), ("layer_norm_eps", None), ("dtype", 1))),
    *((TOKENIZER, "model_max_length", value) for value in (10**12, "nan", 30, 0, -1, "x", None)),
    (TOKENIZER, "pad_token", None),
    *((UNET, "cross_attention_dim", value) for value in (10**12, 10**6, "nan", 64, -1, None, "x")),
    *((UNET, "addition_embed_type_num_heads", value) for value in (0, -1, 10**6, "nan")),
    *((UNET, "attention_head_dim", value) for value in (0, 10**12, "nan")),
    (UNET, "addition_embed_type", None),
    *((INDEX, name, value) for name in ("text_encoder", "tokenizer") for value in (7, None, ["a"], ["a", "b"])),
    (INDEX, "text_encoder", ["transformers", "BertModel"]),
    (INDEX, "text_encoder", ["transformers", "CLIPTextModelWithProjection"]),
    (INDEX, "text_encoder", ["transformers", "CLIPTokenizer"]),
    (INDEX, "tokenizer", ["transformers", "CLIPTextModel"]),
    (INDEX, "example_prompts", [7]),
]
# What may stand in the line for a file: diffusers names some by their folder, and weights are those of a network.
NAMES = {
    INDEX: ("model_index.json", "text_encoder", "tokenizer"),
    ENCODER: ("text_encoder",),
    ENCODER_WEIGHTS: ("text_encoder",),
    TOKENIZER: ("tokenizer",),
    WORDS: ("tokenizer",),
    UNET: ("unet", "network"),
    UNET_WEIGHTS: ("unet", "network"),
}


@pytest.fixture(scope="module")
def run(run_script, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("captioned") / "run"
    run_script("train_conditional", f"{TINY} --num_epochs 1 --caption_column caption", output_dir)
    return output_dir


@pytest.fixture
def refuse(run, run_script, tmp_path, capfd):
    """Returns a function that damages a copy of the model and has sample.py draw from it."""

    def refuse_damaged(file: str, damage) -> None:
        ignored = shutil.ignore_patterns("checkpoint-*", "samples", "report.html")
        copy = shutil.copytree(run, tmp_path / "model", ignore=ignored)
        damage(copy / file)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KB
        start = time.monotonic()
        with pytest.raises(SystemExit) as exit:
            run_script("sample", f"{copy} --prompt hero --num_inference_steps 1 --output {tmp_path / 'out.png'}")
        assert exit.value.code == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        assert any(name in line for name in NAMES[file]), line
        assert time.monotonic() - start < 30
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 5e5

    return refuse_damaged


@pytest.mark.parametrize(("file", "content"), WHOLE_FILES)
def test_a_file_that_is_damaged(file, content, refuse):
    def damage(path: Path) -> None:
        if content == "missing":
            path.unlink()
        elif content == "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            path.write_text(CONTENTS[content])

    refuse(file, damage)


@pytest.mark.parametrize(("file", "name", "value"), NUMBERS)
def test_a_value_that_is_wrong(file, name, value, refuse):
    refuse(file, lambda path: change_json(path, **{name: float("nan") if value == "nan" else value}))


@pytest.mark.parametrize("kind", ["not finite", "missing", "of another size"])
@pytest.mark.parametrize("file", [ENCODER_WEIGHTS, UNET_WEIGHTS])
def test_weights_that_are_wrong(file, kind, refuse):
    def damage(path: Path) -> None:
        weights = load_file(path)
        name = next(name for name in weights if name.endswith("weight"))
        if kind == "not finite":
            weights[name].view(-1)[0] = float("nan")
        elif kind == "missing":
            del weights[name]
        else:
            weights[name] = weights[name].repeat(2, *[1] * (weights[name].ndim - 1))
        save_file(weights, path, {"format": "pt"})

    refuse(file, damage)


@pytest.mark.parametrize("kind", ["number", "template"])
def test_words_that_the_text_encoder_or_the_tokenizer_does_not_have(kind, refuse):
    def damage(path: Path) -> None:
        words = json.loads(path.read_text())
        if kind == "number":
            words["model"]["vocab"]["hero"] = 1000
        else:
            words["post_processor"]["special_tokens"] = {}
        path.write_text(json.dumps(words))

    refuse(WORDS, damage)
