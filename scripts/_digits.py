"""Data shared by the scripts that build the bundled digit assets: images, captions and the two disjoint halves."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from branchtree_rewards.digits import named_digit
from sklearn.datasets import load_digits
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
PROMPT_FILES = (ROOT / "recipes/prompts/digits_train.txt", ROOT / "recipes/prompts/digits_heldout.txt")
IMAGE_SIZE = 32


def digit_images() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 handwritten digits.

    Returns:
        images: float32 (1797, 1, 32, 32) in [0, 1], bright strokes on a dark ground, smoothly upsampled from 8x8.
        labels: int64 (1797,), the digit drawn.
    """
    data = load_digits()
    small = torch.as_tensor(data.images, dtype=torch.float32).div(16).unsqueeze(1)
    images = F.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    return images.clamp(0, 1), torch.as_tensor(data.target, dtype=torch.int64)


def disjoint_halves(count: int) -> tuple[Tensor, Tensor]:
    """Split `count` indices into two disjoint halves, the same ones on every call.

    Returns:
        The int64 indices that train the `reward` classifier, then those that train the `heldout` classifier.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1797))
    return order[: count // 2], order[count // 2 :]


def random_shift(images: Tensor, largest: int, generator: torch.Generator) -> Tensor:
    """Move each image (B, C, H, W) by up to `largest` pixels in both directions, filling with black."""
    count, _, height, width = images.shape
    padded = F.pad(images, (largest, largest, largest, largest))
    top, left = torch.randint(0, 2 * largest + 1, (2, count), generator=generator)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    batch = torch.arange(count)[:, None, None, None]
    channels = torch.arange(images.shape[1])[None, :, None, None]
    return padded[batch, channels, rows, columns]


def read_prompts(files: Sequence[Path] = PROMPT_FILES) -> list[str]:
    """Return every line of the prompt files that is not empty, in order."""
    lines = [line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]


def prompts_by_digit(prompts: Sequence[str]) -> list[list[str]]:
    """Group prompts by the digit they name; the result has ten entries.

    Raises:
        ValueError: a prompt does not name exactly one digit.
    """
    groups: list[list[str]] = [[] for _ in range(10)]
    for prompt in prompts:
        digit = named_digit(prompt)
        if digit is None:
            raise ValueError(f"the prompt {prompt!r} does not name exactly one digit")
        groups[digit].append(prompt)
    return groups


def words(prompts: Sequence[str]) -> list[str]:
    """Return the distinct lower-case words and numerals of the prompts, sorted."""
    return sorted({word for prompt in prompts for word in re.findall(r"[a-z]+|[0-9]", prompt.lower())})
