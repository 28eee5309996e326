"""The Wan2.1 family of video models: diffusers' WanImageToVideoPipeline and WanPipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from branchtree.data.frames import first_frame, last_frame
from branchtree.data.prompts import MEDIA
from branchtree.errors import DataError
from branchtree.plugins import Condition, Conditioning, Register, hookimpl
from branchtree_adapters.pipeline.adapter import PipelineAdapter, on_device
from branchtree_adapters.pipeline.blueprint import TRANSFORMER
from branchtree_adapters.wan_footprint import work
from branchtree_adapters.wan_layout import IMAGE_ENCODER, Layout, WanConfig, published, work_out_layout

if TYPE_CHECKING:
    from PIL import Image

# Queries, keys, values, outputs and feed-forward of every block: the layers that DiffSynth-Studio's Wan scripts train
# ("q,k,v,o,ffn.0,ffn.2"). The projections of image embeddings are not among them, so that the weights fit text-to-video
# models too; loading such weights into an image-to-video model, diffusers fills in zeros for them, and says so.
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
LORA_TARGETS = (
    *(f"{attn}.{name}" for attn in ("attn1", "attn2") for name in _PROJECTIONS),
    "ffn.net.0.proj",
    "ffn.net.2",
)


class Wan(PipelineAdapter):
    """A Wan2.1 model. Latents of one sample are (channels, frames, rows, columns), normalised as in diffusers."""

    modality = "video"
    float32_components = ("vae", "image_encoder")  # as in diffusers' own example of the pipeline
    encodes_with_vae = True
    encoding_settings = (
        *("task", "height", "width", "frames", "image_fit"),
        *("guided", "negative_prompt", "max_sequence_length"),
    )
    decode_pixels = 16 * 1024**2
    lora_targets = LORA_TARGETS

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        from_image = config.task == "image_to_video"
        self.pipeline_class = "WanImageToVideoPipeline" if from_image else "WanPipeline"
        self.media = frozenset(MEDIA if from_image else ())
        self.rows_per_prediction = config.rows_per_prediction
        self.published = published(config)
        self._texts: dict[str, Tensor] = {}

    @property
    def _layout(self) -> Layout:
        return work_out_layout(self.config, self.configs)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, frames, rows, columns. Raises ModelError for a video or task that the model is not made for."""
        return self._layout.latent

    @property
    def tokens(self) -> int:
        """Patches of a video."""
        return self._layout.tokens

    def row_costs(self) -> Mapping[str, Any]:
        """Return what a row costs the transformer; see ``work`` for how."""
        layout, image_tokens = self._layout, 0
        if IMAGE_ENCODER in self.configs:  # one embedding for each of CLIP's patches and its class token
            encoder = self.configs[IMAGE_ENCODER]
            image_tokens = (encoder.get("image_size", 224) // encoder.get("patch_size", 32)) ** 2 + 1
        texts, image = self.rows_per_prediction, layout.images * image_tokens
        return work(self.configs[TRANSFORMER], layout, self.config.max_sequence_length, image, texts)

    def check(self, condition: Condition) -> None:
        """Refuse a condition that the model cannot take.

        Raises DataError for a first frame that is missing, unreadable or of another size, a last frame likewise where
        one is given or needed, and a negative prompt without guidance; ModelError for a video that cannot be made.
        """
        self._frames(condition)

    def _frames(self, condition: Condition) -> list[Image.Image]:
        """The frames that condition the video, first and, where there is one, last, in the video's size."""
        if condition.negative_prompt and not self.config.guided:
            raise DataError(
                f"{condition} has a negative prompt, which a guidance of {self.config.guidance} makes no use of; "
                "remove it, or raise guidance above 1."
            )
        images = self._layout.images
        if self.config.task == "text_to_video":
            if condition.last_image is not None:
                raise DataError(f"{condition} has a last_image, which text_to_video does not take; remove it.")
            return []
        first, last = first_frame(condition), last_frame(condition)
        if first is None:
            raise DataError(f"{condition} has no first frame; give it an 'image' or a 'video'.")
        if last is None and images == 2:
            raise DataError(f"{condition} has no last frame, which this model needs; give it a 'last_image'.")
        frames = {"first frame": first, "last frame": last}
        return [self._fit(condition, name, image) for name, image in frames.items() if image is not None]

    def _fit(self, condition: Condition, name: str, image: Image.Image) -> Image.Image:
        from PIL import Image, ImageOps

        width, height = size = (self.config.width, self.config.height)
        if image.size == size:
            return image
        if self.config.image_fit == "crop":
            return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        raise DataError(
            f"{condition}: its {name} is {image.width} x {image.height} pixels, and the video is {width} x {height}; "
            f"give an image of that size, or set image_fit to 'crop' to scale it and cut its middle out."
        )

    def encode(self, conditions: Sequence[Condition]) -> Conditioning:
        """Encode P conditions; a text that comes again is not encoded again. See ``encode_condition``."""
        encoded = super().encode(conditions)
        self._texts.clear()
        return encoded

    def encode_condition(self, condition: Condition) -> Conditioning:
        """Encode texts and images of a condition.

        Returns ``prompt_embeds`` and, under guidance, ``negative_prompt_embeds`` (1, tokens, dim) of UMT5. For
        image_to_video also ``condition`` (1, mask channels + channels, frames, rows, columns), float32: which frames
        are given, and the latents of a video that shows them and is grey elsewhere; and, where the transformer takes
        them, ``image_embeds`` (1, images, tokens, dim) of CLIP. Raises DataError as ``check`` does.
        """
        frames, negative = self._frames(condition), condition.negative_prompt
        encoded = {"prompt_embeds": self._encode_text(condition.prompt)}
        if self.config.guided:
            text = self.config.negative_prompt if negative is None else negative
            encoded["negative_prompt_embeds"] = self._encode_text(text)
        if self.config.task == "image_to_video":
            encoded["condition"] = self._encode_frames(frames)
        if images := self._layout.images:
            embedded = self.pipeline.encode_image(frames[:images], self.device)
            encoded["image_embeds"] = embedded.unsqueeze(0).to(encoded["prompt_embeds"].dtype)
        return encoded

    def _encode_text(self, text: str) -> Tensor:
        """Return UMT5's embedding (1, tokens, dim) on the CPU."""
        if text not in self._texts:
            self._texts[text] = self.pipeline.encode_prompt(
                text,
                do_classifier_free_guidance=False,
                max_sequence_length=self.config.max_sequence_length,
                device=self.device,
            )[0].cpu()
        return self._texts[text]

    def _encode_frames(self, frames: Sequence[Image.Image]) -> Tensor:
        """Mask channels and latents (1, channels, frames, rows, columns) of a video with the given frames."""
        pipeline, (height, width) = self.pipeline, (self.config.height, self.config.width)
        on_device(pipeline.vae, self.device)
        first, *last = (pipeline.video_processor.preprocess(frame, height, width).to(self.device) for frame in frames)
        _, condition = pipeline.prepare_latents(
            first,
            batch_size=1,
            num_channels_latents=self._layout.latent[0],
            height=height,
            width=width,
            num_frames=self.config.frames,
            dtype=torch.float32,
            device=self.device,
            latents=torch.zeros(()),  # not used, but would be drawn from torch's own random state otherwise
            last_image=last[0] if last else None,
        )
        rows: Tensor = condition.cpu()
        return rows

    def scheduler_changes(self) -> Mapping[str, Any]:
        """Return the configured ``flow_shift``, if any, by the scheduler's name for it."""
        name = "flow_shift" if "flow_shift" in self.pipeline.scheduler.config else "shift"
        return {} if self.config.flow_shift is None else {name: self.config.flow_shift}

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """Return the velocity (B, *latent), float32, of latents (B, *latent) at sigma (B,) in [0, 1].

        Under guidance g, 2 B rows go through the transformer in one call, those with the prompt first, and their
        predictions v, v' become v' + g (v - v'). The transformer gets its inputs in the dtype it was loaded in, and
        sigma * 1000 as timestep in float32.
        """
        device, copies = latents.device, self.rows_per_prediction
        text = [conditioning["prompt_embeds"]]
        if self.config.guided:
            text.append(conditioning["negative_prompt_embeds"])
        if "condition" in conditioning:
            latents = torch.cat([latents, conditioning["condition"].to(latents)], dim=1)
        images = conditioning.get("image_embeds")
        if images is not None:
            images = images.to(device, self.dtype).repeat(copies, 1, 1, 1).flatten(0, 1)
        output: Tensor = (self.denoiser if denoiser is None else denoiser)(
            hidden_states=latents.to(self.dtype).repeat(copies, 1, 1, 1, 1),
            timestep=(sigma.to(device) * 1000).repeat(copies),
            encoder_hidden_states=torch.cat(text).to(device, self.dtype),
            encoder_hidden_states_image=images,
            return_dict=False,
        )[0].float()
        if not self.config.guided:
            return output
        prompted, unprompted = output.chunk(2)
        guided: Tensor = unprompted + self.config.guidance * (prompted - unprompted)
        return guided

    def vae_latents(self, latents: Tensor) -> Tensor:
        """Return latents (B, *latent) with the VAE's own mean and deviation."""
        config = self.pipeline.vae.config
        statistics = torch.tensor([config.latents_mean, config.latents_std], device=latents.device)
        mean, std = statistics.view(2, -1, 1, 1, 1).unbind()
        return latents * std + mean


@hookimpl
def register_models(register: Register) -> None:
    """Register the model family ``wan``."""
    register("wan", build=Wan, config=WanConfig, summary="Wan2.1 image- and text-to-video models (diffusers)")
