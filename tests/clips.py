"""Clips whose motion is known: handwritten digits on black, textures that pan, and a patch before a background.

Paths are (x, y) in pixels, y grows downwards. Axis letters: B clips, F frames, C channels, H height, W width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

SIZE = 32
FRAMES = 9
GLYPH = 16  # pixels
REACH = 9.0  # how far a glyph's centre may lie from the frame's before its ink leaves the frame
UNIT = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


@cache
def glyphs() -> Tensor:
    """All digits of scikit-learn, (N, 8, 8) in [0, 1]."""
    return torch.as_tensor(load_digits().images, dtype=torch.float32) / 16


def draw(images: Tensor, centres: Tensor) -> Tensor:
    """Clips (B, F, 3, 32, 32) of glyphs (B, 8, 8) at centres (B, F, 2) from the frame's middle, on black."""
    count, frames = centres.shape[:2]
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    grid = (pixels - centres.flatten(0, 1)[:, None, None]) * (2 / GLYPH)
    drawn = F.grid_sample(images.repeat_interleave(frames, 0)[:, None], grid, mode="bicubic", align_corners=False)
    return drawn.clamp(0, 1).unflatten(0, (count, frames)).expand(-1, -1, 3, -1, -1).contiguous()


def reflected(path: Tensor, reach: float) -> Tensor:
    """A path folded at +-reach, as a ball's that bounces."""
    folded = torch.remainder(path + reach, 4 * reach)
    return torch.minimum(folded, 4 * reach - folded) - reach


@dataclass(frozen=True)
class DigitClips:
    """Clips of one digit each, the glyphs, and where their centres are."""

    videos: Tensor  # (B, F, 3, 32, 32)
    images: Tensor  # (B, 8, 8)
    centres: Tensor  # (B, F, 2)
    directions: tuple[str, ...]  # of the first step

    def moved(self, offsets: Tensor) -> Tensor:
        """The same digits with their centres shifted by offsets that broadcast to (B, F, 2)."""
        return draw(self.images, self.centres + offsets)


def digit_clips(count: int, seed: int, bounces: bool = False) -> DigitClips:
    """Digits moving left, right, up and down in turn, at 0.75 to 2 pixels a frame; each bounces once, or none does."""
    source = random.Random(seed)
    paths, directions = [], []
    for index in range(count):
        direction, speed = list(UNIT)[index % 4], source.uniform(0.75, 2.0)
        length = speed * (FRAMES - 1)
        start = REACH - source.uniform(0.25, 0.75) * length if bounces else source.uniform(length - REACH, REACH)
        start = start if bounces else -start
        across = source.uniform(-REACH / 2, REACH / 2)
        unit = torch.tensor(UNIT[direction])
        along = reflected(start + speed * torch.arange(FRAMES), REACH)
        paths.append(along[:, None] * unit + across * unit.flip(0))
        directions.append(direction)
    images = glyphs()[torch.tensor(source.sample(range(len(glyphs())), count))]
    centres = torch.stack(paths)
    return DigitClips(draw(images, centres), images, centres, tuple(directions))


def line(velocity: Sequence[float], frames: int, start: Sequence[float] = (0.0, 0.0)) -> Tensor:
    """A straight path (F, 2)."""
    return torch.tensor(start) + torch.arange(frames)[:, None] * torch.tensor(velocity)


@cache
def texture(seed: int, height: int, width: int, grain: float) -> Tensor:
    """A smooth colour texture (3, H, W) in [0, 1], made of random plane waves of one to three ``grain`` pixels."""
    source = torch.Generator().manual_seed(seed)
    waves = 24
    angle, phase = (2 * math.pi * torch.rand(3, waves, generator=source) for _ in range(2))
    rate = 2 * math.pi / (grain * (1 + 2 * torch.rand(3, waves, generator=source)))
    down = (rate * angle.sin())[..., None] * torch.arange(height)
    across = (rate * angle.cos())[..., None] * torch.arange(width) + phase[..., None]
    # cos(a + b), summed over the waves as two matrix products.
    waved = down.cos().transpose(1, 2) @ across.cos() - down.sin().transpose(1, 2) @ across.sin()
    return (0.5 + 0.25 * waved / waves**0.5).clamp(0, 1)


def placed(image: Tensor, path: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Frames (F, C, H, W) of an image (C, h, w), its middle at path (F, 2) from theirs, and what it covers of them."""
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    pixels = torch.stack([x, y], dim=-1) - path[:, None, None]
    grid = pixels * 2 / torch.tensor([image.shape[2], image.shape[1]])
    layers = torch.cat([image, torch.ones_like(image[:1])])[None].expand(len(path), -1, -1, -1)
    drawn = F.grid_sample(layers, grid, mode="bicubic", align_corners=False).clamp(0, 1)
    return drawn[:, :-1], drawn[:, -1:]


def pan(seed: int, path: Tensor, height: int, width: int) -> Tensor:
    """A whole frame of texture whose content follows a path: (F, 3, H, W)."""
    reach = 2 * int(path.abs().max().ceil()) + 8
    return placed(texture(seed, height + reach, width + reach, min(height, width) / 16), path, height, width)[0]


def turning(seeds: Sequence[int], degrees: float, frames: int, size: int) -> Tensor:
    """Squares of texture that turn about their middle by so much a frame: (B, F, 3, S, S)."""
    angle = torch.deg2rad(degrees * torch.arange(frames))
    nought = torch.zeros(frames)
    turn = torch.stack([angle.cos(), -angle.sin(), nought, angle.sin(), angle.cos(), nought], dim=1) / 1.5
    grid = F.affine_grid(turn.view(-1, 2, 3), [frames, 3, size, size], align_corners=False)
    images = [texture(seed, 3 * size // 2, 3 * size // 2, size / 12) for seed in seeds]
    drawn = [
        F.grid_sample(image.expand(frames, -1, -1, -1), grid, mode="bicubic", align_corners=False) for image in images
    ]
    return torch.stack(drawn).clamp(0, 1)


def patch(seed: int, path: Tensor, height: int, width: int) -> Tensor:
    """A textured square, a third of the frame's shorter side, before a still textured background: (F, 3, H, W)."""
    side = min(height, width) // 3
    drawn, covered = placed(texture(seed, side, side, min(height, width) / 16), path, height, width)
    return drawn * covered + background(seed, height, width) * (1 - covered)


def background(seed: int, height: int, width: int) -> Tensor:
    """The still background (3, H, W) of a patch."""
    return texture(seed + 1000, height, width, min(height, width) / 16)


def fading(videos: Tensor, ground: Tensor | float = 0.0) -> Tensor:
    """Videos (B, F, ...) whose content vanishes evenly into the ground."""
    left = torch.linspace(1, 0, videos.shape[1]).view(1, -1, 1, 1, 1)
    return videos * left + ground * (1 - left)


def broken(clips: DigitClips, seed: int) -> dict[str, Tensor]:
    """The same clips spoilt in different ways, by what was done to them."""
    source = torch.Generator().manual_seed(seed)
    videos = clips.videos
    count, frames = videos.shape[:2]
    rows, late = torch.arange(count), torch.randint(1, frames, (count,), generator=source)
    angle = 2 * math.pi * torch.rand(count, generator=source)
    far = torch.stack([angle.cos(), angle.sin()], dim=-1)
    one, after = torch.zeros(count, frames, 2), torch.zeros(count, frames, 2)
    one[rows, late] = far
    after[torch.arange(frames) >= late[:, None]] = far.repeat_interleave(frames - late, 0)
    shown = torch.arange(frames).expand(count, -1).clone()
    shown[shown >= late[:, None].clamp(2, frames - 2)] -= 1
    other, drawn = videos.roll(1, 0), torch.randn(count, frames, 2, generator=source)
    start, rest = videos[:, :1], videos[:, 1:]
    return {
        "still": start.expand_as(videos),
        "one frame displaced by 2 pixels": clips.moved(2 * one),
        "one frame displaced by 5 pixels": clips.moved(5 * one),
        "teleport by 4 pixels": clips.moved(4 * after),
        "one frame shown twice": videos[rows[:, None], shown],
        "every other frame shown twice": videos[:, [0, 1, 1, 3, 3, 5, 5, 7, 7]],
        "fade out": fading(videos),
        "first frame alone": torch.cat([start, torch.zeros_like(rest)], dim=1),
        "another digit after the first frame": torch.cat([start, other[:, 1:]], dim=1),
        "another digit in the first frame": torch.cat([other[:, :1], rest], dim=1),
        "black first frame": torch.cat([torch.zeros_like(start), rest], dim=1),
        "jitter of 0.5 pixels": clips.moved(0.5 * drawn),
        "still but for jitter of 0.5 pixels": draw(clips.images, clips.centres[:, :1] + 0.5 * drawn),
        "reversed at each frame": videos[:, [0, 1, 0, 1, 0, 1, 0, 1, 0]],
        "negative in the middle": torch.cat([videos[:, :4], 1 - videos[:, 4:5], videos[:, 5:]], dim=1),
        "noise": torch.rand(videos.shape, generator=source),
        "still under noise": (start + 0.1 * torch.randn(videos.shape, generator=source)).clamp(0, 1),
        "brightness flickers": videos * (0.4 + 0.6 * torch.rand(count, frames, 1, 1, 1, generator=source)),
    }
