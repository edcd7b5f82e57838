from pipelines.pipeline_ddpm import (
    ConditionalDDPMPipeline,
    TextToImageDDPMPipeline,
    UnconditionalDDPMPipeline,
    to_straight_alpha,
)

__all__ = ["ConditionalDDPMPipeline", "TextToImageDDPMPipeline", "UnconditionalDDPMPipeline", "to_straight_alpha"]
