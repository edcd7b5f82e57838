"""DDPM scheduler whose every coefficient is a closed-form float64 function of the betas, tabulated once."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]
VarianceType = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]
PredictionType = Literal["epsilon", "sample", "v_prediction"]
TimestepSpacing = Literal["linspace", "leading", "trailing"]

# sqrt(alpha_bar_T) above which the prior N(0, I) visibly differs from the last noised image; the published
# schedules leave 0.006 (Ho et al. 2020) to 0.07 (Stable Diffusion).
MAX_TERMINAL_SIGNAL = 0.1


@dataclass
class ClosedFormDDPMSchedulerOutput(BaseOutput):
    """
    Output class for the scheduler's `step` function.

    Args:
        prev_sample (`torch.Tensor` of shape `(B, C, H, W)`):
            Sample `x_{t-1}` of the previous timestep, the next model input of the denoising loop.
        pred_original_sample (`torch.Tensor` of shape `(B, C, H, W)`):
            Denoised sample `x_0` predicted at this timestep, after clipping or thresholding.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class _CoefficientTable:
    """K coefficients for each of T timesteps: one read-only float64 table, and a copy per device and dtype."""

    def __init__(self, columns: Sequence[np.ndarray]):
        self.values = np.stack(columns, axis=1)  # (T, K)
        self.values.flags.writeable = False
        self.copies: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def copy(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Return the table `(T, K)` on a device, in a dtype; made at the first call."""
        key = (device, dtype)
        if key not in self.copies:
            # Autograd refuses to save tensors made in inference mode, and training may follow sampling.
            with torch.inference_mode(False):
                self.copies[key] = torch.from_numpy(self.values.copy()).to(dtype).to(device)
        return self.copies[key]

    def at(self, timestep: int | torch.Tensor, sample: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return the K coefficients at `timestep`, each `(B or 1, 1, 1, 1)`, without reading from the device."""
        table = self.copy(sample.device, dtype)
        if isinstance(timestep, torch.Tensor) and timestep.device == sample.device:
            rows = table.index_select(0, timestep.reshape(-1))
        else:
            rows = table[timestep]  # a view, as the host knows the timestep
        return list(rows.view(-1, table.shape[1], *(1,) * (sample.ndim - 1)).unbind(1))


def _cosine_alpha_bar(t: np.ndarray) -> np.ndarray:
    """Return alpha_bar at times in [0, 1], up to a factor (Nichol and Dhariwal 2021, eq. 17)."""
    return np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_alpha_bar(t: np.ndarray) -> np.ndarray:
    """Return alpha_bar at times in [0, 1] (Hang et al. 2024, arXiv 2407.03297, Table 1)."""
    # The square root is diffusers', kept for equal betas.
    half_log_snr = -0.5 * np.copysign(1, 0.5 - t) * np.log(1 - 2 * np.abs(0.5 - t) + 1e-6)
    return np.sqrt(1 / (1 + np.exp(-half_log_snr)))


def _make_betas(schedule: str, beta_start: float, beta_end: float, num_train_timesteps: int) -> np.ndarray:
    """Return the float64 betas `(T,)` of a named schedule."""
    if schedule == "linear":  # Ho et al. 2020, section 4
        return np.linspace(beta_start, beta_end, num_train_timesteps)
    if schedule == "scaled_linear":  # Rombach et al. 2022
        return np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
    if schedule == "sigmoid":  # Xu et al. 2022, GeoDiff
        sigmoid = 1 / (1 + np.exp(-np.linspace(-6, 6, num_train_timesteps)))
        return sigmoid * (beta_end - beta_start) + beta_start
    alpha_bar = _cosine_alpha_bar if schedule == "squaredcos_cap_v2" else _laplace_alpha_bar
    signal = alpha_bar(np.arange(num_train_timesteps + 1) / num_train_timesteps)
    return np.minimum(1 - signal[1:] / signal[:-1], 0.999)


def _rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(alpha_bar) so that it ends at exactly 0 (Lin et al. 2023, Algorithm 1)."""
    signal = np.sqrt(np.cumprod(1 - betas))
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    return np.concatenate([betas[:1], 1 - (signal[1:] / signal[:-1]) ** 2])


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError if the value of an option is none of its choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but is {value!r}.")


class ClosedFormDDPMScheduler(SchedulerMixin, ConfigMixin):
    """
    DDPM scheduler (Ho et al. 2020, arXiv 2006.11239): a drop-in for [`~diffusers.DDPMScheduler`] with the same
    options, config and random numbers, whose coefficients are computed in float64 and tabulated per timestep.

    `step`, `add_noise` and `get_velocity` compute in float32 (in float64 for float64 inputs) and return the dtype
    that PyTorch promotes their inputs to. They never read from the device.

    Args:
        num_train_timesteps (`int`, defaults to `1000`):
            Number T of diffusion steps the model is trained on.
        beta_start (`float`, defaults to `0.0001`):
            First beta of the `linear`, `scaled_linear` and `sigmoid` schedules.
        beta_end (`float`, defaults to `0.02`):
            Last beta of these schedules.
        beta_schedule (`str`, defaults to `"linear"`):
            One of `linear`, `scaled_linear`, `squaredcos_cap_v2`, `sigmoid`, `laplace`.
        trained_betas (`np.ndarray` or `list[float]`, *optional*):
            Betas that take the place of a schedule; T is then their number.
        variance_type (`str`, defaults to `"fixed_small"`):
            Variance of the reverse step. `fixed_small`: the posterior variance, eq. 7 of Ho et al. 2020.
            `fixed_large`: beta_t. The `_log` forms store the logarithm of the same variance, so they are the same
            distribution. `learned`: the second half of the model's channels. `learned_range`: that half interpolates
            between the two logarithms, eq. 15 of Nichol and Dhariwal 2021.
        clip_sample (`bool`, defaults to `True`):
            Clip the predicted x_0 to `[-clip_sample_range, clip_sample_range]`.
        prediction_type (`str`, defaults to `"epsilon"`):
            What the model predicts: `epsilon` (the noise), `sample` (x_0) or `v_prediction` (Salimans and Ho 2022,
            section 4).
        thresholding (`bool`, defaults to `False`):
            Clip x_0 by a percentile of each image instead (dynamic thresholding, Saharia et al. 2022, section 2.3).
        dynamic_thresholding_ratio (`float`, defaults to `0.995`):
            The percentile, as a fraction.
        clip_sample_range (`float`, defaults to `1.0`):
            Largest magnitude of x_0 when `clip_sample`.
        sample_max_value (`float`, defaults to `1.0`):
            Largest threshold when `thresholding`.
        timestep_spacing (`str`, defaults to `"leading"`):
            `linspace`, `leading` or `trailing` (Lin et al. 2023, Table 2).
        steps_offset (`int`, defaults to `0`):
            Added to the timesteps of `leading` spacing.
        rescale_betas_zero_snr (`bool`, defaults to `False`):
            Rescale the betas so that the last timestep is pure noise (Lin et al. 2023, Algorithm 1).

    Raises:
        `ValueError`: If an option has an unknown value, a beta is outside (0, 1], or the last timestep has no signal
            left and the model predicts `epsilon`, from which x_0 then cannot be recovered.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012  (diffusers' class attribute)
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: VarianceType = "fixed_small",
        clip_sample: bool = True,
        prediction_type: PredictionType = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: TimestepSpacing = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ):
        if "_use_default_values" in self.config:
            # `from_config` replaces the values listed there by the other class's defaults, and Heun's betas differ.
            self.register_to_config(_use_default_values=[])
        # None is in the config of a DPM-Solver scheduler; diffusers' DDPMScheduler then samples as fixed_small.
        if variance_type is None:
            self.register_to_config(variance_type="fixed_small")
        _check_choice("beta_schedule", beta_schedule, get_args(BetaSchedule))
        _check_choice("variance_type", self.config["variance_type"], get_args(VarianceType))
        _check_choice("prediction_type", prediction_type, get_args(PredictionType))
        _check_choice("timestep_spacing", timestep_spacing, get_args(TimestepSpacing))

        if trained_betas is not None:
            betas = np.array(trained_betas, dtype=np.float64)
            self.register_to_config(trained_betas=betas.tolist())  # a list compares and serialises, an array does not
        else:
            betas = _make_betas(beta_schedule, beta_start, beta_end, num_train_timesteps)
        if not ((betas > 0).all() and (betas[:-1] < 1).all() and betas[-1] <= 1):
            raise ValueError("Every beta must lie in (0, 1); only the last may be 1.")
        if rescale_betas_zero_snr:
            betas = _rescale_zero_terminal_snr(betas)
        self._betas = betas
        # Sums of log1p keep the relative precision of 1 - alpha_bar, which a product of alphas near 1 loses.
        with np.errstate(divide="ignore"):  # log 0 = -inf is the exact value at zero terminal SNR
            self._log_alphas_cumprod = np.cumsum(np.log1p(-betas))
        self._betas.flags.writeable = self._log_alphas_cumprod.flags.writeable = False
        self._check_terminal_signal()

        # q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), Ho et al. 2020, eq. 4
        signal = np.exp(0.5 * self._log_alphas_cumprod)
        self._forward = _CoefficientTable([signal, np.sqrt(-np.expm1(self._log_alphas_cumprod))])

        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self._set_chain(np.arange(len(betas))[::-1].copy(), None)

    def _check_terminal_signal(self) -> None:
        """Raise a ValueError if x_0 can't be recovered at the last timestep; warn if much of x_0 is left there."""
        terminal_signal = math.exp(0.5 * self._log_alphas_cumprod[-1])
        if terminal_signal == 0 and self.config["prediction_type"] == "epsilon":
            raise ValueError(
                "With zero terminal SNR the last timestep is pure noise, from which x_0 cannot be recovered by"
                " predicting epsilon: use prediction_type='v_prediction'."
            )
        if terminal_signal > MAX_TERMINAL_SIGNAL:
            warnings.warn(
                f"The last of {len(self._betas)} timesteps keeps sqrt(alpha_bar) = {terminal_signal:.2f} of the image,"
                " but sampling starts from pure noise: pass rescale_betas_zero_snr=True with"
                " prediction_type='v_prediction', or larger betas.",
                stacklevel=4,  # the caller of the constructor, outside of register_to_config
            )

    @classmethod
    def from_config(
        cls, config: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "ClosedFormDDPMScheduler | tuple[ClosedFormDDPMScheduler, dict[str, Any]]":
        """
        Make a scheduler from the config of another one, or from a file's, as diffusers does.

        Args:
            config (`dict`): The config.
            return_unused_kwargs (`bool`, defaults to `False`): Whether to return the values that were not used too.
            kwargs: Values that take the place of those in `config`.

        Returns:
            [`ClosedFormDDPMScheduler`] or `tuple`: The scheduler, and the unused values.
        """
        result = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        scheduler = result[0] if isinstance(result, tuple) else result
        if "_class_name" not in config:
            # The scheduler is not from a file: as in a new one, no value counts as left at its default.
            scheduler.register_to_config(_use_default_values=[])
        return result

    @property
    def betas(self) -> torch.Tensor:
        """Variances beta_t of the forward steps, `(T,)`, float64; a copy."""
        return torch.from_numpy(self._betas.copy())

    @property
    def alphas(self) -> torch.Tensor:
        """`1 - beta_t`, `(T,)`, float64; a copy."""
        return torch.from_numpy(1 - self._betas)

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """alpha_bar_t, the product of the alphas up to t, `(T,)`, float64; a copy."""
        return torch.from_numpy(np.exp(self._log_alphas_cumprod))

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """
        Return `sample` unchanged; other schedulers scale the model's input here.

        Args:
            sample (`torch.Tensor`): Current sample.
            timestep (`int` or `torch.Tensor`, *optional*): Current timestep.

        Returns:
            `torch.Tensor`: The same tensor.
        """
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """
        Set the timesteps of the reverse chain, from noise to image.

        Args:
            num_inference_steps (`int`, *optional*):
                Number of timesteps, spaced as `timestep_spacing` says. Either this or `timesteps`.
            device (`str` or `torch.device`, *optional*):
                Device of `self.timesteps` and of the coefficients; the CPU if not given.
            timesteps (`list[int]`, *optional*):
                The timesteps themselves, strictly descending, in 0..T-1.

        Raises:
            `ValueError`: If not exactly one of the two is given, or if the timesteps are not strictly descending in
                0..T-1.
        """
        if timesteps is not None and num_inference_steps is None:
            chain = np.asarray(timesteps, dtype=np.int64)
        elif num_inference_steps is not None and timesteps is None:
            chain = self._spaced_timesteps(num_inference_steps)
        else:
            raise ValueError("Exactly one of `num_inference_steps` and `timesteps` must be given.")
        if len(chain) == 0 or (np.diff(chain) >= 0).any():
            raise ValueError("`timesteps` must be in strictly descending order, at least one.")
        if chain[0] >= len(self._betas) or chain[-1] < 0:
            raise ValueError(
                f"`timesteps` must lie in 0..{len(self._betas) - 1}, but go from {chain[0]} to {chain[-1]}."
            )
        self.num_inference_steps = len(chain)
        self._set_chain(chain, device)

    def _spaced_timesteps(self, num_inference_steps: int) -> np.ndarray:
        """Return the descending timesteps `(n,)` of `timestep_spacing` (Lin et al. 2023, Table 2, counted from 0)."""
        num_train_timesteps = self.config["num_train_timesteps"]
        if not 1 <= num_inference_steps <= num_train_timesteps:
            raise ValueError(f"`num_inference_steps` must lie in 1..{num_train_timesteps}: {num_inference_steps}.")
        if self.config["timestep_spacing"] == "linspace":
            chain = np.linspace(0, num_train_timesteps - 1, num_inference_steps).round()[::-1]
        elif self.config["timestep_spacing"] == "leading":
            step_ratio = num_train_timesteps // num_inference_steps
            chain = np.arange(num_inference_steps)[::-1] * step_ratio + self.config["steps_offset"]
        else:
            # Rounding in `arange` may yield one element too many, which would be timestep -1.
            step_ratio = num_train_timesteps / num_inference_steps
            chain = np.arange(num_train_timesteps, 0, -step_ratio)[:num_inference_steps].round() - 1
        return chain.astype(np.int64)

    def _set_chain(self, chain: np.ndarray, device: str | torch.device | None) -> None:
        """Tabulate the reverse step of each timestep of the descending `chain`, `(n,)`."""
        log_alpha_bar = self._log_alphas_cumprod[chain]
        log_alpha_bar_prev = np.append(log_alpha_bar[1:], 0.0)  # alpha_bar is 1 before the first noise
        one_minus_alpha_bar, one_minus_alpha_bar_prev = -np.expm1(log_alpha_bar), -np.expm1(log_alpha_bar_prev)
        log_alpha = log_alpha_bar - log_alpha_bar_prev
        beta = -np.expm1(log_alpha)

        signal, noise = np.exp(0.5 * log_alpha_bar), np.sqrt(one_minus_alpha_bar)
        if self.config["prediction_type"] == "epsilon":  # Ho et al. 2020, eq. 15
            x0_coefficients = [1 / signal, -noise]
        elif self.config["prediction_type"] == "v_prediction":  # Salimans and Ho 2022, section 4
            x0_coefficients = [signal, -noise]
        else:
            x0_coefficients = []
        # Mean of q(x_{t-1} | x_t, x_0), Ho et al. 2020, eq. 7
        mean_coefficients = [
            np.exp(0.5 * log_alpha_bar_prev) * beta / one_minus_alpha_bar,
            np.exp(0.5 * log_alpha) * one_minus_alpha_bar_prev / one_minus_alpha_bar,
        ]
        posterior_variance = one_minus_alpha_bar_prev / one_minus_alpha_bar * beta
        columns = [*x0_coefficients, *mean_coefficients, *self._deviation_columns(beta, posterior_variance)]

        # A timestep outside the chain has no coefficients. As a tensor it yields NaN: to read and refuse it would take
        # a wait for the device.
        coefficients = np.full((len(columns), len(self._betas)), np.nan)
        coefficients[:, chain] = columns
        self._reverse = _CoefficientTable(list(coefficients))
        self._chain = frozenset(chain.tolist())
        self.timesteps = torch.from_numpy(chain).to(device)
        # Copied here, so that `step` and `add_noise` have nothing to move.
        for table in (self._forward, self._reverse):
            table.copy(self.timesteps.device, torch.float32)

    def _deviation_columns(self, beta: np.ndarray, posterior_variance: np.ndarray) -> list[np.ndarray]:
        """Return the coefficients `(n,)` of the reverse step's standard deviation, which is 0 at the last timestep."""
        is_noisy = np.arange(len(beta)) < len(beta) - 1
        variance_type = self.config["variance_type"]
        if variance_type == "learned":
            return [is_noisy.astype(np.float64)]
        if variance_type == "learned_range":
            # log variance = v log(beta) + (1 - v) log(posterior variance) with v = (model output + 1) / 2,
            # Nichol and Dhariwal 2021, eq. 15; half of it, as a line in the model output
            log_beta = np.log(beta)
            log_posterior = np.log(posterior_variance, out=log_beta.copy(), where=is_noisy)
            offset = np.where(is_noisy, 0.25 * (log_beta + log_posterior), -np.inf)
            return [offset, 0.25 * (log_beta - log_posterior)]
        return [np.sqrt(np.where(is_noisy, beta if "large" in variance_type else posterior_variance, 0.0))]

    def previous_timestep(self, timestep: int | torch.Tensor) -> torch.Tensor:
        """
        Return the timestep that follows `timestep` in the reverse chain.

        Args:
            timestep (`int` or `torch.Tensor`): Timestep, or a tensor of timesteps of any shape.

        Returns:
            `torch.Tensor`: The largest listed timestep below each, or -1; the same shape.
        """
        timestep = torch.as_tensor(timestep, device=self.timesteps.device).unsqueeze(-1)
        return torch.where(self.timesteps < timestep, self.timesteps, -1).amax(-1)

    def _threshold_sample(self, sample: torch.Tensor) -> torch.Tensor:
        """Clip and scale each image by its own percentile: dynamic thresholding, Saharia et al. 2022, section 2.3."""
        threshold = sample.abs().flatten(1).quantile(self.config["dynamic_thresholding_ratio"], dim=1)  # (B,)
        threshold = threshold.clamp(min=1, max=self.config["sample_max_value"])
        threshold = threshold.view(-1, *(1,) * (sample.ndim - 1))
        return sample.clamp(-threshold, threshold) / threshold

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> ClosedFormDDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Sample x_{t-1} given x_t and the model's output (Ho et al. 2020, Algorithm 2, with x_0 clipped in between).

        Each call draws one noise tensor, also at the last listed timestep, where its coefficient is 0, so that nothing
        branches on the timestep. The generator's state after a run depends on the number of steps alone.

        Args:
            model_output (`torch.Tensor` of shape `(B, C, H, W)`):
                The model's output; `(B, 2C, H, W)` if the variance is learned.
            timestep (`int` or `torch.Tensor`):
                A listed timestep. A tensor, of shape `()` or `(B,)`, may lie on the samples' device: the host does not
                read it, and a timestep that is not listed yields NaN.
            sample (`torch.Tensor` of shape `(B, C, H, W)`):
                x_t.
            generator (`torch.Generator` or a list of one per image, *optional*):
                Source of the noise, which is drawn in the dtype of `model_output`.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`ClosedFormDDPMSchedulerOutput`] or a tuple.

        Returns:
            [`ClosedFormDDPMSchedulerOutput`] or `tuple`: x_{t-1} and the predicted x_0, in new tensors.

        Raises:
            `IndexError`: If `timestep` is an `int` that `set_timesteps` did not list.
            `ValueError`: If the variance is learned and `model_output` has not twice the sample's channels.
        """
        config = self.config
        if (
            not isinstance(timestep, torch.Tensor)
            and not torch.compiler.is_compiling()
            and timestep not in self._chain
        ):
            raise IndexError(f"Timestep {timestep} is not one of the {len(self._chain)} listed by `set_timesteps`.")

        # 1. The model's channels: the prediction, and the variance where it is learned (Nichol and Dhariwal 2021,
        # section 3.1)
        if config["variance_type"] in ("learned", "learned_range"):
            if model_output.shape[1] != 2 * sample.shape[1]:
                raise ValueError(
                    f"A learned variance needs a model output of {2 * sample.shape[1]} channels, twice the sample's,"
                    f" but it has {model_output.shape[1]}."
                )
            model_output, predicted_variance = model_output.chunk(2, dim=1)

        # 2. The coefficients of this timestep, which `_set_chain` has tabulated
        output_dtype = torch.promote_types(model_output.dtype, sample.dtype)
        dtype = torch.promote_types(output_dtype, torch.float32)
        coefficients = self._reverse.at(timestep, sample, dtype)

        # 3. The predicted x_0: (x_t - sqrt(1 - alpha_bar_t) epsilon) / sqrt(alpha_bar_t) (Ho et al. 2020, eq. 15), or
        # sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v (Salimans and Ho 2022, section 4)
        if config["prediction_type"] == "sample":
            x0 = model_output.to(dtype, copy=True)
        else:
            sample_coefficient, output_coefficient, *coefficients = coefficients
            if config["prediction_type"] == "epsilon":
                # The difference first: at large t its terms nearly cancel, and scaled ones would round by more.
                x0 = torch.addcmul(sample, model_output, output_coefficient).mul_(sample_coefficient)
            else:
                x0 = (sample * sample_coefficient).addcmul_(model_output, output_coefficient)

        # 4. x_0 within the range of images (Saharia et al. 2022, section 2.3, or clipping)
        if config["thresholding"]:
            x0 = self._threshold_sample(x0)
        elif config["clip_sample"]:
            x0 = x0.clamp_(-config["clip_sample_range"], config["clip_sample_range"])

        # 5. The standard deviation of x_{t-1}: fixed (Ho et al. 2020, eq. 7 or beta_t), or learned (Nichol and
        # Dhariwal 2021, eq. 15)
        x0_coefficient, xt_coefficient, *deviation = coefficients
        if config["variance_type"] == "learned":
            std = (predicted_variance * deviation[0]).sqrt_()
        elif config["variance_type"] == "learned_range":
            std = torch.addcmul(deviation[0], predicted_variance, deviation[1]).exp_()
        else:
            std = deviation[0]

        # 6. x_{t-1}: the mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7), and noise of that deviation
        # (Algorithm 2, line 4)
        noise = randn_tensor(
            model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
        )
        # In place on the noise, which is ours: a fresh tensor per pass would cost more than the pass.
        prev_sample = noise.to(dtype).mul_(std).addcmul_(sample, xt_coefficient).addcmul_(x0, x0_coefficient)

        prev_sample, x0 = prev_sample.to(output_dtype), x0.to(output_dtype)
        if not return_dict:
            return prev_sample, x0
        return ClosedFormDDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        """
        Sample x_t given x_0: `sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise` (Ho et al. 2020, eq. 4).

        Args:
            original_samples (`torch.Tensor` of shape `(B, C, H, W)`): x_0.
            noise (`torch.Tensor` of shape `(B, C, H, W)`): Standard normal noise.
            timesteps (`torch.Tensor` of shape `(B,)` or `()`): Timestep of each image, in 0..T-1.

        Returns:
            `torch.Tensor`: x_t, of shape `(B, C, H, W)`.
        """
        output_dtype = torch.promote_types(original_samples.dtype, noise.dtype)
        dtype = torch.promote_types(output_dtype, torch.float32)
        signal_rate, noise_rate = self._forward.at(timesteps, original_samples, dtype)
        return (original_samples * signal_rate).addcmul_(noise, noise_rate).to(output_dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor) -> torch.Tensor:
        """
        Return the target of `v_prediction`: `sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_0` (Salimans and Ho
        2022, section 4).

        Args:
            sample (`torch.Tensor` of shape `(B, C, H, W)`): x_0.
            noise (`torch.Tensor` of shape `(B, C, H, W)`): The noise that `add_noise` mixed in.
            timesteps (`torch.Tensor` of shape `(B,)` or `()`): Timestep of each image, in 0..T-1.

        Returns:
            `torch.Tensor`: The velocity, of shape `(B, C, H, W)`.
        """
        output_dtype = torch.promote_types(sample.dtype, noise.dtype)
        dtype = torch.promote_types(output_dtype, torch.float32)
        signal_rate, noise_rate = self._forward.at(timesteps, sample, dtype)
        return (noise * signal_rate).addcmul_(sample, noise_rate, value=-1).to(output_dtype)
