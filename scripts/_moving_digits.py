"""Moving handwritten digits: the clips, prompts and first frames that the small video model is made from."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from branchtree_rewards.digits import DIGIT_WORDS
from sklearn.datasets import load_digits
from torch import Tensor

FRAME_SIZE = 32  # pixels
FRAMES = 9
GLYPH_SIZE = 16  # pixels: each pixel of a glyph covers 2x2 of a frame
REACH = 9.0  # of a glyph's centre from the frame's: here its ink touches the edge
HELD_OUT_GLYPHS = 200
JITTER = 0.6  # pixels: the deviation of each frame of a clip that jitters

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Unit steps (x, y); y grows downwards."""
SPEEDS: dict[str, float] = {" slowly": 0.8, "": 1.4, " quickly": 2.0}
"""Pixels a frame, by the word that asks for it."""
WORDINGS = ("{a} {digit} moving {direction}{speed}", "a handwritten {digit} going {direction}{speed}")
HELD_OUT_WORDINGS = ("the digit {digit} drifting {direction}{speed}",)


@dataclass(frozen=True)
class Motion:
    """One clip's path: where the glyph's centre starts, (x, y) from the frame's centre, and its velocity a frame."""

    start: tuple[float, float]
    velocity: tuple[float, float]


@dataclass(frozen=True)
class Order:
    """What a clip is to show."""

    digit: int
    direction: str
    speed: str  # a key of SPEEDS

    def prompt(self, wording: str) -> str:
        """The order in words."""
        digit = DIGIT_WORDS[self.digit]
        article = "an" if digit == "eight" else "a"
        return wording.format(a=article, digit=digit, direction=self.direction, speed=self.speed)


def glyphs(held_out: bool) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits, either those that are held out or all others.

    Returns:
        glyphs: float32 (N, 8, 8) in [0, 1].
        labels: int64 (N,), the digit drawn.
    """
    images, labels = all_glyphs()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1797))
    rows = order[:HELD_OUT_GLYPHS] if held_out else order[HELD_OUT_GLYPHS:]
    return images[rows], labels[rows]


def all_glyphs() -> tuple[Tensor, Tensor]:
    """Return all of scikit-learn's digits: float32 (1797, 8, 8) in [0, 1], and int64 (1797,)."""
    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32).div(16)
    return images, torch.as_tensor(data.target, dtype=torch.int64)


def draw_motion(order: Order, source: random.Random) -> Motion:
    """A path that obeys an order; about one in five meets the edge on its way and bounces off it."""
    step = DIRECTIONS[order.direction]
    speed = SPEEDS[order.speed] * source.uniform(0.95, 1.05)
    room = 2 * REACH - speed * (FRAMES - 1)
    along = -REACH + source.uniform(0, max(room, 0.0))
    if source.random() < 0.2:
        along += source.uniform(0.3, 0.5) * speed * (FRAMES - 1) + max(room, 0.0)
    across = source.uniform(-REACH, REACH)
    sign = sum(step)
    start = (sign * min(along, REACH), across) if step[0] else (across, sign * min(along, REACH))
    return Motion(start, (step[0] * speed, step[1] * speed))


def jitter(centres: Tensor, source: random.Random) -> Tensor:
    """Shake paths (B, FRAMES, 2) by up to a pixel or two, but for the first frame."""
    generator = torch.Generator().manual_seed(source.getrandbits(32))
    shaken = centres + JITTER * torch.randn(centres.shape, generator=generator)
    return torch.cat([centres[:, :1], shaken[:, 1:]], dim=1)


def path(motions: Sequence[Motion]) -> Tensor:
    """Centres (B, FRAMES, 2) of glyphs, (x, y) from the frame's centre; the edges reflect them."""
    start = torch.tensor([motion.start for motion in motions])[:, None]
    velocity = torch.tensor([motion.velocity for motion in motions])[:, None]
    straight = start + velocity * torch.arange(FRAMES)[None, :, None]
    folded = torch.remainder(straight + REACH, 4 * REACH)
    return torch.minimum(folded, 4 * REACH - folded) - REACH


def render(images: Tensor, centres: Tensor) -> Tensor:
    """Draw glyphs (B, 8, 8) at centres (B, T, 2): clips (B, T, 1, 32, 32) in [0, 1], bicubic, black ground."""
    count, frames = centres.shape[:2]
    axis = torch.arange(FRAME_SIZE) - (FRAME_SIZE - 1) / 2
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # (H, W, 2) as (x, y)
    grid = (pixels - centres.flatten(0, 1)[:, None, None]) / (GLYPH_SIZE / 2)
    glyph = images.repeat_interleave(frames, 0).unsqueeze(1)
    drawn: Tensor = F.grid_sample(glyph, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return drawn.clamp(0, 1).reshape(count, frames, 1, FRAME_SIZE, FRAME_SIZE)


def draw_orders(labels: Sequence[int], source: random.Random) -> list[Order]:
    """A random direction and speed for each digit."""
    return [Order(label, source.choice(list(DIRECTIONS)), source.choice(list(SPEEDS))) for label in labels]


def draw_clips(
    images: Tensor, labels: Tensor, count: int, source: random.Random, flawed: float = 0.0
) -> tuple[Tensor, list[Order]]:
    """Random clips (count, FRAMES, 1, 32, 32) of some glyphs, and the orders that they obey.

    A share `flawed` of them goes some other way than ordered, and as large a share jitters.
    """
    rows = source.choices(range(len(images)), k=count)
    orders = draw_orders(labels[rows].tolist(), source)
    # Sound clips draw no numbers for flaws.
    ways = [
        replace(order, direction=source.choice(list(DIRECTIONS))) if flawed and source.random() < flawed else order
        for order in orders
    ]
    centres = path([draw_motion(way, source) for way in ways])
    if flawed:
        shaken = torch.tensor([source.random() < flawed for _ in rows])
        centres = torch.where(shaken[:, None, None], jitter(centres, source), centres)
    return render(images[rows], centres), orders


def vocabulary() -> list[str]:
    """Every word of every prompt, sorted."""
    orders = [Order(d, direction, speed) for d in range(10) for direction in DIRECTIONS for speed in SPEEDS]
    prompts = [order.prompt(wording) for order in orders for wording in (*WORDINGS, *HELD_OUT_WORDINGS)]
    return sorted({word for prompt in prompts for word in prompt.split()})
