from pipelines.pipeline_ddpm import (
    DEFAULT_STRENGTH,
    ConditionalDDPMPipeline,
    TextToImageDDPMPipeline,
    UnconditionalDDPMPipeline,
    check_prompt,
    clear_hidden,
    find_nearest,
    find_unknown_words,
    to_oklab,
    to_straight_alpha,
)

__all__ = [
    "DEFAULT_STRENGTH",
    "ConditionalDDPMPipeline",
    "TextToImageDDPMPipeline",
    "UnconditionalDDPMPipeline",
    "check_prompt",
    "clear_hidden",
    "find_nearest",
    "find_unknown_words",
    "to_oklab",
    "to_straight_alpha",
]
