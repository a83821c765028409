"""Class-conditional sampling as a diffusers pipeline. Only exported folders use it (`bundle.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from promoe_ds.diffusion.guidance import guides
from promoe_ds.formats.diffusers_sampling import drawn, fitted
from promoe_ds.sampling.noise import image_noise


class ProMoEPipeline(DiffusionPipeline):
    """From noise to images with a stock scheduler.

    Args:
        transformer: ProMoETransformer2DModel.
        scheduler: FlowMatchEulerDiscreteScheduler for rectified flow, DDPMScheduler for DDPM, or any of diffusers that
            draws from such a model, made by `from_config`; others are refused when they are to draw.
        vae: AutoencoderKL or AutoencoderTiny of a model of latents; None for pixels.
        codec: scale, shift and range of pixels of the latents it was trained on; None: as the vae says.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]

    def __init__(self, transformer: Any, scheduler: Any, vae: Any = None, codec: dict[str, Any] | None = None):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(codec=codec)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        guidance_scale: float = 1.5,
        num_inference_steps: int = 250,
        seed: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw an image for each label.

        Args:
            class_labels: N labels in 0..num_classes; num_classes means "no class".
            guidance_scale: of classifier-free guidance; at 1 or below one conditional forward per step.
            seed: the noise of promoe_ds: image i depends on (seed, i) alone and is the one that promoe_ds draws.
            generator: noise as other pipelines draw it; steps that add noise draw it from there in any case.
            latents: the noise itself, [N, C, H, W].
            output_type: pil; np float32 [N, H, W, C] or pt [N, C, H, W] in [0, 1]; latent: the scheduler's result.

        Raises:
            ValueError: a label is no class; the scheduler does not draw from this model in so many steps.
        """
        m = self.transformer.config.model
        labels = [class_labels] if isinstance(class_labels, int) else [int(label) for label in class_labels]
        if any(not 0 <= label <= m["num_classes"] for label in labels):
            raise ValueError(f"class_labels must lie in 0..{m['num_classes']}, which means no class")
        shape = (len(labels), m["channels"], m["image_size"], m["image_size"])
        device = self._execution_device
        if latents is None and seed is not None:
            latents = image_noise(seed, np.arange(len(labels)), shape[1:])
        elif latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        scheduler, learned = fitted(
            self.scheduler, m["channels"], self.transformer.config.ddpm_steps, num_inference_steps
        )

        def predict(x: Tensor, time: Tensor) -> Tensor:
            p = self.predict(x, time, labels, guidance_scale)
            return p if learned else p[:, : x.shape[1]]

        x = latents.to(device, torch.float32)
        progress: Any = self.progress_bar
        x = drawn(scheduler, predict, x, num_inference_steps, generator, progress)
        images = self.finish(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def predict(self, x: Tensor, time: Tensor, labels: list[int], scale: float) -> Tensor:
        """Guided prediction p_null + scale (p_label - p_null), with the variance channels where the model has them."""
        m, channels = self.transformer.config.model, self.transformer.config.guidance_channels
        guided = guides(scale, self.transformer.config.guidance_interval, float(time))
        label = torch.tensor(labels + [m["num_classes"]] * len(labels) if guided else labels)
        x = torch.cat([x, x]) if guided else x
        p = self.transformer(x, time.expand(len(x)).to(x.device), label)
        if not guided:
            return p
        p_label, p_null = p.chunk(2)
        moved = x.shape[1] if channels == "all" else min(int(channels), x.shape[1])
        mixed = p_null[:, :moved] + scale * (p_label[:, :moved] - p_null[:, :moved])
        return torch.cat([mixed, p_label[:, moved:]], dim=1)

    def finish(self, x: Tensor, output_type: str) -> Any:
        """Decode latents and give images their form; pixels are clamp(127.5 x + 128, 0, 255), truncated."""
        if output_type == "latent":
            return x
        if self.vae is not None:
            own = {"scale": self.vae.config.scaling_factor, "shift": getattr(self.vae.config, "shift_factor", 0) or 0}
            codec = self.config.get("codec") or own
            scale, shift = (torch.tensor(codec[key], device=x.device).float().reshape(-1, 1, 1) for key in own)
            x = self.vae.decode((x / scale + shift).to(self.vae.dtype)).sample.float()
            low, high = codec.get("pixel_range", (-1, 1))
            x = (x - low) * (2 / (high - low)) - 1
        elif x.shape[1] not in (1, 3):
            raise ValueError("the model makes latents: give the pipeline a vae, or ask for output_type='latent'")
        if output_type == "pil":
            pixels = (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
        unit = (x / 2 + 0.5).clamp(0, 1)
        return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()
