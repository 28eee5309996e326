"""The ``guest_sd3`` model: Stable Diffusion 3, on diffusers' StableDiffusion3Pipeline."""

import pydantic
import torch
from branchtree_adapters import PipelineAdapter, PipelineConfig
from torch import Tensor, nn

from branchtree.plugins import Condition, Conditioning


class SD3Config(PipelineConfig):
    """``guidance`` is the scale of classifier-free guidance."""

    guidance: float = pydantic.Field(default=4.5, gt=1)


class SD3(PipelineAdapter):
    """Stable Diffusion 3 and 3.5; latents of an image are (16, rows, columns), an eighth of its size."""

    modality = "image"
    pipeline_class = "StableDiffusion3Pipeline"
    rows_per_prediction = 2  # with the prompt and with the negative prompt
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")

    def encode_condition(self, condition: Condition) -> Conditioning:
        """Embeddings (1, 2, tokens, dim) and pooled ones (1, 2, dim), of the prompt and of the negative prompt."""
        text, negative_text, pooled, negative_pooled = self.pipeline.encode_prompt(
            condition.prompt, None, None, negative_prompt=condition.negative_prompt or "", device=self.device
        )
        return {"text": torch.stack([text, negative_text], 1), "pooled": torch.stack([pooled, negative_pooled], 1)}

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """The guided velocity of latents (B, *latent) at sigma (B,)."""
        given = {name: value.to(latents.device, self.dtype).flatten(0, 1) for name, value in conditioning.items()}
        output = (denoiser or self.denoiser)(
            hidden_states=latents.to(self.dtype).repeat_interleave(2, dim=0),
            timestep=(1000 * sigma.to(latents.device)).repeat_interleave(2),
            encoder_hidden_states=given["text"],
            pooled_projections=given["pooled"],
            return_dict=False,
        )[0].float()
        prompted, unprompted = output.unflatten(0, (-1, 2)).unbind(1)
        return unprompted + self.config.guidance * (prompted - unprompted)
