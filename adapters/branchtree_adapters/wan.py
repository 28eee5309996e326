"""The Wan2.1 family of video models, on the parts of diffusers' WanImageToVideoPipeline and WanPipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from branchtree.data.frames import first_frame, last_frame
from branchtree.data.prompts import MEDIA
from branchtree.errors import DataError
from branchtree.plugins import Condition, Conditioning, Footprint, Media
from branchtree.plugins.hookspecs import Register, hookimpl
from branchtree_adapters.pipeline import sources as shared
from branchtree_adapters.pipeline import speed
from branchtree_adapters.pipeline.adapter import PipelineAdapter
from branchtree_adapters.pipeline.grids import scheduler_grid
from branchtree_adapters.wan_footprint import footprint
from branchtree_adapters.wan_layout import (
    IMAGE_ENCODER,
    INDEX,
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    Layout,
    WanConfig,
    decoded_at_once,
    read_wan_configs,
    work_out_layout,
)

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
    prediction = "velocity"
    frozen_parts = ("vae", "text_encoder", "image_encoder")
    encoders = ("text_encoder", "image_encoder")
    encoding_parts = ("text_encoder", "tokenizer", "image_encoder", "image_processor", "vae")
    float32_parts = ("vae", "image_encoder")  # as in diffusers' own example of the pipeline
    lora_targets = LORA_TARGETS

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def rows_per_prediction(self) -> int:
        """2 under classifier-free guidance: one row with the prompt and one with the negative prompt."""
        return self.config.rows_per_prediction

    @property
    def media(self) -> frozenset[str]:
        """What ``image_to_video`` begins with; nothing for ``text_to_video``."""
        return frozenset(MEDIA) if self.config.task == "image_to_video" else frozenset()

    @cached_property
    def _layout(self) -> Layout:
        """Read from configuration files until ``load`` replaces it. Raises ModelError for what cannot be made."""
        return work_out_layout(self.config, read_wan_configs(self.config)[0])

    def footprint(self) -> Footprint:
        """The model's sizes, from config.json files; for a hub id not in the local cache, a published Wan2.1 model's.

        Raises ModelError for a missing folder, or for a video or task that the model is not made for.
        """
        return footprint(self.config, LORA_TARGETS)

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

    def load(self, device: torch.device, dtype: torch.dtype, denoiser_dtype: torch.dtype) -> None:
        """Load the pipeline: the transformer to ``device``, the VAE to the CPU until it is needed.

        Encoders are read when ``encode`` first needs them. VAE and image encoder are in float32 always.
        The weights that diffusers keeps in float32 (time embedding, norms, modulation) stay so. Raises ModelError if
        the source cannot be read, or for a video or task that the model is not made for.
        """
        from diffusers import WanImageToVideoPipeline, WanPipeline

        source = shared.locate_pipeline(self.config.path, self.config.revision)
        shared.fetch_configs(source, (INDEX, TRANSFORMER, VAE, TEXT_ENCODER, IMAGE_ENCODER))
        work_out_layout(self.config, read_wan_configs(self.config)[0])  # before weights are read
        pipeline = WanPipeline if self.config.task == "text_to_video" else WanImageToVideoPipeline
        speed.check_attention(self.config.attention)
        loaded = self._read(pipeline, source, dtype, denoiser_dtype)
        index = shared.read_configs(source, {INDEX: loaded.config}, "")[0]  # the pipeline's own lacks the encoders
        found = {**index, TRANSFORMER: loaded.transformer.config, VAE: loaded.vae.config}
        self._layout = work_out_layout(self.config, found)
        speed.set_attention(loaded.transformer, self.config.attention)
        self._keep(loaded, device, denoiser_dtype)
        if device.type == "cpu":
            shared.channels_last(loaded.vae)

    @torch.no_grad()
    def encode(self, conditions: Sequence[Condition]) -> Conditioning:
        """Encode P conditions, each text and each image by itself so that no row depends on another.

        Returns, on the CPU: ``prompt_embeds`` and, under guidance, ``negative_prompt_embeds`` (P, tokens, dim) of
        UMT5. For image_to_video also ``condition`` (P, mask channels + channels, frames, rows, columns), float32: which
        frames are given, and the latents of a video that shows them and is grey elsewhere; and, where the transformer
        takes them, ``image_embeds`` (P, images, tokens, dim) of CLIP. Raises DataError as ``check`` does.
        """
        frames = [self._frames(condition) for condition in conditions]
        encoded = {"prompt_embeds": self._encode_texts([condition.prompt for condition in conditions])}
        if self.config.guided:
            own = [condition.negative_prompt for condition in conditions]
            texts = [self.config.negative_prompt if text is None else text for text in own]
            encoded["negative_prompt_embeds"] = self._encode_texts(texts)
        if self.config.task == "image_to_video":
            encoded["condition"] = torch.cat([self._encode_frames(images) for images in frames])
        if self._layout.images:
            self._with_encoders()
            embedded = [self._pipeline.encode_image(images[: self._layout.images], self._device) for images in frames]
            encoded["image_embeds"] = torch.stack([rows.cpu() for rows in embedded]).to(encoded["prompt_embeds"].dtype)
        return encoded

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        """UMT5 embeddings (P, tokens, dim) on the CPU; a text that comes again is not encoded again."""
        self._with_encoders()
        rows: dict[str, Tensor] = {}
        for text in dict.fromkeys(texts):
            rows[text] = self._encode_text(text)
        return torch.cat([rows[text] for text in texts])

    def _encode_text(self, text: str) -> Tensor:
        """UMT5's embedding (1, tokens, dim) on the CPU."""
        embedded: Tensor = self._pipeline.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
            device=self._device,
        )[0]
        return embedded.cpu()

    @torch.no_grad()
    def _embedded(self, texts: Mapping[str, str], shade: int) -> Mapping[str, Tensor]:
        from PIL import Image

        found = {"text_encoder": self._encode_text(texts["tokenizer"])}
        if getattr(self._pipeline, "image_encoder", None) is not None:
            image = Image.new("RGB", (self.config.width, self.config.height), (shade, 128, 128))
            found["image_encoder"] = self._pipeline.encode_image([image], self._device).cpu()
        return found

    def _encode_frames(self, frames: Sequence[Image.Image]) -> Tensor:
        """Mask channels and latents (1, channels, frames, rows, columns) of a video with the given frames."""
        pipeline, (height, width) = self._pipeline, (self.config.height, self.config.width)
        shared.on_device(pipeline.vae, self._device)
        first, *last = (pipeline.video_processor.preprocess(frame, height, width).to(self._device) for frame in frames)
        _, condition = pipeline.prepare_latents(
            first,
            batch_size=1,
            num_channels_latents=self._layout.latent[0],
            height=height,
            width=width,
            num_frames=self.config.frames,
            dtype=torch.float32,
            device=self._device,
            latents=torch.zeros(()),  # not used, but would be drawn from torch's own random state otherwise
            last_image=last[0] if last else None,
        )
        rows: Tensor = condition.cpu()
        return rows

    def _encoding_settings(self) -> dict[str, object]:
        names = ("task", "height", "width", "frames", "guided", "negative_prompt", "image_fit", "max_sequence_length")
        return {name: getattr(self.config, name) for name in names}

    def initial_noise(self, generator: torch.Generator) -> Tensor:
        """Starting latents (channels, frames, rows, columns), float32 on the CPU: what the pipeline draws."""
        from diffusers.utils.torch_utils import randn_tensor

        shape = (1, *self._layout.latent)
        noise: Tensor = randn_tensor(shape, generator=generator, device=torch.device("cpu"), dtype=torch.float32)
        return noise[0]

    def sigmas(self, steps: int) -> Tensor:
        """The grid of the pipeline's scheduler, under ``flow_shift`` if it is set: (steps + 1,) float32, to 0.

        Raises ModelError for a scheduler whose grid is not one of flow matching, or that the pipeline cannot use.
        """
        scheduler = self._pipeline.scheduler
        name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
        changes = {} if self.config.flow_shift is None else {name: self.config.flow_shift}
        return scheduler_grid(
            scheduler, str(self.config.path), steps, lambda fresh: fresh.set_timesteps(steps, device="cpu"), changes
        )

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """The velocity (B, *latent), float32, of latents (B, *latent) at sigma (B,) in [0, 1].

        ``conditioning`` holds B rows of what ``encode`` returned. Under guidance g, 2 B rows go through the transformer
        in one call, those with the prompt first, and their predictions v, v' become v' + g (v - v'). The transformer
        gets its inputs in the dtype it was loaded in, and sigma * 1000 as timestep in float32.
        """
        device, copies = latents.device, self.rows_per_prediction
        text = [conditioning["prompt_embeds"]]
        if self.config.guided:
            text.append(conditioning["negative_prompt_embeds"])
        if "condition" in conditioning:
            latents = torch.cat([latents, conditioning["condition"].to(latents)], dim=1)
        images = conditioning.get("image_embeds")
        if images is not None:
            images = images.to(device, self._dtype).repeat(copies, 1, 1, 1).flatten(0, 1)
        output: Tensor = (self.denoiser if denoiser is None else denoiser)(
            hidden_states=latents.to(self._dtype).repeat(copies, 1, 1, 1, 1),
            timestep=(sigma.to(device) * 1000).repeat(copies),
            encoder_hidden_states=torch.cat(text).to(device, self._dtype),
            encoder_hidden_states_image=images,
            return_dict=False,
        )[0].float()
        if not self.config.guided:
            return output
        prompted, unprompted = output.chunk(2)
        return unprompted + self.config.guidance * (prompted - unprompted)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Media:
        """Decode latents (B, *latent) to videos (B, F, 3, H, W), float32 in [0, 1], on the device.

        As many rows go through the VAE at once as ``decoded_at_once`` says.
        """
        vae = shared.on_device(self._pipeline.vae, self._device)
        statistics = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=self._device)
        mean, std = statistics.view(2, -1, 1, 1, 1)
        rows = decoded_at_once(self.config)
        videos = []
        for part in latents.split(rows):
            pixels = vae.decode((part.to(self._device) * std + mean).to(vae.dtype), return_dict=False)[0]
            videos.append((pixels.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2))
        return Media(videos=torch.cat(videos), fps=self.config.fps)


@hookimpl
def register_models(register: Register) -> None:
    """Register the model family ``wan``."""
    register("wan", build=Wan, config=WanConfig, summary="Wan2.1 image- and text-to-video models (diffusers)")
