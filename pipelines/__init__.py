from pipelines.pipeline_ddpm import ConditionalDDPMPipeline, UnconditionalDDPMPipeline

__all__ = ["ConditionalDDPMPipeline", "UnconditionalDDPMPipeline"]
