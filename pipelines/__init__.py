from pipelines.pipeline_ddpm import ConditionalDDPMPipeline, UnconditionalDDPMPipeline, to_oklab, to_straight_alpha

__all__ = ["ConditionalDDPMPipeline", "UnconditionalDDPMPipeline", "to_oklab", "to_straight_alpha"]
