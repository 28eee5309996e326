"""Content of small checkpoints: random weights, drawn from a stream of their own, and files of settings.

No tensor is constant, so that every one of them matters to a score. Settings that do not depend on anything are kept in
`data/small_*.json`, by file name.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from branchtree_rewards.shared.source import bundled_json
from branchtree_rewards.shared.weights import State

Shapes = Mapping[str, Sequence[int]]


def random_state(shapes: Shapes, generator: torch.Generator, unscaled: str | None = None) -> State:
    """Return random weights by name: matrices keep the size of what they act on, norms are near 1, biases small.

    Args:
        shapes: Shapes by name, in the order in which numbers are drawn.
        generator: Draws the numbers.
        unscaled: Text in the names of embeddings, whose numbers have deviation 1.
    """
    return {
        name: random_tensor(name, shape, generator, unscaled is not None and unscaled in name)
        for name, shape in shapes.items()
    }


def random_tensor(name: str, shape: Sequence[int], generator: torch.Generator, unscaled: bool = False) -> Tensor:
    """Return one of the tensors of `random_state`."""
    noise: Tensor = torch.randn(tuple(shape), generator=generator)
    if noise.ndim == 1:
        return 0.1 * noise + 1 if name.endswith("weight") else 0.1 * noise
    return noise if unscaled else noise / math.sqrt(math.prod(shape[1:]))


def meta_shapes(build: Callable[[], nn.Module]) -> dict[str, torch.Size]:
    """Return the shapes of all tensors of the module that ``build`` makes, which takes no memory."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build().state_dict().items()}


def write_json(file: Path, content: Any) -> None:
    """Write a file of settings."""
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")


def write_kept_settings(folder: Path, checkpoint: str, tokens: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Write the files of settings that are kept for a small checkpoint.

    Args:
        folder: The folder to write to.
        checkpoint: Which of `data/small_*.json`.
        tokens: Ids of tokens by name, written instead of the names.

    Returns:
        The contents by file name.
    """
    kept = json.dumps(bundled_json(f"small_{checkpoint}.json"))
    for token, index in (tokens or {}).items():
        kept = kept.replace(json.dumps(token), str(index))
    contents: dict[str, Any] = json.loads(kept)
    for name, content in contents.items():
        write_json(folder / name, content)
    return contents
