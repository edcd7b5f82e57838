from models.unet_basic_2d import BasicUNet2DModel
from models.unet_context_2d import ContextUNet2DModel

__all__ = ["BasicUNet2DModel", "ContextUNet2DModel"]
