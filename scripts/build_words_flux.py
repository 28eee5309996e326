"""Build a small, complete FluxPipeline that writes short words, from nothing.

The VAE is trained first, on pictures of random letters in fonts that come with matplotlib; then the two text encoders
together with the transformer, by flow matching, on letters of one width. No word of the held-out prompts is ever drawn.
Training stops at the first check in which the mean of the reward `ocr` on prompts to train on is at least `STOP_AT`:
reinforcement learning then has a sound model to start from and something left to teach it. With a larger `--until` the
model becomes better. The result depends on the seeds below only. Takes some nine minutes on one CPU thread; a run that
is started again goes on from what it left in `--work`.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

import torch
import torch.nn.functional as F
from _digits import ROOT
from _small_flux import (
    assemble,
    build_clip_tokenizer,
    build_text_encoders,
    build_transformer,
    build_vae,
    flow_loss,
    pack_latents,
    sample,
    save_flux,
    set_scale,
)
from _small_models import build_t5_tokenizer
from _words import HEIGHT, PROMPT, SPACED, VARIED, WIDTH, draw_words, random_words, read_words
from branchtree_rewards.ocr.reward import Ocr, OcrConfig
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from branchtree.plugins import Condition, Media

SEED = 11
TEXT_WIDTH = 64
CLIP_TOKENS = 12
T5_TOKENS = 8
LATENT_CHANNELS = 16
GRID = (HEIGHT // 16, WIDTH // 16)

VAE_STEPS = 800
VAE_WHOLE = 100
VAE_PIXELS = 24 * 32 * 32
VAE_LEARNING_RATE = 3e-3
KL_WEIGHT = 1e-4

PICTURES = 16_000
FLOW_BATCH = 64
FLOW_LEARNING_RATE = 1.5e-3
WARM_UP = 100
EMA_DECAY = 0.995
CHECK_EVERY = 250
STOP_AT = 0.75


def as_network_input(pictures: Tensor) -> Tensor:
    """Turn grey pictures, uint8 (N, H, W), into images (N, 3, H, W) in [-1, 1]."""
    return (pictures.to(torch.float32) / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def train_vae(vae: AutoencoderKL, pictures: Tensor, generator: torch.Generator) -> None:
    """Train on pictures, uint8 (N, 32, 128), and set the scale that standardises the latents.

    Only the last `VAE_WHOLE` steps see whole pictures; the others see squares of them, which cost less.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, VAE_LEARNING_RATE, total_steps=VAE_STEPS)
    for step in range(1, VAE_STEPS + 1):
        width = WIDTH if step > VAE_STEPS - VAE_WHOLE else HEIGHT
        rows = torch.randint(0, len(pictures), (VAE_PIXELS // (HEIGHT * width),), generator=generator)
        left = int(torch.randint(0, WIDTH - width + 1, (1,), generator=generator))
        target = as_network_input(pictures[rows, :, left : left + width])
        posterior = vae.encode(target).latent_dist
        restored = vae.decode(posterior.sample(generator)).sample
        loss = F.mse_loss(restored, target) + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"VAE step {step}: loss {loss.item():.4f}", flush=True)
    vae.requires_grad_(False).eval()
    set_scale(vae, torch.no_grad()(vae.encode)(as_network_input(pictures[:512])).latent_dist.mean)


def build_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    """Return the pipeline around a trained VAE; its text encoders, of which T5 has a token a letter, are untrained.

    The first and the last letter are one token with their quotation mark: T5 knows no other positions than
    relative ones, and these two are what the other letters' positions are relative to.
    """
    wording = PROMPT.split(' "')[0].split()
    clip = build_clip_tokenizer([word.lower() for word in wording], CLIP_TOKENS)
    first, last = [f'"{letter}' for letter in ascii_uppercase], [f'{letter}"' for letter in ascii_uppercase]
    t5 = build_t5_tokenizer([*wording, *first], T5_TOKENS, pieces=[*ascii_uppercase, *last])
    return assemble(
        vae,
        (clip, t5),
        build_text_encoders(clip, t5, TEXT_WIDTH, t5_layers=2),
        build_transformer(LATENT_CHANNELS, TEXT_WIDTH, single_layers=2),
    )


def encode_all(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Return the packed latents of all pictures."""
    return torch.cat([pack_latents(vae, as_network_input(chunk)) for chunk in pictures.split(100)])


@torch.no_grad()
def mean_reward(pipeline: FluxPipeline, words: Sequence[str], seed: int) -> float:
    """Return the mean of the reward `ocr` over one sample for each word."""
    prompts = [PROMPT.format(word) for word in words]
    images = sample(pipeline, prompts, (HEIGHT, WIDTH), torch.Generator().manual_seed(seed))
    reward = Ocr(OcrConfig(detect=False))
    reward.load(torch.device("cpu"))
    return reward.score(Media(images=images), [Condition(prompt=prompt) for prompt in prompts]).values.mean().item()


class Flow:
    """Flow matching of a pipeline's transformer and text encoders; `result` is the pipeline of the averaged weights."""

    STATE = ("modules", "averaged", "optimizer")

    def __init__(self, pipeline: FluxPipeline) -> None:
        names = ("transformer", "text_encoder", "text_encoder_2")
        self.pipeline = pipeline
        self.modules = nn.ModuleList([getattr(pipeline, name) for name in names])
        self.averaged = AveragedModel(self.modules, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY)).eval()
        averages = dict(zip(names, self.averaged.module.children(), strict=True))
        self.result = FluxPipeline(**{**pipeline.components, **averages})
        self.result.set_progress_bar_config(disable=True)
        self.optimizer = torch.optim.AdamW(self.modules.parameters(), lr=FLOW_LEARNING_RATE, weight_decay=1e-2)
        self.step = 0

    def take(self, latents: Tensor, words: Sequence[str]) -> float:
        """Take a step on a random batch of packed latents and their words; return its loss."""
        self.step += 1
        generator = torch.Generator().manual_seed(SEED + self.step)  # so that a run can be resumed
        rows = torch.randint(0, len(latents), (FLOW_BATCH,), generator=generator)
        prompts = [PROMPT.format(words[row]) for row in rows.tolist()]
        loss = flow_loss(self.pipeline, latents[rows], GRID, prompts, generator)
        self.optimizer.param_groups[0]["lr"] = FLOW_LEARNING_RATE * min(1, self.step / WARM_UP)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        self.averaged.update_parameters(self.modules)
        return loss.item()

    def save(self, file: Path) -> None:
        """Write all that `restore` needs."""
        torch.save({name: getattr(self, name).state_dict() for name in self.STATE} | {"step": self.step}, file)

    def restore(self, file: Path) -> None:
        """Go back to where `save` was called."""
        state = torch.load(file, weights_only=True)
        for name in self.STATE:
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]


def prepare_vae(folder: Path, pictures: Tensor) -> AutoencoderKL:
    """Return the VAE in a folder; train it first, if there is none."""
    if not folder.is_dir():
        vae = build_vae((8, 16, 32, 32), LATENT_CHANNELS, HEIGHT)
        train_vae(vae, pictures, torch.Generator().manual_seed(SEED))
        vae.save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder).requires_grad_(False).eval()


def main() -> None:
    """Train everything, print the mean reward at each check, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "adapters/branchtree_adapters/assets/words_flux"
    parser.add_argument("--output", type=Path, default=default, help="folder for the pipeline")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/words_flux", help="folder of what can be resumed")
    parser.add_argument("--until", type=float, default=STOP_AT, help="the mean reward to stop at")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(SEED)
    train, heldout = read_words("train"), set(read_words("heldout"))
    words = random_words(PICTURES, heldout, rng)
    varied, spaced = draw_words(words, VARIED, rng), draw_words(words, SPACED, rng)
    torch.manual_seed(SEED)
    vae = prepare_vae(arguments.work / "vae", varied)
    torch.manual_seed(SEED)
    flow, checkpoint, reward = Flow(build_pipeline(vae)), arguments.work / "flow.pt", 0.0
    if checkpoint.is_file():
        flow.restore(checkpoint)
    latents = encode_all(vae, spaced)
    while reward < arguments.until:
        loss = flow.take(latents, words)
        if flow.step % CHECK_EVERY == 0:
            reward = mean_reward(flow.result, train[::4], SEED)
            print(f"flow step {flow.step}: loss {loss:.3f}, reward {reward:.3f}", flush=True)
            flow.save(checkpoint)
    save_flux(flow.result, arguments.output)


if __name__ == "__main__":
    main()
