"""The small convolutional network behind the `digits` reward, and how its bundled weights are read."""

from importlib.resources import files
from typing import Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ClassifierName = Literal["reward", "heldout", "moving_reward", "moving_heldout"]
"""Two for images that a digit fills, and two for video frames in which a digit of half their size lies anywhere."""

CLASSES = 10
IMAGE_SIZE = 32


def weights_name(classifier: ClassifierName) -> str:
    """Return the file name, inside the package's `assets` folder, of a classifier's weights."""
    return f"digits_{classifier}.safetensors"


def to_network_input(images: Tensor) -> Tensor:
    """Turn images of any size into what `DigitClassifier` reads.

    Args:
        images: float (B, C, H, W) in [0, 1].

    Returns:
        float32 (B, 1, 32, 32): the mean over the channels, resized with antialiased bilinear filtering.
    """
    grey = images.to(torch.float32).mean(dim=1, keepdim=True)
    if grey.shape[-2:] == (IMAGE_SIZE, IMAGE_SIZE):
        return grey
    return F.interpolate(grey, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False, antialias=True)


class DigitClassifier(nn.Module):
    """A convolutional network that tells the ten handwritten digits apart.

    `forward` maps float32 images (B, 1, 32, 32) in [0, 1] to logits (B, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.SiLU(),
        )
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(64 * 4 * 4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, 10) of images (B, 1, 32, 32)."""
        logits: Tensor = self.head(self.dropout(self.features(images).flatten(1)))
        return logits


def load_classifier(classifier: ClassifierName, device: torch.device) -> DigitClassifier:
    """Return a bundled classifier in evaluation mode on `device`, its parameters frozen.

    Raises:
        FileNotFoundError: the package was installed without its assets.
    """
    weights = files("branchtree_rewards").joinpath("assets", weights_name(classifier)).read_bytes()
    with torch.device("meta"):  # without drawing first weights, which would move torch's global random state
        network = DigitClassifier()
    network.load_state_dict(safetensors.torch.load(weights), assign=True)
    return network.requires_grad_(False).eval().to(device)
