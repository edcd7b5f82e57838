"""The toy process that tutorials start from: a straight line from an image to noise."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

NOISE_TYPES = ("gaussian", "uniform")


@dataclass
class LinearCorruptionSchedulerOutput(BaseOutput):
    """
    Output class of [`LinearCorruptionScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            The sample of the next, less noisy timestep: the input of the next model call.
        pred_original_sample (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            The clean image predicted at this timestep: the model output itself.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class LinearCorruptionScheduler(SchedulerMixin, ConfigMixin):
    """
    The toy process that tutorials start from, as in the Hugging Face diffusion course, unit 1, "Diffusion
    Models from Scratch": `noisy = (1 - amount) * clean + amount * noise`. The model predicts the clean image,
    and each sampling step moves `1 / (steps left)` of the way to the prediction.

    With Gaussian noise this is the Euler method on the straight path of rectified flow
    ([arXiv:2209.03003](https://arxiv.org/abs/2209.03003), equation 1), run from noise to data. Timesteps are the
    integers 0 to `num_train_timesteps - 1`, and `amount(t) = (t + 1) / num_train_timesteps`.

    Noise is always handed in as standard normal noise, the kind that training loops and pipelines draw.
    `add_noise` transforms this noise; a pipeline calls [`~LinearCorruptionScheduler.transform_noise`] once on its
    initial latents, if its scheduler has this method.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            The number of timesteps, hence of different amounts of noise, in training.
        noise_type (`"gaussian"` or `"uniform"`, defaults to `"gaussian"`):
            The distribution of the noise: standard normal, or uniform on [-1, 1]. The latter, with images in
            [-1, 1], is the tutorials' process with noise and images in [0, 1].

    Raises:
        ValueError: If `noise_type` is unknown.
    """

    _compatibles: list[str] = []  # noqa: RUF012
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, noise_type: Literal["gaussian", "uniform"] = "gaussian"
    ) -> None:
        if noise_type not in NOISE_TYPES:
            raise ValueError(f"Unknown noise_type {noise_type!r}; known are {', '.join(NOISE_TYPES)}.")
        if "_use_default_values" in self.config:
            # `from_config` loses the values listed there, among which are those that were given by position.
            self.register_to_config(_use_default_values=[])
        self.set_timesteps(num_train_timesteps)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """
        Return the sample as it is: this process needs no scaling.

        Args:
            sample (`torch.Tensor`): The input of the model.
            timestep (`int` or `torch.Tensor`, *optional*): Unused.

        Returns:
            `torch.Tensor`: `sample`.
        """
        return sample

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """
        Set the timesteps of sampling: `num_inference_steps` of them, descending, with the amounts of noise
        `1, 1 - 1/n, ..., 1/n`, each rounded to the nearest training timestep.

        Args:
            num_inference_steps (`int`): The number of sampling steps, 1 to `num_train_timesteps`.
            device (`str` or `torch.device`, *optional*): Where to put `timesteps`.

        Raises:
            ValueError: If `num_inference_steps` is out of its range.
        """
        num_train_timesteps = self.config["num_train_timesteps"]
        if not 1 <= num_inference_steps <= num_train_timesteps:
            raise ValueError(
                f"num_inference_steps must be between 1 and num_train_timesteps ({num_train_timesteps}), "
                f"got {num_inference_steps}."
            )
        amounts = np.linspace(1, 0, num_inference_steps, endpoint=False)
        timesteps = np.round(amounts * num_train_timesteps).astype(np.int64) - 1
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.from_numpy(timesteps).to(device)
        self._steps_left = {t: num_inference_steps - i for i, t in enumerate(timesteps.tolist())}

    def transform_noise(self, noise: torch.Tensor) -> torch.Tensor:
        """
        Turn standard normal noise into the noise of this process.

        For uniform noise this is the probability integral transform, scaled to [-1, 1]: `2 * Phi(z) - 1 =
        erf(z / sqrt(2))`.

        Args:
            noise (`torch.Tensor` of any shape): Standard normal noise.

        Returns:
            `torch.Tensor`: The noise of `noise_type`, of the same shape and dtype.
        """
        if self.config["noise_type"] == "gaussian":
            return noise
        return torch.erf(noise.float() / math.sqrt(2)).to(noise.dtype)  # N(0, 1) -> U[-1, 1]

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        Corrupt clean images: `(1 - amount) * original_samples + amount * transform_noise(noise)`.

        Args:
            original_samples (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                The clean images, in [-1, 1].
            noise (`torch.Tensor` of the same shape): Standard normal noise.
            timesteps (`torch.Tensor` of shape `(batch_size,)` or `()`):
                Integer timesteps, 0 to `num_train_timesteps - 1`.

        Returns:
            `torch.Tensor`: The noisy images, in the shape and dtype of `original_samples`.
        """
        # The coefficients are ratios of small integers. One float32 division on the samples' device rounds these
        # ratios to the same bits as a float64 table would, with no copy between devices and no wait.
        num_train_timesteps = self.config["num_train_timesteps"]
        noise_steps = (timesteps.to(original_samples.device) + 1).float()
        noise_steps = noise_steps.view(-1, *[1] * (original_samples.ndim - 1))  # (B,) -> (B, 1, 1, 1)
        amount = noise_steps / num_train_timesteps
        clean_amount = (num_train_timesteps - noise_steps) / num_train_timesteps
        noisy_samples = clean_amount * original_samples.float() + amount * self.transform_noise(noise.float())
        return noisy_samples.to(original_samples.dtype)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> LinearCorruptionSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Move the sample `1 / (steps left)` of the way to the predicted clean image.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                The clean image predicted by the model.
            timestep (`int` or `torch.Tensor` of shape `()`): The current timestep, one of `timesteps`.
            sample (`torch.Tensor` of the same shape as `model_output`): The current noisy sample.
            generator (`torch.Generator`, *optional*):
                Accepted for the common interface and not used: given the initial noise, nothing here is random.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.

        Returns:
            [`LinearCorruptionSchedulerOutput`] or `tuple`: `prev_sample` and `pred_original_sample`, in the
            dtype of `sample`.

        Raises:
            ValueError: If `timestep` is not one of `timesteps`.
        """
        steps_left = self._steps_left.get(int(timestep))
        if steps_left is None:
            raise ValueError(
                f"Timestep {int(timestep)} is not one of the {self.num_inference_steps} set by set_timesteps."
            )
        # A sum of two weighted terms, and not `sample + (model_output - sample) / steps_left`: the last step has to
        # return exactly the prediction, and adding back a rounded difference does not.
        weight = 1 / steps_left
        prev_sample = (1 - weight) * sample.float() + weight * model_output.float()
        prev_sample = prev_sample.to(sample.dtype)
        pred_original_sample = model_output.to(sample.dtype)
        if not return_dict:
            return prev_sample, pred_original_sample
        return LinearCorruptionSchedulerOutput(prev_sample, pred_original_sample)
