"""What a VideoAlign checkpoint says of itself in its `model_config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchtree.errors import RewardError
from branchtree.files.json_lines import read_json_object
from branchtree_rewards.shared.source import cause
from branchtree_rewards.videoalign.frames import Sampling

DIMENSIONS = ("VQ", "MQ", "TA")  # visual quality, motion quality, text alignment; in the order of the model's outputs
# Mean and standard deviation of the publisher's own scores on its validation set, for a file that gives none.
PUBLISHED = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}
# What the inputs built here follow; a checkpoint trained otherwise would score something else.
EXPECTED: dict[str, dict[str, object]] = {
    "data_config": {
        "eval_dim": list(DIMENSIONS),
        "prompt_template_type": "detailed_special",
        "sample_type": "uniform",
    },
    "model_config": {"use_special_tokens": True, "reward_token": "special"},
}


@dataclass(frozen=True)
class Lora:
    """Low-rank weights beside a linear layer: W + scale B A."""

    rank: int
    scale: float


@dataclass(frozen=True)
class VideoAlignSettings:
    """How a checkpoint was trained, and how its scores are normalised."""

    sampling: Sampling
    lora: Lora | None
    mean: tuple[float, ...]  # by dimension
    std: tuple[float, ...]


def read_settings(file: Path) -> VideoAlignSettings:
    """Read `model_config.json`. Raises RewardError for one that is damaged or asks for another kind of input."""
    try:
        content = read_json_object(file, RewardError)
        for section, wanted in EXPECTED.items():
            for key, value in wanted.items():
                if content[section][key] != value:
                    raise RewardError(
                        f"'{file}' has {section}.{key} = {content[section][key]!r}; this reward reads checkpoints "
                        f"trained with {value!r}"
                    )
        norms = _norms(content.get("inference_config") or {})
        return VideoAlignSettings(
            sampling=_sampling(content["data_config"]),
            lora=_lora(content["peft_lora_config"]),
            mean=tuple(norm[0] for norm in norms),
            std=tuple(norm[1] for norm in norms),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RewardError(
            f"'{file}' is not the model_config.json of a VideoAlign checkpoint ({cause(error)})"
        ) from error


def _sampling(section: Mapping[str, Any]) -> Sampling:
    frames = section.get("num_frames")
    return Sampling(
        fps=float(section["fps"]),
        max_pixels=int(section["max_frame_pixels"]),
        frames=None if frames is None else int(frames),
    )


def _lora(section: Mapping[str, Any]) -> Lora | None:
    if not section["lora_enable"]:
        return None
    rank = int(section["lora_r"])
    # Rank-stabilised LoRA divides by the square root of the rank (arXiv 2312.03732).
    return Lora(rank, section["lora_alpha"] / (math.sqrt(rank) if section.get("use_rslora") else rank))


def _norms(section: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return mean and standard deviation by dimension."""
    if not section:
        return [PUBLISHED[name] for name in DIMENSIONS]
    return [(float(section[f"{name}_mean"]), float(section[f"{name}_std"])) for name in DIMENSIONS]
