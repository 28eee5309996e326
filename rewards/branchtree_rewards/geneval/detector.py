"""Objects in pictures by OWLv2 (arXiv 2306.09683), which looks for what a text names.

Every class is asked for by a text of its own, so that what is found of a class does not depend on which others are
asked for in other pictures. Axis letters: B pictures, Q texts of a picture, T tokens, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from branchtree_rewards.geneval.rules import Found, Objects
from branchtree_rewards.shared.pixels import to_rgb, to_uint8

QUERY = "a photo of a {}"
MOST = 16  # objects of a class, as in GenEval


@dataclass(frozen=True)
class Limits:
    """Which of the boxes that a model gives count as objects."""

    threshold: float  # least confidence
    overlap: float  # largest intersection over union with a surer box of the class


def image_processor(detector: Any) -> Any:
    """Return OWLv2's own preprocessing at the side that an Owlv2ForObjectDetection takes."""
    from transformers import Owlv2ImageProcessor

    side = detector.config.vision_config.image_size
    return Owlv2ImageProcessor(size={"height": side, "width": side})


def query_ids(tokenizer: Any, names: Sequence[Sequence[str]], context: int) -> Tensor:
    """Return the texts that ask for B lists of classes as ids (B * Q, T), rows of zeros after the shorter lists."""
    longest = max(map(len, names))
    ids = torch.zeros(len(names), longest, context, dtype=torch.int64)
    for row, classes in enumerate(names):
        texts = [QUERY.format(name) for name in classes]
        whole = {"padding": "max_length", "truncation": True, "max_length": context}
        ids[row, : len(texts)] = torch.tensor(tokenizer(texts, **whole)["input_ids"])
    return ids.flatten(0, 1)


def find_objects(
    detector: Any, tokenizer: Any, images: Tensor, names: Sequence[Sequence[str]], limits: Sequence[Limits]
) -> list[Objects]:
    """Return the objects of B lists of classes in images (B, C, H, W) in [0, 1], on the detector's device.

    A box belongs to the class of its picture's list that it is surest of.
    """
    pictures = list(to_uint8(to_rgb(images)))
    processor = image_processor(detector)
    pixels = processor(pictures, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    ids = query_ids(tokenizer, names, detector.config.text_config.max_position_embeddings)
    outputs = detector(input_ids=ids.to(images.device), pixel_values=pixels.to(images.device))
    size = (images.shape[-2], images.shape[-1])
    results = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[size] * len(images))
    return [
        _objects(result, classes, size, limit) for result, classes, limit in zip(results, names, limits, strict=True)
    ]


def _objects(result: Any, classes: Sequence[str], size: tuple[int, int], limits: Limits) -> Objects:
    """Return the objects of one picture, without what lies outside of it and what another box shows already."""
    from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

    boxes = clip_boxes_to_image(result["boxes"].float(), size)
    scores, labels = result["scores"].float(), result["labels"]
    kept = remove_small_boxes(boxes, 1.0)
    kept = kept[scores[kept] > limits.threshold]
    kept = kept[batched_nms(boxes[kept], scores[kept], labels[kept], limits.overlap)]  # the surest first
    objects: dict[str, list[Found]] = {}
    for box, score, label in zip(boxes[kept].tolist(), scores[kept].tolist(), labels[kept].tolist(), strict=True):
        found = objects.setdefault(classes[label], [])
        if len(found) < MOST:
            found.append(Found(tuple(box), score))
    return objects
