"""Whether generated sprites obey their captions: what is named is there, and in the colours that it is named with."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from pipelines import TextToImageDDPMPipeline
from sprite_diffusion.common.errors import warn
from sprite_diffusion.data.attributes import has_left_out_pair, is_left_out, read_caption
from sprite_diffusion.data.sources import BUILT_IN_SOURCE
from sprite_diffusion.data.sprites import SIZE, draw_sprites
from sprite_diffusion.metrics.distances import interval_of_ratio
from sprite_diffusion.metrics.evaluation import Batch
from sprite_diffusion.metrics.judge import COLOUR, MIN_ACCURACY, UNSAID, Judge, encode_captions, load_judge
from sprite_diffusion.metrics.real_images import RealImages
from sprite_diffusion.metrics.report import LEFT_OUT_PAIRS, NUMBERS_NAMED, SEEN, UNSEEN, Measurement
from sprite_diffusion.sampling.conditions import Condition
from sprite_diffusion.sampling.pipeline_loading import Pipeline


class Prompts(NamedTuple):
    """Captions to draw, and the sprites that the artist made of them."""

    captions: list[str]
    images: torch.Tensor  # (N, 3, 16, 16) uint8, on white


def draw_prompts(num_images: int, group: str) -> Prompts:
    """Returns captions of the training set of `--leave_out_pairs`, or as many with pairs that are left out of it.

    Args:
        num_images: How many; for `SEEN` at most as many as the training set has.
        group: `SEEN` for the first sprites of the training set, `UNSEEN` for the first that were left out.
    """
    leave_out = {SEEN: has_left_out_pair, UNSEEN: lambda caption: not has_left_out_pair(caption)}[group]
    images, _, captions = draw_sprites(num_images, leave_out=leave_out)
    return Prompts(captions, torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))


def choose_groups(pipeline: Pipeline, real: RealImages, leave_out_pairs: bool) -> tuple[str, ...]:
    """Returns the groups of captions that a model can be judged by: of the built-in artist's words, if it reads those.

    Args:
        pipeline: The model.
        real: What it was trained on.
        leave_out_pairs: Whether that was without the pairs of `--leave_out_pairs`.
    """
    is_captioned = isinstance(pipeline, TextToImageDDPMPipeline)
    if not is_captioned or real.source != BUILT_IN_SOURCE or real.image_size != (SIZE, SIZE):
        return ()
    return (SEEN, UNSEEN) if leave_out_pairs else (SEEN,)


def measure_obedience(
    generate: Callable[[list[Condition]], Iterator[Batch]], num_images: int, groups: Sequence[str]
) -> dict[str, Measurement]:
    """Has images generated of captions, and judges them. Warns of the slots that the judge refuses.

    Args:
        generate: Yields this process's share of the images of some prompts, (B, C, 16, 16), one for each.
        num_images: How many captions of each group.
        groups: Those of `choose_groups`; without any there is nothing to judge.

    Returns:
        The figures of `judge_obedience`, by name; none but on the main process.

    Raises:
        UserInputError: If the judge can't be kept in the cache.
    """
    state = PartialState()
    figures: dict[str, Measurement] = {}
    if not groups:
        return figures
    with state.local_main_process_first():
        judge = load_judge(state.device)
    if judge.refused:
        warn(f"the judge is right on less than {MIN_ACCURACY:.0%} and is not asked about: {', '.join(judge.refused)}")
    for group in groups:
        prompts = draw_prompts(num_images, group)
        conditions = [Condition.of_prompt(caption) for caption in prompts.captions]
        parts = [(rows, judge.read(images)) for rows, images in generate(conditions)]
        parts = gather_object(parts)
        if state.is_main_process:
            order = torch.cat([rows for rows, _ in parts]).argsort()
            seen = torch.cat([values for _, values in parts])[order]
            figures |= judge_obedience(judge, seen, prompts, group)
    return figures


def judge_obedience(judge: Judge, seen: torch.Tensor, prompts: Prompts, group: str) -> dict[str, Measurement]:
    """Returns how much of what captions name is there, beside the same of the artist's own sprites.

    Of the attributes that a caption names, those that are no colours count for "attributes", and the colours for
    "colours", where the right one has to be on the part that it was named with. Both also by how many attributes the
    captions name. A share is that of all attributes, not the mean of shares, and its interval is over captions. Slots
    that the judge refuses are left out.

    Args:
        judge: The judge.
        seen: What `judge.read` has seen in the images, (N, slots).
        prompts: What the images were to be.
        group: `SEEN` or `UNSEEN`, which stands in the names of the figures; with `UNSEEN` the colours of the pairs
            that were left out are also counted alone.
    """
    asked = encode_captions(prompts.captions)  # (N, slots)
    is_named = asked != UNSAID
    num_named = is_named.sum(dim=1)
    is_judged = is_named & torch.tensor([slot not in judge.refused for slot in judge.slots])
    is_colour = torch.tensor([slot.endswith(COLOUR) for slot in judge.slots])
    is_there = seen == asked
    is_real = judge.read(prompts.images) == asked

    counted = {}
    for number, (low, high) in NUMBERS_NAMED.items():
        has_number = ((num_named >= low) & (num_named <= high))[:, None]
        counted[f"attributes_{group}{number}"] = is_judged & ~is_colour & has_number
        counted[f"colours_{group}{number}"] = is_judged & is_colour & has_number
    if group == UNSEEN:
        counted[LEFT_OUT_PAIRS] = is_judged & _find_left_out(judge, prompts.captions)
    return {name: _share(is_there, is_real, counts) for name, counts in counted.items() if counts.any()}


def _find_left_out(judge: Judge, captions: Sequence[str]) -> torch.Tensor:
    """Returns which slots (N, slots) hold the colour of a pair that is left out."""
    left_out = [
        {fact.slot for fact in read_caption(caption) if fact.part and is_left_out(fact.pair)} for caption in captions
    ]
    return torch.tensor([[slot in slots for slot in judge.slots] for slots in left_out])


def _share(is_there: torch.Tensor, is_real: torch.Tensor, counts: torch.Tensor) -> Measurement:
    """Returns the share of what is to be counted, (N, slots), that is there in generated images, and in real ones."""
    rows = counts.any(dim=1)
    parts, wholes = (is_there & counts)[rows].sum(dim=1), counts[rows].sum(dim=1)
    return Measurement(
        value=float(parts.sum()) / float(wholes.sum()),
        interval=interval_of_ratio(parts, wholes),
        real=float((is_real & counts).sum()) / float(wholes.sum()),
        num_images=len(wholes),
    )
