"""The text encoder and its tokenizer: a small one for the words of the captions, or one that is trained already."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from accelerate import PartialState
from diffusers import DiffusionPipeline
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm

from pipelines import find_unknown_words
from sprite_diffusion.common.cache import check_digest, make_once, write_digest
from sprite_diffusion.common.errors import UserInputError, mask_secrets, printable, warn
from sprite_diffusion.common.run_files import read_saved_config
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.sampling.pipeline_loading import Pipeline
from sprite_diffusion.sampling.text_encoders import is_left_out, load_text_encoder, load_text_parts, quiet_transformers

MAX_TOKENS = 77  # of a caption, as CLIP has it; the rest of a longer one is not read
MAX_WORDS = 2**15  # the most frequent ones
BEGIN, END, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"
HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS = 128, 1, 4
EMBEDDED_AT_ONCE = 256  # captions
EMBEDDINGS_FILE = "embeddings.bin"


def build_tokenizer(captions: Sequence[str]) -> Any:
    """Returns a tokenizer for which each word and each mark of the captions is a token; case counts for nothing.

    A word that is in none of them is `UNKNOWN`.
    """
    words = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    words.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special_tokens = [BEGIN, END, UNKNOWN]
    trainer = trainers.WordLevelTrainer(vocab_size=MAX_WORDS, special_tokens=special_tokens, show_progress=False)
    words.train_from_iterator(captions, trainer)
    words.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, words.token_to_id(BEGIN)), (END, words.token_to_id(END))]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,  # as CLIP's
        unk_token=UNKNOWN,
        model_max_length=MAX_TOKENS,
    )
    fit_length(tokenizer, captions)
    return tokenizer


def fit_length(tokenizer: Any, captions: Sequence[str]) -> None:
    """Makes the longest caption the most that a tokenizer takes, up to `MAX_TOKENS` and its own limit."""
    longest = max(len(ids) for ids in tokenizer(list(captions), verbose=False).input_ids)
    tokenizer.model_max_length = min(longest, tokenizer.model_max_length, MAX_TOKENS)


def build_text_encoder(tokenizer: Any) -> transformers.CLIPTextModel:
    """Returns a small text encoder with random weights for the words and the length of a tokenizer."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=4 * HIDDEN_SIZE,
        projection_dim=HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder: Any = transformers.CLIPTextModel(config)
    # Standard deviation 1, so that a token's vector is as long as what the layers add to it. With CLIP's own 0.02 what
    # they add hides which token it is, and words are told apart late: docs/quality.md.
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight)
    return text_encoder


def add_words(tokenizer: Any, text_encoder: Any, captions: Sequence[str]) -> None:
    """Gives a tokenizer for which each word is a token, and its text encoder, the words of captions that are new.

    The vectors of new words begin at random, as far apart as those of the known ones. Prints which they are.
    """
    new = find_unknown_words(tokenizer, " ".join(captions))[: max(0, MAX_WORDS - len(tokenizer))]
    if not new or not isinstance(tokenizer.backend_tokenizer.model, models.WordLevel):
        return
    # As the tokenizer reads them: one letter of Unicode may be written in several ways.
    normalize = getattr(tokenizer.backend_tokenizer.normalizer, "normalize_str", str)
    new = list(dict.fromkeys(map(normalize, new)))
    vocabulary = tokenizer.get_vocab() | {word: len(tokenizer) + i for i, word in enumerate(new)}
    tokenizer.backend_tokenizer.model = models.WordLevel(vocabulary, unk_token=tokenizer.unk_token)
    spread = text_encoder.get_input_embeddings().weight.std().item()
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight[-len(new) :].normal_(std=spread)
    if PartialState().is_main_process:
        print(printable(f"new words, {len(new)}, begin at random: {', '.join(new[:10])}"))


def choose_text_encoder(config: TrainingConfig, captions: Sequence[str], base: Pipeline | None) -> tuple[Any, Any]:
    """Returns the tokenizer and the text encoder of a run, which is frozen if `--text_encoder` names it.

    Those of a checkpoint that the run is resumed from, or of the model that it begins from, stay: their words have the
    numbers that the network has learned. New words are added to those of the model, unless its text encoder is frozen.
    Prints which words of the captions stay unknown.

    Raises `UserInputError` if there is no such text encoder, or the network has learned another one.
    """
    quiet_transformers()
    if config.resume_from_checkpoint is not None:
        tokenizer, text_encoder = _resume_text_encoder(config)
    elif config.text_encoder is not None:
        tokenizer, text_encoder = load_text_encoder(config.text_encoder)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        fit_length(tokenizer, captions)
        if base is not None and not _are_same(text_encoder, base.text_encoder):
            raise UserInputError(
                f"--text_encoder {config.text_encoder}: the network of --init_from {config.init_from} has learned "
                "another one, leave the flag out"
            )
    elif base is not None:
        tokenizer, text_encoder = base.tokenizer, base.text_encoder
        if PartialState().is_main_process:
            note = f"the text encoder of {config.init_from} is trained further; --text_encoder besides would keep it"
            print(printable(mask_secrets(note)))
        add_words(tokenizer, text_encoder, captions)
    else:
        tokenizer = build_tokenizer(captions)
        text_encoder = build_text_encoder(tokenizer)
    unknown = find_unknown_words(tokenizer, " ".join(captions))
    if unknown and PartialState().is_main_process:
        named = ", ".join(unknown[:10])
        warn(f"{len(unknown)} words of the captions are unknown to the text encoder, which tells none apart: {named}")
    if config.text_encoder is not None:
        text_encoder.eval().requires_grad_(False)
    return tokenizer, text_encoder


def _resume_text_encoder(config: TrainingConfig) -> tuple[Any, Any]:
    """Returns the tokenizer of the checkpoint that a run is resumed from, and its text encoder or the frozen one.

    Raises `UserInputError` if the run read no captions, or by another text encoder.
    """
    checkpoint = str(Path(config.output_dir, config.resume_from_checkpoint or ""))
    index = DiffusionPipeline.load_config(checkpoint)
    if "text_encoder" not in index:
        raise UserInputError(f"{checkpoint} was trained without captions: leave --caption_column out")
    saved = read_saved_config(Path(config.output_dir)) or {}  # a copy of a checkpoint alone has none
    earlier = saved.get("text_encoder", config.text_encoder)
    if is_left_out(index["text_encoder"]) != (config.text_encoder is not None) or earlier != config.text_encoder:
        raise UserInputError(f"--text_encoder {config.text_encoder}: {checkpoint} was written with {earlier}")
    parts = load_text_parts(checkpoint, index, frozen=config.text_encoder)
    return parts["tokenizer"], parts["text_encoder"]


def _are_same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Returns whether two networks have the same weights."""
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def tokenize(tokenizer: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    """Returns the "input_ids" (N, L) of captions and their "attention_mask" (N, L), 0 behind the end of a caption.

    They are on the device of the process.
    """
    limit = tokenizer.model_max_length
    num_longer = sum(len(ids) > limit for ids in tokenizer(list(captions), verbose=False).input_ids)
    if num_longer and PartialState().is_main_process:
        warn(f"{num_longer:,} captions are longer than the {limit} tokens that are read: their ends are left out")
    tokens = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    return {name: tokens[name].to(PartialState().device) for name in ("input_ids", "attention_mask")}


def embed_once(text_encoder: Any, tokens: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns the embeddings (N, L, D) of tokens, float32, in a file of the cache that is mapped into memory.

    Moves the text encoder to the device of the process. Raises `UserInputError` if the cache can't be written.
    """
    text_encoder.to(PartialState().device)
    shape = (*tokens["input_ids"].shape, text_encoder.config.hidden_size)

    def write(folder: Path) -> None:
        with open(folder / EMBEDDINGS_FILE, "wb") as file:
            for embeddings in embed(text_encoder, tokens):
                file.write(embeddings.numpy().tobytes())
        write_digest(folder, [EMBEDDINGS_FILE])

    def open_embeddings(folder: Path) -> torch.Tensor:
        check_digest(folder, [EMBEDDINGS_FILE])
        # Mapped so that a change would stay in memory: torch takes no array that is for reading alone.
        return torch.from_numpy(np.memmap(folder / EMBEDDINGS_FILE, np.float32, "c", shape=shape))

    return make_once("embeddings", _hash_all(text_encoder, tokens), write, open_embeddings)


@torch.no_grad()
def embed(text_encoder: Any, tokens: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yields the embeddings (B, L, D) of tokens, some captions after the other, on the CPU."""
    starts = range(0, len(tokens["input_ids"]), EMBEDDED_AT_ONCE)
    for start in tqdm(starts, "embedding captions", dynamic_ncols=True, leave=False):
        batch = {name: values[start : start + EMBEDDED_AT_ONCE] for name, values in tokens.items()}
        yield text_encoder(**batch)[0].cpu()


def _hash_all(text_encoder: Any, tokens: Mapping[str, torch.Tensor]) -> str:
    """Returns a hash of a text encoder, of the tokens that it reads, and of the kind of device that it is on."""
    digest = xxhash.xxh3_128(f"{text_encoder.config.to_json_string()}{text_encoder.device.type}".encode())
    for name, tensor in (*text_encoder.state_dict().items(), *tokens.items()):
        digest.update(repr((name, tensor.shape)).encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
