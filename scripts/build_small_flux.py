"""Build a small, complete FluxPipeline that draws handwritten digits, from nothing.

Everything is trained here on scikit-learn's 1,797 handwritten digits and the captions in `recipes/prompts`: the VAE
first, then the two text encoders together with the transformer, by flow matching. Training stops at the first check
in which about seven samples in ten show the prompted digit according to each bundled classifier: reinforcement
learning then has a sound model to start from and something left to teach it. Run `build_digit_classifiers.py` before.
The result depends on the seeds below only. Takes under ten minutes on two CPU threads.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from _digits import IMAGE_SIZE, ROOT, digit_images, prompts_by_digit, random_shift, read_prompts, words
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
from branchtree_rewards.digits import DIGIT_WORDS, load_classifier, to_network_input
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SEED = 7
TEXT_WIDTH = 32
CLIP_TOKENS = 16
T5_TOKENS = 8
LATENT_CHANNELS = 4
GRID = (4, 4)

VAE_STEPS = 3000
VAE_BATCH = 32
KL_WEIGHT = 1e-4

FLOW_BATCH = 128
FLOW_LEARNING_RATE = 2e-3
EMA_DECAY = 0.98
CHECK_EVERY = 25
CHECKS_START = 150
CHECK_REPEATS = 8
STOP_AT = 0.66


def train_vae(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> None:
    """Train on images (N, 3, 32, 32) in [-1, 1], then set the scale and shift that standardise the latents."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=VAE_STEPS)
    for step in range(1, VAE_STEPS + 1):
        rows = torch.randint(0, len(images), (VAE_BATCH,), generator=generator)
        target = random_shift(images[rows] + 1, 2, generator) - 1
        posterior = vae.encode(target).latent_dist
        restored = vae.decode(posterior.sample(generator)).sample
        loss = F.mse_loss(restored, target) + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"VAE step {step}: loss {loss.item():.4f}", flush=True)
    vae.requires_grad_(False).eval()
    set_scale(vae, vae.encode(images).latent_dist.mean)


def build_pipeline(vae: AutoencoderKL, vocabulary: Sequence[str]) -> FluxPipeline:
    """Return the pipeline around a trained VAE; its text encoders and transformer are untrained."""
    clip, t5 = build_clip_tokenizer(vocabulary, CLIP_TOKENS), build_t5_tokenizer(vocabulary, T5_TOKENS)
    return assemble(
        vae,
        (clip, t5),
        build_text_encoders(clip, t5, TEXT_WIDTH),
        build_transformer(LATENT_CHANNELS, TEXT_WIDTH, single_layers=1),
    )


def draw_prompts(labels: Tensor, groups: Sequence[Sequence[str]], generator: torch.Generator) -> list[str]:
    """Return a random wording for each label (B,)."""
    choices = torch.rand(len(labels), generator=generator).tolist()
    digits = labels.tolist()
    return [groups[digit][int(choice * len(groups[digit]))] for digit, choice in zip(digits, choices, strict=True)]


@torch.no_grad()
def shown_correctly(pipeline: FluxPipeline, groups: Sequence[Sequence[str]], seed: int) -> dict[str, float]:
    """Sample every prompt `CHECK_REPEATS` times; return the share that shows its digit, by each classifier and both."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [(prompt, digit) for digit, group in enumerate(groups) for prompt in group]
    correct: dict[str, list[Tensor]] = {"reward": [], "heldout": []}
    classifiers = [load_classifier("reward", torch.device("cpu")), load_classifier("heldout", torch.device("cpu"))]
    for _ in range(CHECK_REPEATS):
        images = sample(pipeline, [prompt for prompt, _ in pairs], (IMAGE_SIZE, IMAGE_SIZE), generator)
        digits = torch.tensor([digit for _, digit in pairs])
        for results, classifier in zip(correct.values(), classifiers, strict=True):
            results.append(classifier(to_network_input(images)).argmax(dim=-1) == digits)
    joined = {name: torch.cat(results) for name, results in correct.items()}
    joined["both"] = joined["reward"] & joined["heldout"]
    return {name: results.to(torch.float32).mean().item() for name, results in joined.items()}


def flow_steps(
    pipeline: FluxPipeline, latents: Tensor, labels: Tensor, groups: Sequence[Sequence[str]], averaged: AveragedModel
) -> Iterator[int]:
    """Train without end, yielding the number of steps taken; `averaged` follows the trained modules."""
    generator = torch.Generator().manual_seed(SEED)
    trained = nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2])
    optimizer = torch.optim.AdamW(trained.parameters(), lr=FLOW_LEARNING_RATE, weight_decay=1e-2)
    for step in count(1):
        rows = torch.randint(0, len(latents), (FLOW_BATCH,), generator=generator)
        loss = flow_loss(pipeline, latents[rows], GRID, draw_prompts(labels[rows], groups, generator), generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(trained)
        yield step


def train_flow(pipeline: FluxPipeline, images: Tensor, labels: Tensor, groups: Sequence[Sequence[str]]) -> FluxPipeline:
    """Train until both classifiers find `STOP_AT` of the samples right; return the pipeline of the averaged weights."""
    names = ("transformer", "text_encoder", "text_encoder_2")
    modules = nn.ModuleList([getattr(pipeline, name) for name in names])
    averaged = AveragedModel(modules, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY)).eval()
    result = FluxPipeline(**{**pipeline.components, **dict(zip(names, averaged.module.children(), strict=True))})
    result.set_progress_bar_config(disable=True)
    for step in flow_steps(pipeline, pack_latents(pipeline.vae, images), labels, groups, averaged):
        if step < CHECKS_START or step % CHECK_EVERY:
            continue
        shares = shown_correctly(result, groups, seed=SEED + 1)
        print(f"flow step {step}: " + ", ".join(f"{name} {share:.3f}" for name, share in shares.items()), flush=True)
        if shares["both"] >= STOP_AT:
            break
    return result


def main() -> None:
    """Train every part, print the shares of right samples under fresh noise, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "adapters/branchtree_adapters/assets/digits_flux"
    parser.add_argument("--output", type=Path, default=default, help="folder for the pipeline")
    output: Path = parser.parse_args().output
    torch.set_num_threads(2)
    torch.manual_seed(SEED)
    prompts = read_prompts()
    groups = prompts_by_digit(prompts)
    images, labels = digit_images()
    images = images.repeat(1, 3, 1, 1) * 2 - 1
    vae = build_vae((8, 16, 16), LATENT_CHANNELS, IMAGE_SIZE)
    train_vae(vae, images, torch.Generator().manual_seed(SEED))
    vocabulary = sorted({*words(prompts), *DIGIT_WORDS, *map(str, range(10))})
    pipeline = train_flow(build_pipeline(vae, vocabulary), images, labels, groups)
    for seed in (101, 102):
        shares = shown_correctly(pipeline, groups, seed)
        print(f"fresh noise {seed}: " + ", ".join(f"{name} {share:.3f}" for name, share in shares.items()))
    save_flux(pipeline, output)


if __name__ == "__main__":
    main()
