"""Draws images with a denoiser that genscale trained, through diffusers' own schedulers.

This file travels with the weights (:mod:`genscale.export.diffusers`), so it imports nothing of genscale.
(diffusers imports its classes late, where the type checker does not see them.)
"""

# mypy: disable-error-code="attr-defined,misc,union-attr"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class GenscalePipeline(DiffusionPipeline):
    """From noise to images.

    Args:
        denoiser: a ``UNet2DModel``, or a network that is called as it is.
        scheduler: flow matching's, EDM's, or any for discrete steps.
        vae: turns latents into images, where the network draws latents.
        id2label: names of classes by number, where the network knows classes.
        caption_tokens: the length of captions, where the network knows captions.
    """

    _optional_components = ("vae",)

    def __init__(
        self,
        denoiser: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict[str, str] | None = None,
        caption_tokens: int = 0,
    ):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label, caption_tokens=caption_tokens)

    @torch.no_grad()
    def __call__(
        self,
        labels: Sequence[str | int] | Tensor | None = None,
        caption_tokens: Tensor | None = None,
        batch_size: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw.

        Args:
            labels: names or numbers of classes, one for each image.
            caption_tokens: (batch, tokens) int64, zeros at the end of each, for a model of captions.
            batch_size: images, where neither labels, captions nor latents say how many; by default 1.
            guidance_scale: classifier-free guidance: 1 is none.
            latents: (batch, channels, height, width) standard normal noise to start from.
            output_type: ``"pil"``, ``"np"`` (0 to 1, channels last) or ``"pt"`` (-1 to 1, as the network draws them).
        """
        given = [len(each) for each in (labels, caption_tokens, latents) if each is not None]
        number = given[0] if given else batch_size or 1
        nothing = self._nothing(number)
        condition = {**nothing, **self._condition(labels, caption_tokens)}
        device, config = self._execution_device, self.denoiser.config
        if latents is None:
            size = (number, config.in_channels, config.sample_size, config.sample_size)
            latents = randn_tensor(size, generator=generator, device=device, dtype=self.denoiser.dtype)
        self._set_steps(num_inference_steps, device)
        x = latents.to(device) * self._first_sigma()
        for step in self.progress_bar(self.scheduler.timesteps):
            seen = self.scheduler.scale_model_input(x, step) if hasattr(self.scheduler, "scale_model_input") else x
            told = self._told(step)
            answer = self.denoiser(seen, told, **condition).sample
            if guidance_scale != 1:
                answer = torch.lerp(self.denoiser(seen, told, **nothing).sample, answer, guidance_scale)
            x = self.scheduler.step(answer, step, x).prev_sample
        if self.vae is not None:
            shift = getattr(self.vae.config, "shift_factor", None) or 0.0
            x = self.vae.decode(x / self.vae.config.scaling_factor + shift).sample
        self.maybe_free_model_hooks()
        images = _written(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _nothing(self, number: int) -> dict[str, Tensor]:
        """No condition, for each image, as the network learned it."""
        device = self._execution_device
        if self.config.id2label:
            return {"class_labels": torch.full((number,), len(self.config.id2label), device=device)}
        if self.config.caption_tokens:
            return {"caption_tokens": torch.zeros(number, self.config.caption_tokens, dtype=torch.long, device=device)}
        return {}

    def _condition(self, labels: Any, caption_tokens: Tensor | None) -> dict[str, Tensor]:
        """What is asked for, if the network knows it."""
        device = self._execution_device
        if labels is not None and not self.config.id2label:
            raise ValueError("this model was not trained on classes")
        if caption_tokens is not None and not self.config.caption_tokens:
            raise ValueError("this model was not trained on captions")
        if labels is not None:
            numbers = {name: int(number) for number, name in self.config.id2label.items()}
            chosen = [numbers[label] if isinstance(label, str) else int(label) for label in labels]
            return {"class_labels": torch.tensor(chosen, device=device)}
        return {} if caption_tokens is None else {"caption_tokens": caption_tokens.to(device)}

    def _set_steps(self, steps: int, device: torch.device) -> None:
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            self.scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)], device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)

    def _first_sigma(self) -> float:
        """How much noise there is at the first step."""
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler | EDMEulerScheduler):
            return float(self.scheduler.sigmas[0])
        return float((1 - self.scheduler.alphas_cumprod[int(self.scheduler.timesteps[0])]).sqrt())

    def _told(self, step: Tensor) -> Tensor:
        """1,000 times the noise level as the network learned it: the time from 0 to 1, log(sigma) / 4, or the part of
        the discrete steps."""
        if isinstance(self.scheduler, EDMEulerScheduler):
            return 1000 * step
        return step * (1000 / self.scheduler.config.num_train_timesteps)


def _written(x: Tensor, output_type: str) -> Any:
    if output_type == "pt":
        return x
    images = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
    return images if output_type == "np" else DiffusionPipeline.numpy_to_pil(images)
