from pipelines.pipeline_conditional_ddpm import ConditionalDDPMPipeline
from pipelines.pipeline_unconditional_ddpm import UnconditionalDDPMPipeline

__all__ = ["ConditionalDDPMPipeline", "UnconditionalDDPMPipeline"]
