"""Colours of objects by CLIP, zero-shot, as GenEval names them.

Each colour is the mean of the features of three texts about the object; an object has the colour whose mean is nearest
to the feature of its box, cut out of the picture.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from branchtree_rewards.clip.network import image_features, text_features
from branchtree_rewards.geneval.check import COLOURS
from branchtree_rewards.geneval.rules import Box, Found
from branchtree_rewards.shared.pixels import from_pil, normalised, shortest_side_crop

TEXTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class ColourNamer:
    """Names colours by a CLIP, and keeps what it made of the texts of each class."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._classifiers: dict[str, Tensor] = {}

    def classifier(self, clip: Any, name: str) -> Tensor:
        """Return the features (colours, E) of a class in each colour, of length 1, on the CPU."""
        if name not in self._classifiers:
            texts = [text.format(color=colour, name=name) for colour in COLOURS for text in TEXTS]
            features = functional.normalize(text_features(clip, self._tokenizer, texts), dim=-1)
            means = features.unflatten(0, (len(COLOURS), len(TEXTS))).mean(dim=1)
            self._classifiers[name] = functional.normalize(means, dim=-1).cpu()
        return self._classifiers[name]

    def name(self, clip: Any, picture: Image.Image, name: str, found: Sequence[Found]) -> list[str]:
        """Return the colour of each object of a class in a picture."""
        classifier = self.classifier(clip, name).to(clip.device)
        size = clip.config.vision_config.image_size
        crops = [shortest_side_crop(cut_out(picture, one.box), size) for one in found]
        similar = image_features(clip, normalised(from_pil(crops).to(clip.device))) @ classifier.T
        return [COLOURS[index] for index in torch.argmax(similar, dim=1).tolist()]


def cut_out(picture: Image.Image, box: Box) -> Image.Image:
    """Return what a box shows, its edges rounded to pixels; at least one pixel."""
    left, top = min(round(box[0]), picture.width - 1), min(round(box[1]), picture.height - 1)
    return picture.crop((left, top, max(round(box[2]), left + 1), max(round(box[3]), top + 1)))
