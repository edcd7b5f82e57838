from schedulers.scheduling_closed_form_ddpm import ClosedFormDDPMScheduler
from schedulers.scheduling_linear_corruption import LinearCorruptionScheduler

__all__ = ["ClosedFormDDPMScheduler", "LinearCorruptionScheduler"]
