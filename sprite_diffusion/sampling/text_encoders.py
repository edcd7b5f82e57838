"""Text encoders and tokenizers of transformers: loaded without its bars and advice, and checked to fit each other."""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers.utils import logging

from sprite_diffusion.common.errors import UserInputError, first_line
from sprite_diffusion.common.run_files import CONFIG_FILE, find_run, read_saved_config
from sprite_diffusion.sampling.model_checks import check_numbers, naming

MAX_LENGTH = 2**15  # tokens of a prompt; a tokenizer without a limit says 10^30


def quiet_transformers() -> None:
    """Keeps transformers from showing bars for small files, and from advice on what raises an error here anyway."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_text_encoder(name: str) -> tuple[Any, Any]:
    """Returns the tokenizer and the text encoder of `--text_encoder`, in float32 on the CPU.

    Args:
        name: A name on the Hub or a folder: of a text encoder with its tokenizer, or of a pipeline that has both.

    Raises:
        UserInputError: If there is no such text encoder.
    """
    of_pipeline = Path(name, "text_encoder").is_dir()
    tokenizer_folder, encoder_folder = ("tokenizer", "text_encoder") if of_pipeline else ("", "")
    try:
        config = transformers.AutoConfig.from_pretrained(name, subfolder=encoder_folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, subfolder=tokenizer_folder)
        text_encoder = transformers.AutoModelForTextEncoding.from_pretrained(
            name, subfolder=encoder_folder, config=config.get_text_config()
        )
    except Exception as error:  # the values in its files can lead transformers to raise anything
        raise UserInputError(f"--text_encoder {name} can't be loaded: {first_line(error)}") from None
    return tokenizer, text_encoder.float().eval()


def load_text_parts(model: str, index: Mapping[str, Any], frozen: str | None = None) -> dict[str, Any]:
    """Returns the text encoder and the tokenizer of a pipeline by these names, in float32 on the CPU.

    Args:
        model: What holds the pipeline.
        index: Its index, in which the text encoder of a checkpoint is null if the run leaves it as it is.
        frozen: The `--text_encoder` of that run, if it is known.

    Raises:
        UserInputError: Or whatever error the values in their files lead to.
    """
    quiet_transformers()
    with naming("tokenizer"):
        tokenizer_class = _find_class(model, index, "tokenizer", transformers.PreTrainedTokenizerBase)
        tokenizer = tokenizer_class.from_pretrained(model, subfolder="tokenizer")
        if not 2 <= tokenizer.model_max_length <= MAX_LENGTH:
            raise ValueError(f"model_max_length is {tokenizer.model_max_length}: it must be 2 to {MAX_LENGTH:,}")
        _check_template(tokenizer)
        if len(_tokenize_nothing(tokenizer)) != tokenizer.model_max_length:
            raise ValueError("it does not fill a prompt up to its model_max_length")
    if is_left_out(index["text_encoder"]):
        try:
            _, text_encoder = load_text_encoder(frozen or _find_frozen(model))
            _check_fits(text_encoder.config, tokenizer)
        except (UserInputError, ValueError) as error:
            raise UserInputError(f"{model}, the text encoder of its run: {error}") from None
        return {"text_encoder": text_encoder, "tokenizer": tokenizer}
    with naming("text_encoder/config.json"):
        encoder_class = _find_class(model, index, "text_encoder", transformers.PreTrainedModel)
        values, _ = encoder_class.config_class.get_config_dict(model, subfolder="text_encoder")
        if "vocab_size" not in values:  # transformers would take a default for each value, as if there were no file
            raise ValueError("it is missing, or does not say how many words there are")
        check_numbers("", values)
        config = encoder_class.config_class.from_dict(values)
        _check_fits(config, tokenizer)
        size = _check_shapes(encoder_class, config, tokenizer.model_max_length)
    with naming("text_encoder"):
        _check_size(Path(model, "text_encoder"), size)
        text_encoder, found = encoder_class.from_pretrained(
            model, subfolder="text_encoder", config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
        keys = (*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"])
        if keys:
            raise ValueError(
                f"its weights are others than its config.json says ({min(map(str, keys))}): save it again"
            )
    return {"text_encoder": text_encoder.float().eval(), "tokenizer": tokenizer}


def _check_template(tokenizer: Any) -> None:
    """Raises ValueError if a tokenizer puts tokens around a prompt that it does not know: it would end the program."""
    processor = tokenizer.backend_tokenizer.post_processor if tokenizer.is_fast else None
    template = {} if processor is None else json.loads(processor.__getstate__())
    if template.get("type") == "TemplateProcessing":
        put = {piece["SpecialToken"]["id"] for piece in template["single"] if "SpecialToken" in piece}
        if unknown := put - template["special_tokens"].keys():
            raise ValueError(f"its template has {min(unknown)}, which is none of its special tokens")


def _tokenize_nothing(tokenizer: Any) -> list[int]:
    """Returns the tokens of the empty prompt: those that a tokenizer puts around and behind the words of every one."""
    return tokenizer([""], padding="max_length", truncation=True).input_ids[0]


def _check_shapes(encoder_class: Any, config: Any, num_tokens: int) -> int:
    """Returns how many weights a text encoder has. Raises an error unless it gives a vector for each token."""
    # Tensors there have shapes and take no memory; torch warns of those without elements, an error says it better.
    with torch.device("meta"), torch.no_grad(), warnings.catch_warnings(action="ignore"):
        encoder = encoder_class(config).eval()
        embeddings = encoder(torch.zeros(1, num_tokens, dtype=torch.long))[0]
    if embeddings.shape != (1, num_tokens, config.hidden_size):
        raise ValueError(f"it gives the shape {tuple(embeddings.shape)} for {num_tokens} tokens")
    sizes = [parameter.numel() for parameter in encoder.parameters()]
    if 0 in sizes:
        raise ValueError("some of its weights have no elements")
    return sum(sizes)


def _check_size(folder: Path, size: int) -> None:
    """Raises ValueError if the files of a folder have fewer weights than `size`: transformers would draw the rest."""
    saved, paths = 0, [*folder.glob("*.safetensors")]
    for path in paths:
        with safe_open(path, framework="pt") as file:
            saved += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no dict
    if paths and saved < size:
        raise ValueError(f"it has {saved:,} weights, and {size:,} by its config.json")


def is_left_out(entry: Any) -> bool:
    """Returns whether the entry of an index says that the pipeline was saved without this part."""
    return entry == [None, None]


def _find_frozen(checkpoint: str) -> str:
    """Returns where the text encoder of a checkpoint is that has none: in the pipeline of its run, or as the run says.

    Raises `UserInputError` if the folder of the run does not say.
    """
    run_dir = find_run(Path(checkpoint))
    if run_dir is not None and (run_dir / "text_encoder").is_dir():
        return str(run_dir)
    name = None if run_dir is None else (read_saved_config(run_dir) or {}).get("text_encoder")
    if not isinstance(name, str):
        raise UserInputError(
            f"it is not in the checkpoint: put that into the folder of the run, whose {CONFIG_FILE} names it"
        )
    return name


def _check_fits(config: Any, tokenizer: Any) -> None:
    """Raises ValueError if a text encoder takes fewer tokens, or fewer at a time, than its tokenizer gives."""
    largest = max(*tokenizer.get_vocab().values(), *_tokenize_nothing(tokenizer))
    if config.vocab_size <= largest:
        raise ValueError(f"it has {config.vocab_size:,} tokens, and its tokenizer gives the one of number {largest:,}")
    if getattr(config, "max_position_embeddings", MAX_LENGTH) < tokenizer.model_max_length:
        raise ValueError(f"it takes fewer tokens than its tokenizer gives, {tokenizer.model_max_length}")


def _find_class(model: str, index: Mapping[str, Any], part: str, base: type) -> Any:
    """Returns the class of transformers that an index names for a part. Raises `UserInputError` if it is no `base`."""
    library, name = index[part]
    found = getattr(transformers, name, None)
    if library != "transformers" or not (isinstance(found, type) and issubclass(found, base)):
        raise UserInputError(f"{model} has a {name} as its {part}, which is none of transformers")
    return found
