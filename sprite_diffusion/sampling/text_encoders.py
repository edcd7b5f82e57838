"""Text encoders and tokenizers of transformers: loaded without its bars and advice, and checked to fit each other."""

import json
from collections.abc import Mapping
from typing import Any

import transformers
from transformers.utils import logging

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.sampling.model_checks import check_numbers, naming

MAX_LENGTH = 2**15  # tokens of a prompt; a tokenizer without a limit says 10^30


def quiet_transformers() -> None:
    """Keeps transformers from showing bars for small files, and from advice on what raises an error here anyway."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_text_parts(model: str, index: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the text encoder and the tokenizer of a pipeline by these names, in float32 on the CPU.

    Raises `UserInputError`, or whatever error the values in their files lead to.
    """
    quiet_transformers()
    with naming("tokenizer/tokenizer_config.json"):
        tokenizer_class = _find_class(model, index["tokenizer"], transformers.PreTrainedTokenizerBase)
        tokenizer = tokenizer_class.from_pretrained(model, subfolder="tokenizer")
        if not 2 <= tokenizer.model_max_length <= MAX_LENGTH:
            raise ValueError(f"model_max_length is {tokenizer.model_max_length}: it must be 2 to {MAX_LENGTH:,}")
    with naming("text_encoder/config.json"):
        encoder_class = _find_class(model, index["text_encoder"], transformers.PreTrainedModel)
        config = encoder_class.config_class.from_pretrained(model, subfolder="text_encoder")
        check_numbers("", json.loads(config.to_json_string()))
        if config.vocab_size < len(tokenizer):
            raise ValueError(f"it has {config.vocab_size:,} tokens, and its tokenizer {len(tokenizer):,}")
        if getattr(config, "max_position_embeddings", MAX_LENGTH) < tokenizer.model_max_length:
            raise ValueError(f"it takes fewer tokens than its tokenizer gives, {tokenizer.model_max_length}")
    text_encoder, found = encoder_class.from_pretrained(
        model, subfolder="text_encoder", config=config, output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        raise UserInputError(f"{model} lacks weights of its text encoder: {', '.join(missing[:3])}; save it again")
    return {"text_encoder": text_encoder.float().eval(), "tokenizer": tokenizer}


def _find_class(model: str, entry: Any, base: type) -> Any:
    """Returns the class of transformers that an index names. Raises `UserInputError` if it is no `base`."""
    library, name = entry
    found = getattr(transformers, name, None)
    if library != "transformers" or not (isinstance(found, type) and issubclass(found, base)):
        raise UserInputError(f"{model} holds a {name}, which transformers does not have")
    return found
