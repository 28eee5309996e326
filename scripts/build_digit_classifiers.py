"""Train the four classifiers behind the `digits` reward, two of images and two of video frames.

Those of a pair are trained from nothing, on disjoint halves of scikit-learn's 1,797 handwritten digits, and each is
measured on the half that it never saw. In a video frame the digit has half the size and lies anywhere. Augmentation
(shifts, small turns and scalings, blur, softening, noise, contrast) prepares them for generated images, and images of
nothing (blank, noise) are taught to be any digit alike. The result depends on the seeds below only. Takes about five
minutes on two CPU threads.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from _digits import ROOT, digit_images, disjoint_halves, random_shift
from _moving_digits import REACH, all_glyphs, render
from branchtree_rewards.digits import ClassifierName, DigitClassifier, weights_name
from torch import Tensor

EPOCHS = 120
BATCH = 64
NOTHING = 8
LEARNING_RATE = 3e-3
LABEL_SMOOTHING = 0.05
SEEDS: dict[ClassifierName, int] = {"reward": 11, "heldout": 23, "moving_reward": 31, "moving_heldout": 43}

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""From images (B, ...) of digits to what a classifier is shown, (B, 1, 32, 32)."""


def warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn each image (B, 1, H, W) by up to about 10 degrees and scale it by up to 10 percent."""
    count = len(images)
    angle = (torch.rand(count, generator=generator) - 0.5) * 0.35
    scale = 0.9 + 0.2 * torch.rand(count, generator=generator)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos() * scale
    matrix[:, 0, 1] = -angle.sin() * scale
    matrix[:, 1, 0] = angle.sin() * scale
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mix each image with a blurred copy and with a copy that went through a coarser grid, in random shares."""
    count, _, height, width = images.shape
    blurred = F.avg_pool2d(images, 5, stride=1, padding=2, count_include_pad=False)
    coarse = F.interpolate(F.avg_pool2d(images, 4), size=(height, width), mode="bilinear", align_corners=False)
    share = torch.rand(3, count, 1, 1, 1, generator=generator) * torch.tensor([1.0, 0.7, 0.7]).view(3, 1, 1, 1, 1)
    share = share / share.sum(dim=0)
    return share[0] * images + share[1] * blurred + share[2] * coarse


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a randomly changed copy of images (B, 1, 32, 32) in [0, 1]."""
    changed = soften(warp(random_shift(images, 2, generator), generator), generator)
    contrast = 0.7 + 0.5 * torch.rand(len(images), 1, 1, 1, generator=generator)
    noise_scale = 0.08 * torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = torch.randn(images.shape, generator=generator) * noise_scale
    return (changed * contrast + noise).clamp(0, 1)


def augment_frames(glyphs: Tensor, generator: torch.Generator) -> Tensor:
    """Draw glyphs (B, 8, 8) anywhere in frames (B, 1, 32, 32), and change them as generated frames may differ."""
    count = len(glyphs)
    centres = (2 * torch.rand(count, 1, 2, generator=generator) - 1) * REACH
    frames = warp(render(glyphs, centres)[:, 0], generator)
    blurred = F.avg_pool2d(frames, 3, stride=1, padding=1, count_include_pad=False)
    frames = torch.lerp(frames, blurred, 0.7 * torch.rand(count, 1, 1, 1, generator=generator))
    contrast = 0.7 + 0.5 * torch.rand(count, 1, 1, 1, generator=generator)
    noise_scale = 0.08 * torch.rand(count, 1, 1, 1, generator=generator)
    return (frames * contrast + torch.randn(frames.shape, generator=generator) * noise_scale).clamp(0, 1)


def images_of_nothing(count: int, generator: torch.Generator) -> Tensor:
    """Return `count` images (count, 1, 32, 32): grey grounds with smooth or fine noise, or with none."""
    level = torch.rand(count, 1, 1, 1, generator=generator) ** 2
    fine = torch.randn(count, 1, 32, 32, generator=generator)
    smooth = F.interpolate(torch.randn(count, 1, 8, 8, generator=generator), size=(32, 32), mode="bicubic")
    strength = torch.rand(2, count, 1, 1, 1, generator=generator) ** 3
    return (level + strength[0] * fine + strength[1] * smooth).clamp(0, 1)


def train(images: Tensor, labels: Tensor, seed: int, augmentation: Augmentation) -> DigitClassifier:
    """Train a classifier on images (N, ...) and labels (N,), and return it in evaluation mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = DigitClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            nothing = images_of_nothing(NOTHING, generator)
            logits = network(torch.cat([augmentation(images[rows], generator), nothing]))
            targets = torch.cat([F.one_hot(labels[rows], 10), torch.full((NOTHING, 10), 0.1)])
            loss = F.cross_entropy(logits, targets, label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def frames_of(glyphs: Tensor) -> Tensor:
    """Unchanged frames (B, 1, 32, 32) with glyphs (B, 8, 8) in random places."""
    generator = torch.Generator().manual_seed(0)
    return render(glyphs, (2 * torch.rand(len(glyphs), 1, 2, generator=generator) - 1) * REACH)[:, 0]


@torch.no_grad()
def accuracy(network: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Return the share of images (N, 1, 32, 32) that the classifier gets right."""
    return float((network(images).argmax(dim=-1) == labels).to(torch.float32).mean())


def main() -> None:
    """Train both classifiers, print their accuracy on the half they never saw, and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "rewards/branchtree_rewards/assets"
    parser.add_argument("--output", type=Path, default=default, help="folder for the two weight files")
    output: Path = parser.parse_args().output
    torch.set_num_threads(2)
    output.mkdir(parents=True, exist_ok=True)
    stills, (glyphs, _) = digit_images(), all_glyphs()
    labels = stills[1]
    first, second = disjoint_halves(len(labels))
    halves: dict[ClassifierName, tuple[Tensor, Tensor]] = {
        "reward": (first, second),
        "heldout": (second, first),
        "moving_reward": (first, second),
        "moving_heldout": (second, first),
    }
    for name, (own, other) in halves.items():
        moving = name.startswith("moving")
        images, augmentation = (glyphs, augment_frames) if moving else (stills[0], augment)
        network = train(images[own], labels[own], SEEDS[name], augmentation)
        shown = frames_of(glyphs[other]) if moving else images[other]
        parameters = sum(parameter.numel() for parameter in network.parameters())
        print(f"{name}: {parameters} parameters, accuracy {accuracy(network, shown, labels[other]):.4f}", flush=True)
        (output / weights_name(name)).write_bytes(safetensors.torch.save(network.state_dict()))


if __name__ == "__main__":
    main()
