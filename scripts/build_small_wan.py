"""Build a small, complete WanImageToVideoPipeline of moving handwritten digits, from nothing.

Everything is trained here on clips of scikit-learn's handwritten digits that move as their captions say: the video VAE
first, then the text encoder, the image encoder and the transformer together, by flow matching. A last, short stage adds
what footage from the wild has and a model learns from it: clips that go another way than their captions say, and clips
that jitter. So the model is sound, and reinforcement learning has something left to teach it. 200 glyphs are never
trained on; first frames for evaluation are drawn with them. Run `build_digit_classifiers.py` before. The result depends
on the seeds below only. Takes about an hour on one CPU thread.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _digits import ROOT
from _moving_digits import (
    DIRECTIONS,
    FRAME_SIZE,
    HELD_OUT_WORDINGS,
    WORDINGS,
    Order,
    draw_clips,
    glyphs,
    vocabulary,
)
from _small_models import build_t5_tokenizer, save_pipeline, write_clip_weights
from branchtree_rewards.digits import load_classifier, to_network_input
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from branchtree.core.grid import shift_sigmas, time_grid
from branchtree.files.checksums import write_checksums

SEED = 21
TEXT_WIDTH = 48
TOKENS = 12
IMAGE_WIDTH = 48
LATENT_CHANNELS = 8
TIME_SHIFT = 3.0
SAMPLING_STEPS = 16

VAE_STEPS = 2000
VAE_BATCH = 8
VAE_LEARNING_RATE = 3e-3
KL_WEIGHT = 1e-5

POOL = 12288  # clips, encoded once
FLOW_STEPS = 4500
FLOW_BATCH = 64
FLOW_LEARNING_RATE = 2e-3
FLAWED = 0.3  # share of the last stage's clips that go another way than told, and share that jitters
FLAWED_POOL = 4096
FLAWED_STEPS = 700
FLAWED_LEARNING_RATE = 2e-4
UNPROMPTED = 0.1  # share of clips trained without a caption, for classifier-free guidance
EMA_DECAY = 0.995
CHECK_EVERY = 750
CHECKED = 160  # clips
TRAINED = ("transformer", "text_encoder", "image_encoder")


def build_vae() -> AutoencoderKLWan:
    """Return an untrained VAE from clips (9, 32, 32) to latents (3, 8, 8)."""
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_temporal=4,
        scale_factor_spatial=4,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def to_video(clips: Tensor) -> Tensor:
    """Clips (B, T, 1, H, W) in [0, 1] as the VAE reads them: (B, 3, T, H, W) in [-1, 1]."""
    return clips.transpose(1, 2).expand(-1, 3, -1, -1, -1) * 2 - 1


def train_vae(vae: AutoencoderKLWan) -> None:
    """Train on random clips, then set the mean and deviation that standardise the latents."""
    images, labels = glyphs(held_out=False)
    source, generator = random.Random(SEED), torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, VAE_LEARNING_RATE, total_steps=VAE_STEPS)
    for step in range(1, VAE_STEPS + 1):
        target = to_video(draw_clips(images, labels, VAE_BATCH, source)[0])
        posterior = vae.encode(target).latent_dist
        restored = vae.decode(posterior.sample(generator)).sample
        error = restored - target
        loss = error.square().mean() + 0.1 * error.abs().mean()
        loss = loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"VAE step {step}: loss {loss.item():.4f}, error {error.square().mean().item():.5f}", flush=True)
    vae.requires_grad_(False).eval()
    latents = encode(vae, to_video(draw_clips(images, labels, 256, source)[0]))
    vae.register_to_config(
        latents_mean=latents.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=latents.std(dim=(0, 2, 3, 4)).tolist()
    )


@torch.no_grad()
def encode(vae: AutoencoderKLWan, videos: Tensor) -> Tensor:
    """Latents (B, z, 3, 8, 8) of videos (B, 3, 9, 32, 32), not standardised."""
    return torch.cat([vae.encode(part).latent_dist.mode() for part in videos.split(64)])


def statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """The mean and deviation of latents, (1, z, 1, 1, 1) each."""
    mean, std = torch.tensor([vae.config.latents_mean, vae.config.latents_std]).view(2, 1, -1, 1, 1, 1)
    return mean, std


def build_transformer() -> WanTransformer3DModel:
    """Return an untrained image-to-video transformer of about a million parameters."""
    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=2 * LATENT_CHANNELS + 4,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=512,
        num_layers=4,
        # Image and text share one context: with projections of their own, the text would have to be 512 tokens long.
        image_dim=IMAGE_WIDTH,
        added_kv_proj_dim=None,
        rope_max_seq_len=32,
    )


def assemble(vae: AutoencoderKLWan) -> WanImageToVideoPipeline:
    """Return the pipeline around a trained VAE; its encoders and transformer are untrained."""
    tokenizer = build_t5_tokenizer(vocabulary(), TOKENS)
    text_config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=2 * TEXT_WIDTH,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision_config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=2 * IMAGE_WIDTH,
        num_hidden_layers=2,  # Wan reads the layer before the last
        num_attention_heads=2,
        image_size=FRAME_SIZE,
        patch_size=8,
    )
    size = {"height": FRAME_SIZE, "width": FRAME_SIZE}
    return WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text_config),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=TIME_SHIFT),
        image_processor=CLIPImageProcessor(
            size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        image_encoder=CLIPVisionModel(vision_config),
        transformer=build_transformer(),
    )


@dataclass(frozen=True)
class Clips:
    """Clips as the transformer sees them, all on one axis."""

    latents: Tensor  # (N, z, 3, 8, 8), standardised
    condition: Tensor  # (N, 4 + z, 3, 8, 8): mask and latents of the first frame, as the pipeline makes them
    frames: Tensor  # (N, 3, 32, 32): first frames in [-1, 1]
    orders: Sequence[Order]

    def rows(self, rows: Tensor) -> "Clips":
        """Some of the clips."""
        orders = [self.orders[row] for row in rows.tolist()]
        return Clips(self.latents[rows], self.condition[rows], self.frames[rows], orders)


def prepare(vae: AutoencoderKLWan, count: int, held_out: bool, seed: int, flawed: float = 0.0) -> Clips:
    """Draw and encode clips, a few at a time."""
    images, labels = glyphs(held_out)
    source = random.Random(seed)
    mean, std = statistics(vae)
    mask = torch.zeros(1, 4, 3, 8, 8)
    mask[:, :, 0] = 1
    latents, conditions, frames, orders = [], [], [], []
    for first in range(0, count, 128):
        clips, ordered = draw_clips(images, labels, min(128, count - first), source, flawed)
        videos = to_video(clips)
        blank = torch.cat([videos[:, :, :1], torch.zeros_like(videos[:, :, 1:])], dim=2)
        latents.append((encode(vae, videos) - mean) / std)
        known = (encode(vae, blank) - mean) / std
        conditions.append(torch.cat([mask.expand(len(known), -1, -1, -1, -1), known], dim=1))
        frames.append(videos[:, :, 0].contiguous())
        orders += ordered
    return Clips(torch.cat(latents), torch.cat(conditions), torch.cat(frames), orders)


def velocity(pipeline: Any, noisy: Tensor, sigma: Tensor, clips: Clips, prompts: list[str]) -> Tensor:
    """The transformer's velocity for latents (B, z, 3, 8, 8) at sigma (B,), with gradients to all three parts."""
    tokens = pipeline.tokenizer(prompts, padding="max_length", max_length=TOKENS, return_tensors="pt")
    mask = tokens.attention_mask
    text = pipeline.text_encoder(tokens.input_ids, mask).last_hidden_state * mask[:, :, None]
    image = pipeline.image_encoder(clips.frames, output_hidden_states=True).hidden_states[-2]
    output: Tensor = pipeline.transformer(
        hidden_states=torch.cat([noisy, clips.condition], dim=1),
        timestep=sigma * 1000,
        encoder_hidden_states=text,
        encoder_hidden_states_image=image,
        return_dict=False,
    )[0]
    return output


def flow_loss(pipeline: Any, clips: Clips, source: random.Random, generator: torch.Generator) -> Tensor:
    """The flow-matching loss on clips, each in a random wording or, now and then, without words."""
    prompts = [
        "" if source.random() < UNPROMPTED else order.prompt(source.choice((*WORDINGS, *HELD_OUT_WORDINGS)))
        for order in clips.orders
    ]
    uniform = torch.rand(len(prompts), generator=generator)
    sigma = shift_sigmas(uniform, TIME_SHIFT)
    noise = torch.randn(clips.latents.shape, generator=generator)
    noisy = torch.lerp(clips.latents, noise, sigma.view(-1, 1, 1, 1, 1))
    return F.mse_loss(velocity(pipeline, noisy, sigma, clips, prompts), noise - clips.latents)


@torch.no_grad()
def sample(pipeline: Any, clips: Clips, seed: int) -> Tensor:
    """Videos (B, 9, 1, 32, 32) in [0, 1] of some clips' first frames and prompts, by Euler steps."""
    noise = torch.Generator().manual_seed(seed)
    latents = torch.randn(clips.latents.shape, generator=noise)
    prompts = [order.prompt(WORDINGS[0]) for order in clips.orders]
    for here, there in pairwise(time_grid(SAMPLING_STEPS, TIME_SHIFT)):
        step = velocity(pipeline, latents, here.expand(len(latents)), clips, prompts)
        latents = latents + (there - here) * step
    return decode(pipeline.vae, latents)


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Videos (B, 9, 1, 32, 32) in [0, 1] of standardised latents."""
    mean, std = statistics(vae)
    videos = vae.decode(latents * std + mean).sample
    grey: Tensor = videos.mean(dim=1, keepdim=True).transpose(1, 2) / 2 + 0.5
    return grey.clamp(0, 1)


def centroids(videos: Tensor) -> Tensor:
    """Centres of brightness (B, T, 2), (x, y), of videos (B, T, 1, H, W)."""
    weight = (videos[:, :, 0] - 0.25).clamp(min=0) + 1e-6
    axis = torch.arange(FRAME_SIZE, dtype=torch.float32)
    total = weight.sum(dim=(2, 3))
    return torch.stack([(weight.sum(dim=2) * axis).sum(-1) / total, (weight.sum(dim=3) * axis).sum(-1) / total], -1)


def figures(videos: Tensor, orders: Sequence[Order]) -> dict[str, float]:
    """What a set of videos shows: digits kept, directions obeyed, and how evenly and how far they move."""
    digits = torch.tensor([order.digit for order in orders])
    steps = torch.tensor([DIRECTIONS[order.direction] for order in orders], dtype=torch.float32)
    places = centroids(videos)
    early = places[:, 4] - places[:, 0]  # before most of those that bounce turn back
    along = (early * steps).sum(-1)
    kept = [
        (load_classifier(name, torch.device("cpu"))(to_network_input(videos[:, -1])).argmax(-1) == digits)
        for name in ("moving_reward", "moving_heldout")
    ]
    acceleration = places[:, 2:] - 2 * places[:, 1:-1] + places[:, :-2]
    return {
        "digit kept (reward)": kept[0].float().mean().item(),
        "digit kept (heldout)": kept[1].float().mean().item(),
        "direction obeyed": (along > 0.8 * early.norm(dim=-1)).float().mean().item(),
        "displacement": early.norm(dim=-1).mean().item(),
        "acceleration": acceleration.norm(dim=-1).median().item(),
    }


@dataclass(frozen=True)
class Stage:
    """A part of the training by flow matching."""

    name: str
    clips: Clips
    steps: int
    learning_rate: float  # at its peak

    def run(self, pipeline: Any, checked: Clips) -> WanImageToVideoPipeline:
        """Train the transformer and both encoders; return the pipeline of the averaged weights."""
        trained = nn.ModuleList([getattr(pipeline, name) for name in TRAINED])
        averaged = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY)).eval()
        parts = dict(zip(TRAINED, averaged.module.children(), strict=True))
        result = WanImageToVideoPipeline(**{**pipeline.components, **parts})
        for step in self._steps(pipeline, trained):
            averaged.update_parameters(trained)
            if step % CHECK_EVERY == 0 or step == self.steps:
                values = figures(sample(result, checked, 0), checked.orders)
                print(f"{self.name} clips, step {step}: {shown(values)}", flush=True)
        return result

    def _steps(self, pipeline: Any, trained: nn.Module) -> Iterator[int]:
        """Take the steps, yielding the number taken after each."""
        source, generator = random.Random(SEED), torch.Generator().manual_seed(SEED)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=self.learning_rate, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=self.steps, pct_start=0.05
        )
        for step in range(1, self.steps + 1):
            rows = torch.randint(0, len(self.clips.latents), (FLOW_BATCH,), generator=generator)
            loss = flow_loss(pipeline, self.clips.rows(rows), source, generator)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            yield step


def train_flow(pipeline: Any) -> WanImageToVideoPipeline:
    """Train on sound clips, then on flawed ones."""
    vae = pipeline.vae
    checked = prepare(vae, CHECKED, True, SEED + 2)
    print("real clips: " + shown(figures(decode(vae, checked.latents), checked.orders)), flush=True)
    sound = Stage("sound", prepare(vae, POOL, False, SEED + 1), FLOW_STEPS, FLOW_LEARNING_RATE)
    pipeline = sound.run(pipeline, checked)
    flawed = prepare(vae, FLAWED_POOL, False, SEED + 3, FLAWED)
    return Stage("flawed", flawed, FLAWED_STEPS, FLAWED_LEARNING_RATE).run(pipeline, checked)


def shown(values: dict[str, float]) -> str:
    """Figures in one line."""
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def main() -> None:
    """Train every part, print what samples show, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "adapters/branchtree_adapters/assets/moving_digits_wan"
    parser.add_argument("--output", type=Path, default=default, help="folder for the pipeline")
    output: Path = parser.parse_args().output
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    vae = build_vae()
    train_vae(vae)
    pipeline = train_flow(assemble(vae))
    save_pipeline(pipeline, output, "tokenizer")
    write_clip_weights(pipeline.image_encoder, output / "image_encoder", "vision_model")
    write_checksums(output)


if __name__ == "__main__":
    main()
